"""The value of the loss: the formula of the paper, and what PML's own PNPLoss returns."""

import inspect

import pytest
import torch
from helpers import (
    BUILT_IN,
    RTOL,
    VARIANTS,
    VARIANTS_OF_THE_PAPER,
    batch,
    expected_losses,
    expected_mean,
    needs_built_in,
    value_and_grad,
)
from pytorch_metric_learning import reducers
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

from pml_pnp import PNPLoss

pytestmark = pytest.mark.usefixtures("sigmoids")


@pytest.mark.parametrize("variant", VARIANTS)
def test_value_is_the_formula(variant, dtype, device):
    x, y = batch(dtype=dtype, device=device)
    kwargs = {"variant": variant, "alpha": 4, "b": 3}
    loss = PNPLoss(**kwargs)(x, y)
    assert loss.dtype == dtype and loss.device == x.device
    assert loss.item() == pytest.approx(expected_mean(x, y, **kwargs), rel=RTOL[dtype])


def test_queries_without_a_second_positive_give_no_element(device):
    x, y = batch(device=device)
    out = PNPLoss(reducer=reducers.DoNothingReducer())(x, y)["loss"]
    expected = expected_losses(x, y)
    assert out["reduction_type"] == "element"
    assert out["indices"].tolist() == sorted(expected) and 0 not in expected
    assert out["losses"].tolist() == pytest.approx(
        [expected[a] for a in sorted(expected)], rel=1e-4
    )


@pytest.mark.parametrize("kind", ["labels", "tuple", "references"])
def test_same_input_gives_the_same_bits(kind, device):
    x, y = batch(n=64, device=device)
    ref, ref_y = batch(n=80, device=device)
    args = {
        "labels": (y,),
        "tuple": (y, lmu.get_all_triplets_indices(y)),
        "references": (y, None, ref, ref_y),
    }[kind]
    first = value_and_grad(PNPLoss(variant="Dq"), x, *args)
    for _ in range(3):
        for got, want in zip(value_and_grad(PNPLoss(variant="Dq"), x, *args), first, strict=True):
            assert torch.equal(got, want)


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


# --- the same as PML's own PNPLoss


@needs_built_in
def test_signature_begins_like_the_built_in():
    built_in = list(inspect.signature(BUILT_IN).parameters.values())[:-1]
    ours = list(inspect.signature(PNPLoss).parameters.values())[: len(built_in)]
    # PML has no annotations.
    assert [x.replace(annotation=inspect.Parameter.empty) for x in ours] == built_in


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
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@needs_built_in
def test_defaults_equal_the_built_in(device):
    x, y = batch(device=device)
    torch.testing.assert_close(PNPLoss()(x, y), BUILT_IN()(x, y))
