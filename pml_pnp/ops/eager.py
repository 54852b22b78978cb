"""Losses of queries and their gradients in plain PyTorch, for every device.

    R[a, p] = sum over negatives n of a: y[a, p, n]     y = sigmoid(scale * (s[a, n] - s[a, p]))
    L[a]    = share[a] * sum over p: f(R[a, p])         share = 1 / number of p
    d L[a] / d s[a, n] =   sum over p: w[a, p] * y * (1 - y)    w = share * scale * f'(R[a, p])
    d L[a] / d s[a, p] = - sum over n: w[a, p] * y * (1 - y)

Only a block of the N * P * M sigmoids exists at a time. Rows are independent, so the gradient of a
row is computed from its sigmoids while they exist, and every sigmoid is computed once.

The sigmoid of a difference is a ratio, y = g_p / (g_p + g_n) with g = exp(-scale * s), which takes
M exponentials per query instead of P * M. A CPU, which spends most of the time on exponentials
(benchmarks/measure.py --only sigmoids), uses the ratio if the g of a block fit into the dtype.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from pml_pnp.ops.settings import Settings
from pml_pnp.pairs import Relation, blocks_of
from pml_pnp.variants import VARIANTS

INF = float("inf")
# Sigmoids of a block on a CPU: 5 MiB in float32, which stay in cache. Smaller blocks take more
# calls, larger ones wait for memory (benchmarks/measure.py --only blocks).
CPU_BLOCK = 5 * 2**18
# The same on other devices, 64 MiB in float32: few kernel launches matter more than the cache.
DEVICE_BLOCK = 2**24
# Largest scale * (max - min) of a block's similarities for which exp(scale * (s - middle)) is a
# normal number; 2 * 87 and 2 * 708 would be too large.
LARGEST_RANGE = {torch.float32: 160.0, torch.float64: 1400.0}
_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input


def blocks(s: Tensor, p: int) -> Iterator[tuple[slice, list[slice]]]:
    """Cut the pairs of N queries and P positives into blocks of rows and columns; s is (N, M).

    A pair takes M sigmoids. A block has at most CPU_BLOCK or DEVICE_BLOCK, or else one pair.
    """
    n, m = s.shape
    entries = CPU_BLOCK if s.device.type == "cpu" else DEVICE_BLOCK
    pairs = max(1, entries // max(1, m))
    width = min(max(1, p), pairs)
    height = pairs // width
    columns = blocks_of(p, width)
    for rows in blocks_of(n, height):
        yield rows, columns


def losses_and_gradient(
    s: Tensor,
    self_similarity: Tensor | None,
    relation: Relation,
    settings: Settings,
    with_gradient: bool,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the losses L of N queries, and the gradient of L[a] with respect to row a of s.

    Args:
        s: similarities, (N, M), float32 or float64
        self_similarity: of each query to itself, (N,), or None if `s` contains it or it is not used
        relation: positives and negatives
        settings: hyperparameters; `variant` is a name
        with_gradient: whether to compute the gradient
        overwrite: whether the gradient may be written to `s`

    Returns:
        losses (N,), grad_s (N, M) and grad_self (N,). A gradient that is not needed is empty.
    """
    (n, m), scale, has_self = s.shape, settings.scale, self_similarity is not None
    losses = s.new_zeros(n)
    grad_s = s if overwrite else s.new_empty((n, m) if with_gradient else 0)
    grad_self = s.new_empty(n if with_gradient and has_self else 0)
    smallest, width = relation.sizes()
    if width == 0:
        return losses, grad_s.zero_(), grad_self.zero_()
    listed, with_query = relation.query_column is not None, settings.include_self and not has_self
    # With classes of equal size, as samplers make them, all that is listed enters the loss. Nothing
    # is masked then, which saves about 10 of the 60 PyTorch calls of a step at N = 32.
    uniform = smallest == width > listed and (with_query or not listed)
    if uniform:
        share = 1 / (width + has_self)
        factor = scale * share
    else:
        number = relation.number + (has_self - (listed and not with_query))
        share = number.clamp_(min=1).to(s.dtype).reciprocal_()
        factor = (scale * share).unsqueeze(1)
    buffers = None
    for rows, columns in blocks(s, width + has_self):
        part, block = s[rows], relation.of(rows)
        if buffers is None:  # the first block is the largest
            buffers = s.new_empty(part.shape), s.new_empty(part.numel() * columns[0].stop)
        x = buffers[0][: len(part)]
        t_self = self_similarity[rows].unsqueeze(1) if has_self else None
        middle = _middle(part, t_self, scale)
        # A reference that is not a negative is set to `ranked_last`, after every positive, and a
        # positive that is not used to `ranked_first`, before every negative: R = f(R) = 0.
        if middle is None:
            x.copy_(part)
            ranked_last, ranked_first = (-INF, INF) if scale > 0 else (INF, -INF)
        else:
            torch.sub(part, middle, out=x).mul_(-scale).exp_()
            t_self = (t_self - middle).mul_(-scale).exp_() if has_self else None
            ranked_last, ranked_first = INF, 0.0
        index = block.positives(smallest, width)
        t = x.gather(1, index)
        block.fill_non_negatives_(x, index, ranked_last)
        if not uniform:
            t.masked_fill_(~block.used(index, with_query), ranked_first)
        if has_self:
            t_self = t_self.masked_fill(~block.counted().unsqueeze(1), ranked_first)
            t = torch.cat([t, t_self], dim=1)
        grad_of_rows = grad_s[rows] if with_gradient else None
        weight = factor if uniform else factor[rows]
        losses[rows], grad_t = _sum_over_pairs(
            x, t, columns, settings, middle is not None, buffers[1], weight, grad_of_rows
        )
        if with_gradient:
            if has_self:
                grad_self[rows], grad_t = grad_t[:, width], grad_t[:, :width]
            grad_of_rows.scatter_add_(1, index, grad_t)
    losses.mul_(share)
    if not uniform:
        losses.masked_fill_(~relation.counted(), 0)
    return losses, grad_s, grad_self


def _sum_over_pairs(
    x: Tensor,
    t: Tensor,
    columns: list[slice],
    settings: Settings,
    is_ratio: bool,
    buffer: Tensor,
    weight: float | Tensor,
    grad_x: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute the sums over p of f(R[a, p]) for a block of queries a, and their gradient.

    Args:
        x: similarities to references, (rows, M), or their g
        t: those of the positives, (rows, P), or their g
        columns: the columns of t in blocks
        settings: hyperparameters
        is_ratio: whether x and t are g
        buffer: for the sigmoids of a block
        weight: share * scale, a number or (rows, 1)
        grad_x: (rows, M), to which the gradient is written, or None if it is not needed

    Returns:
        The sums, (rows,), and the gradient with respect to the similarities t, (rows, P).
    """
    height, m = x.shape
    f, derivative = VARIANTS[settings.variant].f, VARIANTS[settings.variant].derivative
    x, sums, grad_t = x.unsqueeze(1), None, torch.empty_like(t)
    for cols in columns:
        t_of_cols = t[:, cols].unsqueeze(2)
        y = buffer[: height * t_of_cols.shape[1] * m].view(height, -1, m)
        if is_ratio:
            torch.div(t_of_cols, torch.add(x, t_of_cols, out=y), out=y)
        else:
            # The difference before the scale, since large similarities times scale overflow.
            torch.sub(x, t_of_cols, out=y).mul_(settings.scale).sigmoid_()
        r = y.sum(dim=2)
        part = f(r, settings.alpha, settings.b).sum(dim=1)
        sums = part if sums is None else sums + part
        if grad_x is not None:
            w = derivative(r, settings.alpha, settings.b) * weight
            # y = w * y * (1 - y), in one pass over memory.
            _sigmoid_backward(w.unsqueeze(2).expand_as(y), y, grad_input=y)
            if cols.start == 0:
                torch.sum(y, dim=1, out=grad_x)
            else:
                grad_x += y.sum(dim=1)
            torch.sum(y, dim=2, out=grad_t[:, cols])
    return sums, grad_t.neg_()


def _middle(s: Tensor, t_self: Tensor | None, scale: float) -> float | None:
    """Middle of the range of a block's similarities, or None if the ratio cannot be used."""
    if s.device.type != "cpu":
        return None
    ends = [float(x) for part in (s, t_self) if part is not None for x in part.aminmax()]
    low, high = min(ends), max(ends)
    is_narrow = (high - low) * abs(scale) <= LARGEST_RANGE[s.dtype]
    return low + (high - low) / 2 if is_narrow else None


class NegativesBefore(torch.autograd.Function):
    """R (N, P), the soft numbers of negatives before positives, differentiable twice.

    It serves callable variants and second derivatives. The arguments are the similarities s (N, M),
    infinite where a reference is not a negative, those of the positives, t (N, P), and the scale.
    """

    @staticmethod
    def forward(s: Tensor, t: Tensor, scale: float) -> Tensor:  # noqa: D102
        r = torch.empty_like(t)
        for rows, columns in blocks(s, t.shape[1]):
            for cols in columns:
                x = (s[rows].unsqueeze(1) - t[rows, cols].unsqueeze(2)) * scale
                torch.sum(x.sigmoid_(), dim=2, out=r[rows, cols])
        return r

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: D102
        s, t, ctx.scale = inputs
        ctx.save_for_backward(s, t)

    @staticmethod
    def backward(ctx, grad: Tensor):  # noqa: D102
        # Only differentiable operations, none in place, so that autograd can differentiate this.
        s, t = ctx.saved_tensors
        grad_s, grad_t = [torch.zeros_like(s[:0])], [torch.zeros_like(t[:0])]
        for rows, columns in blocks(s, t.shape[1]):
            by_column, total = [torch.zeros_like(t[rows, :0])], torch.zeros_like(s[rows])
            for cols in columns:
                x = (s[rows].unsqueeze(1) - t[rows, cols].unsqueeze(2)) * ctx.scale
                y = torch.sigmoid(x)
                # d y[a, i, j] / d s[a, j] = scale * y * (1 - y) = - d y[a, i, j] / d t[a, i]
                dy = y * (1 - y) * (ctx.scale * grad[rows, cols]).unsqueeze(2)
                total = total + dy.sum(dim=1)
                by_column.append(-dy.sum(dim=2))
            grad_s.append(total)
            grad_t.append(torch.cat(by_column, dim=1))
        return torch.cat(grad_s), torch.cat(grad_t), None
