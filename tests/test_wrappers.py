"""PML's wrappers around PNPLoss."""

import inspect

import pytest
import torch
from helpers import batch, expected_mean, value_and_grad
from pytorch_metric_learning import distances, miners
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning.utils import distributed
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

from pml_pnp import losses

HAS_SYMMETRIC = "symmetric" in inspect.signature(pml_losses.SelfSupervisedLoss).parameters
NEEDS_GROUP = "emb" in inspect.signature(distributed.DistributedLossWrapper.forward).parameters


def memory(size=40, **kwargs):
    return losses.CrossBatchMemory(
        losses.PNPLoss(variant="Ds"), embedding_size=8, memory_size=size, **kwargs
    )


def test_cross_batch_memory_begins_like_the_plain_loss(device):
    x, y = batch(device=device)
    got, want = value_and_grad(memory(), x, y)
    assert got.item() == pytest.approx(losses.PNPLoss(variant="Ds")(x, y).item(), rel=1e-5)
    assert want.isfinite().all() and want.any()


def test_cross_batch_memory_ranks_the_queue(device):
    loss_func = memory(size=30)  # less than two batches of 24: the second wraps round
    x1, y1 = batch(device=device)
    x2, y2 = batch(device=device)
    loss_func(x1, y1)
    loss = loss_func(x2, y2)
    where = [(24 + i) % 30 for i in range(24)]
    ref, ref_y = torch.zeros(30, 8), torch.zeros(30, dtype=torch.long)
    ref[:24], ref_y[:24] = x1.cpu(), y1.cpu()
    ref[where], ref_y[where] = x2.cpu(), y2.cpu()
    a1, p, a2, n = lmu.get_all_pairs_indices(y2.cpu(), ref_y)
    other = torch.tensor(where)[a1] != p
    expected = expected_mean(x2, ref_emb=ref, tuple_=(a1[other], p[other], a2, n), variant="Ds")
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_cross_batch_memory_with_a_miner(device):
    loss_func = memory(miner=miners.MultiSimilarityMiner())
    for _ in range(3):
        x, y = batch(device=device)
        value, grad = value_and_grad(loss_func, x, y)
        assert value > 0 and grad.isfinite().all() and grad.any()


def test_cross_batch_memory_with_an_enqueue_mask(device):
    x, y = batch(device=device)
    mask = torch.arange(24, device=device) >= 12
    loss = memory()(x, y, enqueue_mask=mask)
    expected = expected_mean(x[:12], y[:12], ref_emb=x[12:], ref_labels=y[12:], variant="Ds")
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_cross_batch_memory_that_only_fills_is_zero(device):
    x, y = batch(device=device)
    value, grad = value_and_grad(
        memory(), x, y, enqueue_mask=torch.ones(24, dtype=torch.bool, device=device)
    )
    assert value == 0 and grad.eq(0).all()


def test_cross_batch_memory_is_pmls_and_is_taken_by_the_distributed_wrapper():
    loss_func = memory()
    assert isinstance(loss_func, pml_losses.CrossBatchMemory)
    assert isinstance(distributed.DistributedLossWrapper(loss_func), torch.nn.Module)


@pytest.mark.parametrize("symmetric", [True, False])
def test_self_supervised_loss_pairs_each_row_with_its_view(symmetric, device):
    x, view = batch(device=device)[0], batch(device=device)[0]
    pnp, y = losses.PNPLoss(variant="Ds"), torch.arange(24)
    if HAS_SYMMETRIC:
        loss_func = losses.SelfSupervisedLoss(pnp, symmetric=symmetric)
    elif not symmetric:
        loss_func = losses.SelfSupervisedLoss(pnp)
    else:
        pytest.skip("this PML has no symmetric SelfSupervisedLoss")
    if symmetric:
        expected = expected_mean(torch.cat([x, view]), torch.cat([y, y]), variant="Ds")
    else:
        expected = expected_mean(x, y, ref_emb=view, ref_labels=y, variant="Ds")
    assert loss_func(x, view).item() == pytest.approx(expected, rel=1e-4)
    assert isinstance(loss_func, pml_losses.SelfSupervisedLoss)


def test_multiple_losses_adds_it_up(device):
    x, y = batch(device=device)
    triplet = losses.TripletMarginLoss()
    loss_func = losses.MultipleLosses([losses.PNPLoss(), triplet], weights=[0.5, 2])
    expected = 0.5 * losses.PNPLoss()(x, y) + 2 * triplet(x, y)
    torch.testing.assert_close(loss_func(x, y), expected)


def test_multiple_losses_with_a_miner_each(device):
    x, y = batch(device=device)
    miner = miners.MultiSimilarityMiner()
    loss_func = losses.MultipleLosses(
        {"pnp": losses.PNPLoss(), "plain": losses.PNPLoss(variant="Ds")}, miners={"pnp": miner}
    )
    expected = losses.PNPLoss()(x, y, miner(x, y)) + losses.PNPLoss(variant="Ds")(x, y)
    torch.testing.assert_close(loss_func(x, y), expected)


def test_wrappers_still_refuse_what_pml_refuses():
    for wrapper in (
        lambda loss: losses.CrossBatchMemory(loss, 8),
        losses.SelfSupervisedLoss,
    ):
        with pytest.raises(Exception, match="not supported for FastAPLoss"):
            wrapper(losses.FastAPLoss())


@pytest.mark.filterwarnings("ignore:DistributedLossWrapper is being used in a non-distributed")
@pytest.mark.skipif(NEEDS_GROUP, reason="this PML needs a process group there")
def test_outside_a_distributed_run_the_wrapper_returns_the_loss_as_it_is():
    x, y = batch()
    loss = distributed.DistributedLossWrapper(losses.PNPLoss())(x, y)
    assert torch.equal(loss, losses.PNPLoss()(x, y))


class ListingMemory(losses.CrossBatchMemory):
    """Lists all pairs, as PML's own does."""

    create_indices_tuple = pml_losses.CrossBatchMemory.create_indices_tuple


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("kwargs", [{}, {"chunk_size": 5}], ids=str)
def test_memory_without_a_list_of_pairs_is_the_same(kwargs, include_self, masked):
    kwargs = {"variant": "Ds", "include_self": include_self, **kwargs}
    kwargs["distance"] = distances.LpDistance(normalize_embeddings=False)
    memories = [
        cls(losses.PNPLoss(anneal=0.3, **kwargs), 8, memory_size=30).double()
        for cls in (losses.CrossBatchMemory, ListingMemory)
    ]
    for _ in range(4):  # the memory of 30 is filled, and begun again in the middle of a batch
        x, y = batch(n=12, dtype=torch.float64)
        mask = {"enqueue_mask": torch.arange(12) < 7} if masked else {}
        results = [value_and_grad(memory, x, y, **mask) for memory in memories]
        torch.testing.assert_close(*results)
    assert results[0][1].abs().max() > 1e-3
