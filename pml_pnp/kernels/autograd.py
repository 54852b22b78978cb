"""Losses of queries as autograd sees them, whatever kernel computes them."""

import functools
import importlib.util
import inspect
import os
import warnings
from collections.abc import Callable
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from pml_pnp.autocast import autocast_off
from pml_pnp.kernels import eager
from pml_pnp.kernels.settings import Settings
from pml_pnp.relation import Relation
from pml_pnp.variants import apply_variant

KERNEL_VARIABLE = "PML_PNP_KERNEL"
# Smaller similarities are not overwritten: there is little to save, and the graph needs a node for
# it, which costs more (benchmarks/measure.py --only overwriting).
SMALLEST_OVERWRITTEN = 2**18


class Origin(NamedTuple):
    """How similarities were computed, distance(queries, references), to compute them again."""

    distance: Callable[[Tensor, Tensor | None], Tensor]
    queries: Tensor
    references: Tensor | None


def query_losses(
    s: Tensor,
    self_similarity: Tensor | None,
    relation: Relation,
    settings: Settings,
    recomputed: bool | None = None,
    origin: Origin | None = None,
) -> Tensor:
    """Losses of N queries, zero for those that do not count.

    Args:
        s: similarities, (N, M), float32 or float64
        self_similarity: of each query to itself, (N,), where the references do not hold it and
            `settings.include_self` is on
        relation: positives and negatives
        settings: hyperparameters
        recomputed: None for a call that runs once. Of a call that runs again before its backward
            (`torch.utils.checkpoint`), False the first time, when only losses are asked for, and
            True the second, when only backward is: losses are then zeros.
        origin: how `s` was computed, if nothing else will read it, not even backward of its
            distance. The gradient may then overwrite it, which saves N x M numbers and, on a CPU,
            the time that the operating system takes to hand them out. A second backward, and one
            with create_graph=True, computes `s` again.

    Returns:
        (N,), differentiable twice with respect to `s` and `self_similarity`
    """
    if not settings.include_self:
        self_similarity = None
    if not isinstance(settings.variant, str):
        return _composed(s, self_similarity, relation, settings)
    with_gradient = (
        torch.is_grad_enabled()
        and recomputed is None
        and (s.requires_grad or (self_similarity is not None and self_similarity.requires_grad))
    )
    again = None
    if origin is not None and with_gradient and _may_overwrite(s) and _may_be_saved(origin):
        again = _Again(origin.distance)
        s = _Kept.apply(s, again, origin)
    return _QueryLosses.apply(
        s, self_similarity, relation, settings, bool(recomputed), with_gradient, again
    )[0]


@torch.no_grad()
def query_losses_and_gradient(
    s: Tensor, relation: Relation, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Losses of N queries, and the gradient of their sum with respect to `s`, without a graph.

    The gradient may take the place of `s`.
    """
    overwrite = _may_overwrite(s)
    losses, gradient, _, factor = _compute(s, None, relation, settings, True, overwrite)
    return losses, gradient.mul_(factor)


def _may_overwrite(s: Tensor) -> bool:
    """Whether the gradient may overwrite `s`: not in a trace, nor with Triton's kernel.

    That reads a row more than once.
    """
    return (
        s.numel() >= SMALLEST_OVERWRITTEN
        and type(s) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not _takes_triton(s)
    )


def _may_be_saved(origin: Origin) -> bool:
    return not any(x is not None and x.is_inference() for x in origin[1:])


class _Again:
    """Computes similarities again, from what their graph has kept."""

    def __init__(self, distance: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        self.distance = distance

    def __call__(self) -> Tensor:
        queries, references = self.kept.saved_tensors
        return self.distance(queries, references)


class _Kept(torch.autograd.Function):
    """Hands similarities on, and keeps what they were computed from for as long as the graph.

    Not in `_QueryLosses`, whose saved tensors are all looked at in every backward: that a memory of
    references has moved on since is an error in those alone that need it.
    """

    @staticmethod
    def forward(s: Tensor, again: _Again, origin: Origin) -> Tensor:
        return s.view_as(s)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, again, origin = inputs
        ctx.save_for_backward(origin.queries, origin.references)
        again.kept = ctx

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


def _compute(
    s: Tensor,
    self_similarity: Tensor | None,
    relation: Relation,
    settings: Settings,
    with_gradient: bool,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose the kernel and call it; what it returns is described at `eager.query_losses`."""
    if torch.compiler.is_compiling():
        return _compute_opaque(s, self_similarity, *relation, *settings, with_gradient)
    if _takes_triton(s):
        from pml_pnp.kernels import triton_kernel

        return triton_kernel.query_losses(s, self_similarity, relation, settings, with_gradient)
    return eager.query_losses(s, self_similarity, relation, settings, with_gradient, overwrite)


# torch.compile sees one operation instead of loops whose length depends on the data.
@torch.library.custom_op("pml_pnp::query_losses", mutates_args=())
def _compute_opaque(
    s: Tensor,
    self_similarity: Optional[Tensor],  # noqa: UP045 (PyTorch 2.4 reads no other spelling)
    columns: Tensor,
    start: Tensor,
    stop: Tensor,
    counted: Tensor,
    absent: Optional[Tensor],  # noqa: UP045
    own: Optional[Tensor],  # noqa: UP045
    scale: float,
    variant: str,
    alpha: float,
    b: float,
    include_self: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    relation = Relation(columns, start, stop, counted, absent, own)
    settings = Settings(scale, variant, alpha, b, include_self)
    return _compute(s, self_similarity, relation, settings, with_gradient)


@_compute_opaque.register_fake
def _(s, self_similarity, *args):
    n, with_gradient = s.shape[0], args[-1]
    return (
        s.new_empty(n),
        s.new_empty(s.shape if with_gradient else 0),
        s.new_empty((n, 1) if with_gradient and self_similarity is not None else 0),
        s.new_empty(n, 1),
    )


def _takes_triton(s: Tensor) -> bool:
    """Whether Triton's kernel computes this: float32 on a GPU, unless the environment forbids."""
    choice = os.environ.get(KERNEL_VARIABLE, "auto")
    if choice not in ("auto", "eager", "triton"):
        raise ValueError(f"{KERNEL_VARIABLE} must be auto, eager or triton, got {choice!r}")
    if choice == "eager" or s.dtype != torch.float32:
        return False
    return choice == "triton" or (s.device.type == "cuda" and _triton_works(s.device))


@functools.cache
def _triton_works(device: torch.device) -> bool:
    """Whether Triton is installed, and has what it needs to compile for this device; tried once."""
    if importlib.util.find_spec("triton") is None:
        return False
    from pml_pnp.kernels import triton_kernel

    labels = torch.zeros(2, dtype=torch.int64, device=device)
    relation = Relation.from_labels(labels, labels, torch.arange(2, device=device))
    settings = Settings(1.0, "O", 1.0, 1.0, True)
    try:
        triton_kernel.query_losses(torch.eye(2, device=device), None, relation, settings, True)
    except Exception as error:
        warnings.warn(f"Triton does not work here, plain PyTorch is used: {error}", stacklevel=2)
        return False
    return True


class _QueryLosses(torch.autograd.Function):
    """Makes the gradient along with the losses, and scales it in backward."""

    @staticmethod
    def forward(s, self_similarity, relation, settings, is_recomputed, with_gradient, again):
        if is_recomputed:
            return s.new_zeros(len(s)), *s.new_empty(3, 0).unbind()
        if again is None:
            return _compute(s, self_similarity, relation, settings, with_gradient)
        s = s.detach()
        losses, _, *rest = _compute(s, self_similarity, relation, settings, True, True)
        return losses, s.new_empty(0), *rest

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        s, self_similarity, relation, ctx.settings, _, with_gradient, again = inputs
        gradients = output[1:]
        ctx.mark_non_differentiable(*gradients)
        ctx.set_materialize_grads(False)
        ctx.gradients, ctx.again = None, again
        if torch.compiler.is_compiling():
            ctx.save_for_backward(s, self_similarity, *relation, *gradients)
            return
        if with_gradient:
            # Not saved for backward, so that backward may scale it in place: N x M numbers less.
            ctx.gradients = gradients
        if again is not None:
            ctx.gradients = s.detach(), *gradients[1:]
            s = None
        ctx.save_for_backward(s, self_similarity, *relation)

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 7
        with autocast_off(grad.device.type):
            return *_QueryLosses._gradients(ctx, grad), *[None] * 5

    @staticmethod
    def _gradients(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """With respect to s and to self_similarity."""
        s, self_similarity, *saved = ctx.saved_tensors
        fields = len(Relation._fields)
        relation, gradients = Relation(*saved[:fields]), saved[fields:]
        if torch.is_grad_enabled():
            s = s if ctx.again is None else ctx.again()
            losses = _composed(s, self_similarity, relation, ctx.settings)
            wanted = [needed for needed in ctx.needs_input_grad[:2]]
            inputs = [
                x for x, is_wanted in zip((s, self_similarity), wanted, strict=True) if is_wanted
            ]
            grads = iter(torch.autograd.grad(losses, inputs, grad, create_graph=True))
            return tuple(next(grads) if is_wanted else None for is_wanted in wanted)
        saved = len(gradients) > 0
        if not saved:
            gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # used up by an earlier backward, or not made
            s = s if ctx.again is None else ctx.again()
            gradients = _compute(s, self_similarity, relation, ctx.settings, True)[1:]
        grad_s, grad_own, factor = gradients
        factor = grad.unsqueeze(1) * factor
        grad_s = grad_s * factor if saved else grad_s.mul_(factor)
        return grad_s, None if self_similarity is None else (grad_own * factor).squeeze(1)


# PyTorch binds the arguments at every call, and would build this anew: a twentieth of a step at
# N = 32.
for function in (_QueryLosses, _Kept):
    function.forward.__signature__ = inspect.signature(function.forward)


def _composed(
    s: Tensor, self_similarity: Tensor | None, relation: Relation, settings: Settings
) -> Tensor:
    """The same by operations that autograd differentiates, as often as it is asked to."""
    t, used = _targets(s, self_similarity, relation, settings.include_self)
    r = eager.negatives_before(s, t, relation.negative_mask(s.shape[1]), settings.scale)
    # What is padding, or of a query that does not count, is kept at R = 1, so that no f, and no
    # derivative of it, is asked for at an odd place.
    r = r.masked_fill(~used, 1)
    per_positive = apply_variant(settings.variant, r, alpha=settings.alpha, b=settings.b)
    return per_positive.masked_fill(~used, 0).sum(dim=1) / used.sum(dim=1).clamp(min=1)


def _targets(
    s: Tensor, self_similarity: Tensor | None, relation: Relation, include_self: bool
) -> tuple[Tensor, Tensor]:
    """Similarities of the positives, (N, P), and which of them are no padding."""
    with_own = include_self and self_similarity is None
    rows = slice(0, len(s))
    index = relation.positives(rows, *reversed(relation.sizes()))
    used = relation.used(rows, index, with_own)
    t = s.gather(1, index)
    if self_similarity is not None:
        t = torch.cat([t, self_similarity.unsqueeze(1)], dim=1)
        used = torch.cat([used, relation.counted.unsqueeze(1)], dim=1)
    return t.masked_fill(~used, 0), used


@torch.no_grad()
def ranking_counts(s: Tensor, relation: Relation, is_inverted: bool) -> Tensor:
    """Three numbers: negatives strictly before positives, positives with any, positives.

    Summed over all queries, by hard counts, without the queries themselves; (3,), dtype of `s`.
    """
    t, used = _targets(s, None, relation, False)
    mask = relation.negative_mask(s.shape[1])
    count = eager.count_negatives_before(s, t, mask, 1.0 if is_inverted else -1.0)
    count.masked_fill_(~used, 0)
    return torch.stack([count.sum(), (count > 0).sum(), used.sum()])
