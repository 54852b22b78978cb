"""Choose the kernel that computes losses and gradients: Triton or plain PyTorch.

The Triton kernel computes float32 on a GPU where Triton works, plain PyTorch everything else. The
environment variable PML_PNP_KERNEL forces one of them: "eager", or "triton" for all float32 input.
"""

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from pml_pnp.ops import eager
from pml_pnp.ops.settings import Settings
from pml_pnp.pairs import Relation

KERNEL_VARIABLE = "PML_PNP_KERNEL"


def kernel_for(s: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Return the kernel for these similarities; `eager.losses_and_gradient` documents it."""
    choice = os.environ.get(KERNEL_VARIABLE, "auto")
    if choice not in ("auto", "eager", "triton"):
        raise ValueError(f"{KERNEL_VARIABLE} must be auto, eager or triton, got {choice!r}")
    if choice == "eager" or s.dtype != torch.float32:
        return eager.losses_and_gradient
    if choice == "triton" or (s.device.type == "cuda" and _triton_works(s.device)):
        from pml_pnp.ops import triton

        return triton.losses_and_gradient
    return eager.losses_and_gradient


@functools.cache
def _triton_works(device: torch.device) -> bool:
    """Whether Triton is installed and compiles for this device; tried once per device."""
    if importlib.util.find_spec("triton") is None:
        return False
    from pml_pnp.ops import triton

    labels = torch.zeros(2, dtype=torch.int64, device=device)
    relation = Relation.from_labels(labels, labels, torch.arange(2, device=device))
    settings = Settings(1.0, "O", 1.0, 1.0, True)
    try:
        triton.losses_and_gradient(torch.eye(2, device=device), None, relation, settings, True)
    except Exception as error:
        warnings.warn(f"Triton does not work here, plain PyTorch is used: {error}", stacklevel=2)
        return False
    return True
