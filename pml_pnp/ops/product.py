"""Mean of the losses of queries whose similarities are a product, s = q z^T.

The rows q are the queries or their directions, those of z likewise of the references. A block of
rows of similarities is multiplied, its gradient G takes its place and is multiplied to its part of
the gradients of q and z, and what is kept for backward is N x d and M x d numbers. A block is
`chunk_size` queries or, without one, the whole batch.

Where the references are the batch and the block is all of it, the gradient of z is (G + G^T) z: one
product, where autograd, which does not know that both factors are the same, makes two. The gradient
D of a direction z = x / |x| becomes that of x, (D - <D, z> z) / |x|, in four passes over a matrix,
where autograd makes nine (benchmarks/measure.py --only products).
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pml_pnp.ops import dispatch
from pml_pnp.ops.settings import Settings
from pml_pnp.ops.similarity import (
    differentiable_gradients,
    differentiable_losses,
    ranking_counts,
)
from pml_pnp.pairs import Pairs
from pml_pnp.precision import autocast_off

# A norm below it counts as this, as in torch.nn.functional.normalize.
SMALLEST_NORM = 1e-12
# Side of the squares in which a matrix is transposed on a CPU, where it has to stay in cache.
CPU_TILE = 512
# Similarities to references other than the batch, at a time, without a chunk_size: 128 MiB.
REFERENCES_BLOCK = 2**25


class _Call(NamedTuple):
    """What autograd does not look at, in one argument, which saves time at every call."""

    pairs: Pairs
    settings: Settings
    height: int  # queries in a block
    normalized: bool
    with_gradient: bool
    with_grad_references: bool
    with_counts: bool
    kept: "_Kept"


def mean_of_losses(
    queries: Tensor,
    references: Tensor | None,
    pairs: Pairs,
    settings: Settings,
    *,
    normalized: bool,
    chunk_size: int | None,
    with_counts: bool,
) -> tuple[Tensor, Tensor | None]:
    """Mean over the queries that count.

    Args:
        queries: (N, d), float32 or float64
        references: (M, d), or None where they are the queries
        pairs: positives and negatives
        settings: hyperparameters; `variant` is a name
        normalized: whether to multiply directions, which is cosine similarity
        chunk_size: queries in a block at most; None for the fastest number
        with_counts: whether to return `ranking_counts`

    Returns:
        The mean, differentiable with respect to queries and references, zero if no query counts,
        NaN if an embedding, or its length, is NaN or infinite; and (3,) counts, or None.
    """
    height, kept = len(queries) if chunk_size is None else chunk_size, _Kept()
    if references is not None:
        height = min(height, REFERENCES_BLOCK // max(1, len(references)))
    with_grad_references = references is not None and references.requires_grad
    with_gradient = torch.is_grad_enabled() and (queries.requires_grad or with_grad_references)
    if with_gradient and references is not None:
        # A tensor of inference mode cannot be saved for backward.
        queries, references = (x.clone() if x.is_inference() else x for x in (queries, references))
        queries = _Keep.apply(queries, references, kept)
    flags = normalized, with_gradient, with_grad_references, with_counts
    call = _Call(pairs, settings, max(1, height), *flags, kept)
    return _Mean.apply(queries, references, call)[:2]


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(queries: Tensor, references: Tensor | None, call: _Call):
        is_self, settings = references is None, call.settings
        q, q_norm, broken = _factor(queries, call.normalized)
        z, z_norm = q, q_norm
        if not is_self:
            z, z_norm, broken_references = _factor(references, call.normalized)
            broken = broken + broken_references
        whole = is_self and 0 < len(q) <= call.height
        grad_q = torch.zeros_like(q) if call.with_gradient and not whole else None
        grad_z = torch.zeros_like(z) if call.with_grad_references else grad_q if is_self else None
        counts = q.new_zeros(3) if call.with_counts else None
        block = None if whole else q.new_empty(min(call.height, len(q)), len(z))
        kernel = dispatch.kernel_for(q)
        total = number = broken
        for rows in blocks_of(q, call.height):
            part, relation = q if whole else q[rows], call.pairs.of(rows)
            s = part @ z.T if whole else torch.mm(part, z.T, out=block[: len(part)])
            if call.with_counts:
                counts += ranking_counts(s, relation, settings.scale > 0)
            own = None if is_self else _self_similarity(part, relation, call)
            loss, grad_s, grad_own = kernel(s, own, relation, settings, call.with_gradient, True)
            total = total + loss.sum()
            number = number + relation.counted.sum()
            if whole and call.with_gradient:
                grad_q = _times_both(grad_s, z)
            elif call.with_gradient:
                grad_q[rows].addmm_(grad_s, z)
                if grad_z is not None:
                    grad_z.addmm_(grad_s.T, part)
                if own is not None:
                    grad_q[rows].addcmul_(part, grad_own.unsqueeze(1), value=2)
        if call.normalized and call.with_gradient:
            _differentiate_direction_(grad_q, q, q_norm)
            if call.with_grad_references:
                _differentiate_direction_(grad_z, z, z_norm)
        divisor = number.clamp(min=1)
        return total / divisor, counts, divisor, grad_q, None if is_self else grad_z

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        queries, _, ctx.call = inputs
        ctx.mark_non_differentiable(*(x for x in output[1:] if x is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(queries, *output[2:])

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return None, None, None
        queries, divisor, *gradients = ctx.saved_tensors
        call, needed = ctx.call, ctx.needs_input_grad[:2]
        grad = grad / divisor
        if torch.is_grad_enabled():
            (references,) = call.kept.node.saved_tensors if call.kept.node else (None,)
            total = partial(_differentiable_sum, call=call)
            with autocast_off(grad.device.type):
                found = differentiable_gradients(total, (queries, references), needed, grad)
            if found is not None:
                return *found, None
        return *(g * grad if x else None for g, x in zip(gradients, needed, strict=True)), None


class _Kept:
    """Finds the node that keeps references; no list, which torch.func would take apart."""

    node = None


class _Keep(torch.autograd.Function):
    """Hands queries on, and keeps references for second derivatives, as long as the graph lives.

    In a node of its own: every backward looks whether a tensor that is saved in its node has been
    changed in place, as a memory changes before a backward that does not need it.
    """

    @staticmethod
    def forward(queries: Tensor, references: Tensor, kept: _Kept) -> Tensor:
        return queries.view_as(queries)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, references, kept = inputs
        ctx.save_for_backward(references)
        kept.node = ctx

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


def blocks_of(x: Tensor, height: int) -> list[slice]:
    """Cut the rows of x into blocks."""
    return [slice(i, min(i + height, len(x))) for i in range(0, len(x), height)]


def _factor(x: Tensor, normalized: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """What is multiplied, (N, d); the lengths of x, (N, 1); zero, or NaN if any is not finite."""
    if not normalized:
        return x, None, zero_or_nan(x)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    broken = norm.sum() * 0
    norm.clamp_(min=SMALLEST_NORM)
    return x / norm, norm, broken


def _self_similarity(part: Tensor, relation, call: _Call) -> Tensor | None:
    """Of queries to themselves, unless they are among the references, as directions, already."""
    if not call.settings.include_self or (call.normalized and relation.query_column is not None):
        return None
    return part.square().sum(dim=1)


def _differentiate_direction_(grad: Tensor, z: Tensor, norm: Tensor) -> None:
    """Turn the gradient of the direction z = x / |x| into that of x, in place."""
    # A length that counts as SMALLEST_NORM does not change with x.
    along = (grad * z).sum(dim=1, keepdim=True).mul_(norm > SMALLEST_NORM)
    grad.addcmul_(z, along, value=-1).div_(norm)


def _times_both(grad: Tensor, z: Tensor) -> Tensor:
    """(G + G^T) z; on a CPU in squares, of which one and its mirror image are the same."""
    if z.device.type != "cpu" or len(z) <= CPU_TILE:
        return (grad + grad.T) @ z
    parts = blocks_of(z, CPU_TILE)
    result, square = torch.zeros_like(z), grad.new_empty(CPU_TILE, CPU_TILE)
    for i, rows in enumerate(parts):
        for columns in parts[i:]:
            block = grad[rows, columns]
            both = square[: block.shape[0], : block.shape[1]]
            torch.add(block, grad[columns, rows].T, out=both)
            result[rows].addmm_(both, z[columns])
            if rows != columns:
                result[columns].addmm_(both.T, z[rows])
    return result


def _differentiable_sum(queries: Tensor, references: Tensor | None, call: _Call) -> Tensor:
    """The sum of losses by operations that autograd differentiates."""
    z = queries if references is None else references
    if call.normalized:
        queries, z = torch.nn.functional.normalize(queries), torch.nn.functional.normalize(z)
    total = queries[:0].sum() + z[:0].sum()
    for rows in blocks_of(queries, call.height):
        part, relation = queries[rows], call.pairs.of(rows)
        own = None if references is None else _self_similarity(part, relation, call)
        total = total + differentiable_losses(part @ z.T, own, relation, call.settings).sum()
    return total


def zero_or_nan(x: Tensor) -> Tensor:
    """Zero, or NaN if anything is NaN or infinite: a sigmoid makes a plausible rank of infinity.

    Also where largest and smallest differ by more than the dtype holds.
    """
    if x.numel() == 0:
        return x.new_zeros(())
    low, high = x.detach().aminmax()
    return low.sub_(high).mul_(0)
