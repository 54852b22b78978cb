"""Losses of queries, and their gradients, in plain PyTorch for every device.

    R[a, p] = sum over negatives n of a: sigmoid(scale * (s[a, n] - s[a, p]))
    L[a]    = share[a] * sum over p: f(R[a, p])                      share = 1 / number of p
    d L[a] / d s[a, n] =   factor[a] * sum over p: f'(R[a, p]) sigmoid'    factor = share * scale
    d L[a] / d s[a, p] = - factor[a] * sum over n: f'(R[a, p]) sigmoid'

Only a block of the N * P * M sigmoids exists at a time. A row needs nothing from the others, so
that its gradient is made while its sigmoids are still there: every sigmoid is computed once.

The same sums by torch.compile, which fuses them but computes every sigmoid twice, take as long on
two CPU cores at N = 384 and twice as long at N = 4,096, and need a C++ compiler
(benchmarks/measure.py --only kernel).
"""

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from pml_pnp.kernels.settings import Settings
from pml_pnp.relation import Relation
from pml_pnp.variants import VARIANTS

# Sigmoids of a block on a CPU: 2.5 MiB in float32, which stay in cache. Smaller blocks take more
# calls, larger ones wait for memory (benchmarks/measure.py --only blocks).
CPU_BLOCK = 5 * 2**17
# On other devices launches cost more than memory does; 64 MiB.
DEVICE_BLOCK = 2**24
# Memory of so few numbers comes from what the process has already.
SMALL = 2**14
_of_thread = threading.local()
_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input


def block_entries(device: torch.device) -> int:
    """How many sigmoids to hold at a time."""
    return CPU_BLOCK if device.type == "cpu" else DEVICE_BLOCK


def blocks(n: int, m: int, p: int, entries: int) -> Iterator[tuple[slice, list[slice]]]:
    """Cut (N, P) into rows, and these into positives, of `entries` / M pairs, but at least one."""
    pairs = max(1, entries // max(1, m))
    width = min(max(1, p), pairs)
    height = pairs // width
    columns = [slice(i, min(i + width, p)) for i in range(0, p, width)]
    for first in range(0, n, height):
        yield slice(first, min(first + height, n)), columns


def query_losses(
    s: Tensor,
    self_similarity: Tensor | None,
    relation: Relation,
    settings: Settings,
    with_gradient: bool,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses and what their gradients are made of; with `overwrite`, in the place of `s`.

    Returns:
        losses (N,), grad_s (N, M), grad_own (N, 1) and factor (N, 1), such that the
        gradient of L[a] is factor[a] * grad_s[a] for s[a], and factor[a] * grad_own[a] for
        self_similarity[a]. A gradient that is not asked for is empty.
    """
    n, m = s.shape
    losses = s.new_empty(n)
    # A row of s is copied before its gradient is written.
    grad_s = s if overwrite else s.new_empty((n, m) if with_gradient else 0)
    grad_own = s.new_empty((n, 1) if with_gradient and self_similarity is not None else 0)
    smallest, width = relation.sizes()
    if width == 0:
        return losses.zero_(), grad_s.zero_(), grad_own.zero_(), s.new_ones(n, 1)
    f, derivative = VARIANTS[settings.variant].f, VARIANTS[settings.variant].derivative
    scale, alpha, b = settings.scale, settings.alpha, settings.b
    # What is given as similarity of the query to itself is one target more, unless the query is
    # among the references: then it takes the place of what is there.
    given = self_similarity is not None
    extra, replaced = given and relation.own is None, given and relation.own is not None
    number = width + 1 if extra else width
    # Classes of one size are what samplers make. At N = 32, where a step is some sixty calls of
    # PyTorch, to have nothing to leave out spares ten of them.
    own = relation.number_of_own
    uniform = smallest == width > own and (own == 0 or settings.include_self)
    if uniform:
        share, factor = 1 / number, s.new_full((n, 1), scale / number)
    else:
        share = relation.share(settings.include_self, extra, s.dtype)
        factor = (share * scale).unsqueeze(1)
    buffers = None
    # All at once where that is little, for the sake of the calls that each block spares.
    everywhere = n * width <= block_entries(s.device)
    positives = relation.positives(slice(0, n), width, smallest) if everywhere else None
    for rows, columns in blocks(n, m, number, block_entries(s.device)):
        height = rows.stop - rows.start
        if buffers is None:
            buffers = _workspace(s, height * m, height * columns[0].stop * m)
        part, losses_of_part = s[rows], losses[rows]
        grad_of_part = grad_s[rows] if with_gradient else grad_s
        x = buffers[0][: height * m].view(height, m).copy_(part)
        index = positives[rows] if everywhere else relation.positives(rows, width, smallest)
        t = x.gather(1, index)
        relation.silence_(x, rows, index, _never_before(scale))
        if extra:
            t = torch.cat([t, self_similarity[rows].unsqueeze(1)], dim=1)
        if replaced:
            is_own = index == relation.own[rows].unsqueeze(1)
            t = torch.where(is_own, self_similarity[rows].unsqueeze(1), t)
        if not uniform:
            used = relation.used(rows, index, settings.include_self)
            if extra:
                used = torch.cat([used, relation.counted[rows].unsqueeze(1)], dim=1)
            t.masked_fill_(~used, 0)  # a difference to infinity would not be a number
        grad_t = torch.empty_like(t)
        for cols in columns:
            y = buffers[1][: height * (cols.stop - cols.start) * m].view(height, -1, m)
            # First the difference, then the scale: large similarities would overflow.
            torch.sub(x.unsqueeze(1), t[:, cols].unsqueeze(2), out=y).mul_(scale).sigmoid_()
            r = y.sum(dim=2)
            values = f(r, alpha, b)
            if not uniform:
                values = values.masked_fill(~used[:, cols], 0)
            if cols.start == 0:
                torch.sum(values, dim=1, out=losses_of_part)
            else:
                losses_of_part += values.sum(dim=1)
            if with_gradient:
                w = derivative(r, alpha, b)
                if not uniform:
                    w = w.masked_fill(~used[:, cols], 0)
                # y = w * y * (1 - y), in one pass.
                _sigmoid_backward(w.unsqueeze(2).expand_as(y), y, grad_input=y)
                if cols.start == 0:
                    torch.sum(y, dim=1, out=grad_of_part)
                else:
                    grad_of_part += y.sum(dim=1)
                torch.sum(y, dim=2, out=grad_t[:, cols])
        if with_gradient:
            grad_t.neg_()
            if extra:
                grad_own[rows] = grad_t[:, width:]
            if replaced:
                grad_own[rows] = (grad_t * is_own).sum(dim=1, keepdim=True)
                grad_t.masked_fill_(is_own, 0)
            grad_of_part.scatter_add_(1, index, grad_t[:, :width])
    losses.mul_(share)
    return losses, grad_s, grad_own, factor


def _workspace(s: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    """Uninitialized vectors like `s`, not to be used beyond the call.

    On a CPU one of up to twice CPU_BLOCK numbers is kept by each thread: at N = 384, memory that
    the operating system hands out anew would take a twentieth of a step, and new tensors in every
    block twice the time.
    """
    total = sum(sizes)
    if s.device.type != "cpu" or not SMALL < total <= 2 * CPU_BLOCK or type(s) is not Tensor:
        return tuple(s.new_empty(size) for size in sizes)
    kept = getattr(_of_thread, "kept", None)
    if kept is None or kept.dtype != s.dtype or len(kept) < total:
        with torch.inference_mode(False):  # what is made in that mode stays there
            kept = _of_thread.kept = torch.empty(total, dtype=s.dtype, device=s.device)
    return kept[:total].split(sizes)


def _never_before(scale: float) -> float:
    """The similarity or distance of what stands before nothing."""
    return float("-inf") if scale > 0 else float("inf")


def _differences(s: Tensor, t: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Compute scale * (s[a, j] - t[a, i]), (rows, P, M), or -inf where j is no negative of a."""
    s = s.masked_fill(~negative, _never_before(scale))
    return (s.unsqueeze(1) - t.unsqueeze(2)) * scale


class _NegativesBefore(torch.autograd.Function):
    @staticmethod
    def forward(s: Tensor, t: Tensor, negative: Tensor, scale: float) -> Tensor:
        r = torch.empty_like(t)
        for rows, columns in blocks(*s.shape, t.shape[1], block_entries(s.device)):
            for cols in columns:
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
        grad_s, grad_t = [], []
        for rows, columns in blocks(*s.shape, t.shape[1], block_entries(s.device)):
            by_column, total = [], torch.zeros_like(s[rows])
            for cols in columns:
                y = torch.sigmoid(_differences(s[rows], t[rows, cols], negative[rows], scale))
                # d R[a, i] / d s[a, j] = scale * sigmoid' = - its share of d R[a, i] / d t[a, i]
                dy = y * (1 - y) * (scale * grad[rows, cols]).unsqueeze(2)
                total = total + dy.sum(dim=1)
                by_column.append(-dy.sum(dim=2))
            grad_s.append(total)
            grad_t.append(torch.cat(by_column, dim=1) if by_column else torch.zeros_like(t[rows]))
        if not grad_s:
            return torch.zeros_like(s), torch.zeros_like(t), None, None
        return torch.cat(grad_s), torch.cat(grad_t), None, None


def negatives_before(s: Tensor, t: Tensor, negative: Tensor, scale: float) -> Tensor:
    """R itself, for an f that is not in the table and for double backward.

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
    for rows, columns in blocks(*s.shape, t.shape[1], block_entries(s.device)):
        for cols in columns:
            x = _differences(s[rows], t[rows, cols], negative[rows], scale)
            count[rows, cols] = (x > 0).sum(dim=2).to(count.dtype)
    return count
