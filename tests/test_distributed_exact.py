"""DistributedLossWrapper(efficient="exact"): 2 and 3 gloo ranks against one process."""

import re
from functools import partial

import exact_cases as cases
import pytest
import torch
from helpers import batch, value_and_grad
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import reducers, regularizers
from pytorch_metric_learning.utils import distributed as pml_distributed

from pml_pnp import losses
from pml_pnp.distributed import DistributedLossWrapper, DistributedMinerWrapper

BAD = "RuntimeError: bad arguments on rank 1"


@pytest.fixture(params=cases.ROWS, ids=lambda n: f"{n}_ranks")
def found(request, ranks):
    """Of each rank, what `results` of exact_cases.py describes, with every number of ranks."""
    return ranks(cases, request.param)


@pytest.mark.parametrize(
    ("world", "name"), [(world, name) for world in cases.ROWS for name in cases.names(world)]
)
def test_ranks_take_the_same_step_as_one_process(ranks, name, world):
    case, found = cases.CASES[name], ranks(cases, world)
    expected = cases.steps(case, cases.ROWS[world])
    half = case.get("dtype") is torch.float16 or case.get("autocast")
    tolerance = {"rtol": 1e-2, "atol": 2e-3} if half else {}
    efficient = case.get("efficient", "exact")
    if efficient is False:  # as PML returns it
        expected = [(loss * world, *rest) for loss, *rest in expected]
    if name == "nothing counts":
        assert expected[0][0] == 0
    else:
        assert max(grad.abs().max() for grad in expected[-1][1]) > 1e-5
    for step, (loss, grads, queue) in enumerate(expected):
        if case.get("twice") or efficient is True:
            # Each rank has the part of its rows, times the number of ranks.
            mean = sum(results[name][step][0] for results in found) / world
            torch.testing.assert_close(mean, loss)
        if efficient is True:  # without the gradient as references of other ranks
            grads = found[0][name][step][1]
        for results in found:
            got, got_grads, got_queue = results[name][step]
            if not case.get("twice") and efficient is not True:
                torch.testing.assert_close(got, loss, **tolerance)
            torch.testing.assert_close(got_grads, grads, **tolerance)
            if not case.get("pmls"):  # which has the rows of a rank before those of others
                assert case.get("twice") or torch.equal(got, found[0][name][step][0])
                torch.testing.assert_close(got_queue, queue)


@pytest.mark.parametrize(
    ("name", "of_rank_1", "of_others"),
    [
        ("labels", r"ValueError: labels must have shape \(6,\)", BAD),
        ("no labels", "ValueError: expected labels or indices_tuple", BAD),
        ("large labels", r"ValueError: labels must be below 2\*\*63", BAD),
        ("size", "ValueError: all ranks .*; rank 1: embeddings of size 3 in torch.float32", None),
        ("dtype", "ValueError: all ranks .*; rank 1: embeddings of size 4 in torch.float64", None),
        ("float8", "TypeError: embeddings must be of one of .* got torch.float8_e4m3fn", BAD),
        ("references", "ValueError: .* rank 1: .* with labels and ref_emb and ref_labels", None),
        ("mask", "ValueError: .* rank 1: .* with labels and enqueue_mask", None),
        ("mask type", "TypeError: enqueue_mask must be bool, got torch.int64", BAD),
        ("no embeddings", "TypeError: embeddings must be a tensor, got NoneType", BAD),
        ("memory and tuple", "ValueError: .* takes no indices_tuple.*: give it a miner", BAD),
        ("memory and references", "ValueError: .* takes neither ref_emb nor ref_labels", BAD),
        ("memory without labels", "TypeError: labels must be a tensor, got NoneType", BAD),
        ("too many for the memory", "ValueError: at most memory_size, 37, .* got", None),
        ("mask without memory", "ValueError: enqueue_mask needs a CrossBatchMemory", BAD),
        ("tuple and miners", "ValueError: a MultipleLosses with miners takes neither", BAD),
        ("sum of a memory and tuple", "ValueError: a CrossBatchMemory in a MultipleLosses", BAD),
        ("views", "ValueError: ref_emb must have the shape of embeddings", BAD),
        ("no views", "TypeError: ref_emb must be a tensor, got NoneType", None),
        ("tuple", r"ValueError: indices_tuple\[0\] must hold indices from 0", None),
        ("tuple of one rank", r"ValueError: indices_tuple\[0\] must hold .*, got 99", BAD),
        ("tuple of floats", "TypeError: indices_tuple must be .* got torch.float32 at", BAD),
        ("tuple and views", "ValueError: SelfSupervisedLoss takes no indices_tuple", BAD),
        ("mask in PML's mode", "ValueError: enqueue_mask needs a CrossBatchMemory", None),
    ],
)
def test_bad_arguments_of_one_rank_are_an_error_on_all(found, name, of_rank_1, of_others):
    for rank, results in enumerate(found):
        expected = of_rank_1 if rank == 1 or of_others is None else of_others
        assert re.match(expected, results["errors"][name] or "no error"), results["errors"][name]


def test_a_rank_whose_embeddings_have_no_gradient_does_not_stop_the_others(found):
    results = [of_rank["without gradient"] for of_rank in found]
    values, without, x, y, grads = zip(*results, strict=True)
    loss_func = losses.PNPLoss(variant="Ds", anneal=0.5)
    value, grad = value_and_grad(loss_func, torch.cat(x), torch.cat(y))
    for of_rank in (*values, *without):
        torch.testing.assert_close(of_rank, value)
    of_ranks = torch.cat([g for g in grads if g is not None])
    torch.testing.assert_close(of_ranks / len(found), grad)


def test_without_a_row_on_any_rank_the_loss_is_zero(found):
    for results in found:
        loss, grad = results["without rows"]
        assert loss == 0 and grad.shape == (0, 4)


def test_an_efficient_miner_finds_pairs_of_the_rows_of_its_rank(found):
    for results in found:
        assert results["mined"] == [list(range(6 * len(found))), list(range(6))]


def test_labels_are_handed_to_the_loss_without_listing_pairs(found):
    assert all(results["no pairs"] for results in found)


def test_a_rank_that_dies_is_an_error_for_the_other(ranks):
    (found,) = ranks(cases, 1)
    for of_call in found["errors"]:  # of backward, and of the next step
        assert of_call and of_call.startswith(("RuntimeError", "DistBackendError"))
    assert found["seconds"] < 6 * cases.TIMEOUT


@pytest.mark.filterwarnings("error")
def test_without_a_process_group_it_is_the_loss_itself():
    x, y = batch()
    loss = DistributedLossWrapper(losses.PNPLoss(), "exact")(x, y)
    assert torch.equal(loss, losses.PNPLoss()(x, y))
    views = DistributedLossWrapper(losses.SelfSupervisedLoss(losses.PNPLoss()), "exact")
    expected = losses.SelfSupervisedLoss(losses.PNPLoss())(x, x + 0.1)
    assert torch.equal(views(x, x + 0.1), expected)
    assert torch.equal(views(x, ref_emb=x + 0.1), expected)
    with pytest.raises(ValueError, match="SelfSupervisedLoss takes no indices_tuple"):
        views(x, x + 0.1, (torch.tensor([0]),) * 3)
    for efficient in (False, "exact"):
        mask = torch.arange(len(x)) < 10
        memory, wrapped = (losses.CrossBatchMemory(losses.PNPLoss(), 8, 40) for _ in range(2))
        wrapper = DistributedLossWrapper(wrapped, efficient)
        assert torch.equal(wrapper(x, y, enqueue_mask=mask), memory(x, y, enqueue_mask=mask))
        pairs = tuple(torch.tensor(i) for i in ([0, 1], [1, 2], [0, 1], [5, 6]))
        assert torch.equal(wrapper(x, y, pairs), memory(x, y, pairs))
        with pytest.raises(ValueError, match="neither ref_emb nor ref_labels"):
            wrapper(x, y, ref_emb=x)


def test_it_is_pmls_for_false_and_true():
    for efficient in (False, True):
        wrapper = DistributedLossWrapper(losses.TripletMarginLoss(), efficient)
        assert isinstance(wrapper, pml_distributed.DistributedLossWrapper)
        assert wrapper.efficient is efficient
    assert DistributedLossWrapper(losses.PNPLoss()).efficient is False
    assert issubclass(DistributedMinerWrapper, pml_distributed.DistributedMinerWrapper)


def pnp(reducer=None, **kwargs):
    return losses.PNPLoss(reducer=reducer, **kwargs)


in_memory = partial(losses.CrossBatchMemory, embedding_size=8)
REGULARIZED = pnp(embedding_regularizer=regularizers.LpRegularizer())
PMLS_MEMORY = pml_losses.CrossBatchMemory(losses.ContrastiveLoss(), 8)
MINED = losses.MultipleLosses([in_memory(pnp())], [cases.miner()])
NO_MEAN = "mean or a sum over queries, MeanReducer, .* got"


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (torch.nn.MSELoss(), TypeError, "needs losses of .*got MSELoss"),
        (losses.MultipleLosses([pnp(), torch.nn.MSELoss()]), TypeError, "got MSELoss"),
        (MINED, ValueError, "MultipleLosses with miners takes neither"),
        (PMLS_MEMORY, TypeError, "got CrossBatchMemory"),
        (pnp(reducers.ThresholdReducer(low=0)), TypeError, f"{NO_MEAN} ThresholdReducer"),
        (pnp(reducers.DoNothingReducer()), TypeError, f"{NO_MEAN} DoNothingReducer"),
        (in_memory(pnp(reducers.DoNothingReducer())), TypeError, f"{NO_MEAN} DoNothingReducer"),
        (REGULARIZED, TypeError, "takes no embedding_regularizer of a PNPLoss, got LpRegularizer"),
    ],
)
def test_what_cannot_be_put_together_is_refused(loss, error, message):
    with pytest.raises(error, match=message):
        DistributedLossWrapper(loss, "exact")


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="efficient must be False, True or \"exact\", got 'exakt'"):
        DistributedLossWrapper(losses.PNPLoss(), "exakt")
