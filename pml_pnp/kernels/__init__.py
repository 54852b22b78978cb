"""The losses of queries from similarities: the only place that knows about blocks and devices.

Triton's kernel takes float32 on a GPU where Triton works, plain PyTorch everything else. The
environment variable PML_PNP_KERNEL forces one: "eager", or "triton" for all float32 input.
"""

from pml_pnp.kernels.autograd import (
    Origin,
    query_losses,
    query_losses_and_gradient,
    ranking_counts,
)
from pml_pnp.kernels.settings import Settings

__all__ = ["Origin", "Settings", "query_losses", "query_losses_and_gradient", "ranking_counts"]
