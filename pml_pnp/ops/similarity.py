"""Losses of queries from a similarity matrix, differentiable by autograd.

The gradient of a named variant is computed along with the losses and scaled in backward. Callable
variants and second derivatives use `differentiable_losses`, whose operations autograd
differentiates.
"""

from functools import partial
from typing import Optional

import torch
from torch import Tensor

from pml_pnp.ops import dispatch, eager
from pml_pnp.ops.settings import Settings
from pml_pnp.pairs import Relation
from pml_pnp.precision import autocast_off
from pml_pnp.variants import apply_variant

COUNTS = 3  # numbers that `ranking_counts` returns


def query_losses(
    s: Tensor, self_similarity: Tensor | None, relation: Relation, settings: Settings
) -> Tensor:
    """Compute the losses of N queries, zero for those that do not count.

    Args:
        s: similarities, (N, M), float32 or float64
        self_similarity: of each query to itself, (N,). Needed if `settings.include_self` is on and
            `s` does not contain it; replaces the one in `s`
        relation: positives and negatives
        settings: hyperparameters

    Returns:
        (N,), differentiable twice with respect to `s` and `self_similarity`
    """
    if not settings.include_self:
        self_similarity = None
    if not isinstance(settings.variant, str):
        return differentiable_losses(s, self_similarity, relation, settings)
    requires_grad = s.requires_grad or (
        self_similarity is not None and self_similarity.requires_grad
    )
    needs_graph = torch.is_grad_enabled() and requires_grad
    if needs_graph or torch.compiler.is_compiling():
        return _QueryLosses.apply(s, self_similarity, relation, settings)[0]
    return dispatch.kernel_for(s)(s, self_similarity, relation, settings, False)[0]


class _QueryLosses(torch.autograd.Function):
    @staticmethod
    def forward(s, self_similarity, relation, settings):
        if torch.compiler.is_compiling():
            return _losses_and_gradient(s, self_similarity, *relation, *settings)
        return dispatch.kernel_for(s)(s, self_similarity, relation, settings, True)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        s, self_similarity, relation, ctx.settings = inputs
        _, *gradients = output
        ctx.mark_non_differentiable(*gradients)
        ctx.set_materialize_grads(False)
        if torch.compiler.is_compiling():
            ctx.save_for_backward(s, self_similarity, *relation, *gradients)
        else:
            # Not by save_for_backward, so that backward may scale it in place, without a copy.
            ctx.gradients = gradients
            ctx.save_for_backward(s, self_similarity, *relation)

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return None, None, None, None
        with autocast_off(grad.device.type):
            return *_QueryLosses._gradients(ctx, grad), None, None

    @staticmethod
    def _gradients(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Gradients with respect to s and self_similarity."""
        s, self_similarity, *saved = ctx.saved_tensors
        fields = len(Relation._fields)
        relation, gradients = Relation(*saved[:fields]), saved[fields:]
        create_graph = torch.is_grad_enabled()
        if create_graph:
            losses = partial(differentiable_losses, relation=relation, settings=ctx.settings)
            found = differentiable_gradients(
                losses, (s, self_similarity), ctx.needs_input_grad, grad
            )
            if found is not None:
                return found
        lacks_gradients = len(gradients) == 0  # torch.compile takes the truth of a tuple since 2.13
        in_place = lacks_gradients and not create_graph
        if lacks_gradients:
            gradients = ctx.gradients
            if in_place:
                ctx.gradients = None
        if gradients is None:  # an earlier backward has scaled them
            gradients = dispatch.kernel_for(s)(s, self_similarity, relation, ctx.settings, True)[1:]
        grad_s, grad_self = gradients
        column = grad.unsqueeze(1)
        grad_s = grad_s.mul_(column) if in_place else grad_s * column
        return grad_s, None if self_similarity is None else grad_self * grad


def differentiable_gradients(function, tensors, needed, grad: Tensor):
    """Differentiable gradients of `function(*tensors)` with respect to the tensors in `needed`.

    None if no tensor requires a gradient: under torch.func, grad mode is on although none does.
    """
    # Views end the graph here: the gradient is that of the tensors, not of their own inputs.
    views = [x if x is None else x.view_as(x) for x in tensors]
    wanted = [x is not None and n and x.requires_grad for x, n in zip(views, needed, strict=False)]
    inputs = [x for x, is_wanted in zip(views, wanted, strict=True) if is_wanted]
    if not inputs:
        return None
    found = iter(torch.autograd.grad(function(*views), inputs, grad, create_graph=True))
    return tuple(next(found) if is_wanted else None for is_wanted in wanted)


# For torch.compile this is one operation; it could not trace loops whose length depends on data.
@torch.library.custom_op("pml_pnp::losses_and_gradient", mutates_args=())
def _losses_and_gradient(
    s: Tensor,
    self_similarity: Optional[Tensor],  # noqa: UP045 (PyTorch 2.4 reads no other spelling)
    columns: Tensor,
    start: Tensor,
    number: Tensor,
    not_negative: Optional[Tensor],  # noqa: UP045
    query_column: Optional[Tensor],  # noqa: UP045
    scale: float,
    variant: str,
    alpha: float,
    b: float,
    include_self: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    relation = Relation(columns, start, number, not_negative, query_column)
    settings = Settings(scale, variant, alpha, b, include_self)
    return dispatch.kernel_for(s)(s, self_similarity, relation, settings, True)


@_losses_and_gradient.register_fake
def _(s, self_similarity, *args):
    n = s.shape[0]  # not len(s), which would make a graph for every batch size
    return s.new_empty(n), s.new_empty(s.shape), s.new_empty(0 if self_similarity is None else n)


def differentiable_losses(
    s: Tensor, self_similarity: Tensor | None, relation: Relation, settings: Settings
) -> Tensor:
    """Compute `query_losses` by operations that autograd differentiates."""
    index = relation.positives(*relation.sizes())
    t = s.gather(1, index)
    used = relation.used(index, settings.include_self and self_similarity is None)
    if self_similarity is not None:
        t = torch.cat([t, self_similarity.unsqueeze(1)], dim=1)
        used = torch.cat([used, relation.counted().unsqueeze(1)], dim=1)
    t = t.masked_fill(~used, 0)
    s = s.clone()
    relation.fill_non_negatives_(s, index, -eager.INF if settings.scale > 0 else eager.INF)
    r = eager.NegativesBefore.apply(s, t, settings.scale)
    # Unused entries get R = 1, where every f and its derivatives are finite, and no gradient.
    r = r.masked_fill(~used, 1)
    per_positive = apply_variant(settings.variant, r, alpha=settings.alpha, b=settings.b)
    return per_positive.masked_fill(~used, 0).sum(dim=1) / used.sum(dim=1).clamp(min=1)


@torch.no_grad()
def ranking_counts(s: Tensor, relation: Relation, is_inverted: bool) -> Tensor:
    """Count negatives strictly before positives, positives with at least one, and positives.

    The counts are summed over all queries, so that those of blocks of queries add up, and leave out
    the queries themselves; (COUNTS,), dtype of `s`.
    """
    index = relation.positives(*relation.sizes())
    used = relation.used(index, False)
    s = s.clone() if is_inverted else -s
    t = s.gather(1, index)
    relation.fill_non_negatives_(s, index, -eager.INF)
    not_before = torch.searchsorted(s.sort(dim=1)[0], t, right=True)
    count = (s.shape[1] - not_before).masked_fill_(~used, 0)
    return torch.stack([count.sum(), (count > 0).sum(), used.sum()]).to(s.dtype)
