"""Losses of queries computed for a chunk of queries at a time, and again in backward.

Nothing of a chunk is kept but its losses, so that memory does not grow with N x M. It serves every
distance, reducer and variant; `product` needs no second computation where it applies.
"""

from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from pml_pnp.precision import autocast_off


class RandomState:
    """State of the random number generators now, for a distance or variant that draws numbers."""

    def __init__(self, *tensors: Tensor) -> None:
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(*tensors)

    @contextmanager
    def restored(self):
        """Draw the same numbers again inside, and leave the generators as they are now."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states)
            yield


class Call(NamedTuple):
    """What `Recomputed` is applied to, before the parameters whose gradient is wanted as well."""

    function: Callable[[slice, Tensor, Tensor | None], tuple[Tensor, ...]]
    """Maps rows, all queries and all references to the losses of these rows, and to tensors
    without gradient; called now."""
    again: Callable[[slice, Tensor, Tensor | None], tuple[Tensor, ...]]
    """The same, called in backward: with the settings and modules as they are now."""
    chunk_size: int
    """Queries at a time."""
    rng: RandomState
    queries: Tensor
    """(N, d)"""
    references: Tensor | None
    """(M, d), or None where they are the queries."""

    @staticmethod
    def of(function, again, chunk_size: int, queries: Tensor, references: Tensor | None) -> "Call":
        """Call on tensors that can be read again in backward."""
        rng = RandomState(queries)
        if torch.is_grad_enabled():
            # A memory moves on before backward; a tensor of inference mode cannot be saved for it.
            queries, references = (
                x if x is None or x.requires_grad else x.clone() for x in (queries, references)
            )
        return Call(function, again, chunk_size, rng, queries, references)


class Recomputed(torch.autograd.Function):
    """The concatenated results of `function` for all chunks of queries.

    The first is differentiable with respect to queries, references and parameters.
    """

    @staticmethod
    def forward(function, again, chunk_size, rng, queries, references, *parameters):
        chunks = [function(rows, queries, references) for rows in _chunks(queries, chunk_size)]
        return tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, ctx.again, ctx.chunk_size, ctx.rng, *tensors = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        # Saved, so that PyTorch raises if one of them is changed in place before backward.
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad, *_):
        needed = ctx.needs_input_grad
        if grad is None:
            return (None,) * len(needed)
        create_graph = torch.is_grad_enabled()
        queries, references, *parameters = ctx.saved_tensors
        with torch.enable_grad(), autocast_off(grad.device.type), ctx.rng.restored():
            # Views: the gradient is that of what is passed, not of what it was computed from.
            queries, references = (x if x is None else x.view_as(x) for x in (queries, references))
            tensors = zip((queries, references, *parameters), needed[4:], strict=True)
            inputs = [x for x, is_needed in tensors if is_needed]
            total = [torch.zeros_like(x) for x in inputs]
            for rows in _chunks(queries, ctx.chunk_size):
                losses = ctx.again(rows, queries, references)[0]
                if not losses.requires_grad:
                    continue
                _check_leaves(losses, inputs)
                found = torch.autograd.grad(
                    losses, inputs, grad[rows], create_graph=create_graph, allow_unused=True
                )
                total = [t if g is None else t + g for t, g in zip(total, found, strict=True)]
        found = iter(total)
        return tuple(next(found) if is_needed else None for is_needed in needed)


def _chunks(queries: Tensor, chunk_size: int) -> list[slice]:
    n = len(queries)
    return [slice(i, min(i + chunk_size, n)) for i in range(0, n, chunk_size)]


def _check_leaves(losses: Tensor, inputs: list[Tensor]) -> None:
    """Raise RuntimeError if the losses depend on a tensor whose gradient would be lost."""
    ends = {x.grad_fn for x in inputs} - {None}
    known = {id(x) for x in inputs}
    waiting, seen = [losses.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or node in ends:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise RuntimeError(
                "with a chunk_size, gradients reach embeddings, references and the parameters of "
                "distance and variant, got a distance or variant that uses another tensor of shape "
                f"{tuple(leaf.shape)} that requires a gradient: make it a parameter of an nn.Module"
            )
        waiting += [n for n, _ in node.next_functions]
