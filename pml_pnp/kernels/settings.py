"""What a kernel is told besides tensors."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from pml_pnp.checks import check_hyperparameters


class Settings(NamedTuple):
    """Hyperparameters of the loss."""

    scale: float
    """1 / anneal for a similarity, -1 / anneal for a distance."""
    variant: str | Callable[[Tensor], Tensor]
    alpha: float
    b: float
    include_self: bool

    @staticmethod
    def checked(*, b, alpha, anneal, variant, include_self: bool, is_inverted: bool) -> "Settings":
        """Settings from the arguments of `pnp_loss`; raises as `check_hyperparameters` does."""
        check_hyperparameters(b=b, alpha=alpha, anneal=anneal, variant=variant)
        scale = (1 if is_inverted else -1) / float(anneal)
        return Settings(scale, variant, float(alpha), float(b), include_self)
