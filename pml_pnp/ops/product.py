"""Mean of the losses of queries whose similarities are a matrix product, s = q z^T.

The rows of q are the queries or their directions, those of z the references or theirs. For each
block of queries, the similarities are computed, the kernel overwrites them by their gradient G, and
G z and G^T q are added to the gradients of q and z. Only these, N x d and M x d numbers, are kept
for backward. A block has `chunk_size` queries or, without one, all of them.

If the references are the batch and one block holds all of it, the gradient is (G + G^T) z, one
product. Autograd, which does not know that both factors are the same tensor, computes two. The
gradient D of a direction z = x / |x| is turned into that of x, (D - <D, z> z) / |x|, in four passes
over a matrix instead of autograd's nine (benchmarks/measure.py --only products).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pml_pnp.ops import dispatch
from pml_pnp.ops.settings import Settings
from pml_pnp.ops.similarity import (
    COUNTS,
    differentiable_gradients,
    differentiable_losses,
    ranking_counts,
)
from pml_pnp.pairs import Pairs, blocks_of
from pml_pnp.precision import autocast_off

# Smaller norms are replaced by it, as in torch.nn.functional.normalize.
SMALLEST_NORM = 1e-12
# Side of the squares in which a CPU transposes a matrix, so that they stay in cache.
CPU_TILE = 512
# The same on other devices, so that a large matrix is not added to its transpose in another one.
DEVICE_TILE = 4096
# Similarities in a block without a chunk_size, if the references are not the batch: 128 MiB.
REFERENCES_BLOCK = 2**25


@dataclass(eq=False)
class _Call:
    """The arguments that are not tensors, in one, since autograd takes time for each argument.

    Not a tuple, which torch.func would take apart.
    """

    pairs: Pairs
    settings: Settings
    height: int  # queries in a block
    normalized: bool
    with_gradient: bool
    with_grad_references: bool
    with_counts: bool
    node: Any = None  # of `_SaveReferences`


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
    """Compute the mean of the losses of the queries that count.

    Args:
        queries: (N, d), float32 or float64
        references: (M, d), or None if they are the queries
        pairs: positives and negatives
        settings: hyperparameters; `variant` is a name
        normalized: whether to multiply directions (cosine similarity) instead of embeddings
        chunk_size: largest number of queries in a block, or None to choose the fastest
        with_counts: whether to compute `ranking_counts`

    Returns:
        The mean, differentiable with respect to queries and references, zero if no query counts,
        NaN if an embedding or its length is NaN or infinite; and the counts (COUNTS,), or None.
    """
    height = len(queries) if chunk_size is None else chunk_size
    if references is not None:
        height = min(height, REFERENCES_BLOCK // max(1, len(references)))
    with_grad_references = references is not None and references.requires_grad
    with_gradient = torch.is_grad_enabled() and (queries.requires_grad or with_grad_references)
    flags = normalized, with_gradient, with_grad_references, with_counts
    call = _Call(pairs, settings, max(1, height), *flags)
    if with_gradient and references is not None:
        # A tensor that was created in inference mode cannot be saved for backward.
        queries, references = (x.clone() if x.is_inference() else x for x in (queries, references))
        queries = _SaveReferences.apply(queries, references, call)
    return _Mean.apply(queries, references, call)[:2]


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(queries: Tensor, references: Tensor | None, call: _Call):
        is_self, settings = references is None, call.settings
        q, q_norm, zero = _factor(queries, call.normalized)
        z, z_norm = q, q_norm
        if not is_self:
            z, z_norm, zero_of_references = _factor(references, call.normalized)
            zero = zero + zero_of_references
        whole = is_self and 0 < len(q) <= call.height
        grad_q = torch.zeros_like(q) if call.with_gradient and not whole else None
        grad_z = torch.zeros_like(z) if call.with_grad_references else grad_q if is_self else None
        counts = q.new_zeros(COUNTS) if call.with_counts else None
        block = None if whole else q.new_empty(min(call.height, len(q)), len(z))
        kernel = dispatch.kernel_for(q)
        total = number = zero  # NaN for input that is not finite
        for rows in blocks_of(len(q), call.height):
            part, relation = q if whole else q[rows], call.pairs.of(rows)
            s = part @ z.T if whole else torch.mm(part, z.T, out=block[: len(part)])
            if call.with_counts:
                counts += ranking_counts(s, relation, settings.scale > 0)
            s_self = None if is_self else _self_similarity(part, relation, call)
            losses, grad_s, grad_self = kernel(
                s, s_self, relation, settings, call.with_gradient, overwrite=True
            )
            del s  # Triton writes the gradient of a small matrix to another one
            total = total + losses.sum()
            number = number + relation.counted().sum()
            if whole and call.with_gradient:
                grad_q = _times_both(grad_s, z)
            elif call.with_gradient:
                grad_q[rows].addmm_(grad_s, z)
                if grad_z is not None:
                    grad_z.addmm_(grad_s.T, part)
                if s_self is not None:
                    grad_q[rows].addcmul_(part, grad_self.unsqueeze(1), value=2)
            del grad_s
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
            (references,) = call.node.saved_tensors if call.node else (None,)
            total = partial(_differentiable_sum, call=call)
            with autocast_off(grad.device.type):
                found = differentiable_gradients(total, (queries, references), needed, grad)
            if found is not None:
                return *found, None
        return *(g * grad if x else None for g, x in zip(gradients, needed, strict=True)), None


class _SaveReferences(torch.autograd.Function):
    """Returns the queries, and saves the references for second derivatives.

    A node of its own, since a backward raises if a tensor that its node has saved was changed in
    place. A CrossBatchMemory changes its references, and a first derivative does not read them.
    """

    @staticmethod
    def forward(queries: Tensor, references: Tensor, call: _Call) -> Tensor:
        return queries.view_as(queries)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, references, call = inputs
        ctx.save_for_backward(references)
        call.node = ctx

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


def _factor(x: Tensor, normalized: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """The factor of the product, (N, d), the lengths of x, (N, 1), and `zero_or_nan` of them."""
    if not normalized:
        return x, None, zero_or_nan(x)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    zero = norm.sum() * 0
    norm.clamp_(min=SMALLEST_NORM)
    return x / norm, norm, zero


def _self_similarity(part: Tensor, relation, call: _Call) -> Tensor | None:
    """Similarity of each query to itself, (rows,), or None if it is not used or taken from `s`.

    A memory holds detached copies of the queries. For directions the similarity to the copy serves,
    since it is 1 and has no gradient. The square of a query has one, which the copy does not get.
    """
    if not call.settings.include_self or (call.normalized and relation.query_column is not None):
        return None
    return part.square().sum(dim=1)


def _differentiate_direction_(grad: Tensor, z: Tensor, norm: Tensor) -> None:
    """Turn the gradient of the direction z = x / |x| into that of x, in place."""
    # A length that was replaced by SMALLEST_NORM does not depend on x.
    along = (grad * z).sum(dim=1, keepdim=True).mul_(norm > SMALLEST_NORM)
    grad.addcmul_(z, along, value=-1).div_(norm)


def _times_both(grad: Tensor, z: Tensor) -> Tensor:
    """(G + G^T) z, in squares, each of which also serves as its mirror image."""
    tile = CPU_TILE if z.device.type == "cpu" else DEVICE_TILE
    if len(z) <= tile:
        return (grad + grad.T) @ z
    parts = blocks_of(len(z), tile)
    result, square = torch.zeros_like(z), grad.new_empty(tile, tile)
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
    """Compute the sum of the losses by operations that autograd differentiates."""
    z = queries if references is None else references
    if call.normalized:
        queries, z = torch.nn.functional.normalize(queries), torch.nn.functional.normalize(z)
    total = queries[:0].sum() + z[:0].sum()
    for rows in blocks_of(len(queries), call.height):
        part, relation = queries[rows], call.pairs.of(rows)
        s_self = None if references is None else _self_similarity(part, relation, call)
        total = total + differentiable_losses(part @ z.T, s_self, relation, call.settings).sum()
    return total


def zero_or_nan(x: Tensor) -> Tensor:
    """Zero, or NaN if x holds NaN or infinity, which a sigmoid would turn into a plausible rank.

    NaN, too, if the difference of the largest and the smallest value overflows.
    """
    if x.numel() == 0:
        return x.new_zeros(())
    low, high = x.detach().aminmax()
    return low.sub_(high).mul_(0)
