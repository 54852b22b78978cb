"""Similarities of a batch with itself that are a plain product, s = z z^T, and what that spares.

With G the gradient of s, that of z is D = (G + G^T) z: one product, where autograd, which does not
know that both factors are the same, makes two. Of the three products that are the floor of such a
loss that is one. The gradient of x, of which z = x / |x| is the direction, is
(D - <D, z> z) / |x| in each row: four passes over a matrix, where autograd makes nine. And where
all queries weigh the same, rows of G can be turned into their part of D as soon as they are there,
so that lean mode need not compute s a second time.
(What that spares: benchmarks/measure.py --only products.)
"""

import inspect
from collections.abc import Callable

import torch
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from pml_pnp.autocast import autocast_off

HOOKS_OF_ALL_MODULES = (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
# Below it a norm counts as this; that of torch.nn.functional.normalize.
SMALLEST_NORM = 1e-12
# Side of the squares in which a matrix is transposed on a CPU, where it matters to stay in cache.
CPU_TILE = 512


def is_product(distance) -> bool:
    """Whether `distance(x)` is z @ z.T with z = `distance.maybe_normalize(x)`, and no more."""
    return (
        type(distance) in (CosineSimilarity, DotProductSimilarity)
        and distance.power == 1
        and not distance.collect_stats
        and not (distance._forward_hooks or distance._forward_pre_hooks or distance._backward_hooks)
        and not any(HOOKS_OF_ALL_MODULES)
        and not {"forward", "compute_mat", "normalize", "maybe_normalize"} & vars(distance).keys()
    )


def self_product(x: Tensor, distance) -> Tensor:
    """Compute `distance(x)`, (N, N), of x (N, d) and a distance that is a product.

    Differentiable as often as wanted.
    """
    if torch.compiler.is_compiling():
        z = distance.maybe_normalize(x)
        return z @ z.T
    by_length = distance.normalize_embeddings and distance.p == 2
    return _SelfProduct.apply(x if by_length else distance.maybe_normalize(x), by_length)[0]


class _SelfProduct(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, by_length: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if not by_length:
            return x @ x.T, None, None
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min_(SMALLEST_NORM)
        z = x / length
        return z @ z.T, z, length

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, ctx.by_length = inputs
        _, z, length = output
        ctx.set_materialize_grads(False)
        if ctx.by_length:
            ctx.mark_non_differentiable(z, length)
        ctx.save_for_backward(x, z, length)

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return None, None
        with autocast_off(grad.device.type):
            return _SelfProduct._gradient(ctx, grad), None

    @staticmethod
    def _gradient(ctx, grad: Tensor) -> Tensor:
        x, z, length = ctx.saved_tensors
        if torch.is_grad_enabled():
            z = normalize(x, eps=SMALLEST_NORM) if ctx.by_length else x
            return torch.autograd.grad(z @ z.T, x, grad, create_graph=True)[0]
        if not ctx.by_length:
            return _times_both(grad, x)
        grad_z = _times_both(grad, z)
        # A length that is none does not change with x.
        along = (grad_z * z).sum(dim=1, keepdim=True).mul_(length > SMALLEST_NORM)
        return grad_z.addcmul_(z, along, value=-1).div_(length)


# As for the kernels' Function: PyTorch would build this anew at every call.
_SelfProduct.forward.__signature__ = inspect.signature(_SelfProduct.forward)


def _times_both(grad: Tensor, z: Tensor) -> Tensor:
    """(G + G^T) z; on a CPU in squares, of which one and its mirror image are the same numbers."""
    if z.device.type != "cpu" or len(z) <= CPU_TILE:
        return (grad + grad.T) @ z
    parts = [slice(i, min(i + CPU_TILE, len(z))) for i in range(0, len(z), CPU_TILE)]
    result = torch.zeros_like(z)
    square = grad.new_empty(CPU_TILE, CPU_TILE)
    for i, rows in enumerate(parts):
        for columns in parts[i:]:
            block = grad[rows, columns]
            both = square[: block.shape[0], : block.shape[1]]
            torch.add(block, grad[columns, rows].T, out=both)
            result[rows].addmm_(both, z[columns])
            if rows != columns:
                result[columns].addmm_(both.T, z[rows])
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
        with autocast_off(grad.device.type):
            total = sum(
                ctx.losses_of(rows, z[rows] @ z.T)[0].sum() for rows in _chunks(z, ctx.chunk_size)
            )
            return *torch.autograd.grad(total, z, grad, create_graph=True), None, None, None


def _chunks(z: Tensor, chunk_size: int) -> list[slice]:
    return [slice(i, min(i + chunk_size, len(z))) for i in range(0, len(z), chunk_size)]
