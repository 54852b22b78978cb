"""Losses of queries and their gradients, in plain PyTorch for every device.

    R[a, p] = sum over negatives n of a: y[a, p, n]     y = sigmoid(scale * (s[a, n] - s[a, p]))
    L[a]    = share[a] * sum over p: f(R[a, p])         share = 1 / number of p
    d L[a] / d s[a, n] =   sum over p: w[a, p] * y * (1 - y)    w = share * scale * f'(R[a, p])
    d L[a] / d s[a, p] = - sum over n: w[a, p] * y * (1 - y)

Only a block of the N * P * M sigmoids exists at a time. A row needs nothing from the others, so its
gradient is made while its sigmoids are still there, and every sigmoid is computed once.

The sigmoid of a difference is a ratio, y = g_p / (g_p + g_n) with g = exp(-scale * s), which takes
M exponentials for each query instead of P * M. It is used on a CPU, where the exponentials are most
of the time (benchmarks/measure.py --only sigmoids), as long as the g of a block fit into the dtype.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from pml_pnp.ops.settings import Settings
from pml_pnp.pairs import Relation
from pml_pnp.variants import VARIANTS

INF = float("inf")
# Sigmoids of a block on a CPU: 5 MiB in float32, which stay in cache. Smaller blocks take more
# calls, larger ones wait for memory (benchmarks/measure.py --only blocks).
CPU_BLOCK = 5 * 2**18
# On other devices launches cost more than memory does; 64 MiB.
DEVICE_BLOCK = 2**24
# Largest scale * (max - min) of a block's similarities for which exp(scale * (s - middle)) is a
# normal number; 2 * 87 and 2 * 708 would be too large.
LARGEST_RANGE = {torch.float32: 160.0, torch.float64: 1400.0}
# Of so few sigmoids the exponentials take less time than finding the range.
FEW_SIGMOIDS = 2**13
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


def losses_and_gradient(
    s: Tensor,
    self_similarity: Tensor | None,
    relation: Relation,
    settings: Settings,
    with_gradient: bool,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of N queries, and the gradient of L[a] in row a.

    Args:
        s: similarities, (N, M), float32 or float64
        self_similarity: of each query to itself, (N,), or None to take it from `s`, if it is there
        relation: positives and negatives
        settings: hyperparameters; `variant` is a name
        with_gradient: whether to make the gradient
        overwrite: whether the gradient may take the place of `s`

    Returns:
        losses (N,), grad_s (N, M) and grad_self (N,). A gradient that is not asked for is empty.
    """
    (n, m), scale, given = s.shape, settings.scale, self_similarity is not None
    losses = s.new_zeros(n)
    grad_s = s if overwrite else s.new_empty((n, m) if with_gradient else 0)
    grad_self = s.new_empty(n if with_gradient and given else 0)
    smallest, width = relation.sizes()
    if width == 0:
        return losses, grad_s.zero_(), grad_self.zero_()
    f, derivative = VARIANTS[settings.variant].f, VARIANTS[settings.variant].derivative
    alpha, b = settings.alpha, settings.b
    listed, with_query = relation.query_column is not None, settings.include_self and not given
    # Samplers make classes of one size. Then nothing is masked, which saves about 10 of the 60
    # calls of PyTorch that are a step at N = 32.
    uniform = smallest == width > listed and (with_query or not listed)
    if uniform:
        share = 1 / (width + given)
        factor = scale * share
    else:
        number = relation.number + (given - (listed and not with_query))
        share = number.clamp_(min=1).to(s.dtype).reciprocal_()
        factor = (scale * share).unsqueeze(1)
    entries = block_entries(s.device)
    few = n * (width + given) * m < FEW_SIGMOIDS
    buffers = None
    for rows, columns in blocks(n, m, width + given, entries):
        height = rows.stop - rows.start
        if buffers is None:  # the first block is the largest
            buffers = s.new_empty(height, m), s.new_empty(height * columns[0].stop * m)
        x, part = buffers[0][:height], s[rows]
        losses_of_rows, grad_of_rows = losses[rows], grad_s[rows]
        own = self_similarity[rows].unsqueeze(1) if given else None
        middle = None if few else _middle(part, own, scale)
        if middle is None:
            x.copy_(part)
            never = -INF if scale > 0 else INF  # the similarity of what stands before nothing
            unused = -never  # and that of a positive which has nothing before it: R = f(R) = 0
        else:
            torch.sub(part, middle, out=x).mul_(-scale).exp_()
            own = (own - middle).mul_(-scale).exp_() if given else None
            never, unused = INF, 0.0
        index = relation.positives(rows, width, smallest)
        t = x.gather(1, index)
        relation.fill_non_negatives_(x, rows, index, never)
        if not uniform:
            t.masked_fill_(~relation.used(rows, index, with_query), unused)
        if given:
            own = own.masked_fill(~relation.counted[rows].unsqueeze(1), unused)
            t = torch.cat([t, own], dim=1)
        x, grad_t = x.unsqueeze(1), torch.empty_like(t)
        for cols in columns:
            t_of_cols = t[:, cols].unsqueeze(2)
            y = buffers[1][: height * t_of_cols.shape[1] * m].view(height, -1, m)
            if middle is None:
                # First the difference, then the scale: large similarities would overflow.
                torch.sub(x, t_of_cols, out=y).mul_(scale).sigmoid_()
            else:
                torch.div(t_of_cols, torch.add(x, t_of_cols, out=y), out=y)
            r = y.sum(dim=2)
            losses_of_rows += f(r, alpha, b).sum(dim=1)
            if with_gradient:
                w = derivative(r, alpha, b) * (factor if uniform else factor[rows])
                # y = w * y * (1 - y), in one pass.
                _sigmoid_backward(w.unsqueeze(2).expand_as(y), y, grad_input=y)
                if cols.start == 0:
                    torch.sum(y, dim=1, out=grad_of_rows)
                else:
                    grad_of_rows += y.sum(dim=1)
                torch.sum(y, dim=2, out=grad_t[:, cols])
        if with_gradient:
            grad_t.neg_()
            if given:
                grad_self[rows], grad_t = grad_t[:, width], grad_t[:, :width]
            grad_of_rows.scatter_add_(1, index, grad_t)
    losses.mul_(share)
    if not uniform:
        losses.masked_fill_(~relation.counted, 0)
    return losses, grad_s, grad_self


def _middle(s: Tensor, own: Tensor | None, scale: float) -> float | None:
    """Middle of the similarities of a block; None if its sigmoids are to be computed one by one."""
    if s.device.type != "cpu":
        return None
    ends = [float(x) for part in (s, own) if part is not None for x in part.aminmax()]
    low, high = min(ends), max(ends)
    is_narrow = (high - low) * abs(scale) <= LARGEST_RANGE[s.dtype]
    return low + (high - low) / 2 if is_narrow else None


class NegativesBefore(torch.autograd.Function):
    """R itself, (N, P), for an f that is not in the table and for second derivatives.

    Of similarities s (N, M), those of the positives t (N, P), which references are negatives
    (N, M) and the scale; differentiable twice with respect to s and t.
    """

    @staticmethod
    def forward(s: Tensor, t: Tensor, negative: Tensor, scale: float) -> Tensor:  # noqa: D102
        r = torch.empty_like(t)
        for rows, columns in blocks(*s.shape, t.shape[1], block_entries(s.device)):
            for cols in columns:
                x = _differences(s[rows], t[rows, cols], negative[rows], scale)
                torch.sum(x.sigmoid_(), dim=2, out=r[rows, cols])
        return r

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: D102
        s, t, negative, ctx.scale = inputs
        ctx.save_for_backward(s, t, negative)

    @staticmethod
    def backward(ctx, grad: Tensor):  # noqa: D102
        # Out of place and by operations that are differentiable themselves, so that double backward
        # is right without further code.
        s, t, negative = ctx.saved_tensors
        grad_s, grad_t = [torch.zeros_like(s[:0])], [torch.zeros_like(t[:0])]
        for rows, columns in blocks(*s.shape, t.shape[1], block_entries(s.device)):
            by_column, total = [torch.zeros_like(t[rows, :0])], torch.zeros_like(s[rows])
            for cols in columns:
                y = torch.sigmoid(_differences(s[rows], t[rows, cols], negative[rows], ctx.scale))
                # d R[a, i] / d s[a, j] = scale * sigmoid' = - its share of d R[a, i] / d t[a, i]
                dy = y * (1 - y) * (ctx.scale * grad[rows, cols]).unsqueeze(2)
                total = total + dy.sum(dim=1)
                by_column.append(-dy.sum(dim=2))
            grad_s.append(total)
            grad_t.append(torch.cat(by_column, dim=1))
        return torch.cat(grad_s), torch.cat(grad_t), None, None


def _differences(s: Tensor, t: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Compute scale * (s[a, j] - t[a, i]), (rows, P, M), or -inf where j is no negative of a."""
    s = s.masked_fill(~negative, -INF if scale > 0 else INF)
    return (s.unsqueeze(1) - t.unsqueeze(2)) * scale
