"""The value of the loss: the formula of the paper, what PML's own PNPLoss returns, zero or NaN."""

import math

import pytest
import torch
from helpers import (
    BUILT_IN,
    DISTANCES,
    RTOL,
    VARIANTS,
    VARIANTS_OF_THE_PAPER,
    batch,
    expected_mean,
    needs_built_in,
    value_and_grad,
)
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

from pml_pnp import PNPLoss

KINDS = ["labels", "references", "references without the query", "pairs", "triplets"]


@pytest.mark.usefixtures("sigmoids")
@pytest.mark.parametrize(
    ("variant", "kind"),
    [*((variant, "labels") for variant in VARIANTS), *(("Ds", kind) for kind in KINDS[1:])],
)
def test_value_is_the_formula(variant, kind, dtype, device):
    """Of tests/test_properties.py this is what other devices than the CPU compute too."""
    x, y = batch(dtype=dtype, device=device)
    ref, ref_y = batch(n=33, dtype=dtype, device=device)
    kwargs = {"variant": variant, "alpha": 4, "b": 3}
    kwargs["include_self"] = kind != "references without the query"
    args = {"labels": y}
    if kind.startswith("references"):
        args |= {"ref_emb": ref, "ref_labels": ref_y}
    elif kind == "pairs":
        a1, p, a2, q = lmu.get_all_pairs_indices(y.cpu())
        args["indices_tuple"] = a1[::2], p[::2], a2[::3], q[::3]
    elif kind == "triplets":
        args["indices_tuple"] = tuple(i[::20] for i in lmu.get_all_triplets_indices(y.cpu()))
    loss = PNPLoss(**kwargs)(x, **args)
    assert loss.dtype == dtype and loss.device == x.device
    assert loss.item() == pytest.approx(expected_mean(x, **args, **kwargs), rel=RTOL[dtype])


@pytest.mark.usefixtures("sigmoids")
@pytest.mark.parametrize("n", [4, 64])
@pytest.mark.parametrize("kind", ["labels", "tuple", "references"])
def test_same_input_gives_the_same_bits(kind, n, device):
    """Wherever in memory it lies."""
    x, y = batch(n=n, device=device)
    ref, ref_y = batch(n=80, device=device)
    args = {
        "labels": (y,),
        "tuple": (y, lmu.get_all_triplets_indices(y)),
        "references": (y, None, ref, ref_y),
    }[kind]
    loss_func = PNPLoss(variant="Dq")
    loss, grad = value_and_grad(loss_func, x, *args)
    for offset in (0, 1, 2, 4, 7):
        copy = x.new_empty(offset + x.numel())[offset:].view_as(x).copy_(x).requires_grad_()
        again = loss_func(copy, *args)
        again.backward()
        assert torch.equal(again, loss) and torch.equal(copy.grad, grad)


def test_labels_may_be_on_another_device_or_of_another_dtype(device):
    x, y = batch(device=device)
    want = PNPLoss()(x, y)
    for labels in (y.cpu(), y.float(), y.int()):
        assert torch.equal(PNPLoss()(x, labels), want)


def test_embeddings_are_left_alone(device):
    x, y = batch(device=device)
    x0, y0 = x.clone(), y.clone()
    PNPLoss()(x, y)
    assert torch.equal(x, x0) and torch.equal(y, y0)


@pytest.mark.parametrize("variant", ["Dq", torch.log1p])
def test_references_may_come_from_inference_mode(variant):
    x, y = batch()
    with torch.inference_mode():
        refs = batch()[0] * 1
    got = value_and_grad(PNPLoss(variant=variant), x, y, None, refs, y)
    torch.testing.assert_close(
        got, value_and_grad(PNPLoss(variant=variant), x, y, None, refs.clone(), y)
    )


def test_zero_is_connected_to_references_too(device):
    x, y = batch(device=device)
    ref = torch.randn(9, 8, device=device, requires_grad=True)
    loss = PNPLoss()(x, y, ref_emb=ref, ref_labels=torch.full((9,), 99))
    loss.backward()
    assert loss == 0 and ref.grad.eq(0).all()


NORMALIZED = ["cosine", "lp", "snr"]


@pytest.mark.parametrize(
    ("distance", "bad"),
    [
        *((x, bad) for x in (*NORMALIZED, "dot", "l1") for bad in (math.nan, math.inf, -math.inf)),
        *((x, 1e20) for x in NORMALIZED),  # whose square is infinite
    ],
)
@pytest.mark.parametrize("where", ["batch", "references"])
@pytest.mark.parametrize("labels", ["mixed", "one class", "lone examples"])
def test_what_is_not_finite_gives_nan(labels, where, distance, bad):
    x, y = batch(n=6)
    ref, ref_y = batch(n=9)
    y = {"mixed": y, "one class": y * 0, "lone examples": torch.arange(6) + 99}[labels]
    (x if where == "batch" else ref)[3, 1] = bad
    loss_func = PNPLoss(distance=DISTANCES[distance](), variant="Dq")
    assert loss_func(x, y, None, ref, ref_y).isnan()
    assert where == "references" or loss_func(x, y).isnan()


def test_large_finite_embeddings_give_a_finite_loss(device):
    x, y = batch(device=device)
    assert PNPLoss(distance=DISTANCES["l1"]())(x.sign() * 1e37, y).isfinite()


@pytest.mark.usefixtures("sigmoids")
@needs_built_in
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("variant", VARIANTS_OF_THE_PAPER)
@pytest.mark.parametrize("kwargs", [{}, {"alpha": 4, "b": 0.7, "anneal": 0.02}], ids=str)
def test_value_and_gradient_equal_the_built_in(variant, kwargs, dtype, device):
    x, y = batch(n=40, dtype=dtype, device=device)
    ours = value_and_grad(PNPLoss(variant=variant, **kwargs), x, y)
    theirs = value_and_grad(BUILT_IN(variant=variant, **kwargs), x, y)
    assert theirs[1].abs().max() > 1e-3
    tolerance = {"rtol": 1e-3, "atol": 1e-5} if dtype == torch.float32 else {}
    torch.testing.assert_close(ours, theirs, **tolerance)
