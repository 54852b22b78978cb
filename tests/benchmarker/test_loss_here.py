"""The loss in whatever PML is here, 0.9.92 or 2: against the reference."""

import pytest
import torch
from helpers import VARIANTS, batch, expected_mean
from pytorch_metric_learning import distances, miners

from pml_pnp import PNPLoss

MINERS = [None, miners.MultiSimilarityMiner(), miners.TripletMarginMiner(margin=0.5)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("distance", [None, distances.LpDistance(), distances.SNRDistance()])
@pytest.mark.parametrize("miner", MINERS)
def test_value_is_the_references(variant, include_self, distance, miner):
    x, y = batch()
    pairs = None if miner is None else miner(x, y)
    settings = {"variant": variant, "include_self": include_self, "distance": distance}
    want = expected_mean(x, y, pairs, anneal=0.1, **settings)
    assert PNPLoss(anneal=0.1, **settings)(x, y, pairs).item() == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradients_are_finite_and_of_the_dtype(dtype):
    x, y = batch(dtype=dtype)
    (grad,) = torch.autograd.grad(PNPLoss(variant="Dq", alpha=4)(x.requires_grad_(), y), x)
    assert grad.dtype == dtype and grad.isfinite().all() and grad.abs().max() > 0


@pytest.mark.parametrize("distance", [distances.LpDistance(), distances.SNRDistance()])
@pytest.mark.parametrize("chunk_size", [None, 7])
def test_gradients_are_those_of_the_value(distance, chunk_size):
    x, y = batch(n=10, dtype=torch.float64)
    loss_func = PNPLoss(distance=distance, anneal=0.3, chunk_size=chunk_size)
    assert torch.autograd.gradcheck(lambda x: loss_func(x, y), x.requires_grad_())


def test_a_batch_without_positives_is_zero_and_has_a_gradient():
    x = torch.randn(4, 3, requires_grad=True)
    loss = PNPLoss()(x, torch.arange(4))
    loss.backward()
    assert loss.item() == 0 and not x.grad.any()
