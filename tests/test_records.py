"""What PML's record-keeper finds: hyperparameters, and statistics of the ranking."""

import pytest
import torch
from helpers import Scale, batch, distance_matrix, masks_of, recorded
from pytorch_metric_learning import distances
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

from pml_pnp import PNPLoss


def test_hyperparameters_are_recorded():
    loss_func = PNPLoss(b=3, alpha=4, anneal=0.02, variant="Dq", include_self=False)
    assert recorded(loss_func, "_record_these") == dict(
        b=3, alpha=4, anneal=0.02, variant="Dq", include_self=False
    )
    for variant, name in ((torch.log1p, "log1p"), (Scale(), "Scale")):
        loss_func = PNPLoss(variant=variant)
        assert recorded(loss_func, "_record_these")["variant_name"] == name
    loss_func = PNPLoss(variant=torch.log1p)
    loss_func.variant = "Dq"
    assert recorded(loss_func, "_record_these")["variant_name"] == "Dq"


def test_statistics_are_recorded_when_asked_for():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, -0.8]])
    y = torch.tensor([0, 0, 1, 2])
    loss_func = PNPLoss(collect_stats=True)
    loss_func(x, y)
    # Query 0 finds 2 before 1; query 1 finds 2 before 0. Nothing else has a positive.
    assert recorded(loss_func, "_record_these_stats") == {
        "negatives_before_positive": 1,
        "positives_behind_negatives": 1,
    }
    # Query 0 finds nothing before 2, 1 finds 0 and 2 before 3, 2 finds 1 before 0, 3 nothing.
    loss_func(x, torch.tensor([0, 1, 0, 1]))
    assert loss_func.negatives_before_positive == 3 / 4
    assert loss_func.positives_behind_negatives == 2 / 4
    loss_func(x, torch.arange(4))
    assert loss_func.negatives_before_positive == loss_func.positives_behind_negatives == 0


@pytest.mark.parametrize("distance", [distances.CosineSimilarity(), distances.LpDistance()])
@pytest.mark.parametrize("kind", ["references", "tuple"])
def test_statistics_are_of_references_and_tuples(kind, distance, device):
    x, y = batch(n=6, classes=2, device=device)
    ref, ref_y = batch(n=40, classes=2, device=device)
    indices = tuple(i[::3] for i in lmu.get_all_pairs_indices(y, ref_y))
    args = (y, None, ref, ref_y) if kind == "references" else (None, indices, ref)
    loss_func = PNPLoss(distance=distance, collect_stats=True)
    loss_func(x, *args)
    s = (1 if distance.is_inverted else -1) * distance_matrix(distance, x, ref)
    positive, negative = masks_of(s.shape, y, None if kind == "references" else indices, ref_y)
    before = [(s[a, negative[a]] > s[a, p]).sum().item() for a, p in positive.nonzero().tolist()]
    assert loss_func.negatives_before_positive == pytest.approx(sum(before) / len(before))
    share = sum(count > 0 for count in before) / len(before)
    assert loss_func.positives_behind_negatives == pytest.approx(share)


def test_statistics_are_off_by_default_and_pmls_global_collect_stats_is_honoured(monkeypatch):
    assert not hasattr(PNPLoss(), "negatives_before_positive")
    monkeypatch.setattr(c_f, "COLLECT_STATS", True)
    assert hasattr(PNPLoss(), "negatives_before_positive")
