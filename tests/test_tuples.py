"""Pairs and triplets from a miner define the positives and negatives of a query."""

import pytest
import torch
from helpers import RTOL, batch, expected_mean
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

from pml_pnp import PNPLoss


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
