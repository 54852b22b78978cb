"""`ref_emb` and `ref_labels`: references to rank instead of the batch."""

import pytest
import torch
from helpers import RTOL, batch, expected_mean, value_and_grad
from pytorch_metric_learning import distances

from pml_pnp import PNPLoss


@pytest.mark.parametrize("include_self", [True, False])
def test_references_are_ranked_and_the_query_itself_is_its_own_positive(
    include_self, dtype, device
):
    x, y = batch(dtype=dtype, device=device)
    ref, ref_y = batch(n=33, dtype=dtype, device=device)
    kwargs = {"variant": "Ds", "include_self": include_self}
    loss = PNPLoss(**kwargs)(x, y, ref_emb=ref, ref_labels=ref_y)
    expected = expected_mean(x, y, ref_emb=ref, ref_labels=ref_y, **kwargs)
    assert loss.item() == pytest.approx(expected, rel=RTOL[dtype])


@pytest.mark.parametrize("variant", ["Dq", torch.log1p])
def test_references_may_come_from_inference_mode(variant):
    x, y = batch()
    with torch.inference_mode():
        refs = batch()[0] * 1
    got = value_and_grad(PNPLoss(variant=variant), x, y, None, refs, y)
    torch.testing.assert_close(
        got, value_and_grad(PNPLoss(variant=variant), x, y, None, refs.clone(), y)
    )


# --- internals


def test_self_similarity_is_cut_into_blocks(monkeypatch, device):
    x, y = batch(dtype=torch.float64, device=device)
    ref, ref_y = batch(n=9, dtype=torch.float64, device=device)
    distance = distances.DotProductSimilarity(normalize_embeddings=False)
    loss_func = PNPLoss(distance=distance, anneal=0.3)
    whole = value_and_grad(loss_func, x, y, None, ref, ref_y)
    monkeypatch.setattr("pml_pnp.distances.SELF_SIMILARITY_BLOCK", 5)
    for got, want in zip(value_and_grad(loss_func, x, y, None, ref, ref_y), whole, strict=True):
        torch.testing.assert_close(got, want)
