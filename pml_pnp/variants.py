"""The functions f(R) that turn the number of negatives before a positive into its loss.

The choice of f determines how the gradient of a positive changes with the number of negatives
before it, which is the subject of the PNP paper (arXiv 2102.04640). Every f is zero at R = 0,
increases with R, and is written so that value and gradient keep their relative accuracy near R = 0,
which training approaches.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Variant(NamedTuple):
    """One row of the table of variants."""

    f: Callable[[Tensor, float, float], Tensor]  # f(R, alpha, b), elementwise
    derivative: Callable[[Tensor, float, float], Tensor]  # f'(R), with the same arguments
    equation: int | None  # number of the equation in the paper, or None


def _bounded(r: Tensor, b: float) -> Tensor:
    """Compute (b r - log(1 + b r)) / b^2 without cancellation near zero, and without b^2.

    With x = b r, z = x / (2 + x) and w = z / b, log(1 + x) = 2 atanh(z) and x - 2 z = x z, which
    leaves r w - 2 w^2 z (1/3 + z^2/5 + z^4/7 + ...). Below x = 1/2, z^2 is at most 1/25, so that 12
    terms reach float64 precision.
    """
    x = b * r
    small = x < 0.5
    near_zero = r.masked_fill(~small, 0)
    w = near_zero / (2 + b * near_zero)
    z2 = (b * w) ** 2
    series = torch.zeros_like(w)
    for k in range(12, 0, -1):
        series = series * z2 + 1 / (2 * k + 1)
    near = near_zero * w - 2 * w * (b * w) * w * series
    return torch.where(small, near, (r - torch.log1p(x) / b) / b)


def _one_minus_exp(y: Tensor) -> Tensor:
    """Compute 1 - exp(y) for y <= 0 without cancellation in value or gradient.

    expm1 is accurate near zero, but autograd differentiates it as expm1(y) + 1, which cancels where
    exp(y) is small. There 1 - exp(y) is accurate in value and gradient.
    """
    if not y.requires_grad:
        return -torch.expm1(y)
    small = y > -0.5
    return torch.where(small, -torch.expm1(y.masked_fill(~small, 0)), 1 - torch.exp(y))


VARIANTS = {
    # R                             1
    "O": Variant(lambda r, alpha, b: r, lambda r, alpha, b: torch.ones_like(r), 5),
    # (1 + R) log(1 + R)            1 + log(1 + R)
    "Iu": Variant(
        lambda r, alpha, b: (1 + r) * torch.log1p(r), lambda r, alpha, b: 1 + torch.log1p(r), 7
    ),
    # (b R - log(1 + b R)) / b^2    R / (1 + b R)
    "Ib": Variant(lambda r, alpha, b: _bounded(r, b), lambda r, alpha, b: r / (1 + b * r), 9),
    # log(1 + R)                    1 / (1 + R)
    "Ds": Variant(lambda r, alpha, b: torch.log1p(r), lambda r, alpha, b: 1 / (1 + r), 12),
    # 1 - 1 / (1 + R)^alpha         alpha / (1 + R)^(alpha + 1)
    "Dq": Variant(
        lambda r, alpha, b: _one_minus_exp(-alpha * torch.log1p(r)),
        lambda r, alpha, b: alpha * (1 + r) ** -(alpha + 1),
        13,
    ),
}


def apply_variant(variant, r: Tensor, *, alpha: float, b: float) -> Tensor:
    """Compute f(R) for the name of a variant or a callable, and check what the callable returns."""
    if isinstance(variant, str):
        return VARIANTS[variant].f(r, alpha, b)
    result = variant(r)
    if not isinstance(result, Tensor):
        raise TypeError(f"variant must return a tensor, got {type(result).__name__}")
    if result.shape != r.shape:
        raise ValueError(
            "variant must return one value per entry: "
            f"expected shape {tuple(r.shape)}, got {tuple(result.shape)}"
        )
    return result
