"""Hyperparameters of the loss, as arguments of the operations."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pml_pnp.checks import check_hyperparameters


class Settings(NamedTuple):
    """Hyperparameters of the loss."""

    scale: float  # 1 / anneal for a similarity, -1 / anneal for a distance
    variant: str | Callable[[Tensor], Tensor]
    alpha: float
    b: float
    include_self: bool

    @staticmethod
    def checked(
        b, alpha, anneal, variant, include_self, *, is_inverted: bool, dtype: torch.dtype
    ) -> "Settings":
        """Check arguments of `pnp_loss` by `check_hyperparameters`, and make settings of them."""
        check_hyperparameters(b, alpha, anneal, variant, include_self, dtype)
        scale = (1 if is_inverted else -1) / float(anneal)
        return Settings(scale, variant, float(alpha), float(b), include_self)
