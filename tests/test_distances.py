"""Every distance of PML, and a user's own."""

import pytest
import torch
from helpers import DISTANCES, RTOL, batch, expected_mean
from pytorch_metric_learning import distances

from pml_pnp import PNPLoss


@pytest.mark.parametrize("with_references", [False, True], ids=["batch", "references"])
@pytest.mark.parametrize("name", DISTANCES)
def test_distance_decides_the_ranking(name, with_references, dtype, device):
    distance = DISTANCES[name]().to(device)
    x, y = batch(dtype=dtype, device=device)
    ref, ref_y = batch(n=13, dtype=dtype, device=device) if with_references else (None, None)
    args = {"labels": y, "ref_emb": ref, "ref_labels": ref_y}
    kwargs = {"distance": distance, "anneal": 0.1, "variant": "Ds"}
    loss = PNPLoss(**kwargs)(x, **args)
    assert loss.item() == pytest.approx(expected_mean(x, **args, **kwargs), rel=RTOL[dtype])


def test_the_iter_fn_of_a_batched_distance_is_kept_and_not_called():
    calls = []
    batched = distances.BatchedDistance(distances.LpDistance(), calls.append, batch_size=5)
    iter_fn = batched.iter_fn
    PNPLoss(distance=batched)(*batch())
    assert batched.iter_fn is iter_fn and not calls


def test_similarities_of_half_precision_are_raised_to_float32():
    class Half(distances.CosineSimilarity):
        def compute_mat(self, query_emb, ref_emb):
            return super().compute_mat(query_emb, ref_emb).half()

    x, y = torch.randn(1024, 8), torch.arange(1024) // 4
    loss = PNPLoss(distance=Half())(x, y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, PNPLoss()(x, y), rtol=1e-2, atol=0)


def test_distance_of_wrong_shape_or_kind_is_named():
    for result, error, message in (
        (torch.ones(24, 8), ValueError, r"a matrix of shape \(24, 24\), got \(24, 8\)"),
        (3, TypeError, "a floating point tensor, got int"),
        (torch.ones(24, 24).long(), TypeError, "a floating point tensor, got torch.int64"),
    ):
        distance = distances.CosineSimilarity()
        distance.forward = lambda *args, result=result: result
        with pytest.raises(error, match=f"distance must return {message}"):
            PNPLoss(distance=distance)(*batch())
    with pytest.raises(TypeError, match="distance must .* is_inverted, got Identity"):
        PNPLoss(distance=torch.nn.Identity())
