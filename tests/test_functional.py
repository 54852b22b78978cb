"""`pml_pnp.functional`: the loss and the statistics of a similarity matrix, without PML."""

import helpers
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from pml_pnp.functional import pnp_loss, ranking_statistics


@pytest.mark.usefixtures("sigmoids")
@pytest.mark.parametrize(
    ("variant", "is_inverted"),
    [*((variant, True) for variant in (*helpers.VARIANTS, torch.sinh)), ("Ib", False)],
)
def test_gradients_of_first_and_second_order(variant, is_inverted):
    s, own = 0.1 * torch.randn(3, 4).double(), 0.1 + 0.1 * torch.randn(3).double()
    kind = torch.randint(0, 3, (3, 4))  # 1: positive, 2: negative
    kind[1] = 2  # a query without positives
    kind[2, kind[2] == 2] = 0  # and one without negatives
    kwargs = {"variant": variant, "is_inverted": is_inverted, "anneal": 0.1}

    def call(s, own):
        return pnp_loss(s, **masks(kind == 1, kind == 2), self_similarity=own, **kwargs)[0]

    inputs = (s.requires_grad_(), own.requires_grad_())
    assert gradcheck(call, inputs) and gradgradcheck(call, inputs)


def test_a_callable_sees_no_odd_place_in_the_padding():
    """A square root has an infinite derivative at R = 0, which padding must not ask for."""
    s = torch.tensor([[-1.0, -1.01, -0.99], [-1.0, -1.01, -0.99]], requires_grad=True)
    positive = torch.tensor([[True, False, False], [True, True, False]])
    losses, _ = pnp_loss(
        s, positive_mask=positive, negative_mask=~positive, include_self=False, variant=torch.sqrt
    )
    losses.sum().backward()
    assert s.grad.isfinite().all()


def test_a_query_that_does_not_count_is_not_shown_to_the_callable():
    """Its rank may lie where f overflows, and would then make the gradient NaN."""
    s = torch.full((200, 200), 0.5)
    s[:2, :2] = 1
    s.requires_grad_()
    labels = torch.arange(200)
    labels[1] = 0
    losses, counted = pnp_loss(s, labels, variant=torch.expm1)  # the others have R = 99.5
    assert counted.nonzero().flatten().tolist() == [0, 1]
    losses.sum().backward()
    assert losses.isfinite().all() and s.grad.isfinite().all()


@pytest.mark.parametrize("by", ["labels", "masks"])
def test_minus_infinity_may_stand_where_the_loss_does_not_look(by):
    labels = torch.tensor([0, 0, 1, 1, 1])
    s = (0.1 * torch.randn(5, 5)).fill_diagonal_(float("-inf")).requires_grad_()
    kwargs = {"labels": labels}
    if by == "masks":
        with torch.no_grad():
            s[:, 0] = float("-inf")  # the column that padding would point to
        same = labels[:, None] == labels
        seen = torch.ones(5, 5, dtype=torch.bool).fill_diagonal_(False)
        seen[:, 0] = False
        kwargs = masks(same & seen, ~same & seen)
    losses, _ = pnp_loss(s, include_self=False, **kwargs)
    losses.sum().backward()
    assert losses.isfinite().all() and s.grad.isfinite().all()


S, Y = torch.eye(4), torch.tensor([0, 0, 1, 1])
MASK = torch.zeros(4, 4, dtype=torch.bool)


def masks(positive=MASK, negative=MASK):
    return {"positive_mask": positive, "negative_mask": negative}


TYPE_ERRORS = [
    (([[1.0]], Y), {}, "similarity must be a tensor, got list"),
    ((S.long(), Y), {}, "similarity must be floating point, got torch.int64"),
    ((S, [0, 0, 1, 1]), {}, "labels must be a tensor, got list"),
    ((S, Y * 1j), {}, "labels must be real, got torch.complex64"),
    ((S,), masks(MASK.long()), "positive_mask must be a bool tensor, got torch.int64"),
]
NEEDS_SELF = "include_self=True needs self_similarity, one value for each of the 4 .* got None"
VALUE_ERRORS = [
    ((S[0], Y), {}, r"similarity must have shape \(N, M\), got \(4,\)"),
    ((S,), {}, "expected either labels .* got none"),
    ((S, Y), masks(), "got labels, positive_mask, negative_mask"),
    ((S,), {"positive_mask": MASK}, "got positive_mask"),
    ((S,), masks(negative=None), "got positive_mask"),
    ((S, None, Y), {}, "got ref_labels"),
    ((S, None, Y), masks(), "got ref_labels, positive_mask"),
    ((S[:2], Y[:2]), {}, r"similarity must be square .* got shape \(2, 4\)"),
    ((S, Y[:3]), {}, r"labels must have shape \(4,\), got \(3,\)"),
    ((S, Y, Y[:3]), {}, r"ref_labels must have shape \(4,\), got \(3,\)"),
    ((S,), masks(negative=MASK[:2]), r"negative_mask must have .*, \(4, 4\), got \(2, 4\)"),
    ((S, Y, Y), {}, NEEDS_SELF),
    ((S,), masks(), NEEDS_SELF),
    ((S, Y, Y), {"self_similarity": torch.ones(3)}, r"must have shape \(4,\), got \(3,\)"),
]


@pytest.mark.parametrize(
    ("error", "args", "kwargs", "message"),
    [*((TypeError, *x) for x in TYPE_ERRORS), *((ValueError, *x) for x in VALUE_ERRORS)],
)
def test_bad_input_is_named(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        pnp_loss(*args, **kwargs)


@pytest.mark.parametrize("is_inverted", [True, False])
def test_ranking_statistics_count_by_hand(is_inverted):
    s = torch.tensor([[0.9, 0.5, 0.7, 0.5], [0.1, 0.2, 0.3, 0.4], [0.3, 0.3, 0.3, 0.3]])
    positive = torch.tensor([[0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]).bool()
    negative = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    mean, share = ranking_statistics(
        s if is_inverted else -s, positive, negative, is_inverted=is_inverted
    )
    assert mean.item() == pytest.approx(2 / 3)  # two before (0, 1), the tie does not count
    assert share.item() == pytest.approx(1 / 3)


def test_ranking_statistics_of_no_positives_are_zero():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert [x.item() for x in ranking_statistics(torch.randn(2, 3), nothing, ~nothing)] == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_ranking_statistics_of_half_precision_are_float32(dtype):
    """Neither a count above 2048 nor a sum above 65504 is a number of float16."""
    s = torch.randn(8, 4099).to(dtype)
    positive = torch.rand(8, 4099) < 0.1
    got = ranking_statistics(s, positive, ~positive)
    want = ranking_statistics(s.double(), positive, ~positive)
    assert want[0] > 1000
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32 and a.item() == pytest.approx(b.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((S.long(), MASK, MASK), TypeError, "similarity must be floating point, got torch.int64"),
        ((S[0], MASK, MASK), ValueError, r"similarity must have shape \(N, M\), got \(4,\)"),
        ((S, MASK.long(), MASK), TypeError, "positive_mask must be a bool tensor, got torch.int64"),
        ((S, MASK, MASK.tolist()), TypeError, "negative_mask must be a bool tensor, got list"),
        ((S, MASK[:, :1], MASK), ValueError, r"positive_mask must .*, \(4, 4\), got \(4, 1\)"),
        ((S, MASK, MASK[:2]), ValueError, r"negative_mask must .*, \(4, 4\), got \(2, 4\)"),
    ],
)
def test_bad_input_of_ranking_statistics_is_named(args, error, message):
    with pytest.raises(error, match=f"^{message}"):
        ranking_statistics(*args)
