"""Losses of queries and their gradients, in one Triton program per query.

The formulas are those of `eager`. A program reads its row of similarities twice for each group of
positives: once to sum sigmoids to R, once to sum their derivatives, which are weighted by f'(R).
Only this program writes its row of the gradient, in a fixed order and without atomics, so the same
input gives the same bits. The number of positives of a query is read on the device, so the host
waits for nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pml_pnp.ops.settings import Settings
from pml_pnp.pairs import Relation, blocks_of

# Numbers of references and positives that a program handles at a time. A class usually has four.
BLOCK_M = 1024
BLOCK_P = 4
# Entries of a gradient that is to overwrite the similarities and is first written beside: 128 MiB.
GRADIENT_BLOCK = 2**25


@triton.jit
def _log1p(x):
    # log(u) x / (u - 1), u = 1 + x: the rounding of u cancels.
    u = 1 + x
    exact = u == 1
    return tl.where(exact, x, tl.log(u) * x / tl.where(exact, 1, u - 1))


@triton.jit
def _one_minus_exp(y):
    # 1 - exp(y), y <= 0: the rounding of u = exp(y) cancels in (1 - u) y / log(u).
    u = tl.exp(y)
    exact = u == 1
    tiny = u < 1e-6
    middle = (1 - u) * y / tl.log(tl.where(exact | tiny, 0.5, u))
    return tl.where(exact, -y, tl.where(tiny, 1 - u, middle))


@triton.jit
def _bounded(r, b):
    # As in `variants`: r w - 2 w^2 z (1/3 + z^2/5 + ...) near zero.
    x = b * r
    near_zero = tl.minimum(x, 0.5)
    z = near_zero / (2 + near_zero)
    w = z / b
    z2 = z * z
    series = z2 * (1 / 13) + 1 / 11
    series = series * z2 + 1 / 9
    series = series * z2 + 1 / 7
    series = series * z2 + 1 / 5
    series = series * z2 + 1 / 3
    near = r * w - 2 * w * z * w * series
    return tl.where(x < 0.5, near, (r - _log1p(x) / b) / b)


@triton.jit
def _f(r, alpha, b, VARIANT: tl.constexpr):
    if VARIANT == "O":
        return r
    elif VARIANT == "Iu":
        return (1 + r) * _log1p(r)
    elif VARIANT == "Ib":
        return _bounded(r, b)
    elif VARIANT == "Ds":
        return _log1p(r)
    else:
        tl.static_assert(VARIANT == "Dq")
        return _one_minus_exp(-alpha * _log1p(r))


@triton.jit
def _derivative(r, alpha, b, VARIANT: tl.constexpr):
    if VARIANT == "O":
        return r * 0 + 1
    elif VARIANT == "Iu":
        return 1 + _log1p(r)
    elif VARIANT == "Ib":
        return r / (1 + b * r)
    elif VARIANT == "Ds":
        return 1 / (1 + r)
    else:
        tl.static_assert(VARIANT == "Dq")
        return alpha * tl.exp(-(alpha + 1) * _log1p(r))


@triton.jit
def _sigmoids(row, j, t, first, last, scale, place, mask_row, m, HAS_MASK: tl.constexpr):
    """sigmoid(scale * (s[a, j] - t)), 0 where j is not a negative, and which j are negatives."""
    inside = j < m
    if HAS_MASK:
        negative = tl.load(mask_row + j, mask=inside, other=1) == 0
    else:
        at = tl.load(place + j, mask=inside, other=0)
        negative = inside & ((at < first) | (at >= last))
    x = tl.load(row + j, mask=negative, other=0.0)
    y = 1 / (1 + tl.exp((t[:, None] - x[None, :]) * scale))
    return tl.where(negative[None, :], y, 0.0), negative


# fmt: off
@triton.jit
def _sum_of_sigmoids(
    row, t, first, last, scale, place, mask_row, m,
    HAS_MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):
    # fmt: on
    """R of a group of positives, whose similarities are t."""
    r = tl.zeros([BLOCK_P], dtype=tl.float32)
    for begin in range(0, m, BLOCK_M):
        j = begin + tl.arange(0, BLOCK_M)
        y, negative = _sigmoids(row, j, t, first, last, scale, place, mask_row, m, HAS_MASK)
        r += tl.sum(y, axis=1)
    return r


# fmt: off
@triton.jit
def _add_derivatives(
    grad_row, group, w, row, t, first, last, scale, place, mask_row, m,
    HAS_MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):
    # fmt: on
    """Write a group's derivatives to the row of the gradient, and return their sums for each t."""
    grad_t = tl.zeros([BLOCK_P], dtype=tl.float32)
    for begin in range(0, m, BLOCK_M):
        j = begin + tl.arange(0, BLOCK_M)
        y, negative = _sigmoids(row, j, t, first, last, scale, place, mask_row, m, HAS_MASK)
        dy = w[:, None] * y * (1 - y)
        grad_t += tl.sum(dy, axis=1)
        grad = tl.sum(dy, axis=0)
        if group > 0:
            grad += tl.load(grad_row + j, mask=negative, other=0.0)
        tl.store(grad_row + j, grad, mask=negative)
    return grad_t


# fmt: off
@triton.jit
def _query(  # place[j] is the position of reference j in `columns`
    s, s_stride, self_similarity, columns, start, number, place, not_negative, query_column,
    losses, grad_s, grad_self, m, scale, alpha, b,
    VARIANT: tl.constexpr,
    HAS_MASK: tl.constexpr,  # not_negative is given
    HAS_SELF: tl.constexpr,  # self_similarity is given
    LISTED: tl.constexpr,  # the queries are among the references
    WITH_QUERY: tl.constexpr,  # and count as positives there
    WITH_GRADIENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    # fmt: on
    a = tl.program_id(0).to(tl.int64)
    row = s + a * s_stride
    mask_row = not_negative + a * m
    grad_row = grad_s + a * m
    first = tl.load(start + a)
    listed = tl.load(number + a)
    last = first + listed
    targets = listed + (1 if HAS_SELF else 0)
    share = 1.0 / tl.maximum(targets - (1 if LISTED and not WITH_QUERY else 0), 1)
    total = 0.0
    if not HAS_MASK:
        # A query without positives, too, has to write its row of the gradient.
        targets = tl.maximum(targets, 1)
    for group in range(0, targets, BLOCK_P):
        i = group + tl.arange(0, BLOCK_P)
        is_reference = i < listed
        column = tl.load(columns + first + i, mask=is_reference, other=0)
        # A query counts if it has a positive besides itself.
        counts = listed > i * 0 + (1 if LISTED else 0)
        used = is_reference & counts
        if LISTED and not WITH_QUERY:
            used = used & (column != tl.load(query_column + a))
        t = tl.load(row + column, mask=used, other=0.0)
        if HAS_SELF:
            is_self = (i == listed) & counts
            t = tl.where(is_self, tl.load(self_similarity + a), t)
            used = used | is_self
        # fmt: off
        r = _sum_of_sigmoids(
            row, t, first, last, scale, place, mask_row, m, HAS_MASK, BLOCK_M, BLOCK_P
        )
        # fmt: on
        total += tl.sum(tl.where(used, _f(r, alpha, b, VARIANT), 0.0), axis=0)
        if WITH_GRADIENT:
            w = tl.where(used, _derivative(r, alpha, b, VARIANT), 0.0) * (share * scale)
            # fmt: off
            grad_t = _add_derivatives(
                grad_row, group, w, row, t, first, last, scale, place, mask_row, m, HAS_MASK,
                BLOCK_M, BLOCK_P,
            )
            # fmt: on
            if HAS_SELF:
                tl.store(grad_self + a + i * 0, -grad_t, mask=is_self)
            if HAS_MASK:
                # In a user's masks a reference may be both positive and negative, so this adds to
                # what other threads of the program have written.
                tl.debug_barrier()
                grad = tl.load(grad_row + column, mask=used & is_reference, other=0.0) - grad_t
                tl.store(grad_row + column, grad, mask=used & is_reference)
                tl.debug_barrier()
            else:
                tl.store(grad_row + column, -grad_t, mask=is_reference)
    tl.store(losses + a, total * share)


def losses_and_gradient(
    s: Tensor,
    self_similarity: Tensor | None,
    relation: Relation,
    settings: Settings,
    with_gradient: bool,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Like `eager.losses_and_gradient`, for float32.

    A program reads its row of `s` several times, so the gradient is written to another matrix. One
    of more than GRADIENT_BLOCK entries overwrites `s` if it may, a block of rows after the other.
    """
    n, m = s.shape
    if overwrite and with_gradient and n * m > GRADIENT_BLOCK:
        height, found = max(1, GRADIENT_BLOCK // m), []
        for rows in blocks_of(n, height):
            own = None if self_similarity is None else self_similarity[rows]
            part = losses_and_gradient(s[rows], own, relation.of(rows), settings, True)
            s[rows] = part[1]
            found.append(part[::2])
            del part  # before the next block
        losses, grad_self = (torch.cat(x) for x in zip(*found, strict=True))
        return losses, s, grad_self
    s = s if s.stride(1) == 1 else s.contiguous()
    mask, query_column = relation.not_negative, relation.query_column
    has_self = self_similarity is not None
    place = relation.columns
    if mask is None:
        place = torch.empty_like(relation.columns, dtype=torch.int32)
        place[relation.columns] = torch.arange(m, dtype=torch.int32, device=s.device)
    losses = s.new_empty(n)
    new = s.new_empty if mask is None else s.new_zeros  # without a mask every entry is written
    grad_s = new((n, m) if with_gradient else 0)
    grad_self = s.new_zeros(n if with_gradient and has_self else 0)
    if n == 0:
        return losses, grad_s, grad_self
    with torch.cuda.device_of(s):
        # fmt: off
        _query[(n,)](
            s, s.stride(0), self_similarity.contiguous() if has_self else s,
            relation.columns, relation.start, relation.number, place,
            place if mask is None else mask.contiguous().view(torch.int8),
            relation.start if query_column is None else query_column,
            losses, grad_s, grad_self, m, settings.scale, settings.alpha, settings.b,
            VARIANT=settings.variant, HAS_MASK=mask is not None, HAS_SELF=has_self,
            LISTED=query_column is not None, WITH_QUERY=settings.include_self and not has_self,
            WITH_GRADIENT=with_gradient, BLOCK_M=BLOCK_M, BLOCK_P=BLOCK_P,
        )
        # fmt: on
    return losses, grad_s, grad_self
