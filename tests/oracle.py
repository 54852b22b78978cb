"""The formula of `reference` on matrices in float64, which autograd differentiates.

Every pair of a query and a positive has a row of M sigmoids: it serves for batches of hundreds.
Where they are few, the loops of `reference` are run beside it.
"""

import math

import pytest
import reference
import torch

FEW = 2000  # sigmoids, that the loops take a millisecond for


def f(variant, r, alpha, b):
    x = b * r
    series = x**2 / 2 - x**3 / 3 + x**4 / 4 - x**5 / 5 + x**6 / 6  # of x - log(1 + x)
    return {
        "O": lambda: r,
        "Iu": lambda: (1 + r) * torch.log1p(r),
        "Ib": lambda: torch.where(x < 1e-3, series, x - torch.log1p(x)) / b**2,
        "Ds": lambda: torch.log1p(r),
        "Dq": lambda: -torch.expm1(-alpha * torch.log1p(r)),
    }[variant]()


def steepest(variant, alpha, b, m):
    """Bound of f'(R) for R from 0 to m."""
    return {"Iu": 1 + math.log1p(m), "Ib": min(1 / b, m), "Dq": alpha}.get(variant, 1)


def pnp_losses(s, positive, negative, own, *, variant, alpha, b, anneal, k=1, include_self=True):
    """L (N,) and which queries count (N,), from s (N, M), masks (N, M) and own (N,).

    The masks do not hold the query itself.
    """
    counted = positive.any(dim=1)
    a, p = positive.nonzero().T
    t = s[a, p]
    if include_self:
        queries = counted.nonzero().squeeze(1)
        a, t = torch.cat([a, queries]), torch.cat([t, own[queries]])
    x = k * (s[a] - t.unsqueeze(1)) / anneal
    r = x.masked_fill(~negative[a], -math.inf).sigmoid().sum(dim=1)
    number = (positive.sum(dim=1) + include_self).clamp(min=1)
    losses = s.new_zeros(len(s)).index_add(0, a, f(variant, r, alpha, b)) / number
    if x.numel() <= FEW:
        of_rows = (
            [set(row.nonzero().flatten().tolist()) for row in mask] for mask in (positive, negative)
        )
        want = reference.pnp_losses(
            s.tolist(), *of_rows, own.tolist(), variant=variant, alpha=alpha, b=b, anneal=anneal,
            k=k, include_self=include_self,
        )  # fmt: skip
        got = dict(zip(counted.nonzero().flatten().tolist(), losses[counted].tolist(), strict=True))
        assert got == pytest.approx(want, rel=1e-9, abs=1e-13)
    return losses, counted
