"""Pairs and triplets from a miner define the positives and negatives of a query."""

import pytest
import torch
from helpers import RTOL, batch, expected_mean, value_and_grad
from pytorch_metric_learning import reducers
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

from pml_pnp import PNPLoss


@pytest.mark.parametrize(
    "make", [lmu.get_all_pairs_indices, lmu.get_all_triplets_indices], ids=["pairs", "triplets"]
)
def test_tuple_of_everything_equals_no_tuple(make, device):
    x, y = batch(dtype=torch.float64, device=device)
    for got, want in zip(
        value_and_grad(PNPLoss(variant="Iu"), x, y, make(y)),
        value_and_grad(PNPLoss(variant="Iu"), x, y),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_a_repeated_pair_counts_once(device):
    x, y = batch(device=device)
    once = lmu.get_all_pairs_indices(y)
    twice = tuple(torch.cat([i, i.flip(0)]) for i in once)
    torch.testing.assert_close(PNPLoss()(x, y, twice), PNPLoss()(x, y, once), rtol=0, atol=0)


def test_tuple_alone_is_enough(device):
    x, y = batch(device=device)
    indices = tuple(i[::2] for i in lmu.get_all_pairs_indices(y))
    torch.testing.assert_close(PNPLoss()(x, indices_tuple=indices), PNPLoss()(x, y, indices))


@pytest.mark.parametrize("kind", ["pairs", "triplets"])
def test_tuple_defines_positives_and_negatives(kind, dtype, device):
    x, y = batch(dtype=dtype, device=device)
    if kind == "pairs":
        a1, p, a2, q = lmu.get_all_pairs_indices(y.cpu())
        keep1 = torch.randperm(len(a1))[: len(a1) // 2]
        keep2 = torch.randperm(len(a2))[: len(a2) // 2]
        indices = a1[keep1], p[keep1], a2[keep2], q[keep2]
    else:
        a, p, q = lmu.get_all_triplets_indices(y.cpu())
        keep = torch.randperm(len(a))[:30]
        indices = a[keep], p[keep], q[keep]
    loss = PNPLoss(variant="Ds")(x, y, indices)
    expected = expected_mean(x, tuple_=indices, variant="Ds")
    assert loss.item() == pytest.approx(expected, rel=RTOL[dtype])


def test_a_query_paired_with_itself_is_no_positive_and_no_negative(device):
    x = torch.randn(3, 4, device=device)
    positive = tuple(torch.tensor(i) for i in ([0, 1], [0, 1], [0, 0], [1, 2]))
    out = PNPLoss(reducer=reducers.DoNothingReducer(), anneal=1)(x, indices_tuple=positive)
    assert out["loss"]["losses"] == 0 and out["loss"]["indices"] is None
    with_self, without = (
        PNPLoss(anneal=1)(x, indices_tuple=tuple(torch.tensor(i) for i in pairs))
        for pairs in (([0], [1], [0, 0], [0, 2]), ([0], [1], [0], [2]))
    )
    assert torch.equal(with_self, without)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.uint8])
def test_indices_may_be_of_any_integer_type(index_dtype, device):
    x, y = batch(device=device)
    indices = lmu.get_all_pairs_indices(y)
    small = tuple(i.to(index_dtype) for i in indices)
    torch.testing.assert_close(PNPLoss()(x, y, small), PNPLoss()(x, y, indices))
