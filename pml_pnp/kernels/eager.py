"""Soft ranks in plain PyTorch, for every device.

    R[a, i] = sum over j with negative[a, j] of sigmoid(scale * (s[a, j] - t[a, i]))

`s` (N, M) are the similarities, `t` (N, P) those of the positives. All N * P * M sigmoids are
computed, but only one chunk of rows is held at a time, in forward and again in backward; what is
kept in between is the input.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Entries of one (rows, P, M) block: 1 MiB in float32, so that a block and its temporaries stay in
# the cache of a CPU core, while small batches still run as a single block.
BLOCK_ENTRIES = 2**18


def _blocks(n: int, m: int, p: int) -> Iterator[tuple[slice, slice]]:
    """Cut (N, P) into (rows, positives) blocks of BLOCK_ENTRIES / M pairs, but at least one."""
    pairs = max(1, BLOCK_ENTRIES // max(1, m))
    columns = min(max(1, p), pairs)
    rows = pairs // columns
    for start in range(0, n, rows):
        for first in range(0, p, columns):
            yield slice(start, start + rows), slice(first, first + columns)


def _differences(s: Tensor, t: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Compute scale * (s[a, j] - t[a, i]), (rows, P, M), or -inf where j is no negative of a."""
    absent = float("-inf") if scale > 0 else float("inf")
    return (s.masked_fill(~negative, absent).unsqueeze(1) - t.unsqueeze(2)) * scale


class _NegativesBefore(torch.autograd.Function):
    @staticmethod
    def forward(s: Tensor, t: Tensor, negative: Tensor, scale: float) -> Tensor:
        r = torch.empty_like(t)
        for rows, cols in _blocks(*s.shape, t.shape[1]):
            x = _differences(s[rows], t[rows, cols], negative[rows], scale)
            r[rows, cols] = torch.sigmoid_(x).sum(dim=2)
        return r

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        s, t, negative, ctx.scale = inputs
        ctx.save_for_backward(s, t, negative)

    @staticmethod
    def backward(ctx, grad: Tensor):
        # Out of place and by operations that are differentiable themselves, so that double backward
        # is right without further code.
        s, t, negative = ctx.saved_tensors
        scale = ctx.scale
        grad_s, grad_t, start = [], [], None
        for rows, cols in _blocks(*s.shape, t.shape[1]):
            y = torch.sigmoid(_differences(s[rows], t[rows, cols], negative[rows], scale))
            # d R[a, i] / d s[a, j] = scale * sigmoid' = -(its share of d R[a, i] / d t[a, i])
            dy = y * (1 - y) * (scale * grad[rows, cols]).unsqueeze(2)
            if rows.start == start:
                grad_s[-1] = grad_s[-1] + dy.sum(dim=1)
                grad_t[-1].append(-dy.sum(dim=2))
            else:
                start = rows.start
                grad_s.append(dy.sum(dim=1))
                grad_t.append([-dy.sum(dim=2)])
        if not grad_s:
            return torch.zeros_like(s), torch.zeros_like(t), None, None
        return torch.cat(grad_s), torch.cat([torch.cat(g, dim=1) for g in grad_t]), None, None


def negatives_before(s: Tensor, t: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Soft number of negatives of query a that stand before a positive at t[a, i].

    Args:
        s: similarities, (N, M), float32 or float64
        t: similarities of the positives, (N, P), same dtype and device
        negative: which references are negatives of which query, (N, M), bool
        scale: 1 / anneal for a similarity, -1 / anneal for a distance

    Returns:
        R, (N, P), differentiable twice with respect to `s` and `t`
    """
    return _NegativesBefore.apply(s, t, negative, scale)


@torch.no_grad()
def count_negatives_before(s: Tensor, t: Tensor, negative: Tensor, scale: float) -> Tensor:
    """The hard count that `negatives_before` is the smooth version of, (N, P), without gradient."""
    count = torch.empty_like(t)
    for rows, cols in _blocks(*s.shape, t.shape[1]):
        x = _differences(s[rows], t[rows, cols], negative[rows], scale)
        count[rows, cols] = (x > 0).sum(dim=2).to(count.dtype)
    return count
