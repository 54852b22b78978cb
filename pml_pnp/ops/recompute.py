"""Losses computed for a chunk of queries at a time, and again in backward.

Only the losses of a chunk are kept, so that memory does not grow with N x M. This works for every
distance, reducer and variant; `product` is used where it applies, and computes nothing again.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from pml_pnp.pairs import blocks_of
from pml_pnp.precision import autocast_off

Function = Callable[[slice, Tensor, Tensor | None], tuple[Tensor, ...]]


def in_chunks(
    function: Function,
    in_backward: Callable[[], Function],
    chunk_size: int,
    queries: Tensor,
    references: Tensor | None,
    parameters: Iterable[Tensor],
) -> tuple[Tensor, ...]:
    """Concatenate the results of a function for all chunks of queries.

    Args:
        function: maps rows, all queries and all references to the losses of these rows, and to
            other tensors that have no gradient; called in forward
        in_backward: makes the same function for one backward, with copies of the settings and
            modules of forward. Another backward gets copies of its own, because calling a module
            may change its buffers
        chunk_size: number of queries in a chunk
        queries: (N, d)
        references: (M, d), or None if they are the queries
        parameters: those of modules that the function calls

    Returns:
        Tensors of N rows, the first differentiable by queries, references and parameters.
    """
    call = _Call(function, in_backward, chunk_size, queries)
    return Recomputed.apply(call, *map(_clone_constant, (queries, references)), *parameters)


class _Call:
    """The arguments that are not tensors, and the state of the random number generators.

    Not a tuple, which torch.func would take apart.
    """

    def __init__(self, function, in_backward, chunk_size: int, queries: Tensor) -> None:
        self.function, self.in_backward, self.chunk_size = function, in_backward, chunk_size
        self.random_state = torch.get_rng_state()
        self.devices, self.device_states = get_device_states(queries)

    def restore_random_state(self) -> None:
        """Set the generators to their state at the call."""
        torch.set_rng_state(self.random_state)
        set_device_states(self.devices, self.device_states)


def _clone_constant(x: Tensor | None) -> Tensor | None:
    """Clone a tensor that has no gradient, before it is saved for backward.

    A CrossBatchMemory changes its references before backward, and a tensor that was created in
    inference mode cannot be saved.
    """
    is_constant = x is not None and torch.is_grad_enabled() and not x.requires_grad
    return x.clone() if is_constant else x


class Recomputed(torch.autograd.Function):
    """Computes what `in_chunks` returns."""

    @staticmethod
    def forward(call, queries, references, *parameters):  # noqa: D102
        blocks = blocks_of(len(queries), call.chunk_size)
        chunks = [call.function(rows, queries, references) for rows in blocks]
        return tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: D102
        ctx.call, *tensors = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        # By save_for_backward, so that PyTorch raises if one of them has been changed in place.
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad, *_):  # noqa: D102
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        create_graph, needed, call = torch.is_grad_enabled(), ctx.needs_input_grad[1:], ctx.call
        queries, references, *parameters = ctx.saved_tensors
        with (
            torch.enable_grad(),
            autocast_off(grad.device.type),
            torch.random.fork_rng(call.devices),
        ):
            call.restore_random_state()
            function = call.in_backward()
            queries, references = map(_view, (queries, references), needed)
            tensors = zip((queries, references, *parameters), needed, strict=True)
            inputs = [x for x, is_needed in tensors if is_needed]
            total: list[Tensor | None] = [None] * len(inputs)  # None for an input that is not used
            for rows in blocks_of(len(queries), call.chunk_size):
                losses = function(rows, queries, references)[0]
                if losses.requires_grad:
                    _check_leaves(losses, inputs)
                    found = torch.autograd.grad(
                        losses, inputs, grad[rows], create_graph=create_graph, allow_unused=True
                    )
                    total = [_sum(*pair) for pair in zip(total, found, strict=True)]
        found = iter(total)
        return None, *(next(found) if x else None for x in needed)


def _sum(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """The sum of two gradients, where None stands for zero."""
    return part if total is None else total if part is None else total + part


def _view(x: Tensor | None, is_needed: bool) -> Tensor | None:
    """A view of x, which ends the graph: the gradient is that of x, not of the inputs of x."""
    if x is None:
        return None
    view = x.view_as(x)
    # By now, a tensor that torch.func has differentiated does not require a gradient any more.
    return view.detach().requires_grad_() if is_needed and not view.requires_grad else view


def _check_leaves(losses: Tensor, inputs: list[Tensor]) -> None:
    """Raise RuntimeError if the losses depend on another leaf, whose gradient would be lost."""
    seen = {None, *(x.grad_fn for x in inputs)}
    waiting = [losses.grad_fn]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        waiting += [n for n, _ in node.next_functions]
        leaf = getattr(node, "variable", None)
        if leaf is not None and not any(leaf is x for x in inputs):
            raise RuntimeError(
                "with a chunk_size, gradients reach embeddings, references and the parameters of "
                "distance and variant, got a distance or variant that uses another tensor of shape "
                f"{tuple(leaf.shape)} that requires a gradient: make it a parameter of an nn.Module"
            )
