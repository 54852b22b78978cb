"""The wrappers: around a PNPLoss, and around PML's MultipleLosses the sum of its losses in them."""

import copy
import inspect
from functools import partial

import pytest
import torch
from helpers import batch, value_and_grad
from pytorch_metric_learning import distances, miners, reducers
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

from pml_pnp import losses
from pml_pnp.sums import parts_of


def pnp(**kwargs):
    return losses.PNPLoss(variant="Ds", anneal=0.1, **kwargs)


def mined():
    return miners.MultiSimilarityMiner(epsilon=0.3)


HAS_SYMMETRIC = "symmetric" in inspect.signature(pml_losses.SelfSupervisedLoss).parameters
# Losses with their weights and miners.
SUMS = {
    "list": lambda: [(losses.MultiSimilarityLoss(), 1, None), (pnp(), 1, None)],
    "weights": lambda: [
        (pnp(), 2, None),
        (losses.TripletMarginLoss(), torch.tensor(0.5), None),
        (pnp(distance=distances.LpDistance()), 1, None),
    ],
    "dict": lambda: [
        (losses.NTXentLoss(), 3, None),
        (pnp(reducer=reducers.SumReducer()), 0.1, None),
    ],
    "miners": lambda: [
        (pnp(), 1, mined()),
        (pnp(), 1, None),
        (losses.ContrastiveLoss(), 1, miners.BatchHardMiner()),
    ],
    "dict of miners": lambda: [(pnp(), 2, mined()), (losses.SupConLoss(), 3, None)],
}


def made(name):
    """A MultipleLosses of lists or dicts, and its losses with weights and miners."""
    parts = SUMS[name]()
    given = [list(column) for column in zip(*copy.deepcopy(parts), strict=True)]
    if "dict" in name:  # in any order, and miners not for all
        given = [dict(zip("ab", column, strict=True)) for column in given]
        given[1] = dict(reversed(given[1].items()))
        given[2] = {key: miner for key, miner in given[2].items() if miner is not None}
    losses_, weights, miners_ = given
    weights, miners_ = weights if name != "list" else None, miners_ if "miners" in name else None
    return losses.MultipleLosses(losses_, miners_, weights), parts


def assert_sum(whole, parts, *args, **kwargs):
    """The value and gradient of `whole` are the sums of those of (function, weight)."""
    found = [value_and_grad(part, *args, **kwargs) for part, _ in parts]
    got = value_and_grad(whole, *args, **kwargs)
    for i in range(2):
        expected = sum(weight * x[i] for x, (_, weight) in zip(found, parts, strict=True))
        torch.testing.assert_close(got[i], expected)
    assert got[1].abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["plain", "mask", "miner", "pairs"])
@pytest.mark.parametrize("name", SUMS)
def test_a_memory_adds_up_what_it_would_return_for_each_loss(name, kind, device):
    if kind in ("miner", "pairs") and "miners" in name:
        pytest.skip("refused")
    both, parts = made(name)
    size, miner = 60 if kind == "pairs" else 30, mined() if kind == "miner" else None
    whole = losses.CrossBatchMemory(both, 8, size, miner=miner).double()
    alone = [
        (losses.CrossBatchMemory(loss, 8, size, miner=own or miner).double(), weight)
        for loss, weight, own in parts
    ]
    for _ in range(4):
        x, y = batch(n=12, dtype=torch.float64, device=device)
        args = {}
        if kind == "mask":
            args["enqueue_mask"] = torch.arange(12, device=device) < 7
        if kind == "pairs":
            triplets = lmu.get_all_triplets_indices(y)
            args["indices_tuple"] = c_f.shift_indices_tuple(triplets, whole.queue_idx)
        assert_sum(whole, alone, x, y, **args)
        torch.testing.assert_close(whole.embedding_memory, alone[0][0].embedding_memory)
    assert whole.queue_idx == alone[0][0].queue_idx


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["PNPLoss alone", *SUMS])
def test_views_are_compared_by_each_loss(name, symmetric, device):
    if symmetric and not HAS_SYMMETRIC:
        pytest.skip("this PML has no symmetric SelfSupervisedLoss")
    both, parts = made(name) if name in SUMS else (pnp(), [(pnp(), 1, None)])
    kwargs = {"symmetric": symmetric} if HAS_SYMMETRIC else {}
    x, view = (batch(n=12, dtype=torch.float64, device=device)[0] for _ in range(2))
    y = torch.arange(12, device=device)

    def alone(loss, miner):
        def compute(x, view):
            args = (x, y, view, y.clone())
            if symmetric:
                args = (torch.cat([x, view]), torch.cat([y, y]))
            pairs = None if miner is None else miner(*args)
            return loss(*args[:2], pairs, *args[2:])

        return compute

    alone = [(alone(loss, miner), weight) for loss, weight, miner in parts]
    assert_sum(losses.SelfSupervisedLoss(both, **kwargs), alone, x, view)


def test_a_sum_inside_a_sum():
    inner = losses.MultipleLosses([pnp(), losses.ContrastiveLoss()], weights=[1, 2])
    outer = losses.MultipleLosses([inner, losses.NTXentLoss()], [mined(), None], [3, 5])
    parts = parts_of(outer)
    names = [type(part.loss).__name__ for part in parts]
    assert names == ["PNPLoss", "ContrastiveLoss", "NTXentLoss"]
    assert [part.weight for part in parts] == [3, 6, 5]
    assert [part.miner for part in parts] == [outer.miners[0], outer.miners[0], None]
    x, y = batch()[0], torch.arange(24) // 4
    torch.testing.assert_close(losses.CrossBatchMemory(outer, 8, 24)(x, y), outer(x, y))


def test_a_miner_of_the_memory_is_called_once_for_all_losses():
    calls = []
    miner = mined()
    miner.register_forward_hook(lambda *_: calls.append(1))
    both = losses.MultipleLosses([losses.MultiSimilarityLoss(), pnp(), losses.NTXentLoss()])
    losses.CrossBatchMemory(both, 8, miner=miner)(*batch())
    assert len(calls) == 1


class Halved(losses.MultipleLosses):
    def forward(self, *args):
        return super().forward(*args) / 2


def hooked():
    both = losses.MultipleLosses([pnp()])
    both.register_forward_hook(lambda *_: None)
    return both


def with_miner():
    return summed([pnp()], [mined()])


in_memory = partial(losses.CrossBatchMemory, embedding_size=8)
summed = losses.MultipleLosses
NO_MINER = "MultipleLosses with miners takes neither indices_tuple nor another miner"
NOT_IN_MEMORY = "CrossBatchMemory not supported for FastAPLoss"
NO_VIEWS = "SelfSupervisedLoss not supported for MarginLoss"
PAIRS = (torch.tensor([0]),) * 3


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: in_memory(Halved([pnp()])), TypeError, "without hooks .* got Halved"),
        (lambda: in_memory(hooked()), TypeError, "without hooks"),
        (lambda: in_memory(summed([])), ValueError, "at least one loss, got none"),
        (lambda: in_memory(losses.FastAPLoss()), Exception, NOT_IN_MEMORY),
        (lambda: in_memory(summed([pnp(), losses.FastAPLoss()])), Exception, NOT_IN_MEMORY),
        (lambda: losses.SelfSupervisedLoss(losses.MarginLoss()), Exception, NO_VIEWS),
        (lambda: losses.SelfSupervisedLoss(summed([losses.MarginLoss()])), Exception, NO_VIEWS),
        (lambda: in_memory(with_miner(), miner=mined()), ValueError, NO_MINER),
        (lambda: parts_of(summed([with_miner()], [mined()])), ValueError, NO_MINER),
        (lambda: in_memory(with_miner())(*batch(), PAIRS), ValueError, NO_MINER),
    ],
)
def test_what_cannot_be_added_up_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_hook_that_is_added_later_is_refused_before_anything_is_enqueued():
    ours = losses.CrossBatchMemory(losses.MultipleLosses([pnp()]), 8)
    ours.loss.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="without hooks"):
        ours(*batch())
    assert ours.queue_idx == 0


def test_a_subclass_without_a_forward_of_its_own_is_taken():
    class Named(losses.MultipleLosses):
        pass

    x, y = batch()
    torch.testing.assert_close(losses.CrossBatchMemory(Named([pnp()]), 8)(x, y), pnp()(x, y))
