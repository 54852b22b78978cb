"""`ref_emb` and `ref_labels`: references to rank instead of the batch."""

import pytest
import torch
from helpers import RTOL, batch, expected_mean, value_and_grad
from pytorch_metric_learning import distances, reducers
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

from pml_pnp import PNPLoss


def test_references_that_are_the_batch_give_the_plain_value(device):
    x, y = batch(dtype=torch.float64, device=device)
    ref, ref_y = x.clone(), y.clone()
    indices = lmu.get_all_pairs_indices(y, ref_y)
    indices = lmu.remove_self_comparisons(
        indices, torch.arange(len(x), device=device), len(ref), ref_is_subset=False
    )
    plain = PNPLoss(variant="Dq")(x, y)
    torch.testing.assert_close(PNPLoss(variant="Dq")(x, y, indices, ref, ref_y), plain)


def test_the_batch_itself_given_as_references_is_the_plain_call(device):
    x, y = batch(device=device)
    torch.testing.assert_close(PNPLoss()(x, y, ref_emb=x, ref_labels=y), PNPLoss()(x, y))


def test_the_batch_with_other_labels_is_a_set_of_references(device):
    """As in PML, where a row then is a positive of itself; SelfSupervisedLoss counts on it."""
    x, y = batch(device=device)
    want = PNPLoss(variant="Ds")(x, y, ref_emb=x.clone(), ref_labels=y.clone())
    got = PNPLoss(variant="Ds")(x, y, ref_emb=x, ref_labels=y.clone())
    torch.testing.assert_close(got, want)
    assert got != PNPLoss(variant="Ds")(x, y)


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


def test_references_work_with_a_tuple_and_no_labels(device):
    x, ref = torch.randn(2, 4, device=device), torch.randn(5, 4, device=device)
    triplets = tuple(torch.tensor(i) for i in ([0, 0, 1], [0, 1, 4], [2, 3, 0]))
    loss = PNPLoss()(x, indices_tuple=triplets, ref_emb=ref)
    assert loss.item() == pytest.approx(expected_mean(x, ref_emb=ref, tuple_=triplets), rel=1e-4)


def test_references_that_require_a_gradient_get_one():
    x, y = batch(n=6, d=3, dtype=torch.float64)
    ref, ref_y = batch(n=5, d=3, dtype=torch.float64)
    distance = distances.DotProductSimilarity(normalize_embeddings=False)
    loss_func = PNPLoss(anneal=0.2, reducer=reducers.SumReducer(), distance=distance)

    def call(x, ref):
        return loss_func(x, y, ref_emb=ref, ref_labels=ref_y)

    assert torch.autograd.gradcheck(call, (x.requires_grad_(), ref.requires_grad_()))


def test_references_of_another_dtype(device):
    x, y = batch(dtype=torch.float16, device=device)
    ref, ref_y = batch(n=9, dtype=torch.float32, device=device)
    loss = PNPLoss()(x, y, ref_emb=ref, ref_labels=ref_y)
    assert loss.dtype == torch.float16
    expected = expected_mean(x, y, ref_emb=ref, ref_labels=ref_y)
    assert loss.item() == pytest.approx(expected, rel=2e-3)


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
