"""Similarities of a batch with itself that are a plain product, s = z z^T, and what that spares.

With G the gradient of s, that of z is (G + G^T) z: one product, where autograd, which does not know
that both factors are the same, makes two. Of the three products that are the floor of such a loss
that is one. And where all queries weigh the same, rows of G can be turned into their part of the
gradient of z as soon as they are there, so that lean mode need not compute s a second time.
(On two CPU cores, N = 4,096, d = 512: G z + G^T z takes 244 ms, what is below 170.)
"""

from collections.abc import Callable

import torch
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity
from torch import Tensor

# With fewer rows a product takes less time than to step into Python in backward.
FEWEST = 64
# Side of the squares in which a matrix is transposed on a CPU, where it matters to stay in cache.
CPU_TILE = 512


def is_product(distance) -> bool:
    """Whether `distance(x)` is z @ z.T with z = `distance.maybe_normalize(x)`, and no more."""
    return (
        type(distance) in (CosineSimilarity, DotProductSimilarity)
        and distance.power == 1
        and not distance.collect_stats
        and not (distance._forward_hooks or distance._forward_pre_hooks or distance._backward_hooks)
        and not {"forward", "compute_mat"} & vars(distance).keys()
    )


def self_product(z: Tensor) -> Tensor:
    """Compute z @ z.T, (N, N), of z (N, d); differentiable as often as wanted."""
    if torch.compiler.is_compiling() or len(z) < FEWEST:
        return z @ z.T
    return _SelfProduct.apply(z)


class _SelfProduct(torch.autograd.Function):
    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return z @ z.T

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        if torch.is_grad_enabled() or z.device.type != "cpu" or len(z) <= CPU_TILE:
            return (grad + grad.T) @ z
        parts = [slice(i, i + CPU_TILE) for i in range(0, len(z), CPU_TILE)]
        result = torch.empty_like(z)
        for rows in parts:
            both = grad[rows].clone()
            for columns in parts:
                both[:, columns].add_(grad[columns, rows].T)
            torch.mm(both, z, out=result[rows])
        return result


def total_in_one_pass(
    z: Tensor,
    chunk_size: int,
    losses_of: Callable[[slice, Tensor], tuple[Tensor, Tensor]],
    losses_and_gradient_of: Callable[[slice, Tensor], tuple[Tensor, Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Sum of the losses of all queries, from `chunk_size` rows of z @ z.T at a time.

    Args:
        z: (N, d)
        chunk_size: queries at a time
        losses_of: maps some rows and their similarities to losses and to which queries count
        losses_and_gradient_of: the same, with the gradient of the losses' sum, same shape as the
            similarities, as third

    Returns:
        the sum, differentiable with respect to z, and how many queries count
    """
    return _OnePass.apply(z, chunk_size, losses_of, losses_and_gradient_of)[:2]


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(z: Tensor, chunk_size: int, losses_of, losses_and_gradient_of):
        total, number = z.new_zeros(()), torch.zeros((), dtype=torch.int64, device=z.device)
        gradient = torch.zeros_like(z)
        rows_at_once = z.new_empty(chunk_size, len(z))
        for rows in _chunks(z, chunk_size):
            part = z[rows]
            s = torch.mm(part, z.T, out=rows_at_once[: len(part)])
            losses, counted, grad_s = losses_and_gradient_of(rows, s)
            total += losses.sum()
            number += counted.sum()
            gradient[rows].addmm_(grad_s, z)
            gradient.addmm_(grad_s.T, part)
        return total, number, gradient

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        z, ctx.chunk_size, ctx.losses_of, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.gradient = output[2]
        ctx.save_for_backward(z)

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 4
        (z,) = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return ctx.gradient * grad, None, None, None
        total = sum(
            ctx.losses_of(rows, z[rows] @ z.T)[0].sum() for rows in _chunks(z, ctx.chunk_size)
        )
        return *torch.autograd.grad(total, z, grad, create_graph=True), None, None, None


def _chunks(z: Tensor, chunk_size: int) -> list[slice]:
    return [slice(i, min(i + chunk_size, len(z))) for i in range(0, len(z), chunk_size)]
