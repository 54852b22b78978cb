"""PML's wrappers around PNPLoss."""

import inspect

import pytest
import torch
from helpers import batch, expected_mean
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import miners
from pytorch_metric_learning.utils import distributed

from pml_pnp import losses

HAS_SYMMETRIC = "symmetric" in inspect.signature(pml_losses.SelfSupervisedLoss).parameters
NEEDS_GROUP = "emb" in inspect.signature(distributed.DistributedLossWrapper.forward).parameters


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


def test_multiple_losses_with_a_miner_each(device):
    x, y = batch(device=device)
    miner, triplet = miners.MultiSimilarityMiner(), losses.TripletMarginLoss()
    made = {"pnp": losses.PNPLoss(), "triplet": triplet}
    loss_func = losses.MultipleLosses(made, {"pnp": miner}, {"pnp": 0.5, "triplet": 2})
    expected = 0.5 * losses.PNPLoss()(x, y, miner(x, y)) + 2 * triplet(x, y)
    torch.testing.assert_close(loss_func(x, y), expected)


def test_wrappers_still_refuse_what_pml_refuses():
    for wrapper in (lambda loss: losses.CrossBatchMemory(loss, 8), losses.SelfSupervisedLoss):
        with pytest.raises(Exception, match="not supported for FastAPLoss"):
            wrapper(losses.FastAPLoss())


@pytest.mark.filterwarnings("ignore:DistributedLossWrapper is being used in a non-distributed")
@pytest.mark.skipif(NEEDS_GROUP, reason="this PML needs a process group there")
def test_outside_a_distributed_run_the_wrapper_returns_the_loss_as_it_is():
    x, y = batch()
    loss = distributed.DistributedLossWrapper(losses.PNPLoss())(x, y)
    assert torch.equal(loss, losses.PNPLoss()(x, y))
