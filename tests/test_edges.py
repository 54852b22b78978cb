"""Batches with nothing to rank give zero; NaN or infinite embeddings give NaN."""

import pytest
import torch
from helpers import DISTANCES, batch, value_and_grad

from pml_pnp import PNPLoss

EDGES = {
    "one class": (torch.randn(4, 3), torch.zeros(4, dtype=torch.long), None),
    "lone examples": (torch.randn(4, 3), torch.arange(4), None),
    "batch of one": (torch.randn(1, 3), torch.zeros(1, dtype=torch.long), None),
    "empty batch": (torch.randn(0, 3), torch.zeros(0, dtype=torch.long), None),
    "empty triplets": (torch.randn(4, 3), torch.arange(4) // 2, 3),
    "empty pairs": (torch.randn(4, 3), torch.arange(4) // 2, 4),
}


@pytest.mark.parametrize("case", EDGES)
def test_nothing_to_rank_is_zero_connected_to_the_graph(case, dtype, device):
    x, y, length = EDGES[case]
    x, y = x.to(device, dtype), y.to(device)
    indices = (
        None if length is None else tuple(torch.tensor([], device=device) for _ in range(length))
    )
    value, grad = value_and_grad(PNPLoss(), x, y, indices)
    assert value == 0 and value.dtype == dtype
    assert grad.shape == x.shape and grad.eq(0).all()


def test_zero_is_connected_to_references_too(device):
    x, y = batch(device=device)
    ref = torch.randn(9, 8, device=device, requires_grad=True)
    loss = PNPLoss()(x, y, ref_emb=ref, ref_labels=torch.full((9,), 99))
    loss.backward()
    assert loss == 0 and ref.grad.eq(0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("distance", ["cosine", "dot", "lp", "lp squared, not normalized", "snr"])
@pytest.mark.parametrize("labels", ["mixed", "one class", "lone examples"])
def test_an_embedding_that_is_not_finite_gives_nan(labels, distance, bad):
    x, y = batch(n=6)
    y = {"mixed": y, "one class": y * 0, "lone examples": torch.arange(6)}[labels]
    x[3, 1] = bad
    assert PNPLoss(distance=DISTANCES[distance](), variant="Dq")(x, y).isnan()


def test_a_reference_that_is_not_finite_gives_nan():
    x, y = batch()
    ref, ref_y = batch(n=9)
    ref[2] = float("inf")
    # Without a check, infinitely far would only mean ranked last.
    distance = DISTANCES["lp squared, not normalized"]()
    for labels in (y, y * 0 + 99):  # also when no query has a positive
        assert PNPLoss(distance=distance)(x, labels, ref_emb=ref, ref_labels=ref_y).isnan()


def test_large_finite_embeddings_give_a_finite_loss(device):
    x, y = batch(device=device)
    assert PNPLoss(distance=DISTANCES["l1"]())(x.sign() * 1e37, y).isfinite()
