"""CrossBatchMemory, next to PML's where that one is right."""

import copy
from unittest import mock

import pytest
import torch
from helpers import Category, batch, through_file, value_and_grad
from pytorch_metric_learning import distances, miners
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import distributed
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch.nn.modules.module import register_module_forward_pre_hook

from pml_pnp import losses
from pml_pnp.pairs import QueryColumns
from pml_pnp.sums import Part


def memory(size=40, loss=None, **kwargs):
    loss = losses.PNPLoss(variant="Ds", anneal=0.1) if loss is None else loss
    return losses.CrossBatchMemory(loss, embedding_size=8, memory_size=size, **kwargs)


def pmls(size=40, loss=None, **kwargs):
    """PML's own, around a loss that it takes."""
    return pml_losses.CrossBatchMemory(loss, embedding_size=8, memory_size=size, **kwargs)


def arguments_of(ours, x, y):
    """What the loss of a memory is called with."""
    return ours.enqueue(x, y).arguments(Part(ours.loss))


def other_losses():
    return [losses.ContrastiveLoss(), losses.TripletMarginLoss(), losses.MultiSimilarityLoss()]


@pytest.mark.parametrize("miner", [None, miners.MultiSimilarityMiner(), miners.BatchHardMiner()])
@pytest.mark.parametrize("loss", other_losses(), ids=lambda loss: type(loss).__name__)
def test_other_losses_and_the_queue_are_as_in_pml(loss, miner, device):
    """Also with a mask, and with pairs or triplets, which are added to those of the memory."""
    ours, theirs = memory(30, loss, miner=miner), pmls(30, loss, miner=miner)
    given = {1: lmu.get_all_pairs_indices, 4: lmu.get_all_triplets_indices}
    for step in range(5):
        x, y = batch(n=10, device=device)
        args = {"enqueue_mask": torch.arange(10, device=device) < 5} if step == 3 else {}
        if step in given:
            args["indices_tuple"] = c_f.shift_indices_tuple(given[step](y), ours.queue_idx)
        torch.testing.assert_close(
            value_and_grad(ours, x, y, **args), value_and_grad(theirs, x, y, **args)
        )
        assert ours.queue_idx == theirs.queue_idx
        assert ours.has_been_filled == theirs.has_been_filled
        torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))


@pytest.mark.parametrize("loss", [None, *other_losses()], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("miner", [None, miners.MultiSimilarityMiner()])
def test_a_mask_that_enqueues_nothing_does_not_fill_the_memory(loss, miner, device):
    x, y = batch(device=device)
    ours = memory(loss=loss, miner=miner)
    nothing = torch.zeros(24, dtype=torch.bool, device=device)
    value, grad = value_and_grad(ours, x, y, enqueue_mask=nothing)  # there is no reference at all
    assert value == 0 and grad.eq(0).all() and not ours.has_been_filled
    ours(x, y)
    first = copy.deepcopy(ours.state_dict())
    ours(x, y, enqueue_mask=nothing)  # tests/test_stateful.py has its value
    assert not ours.has_been_filled and ours.queue_idx == 24
    assert len(ours.curr_batch_idx) == 0  # as PML leaves it
    torch.testing.assert_close(ours.state_dict(), first)


def test_the_queue_takes_the_dtype_of_the_embeddings(dtype, device):
    x, y = batch(dtype=dtype, device=device)
    ours = memory()
    ours(x, y)
    assert ours.embedding_memory.dtype == dtype and torch.equal(ours.embedding_memory[:24], x)


def triplet(positive):
    return {"tuple_": (torch.tensor([0]), torch.tensor([positive]), torch.tensor([0]))}


TYPE_ERRORS = [
    ({"x": [0.0] * 24}, "embeddings must be a tensor, got list"),
    ({"y": None}, "labels must be a tensor, got NoneType"),
    ({"y": torch.zeros(24) * 1j}, "labels must be real, got torch.complex64"),
    ({"mask": torch.zeros(24)}, "enqueue_mask must be bool, got torch.float32"),
    ({"mask": torch.zeros(24, dtype=torch.int64)}, "bool, got torch.int64"),
    ({"mask": [True] * 24}, "enqueue_mask must be a tensor, got list"),
]
LARGE, SMALL = ({"x": torch.zeros(n, 8), "y": torch.zeros(n)} for n in (50, 6))
TOO_LARGE = torch.full((24,), 2**64 - 1, dtype=torch.uint64)
VALUE_ERRORS = [
    (LARGE, "memory_size, 40,.* got 50"),
    (LARGE | {"mask": torch.arange(50) < 45}, "memory_size, 40,.* got 45"),
    ({"x": torch.zeros(24, 9)}, "embedding_size of the memory, 8, got 9"),
    ({"x": torch.zeros(24)}, r"shape \(batch size, embedding size\), got \(24,\)"),
    ({"y": torch.zeros(23)}, r"shape \(24,\).* got \(23,\)"),
    ({"y": TOO_LARGE}, rf"labels must be below 2\*\*63 to be kept as int64, got {2**64 - 1}"),
    ({"mask": torch.arange(23) < 5}, r"shape \(24,\), got \(23,\)"),
    ({"mask": torch.ones(24, 1).bool()}, r"shape \(24,\), got \(24, 1\)"),
    ({"mask": torch.arange(24) < 5} | triplet(0), "indices_tuple or enqueue_mask, got both"),
    ({"tuple_": (torch.tensor([24]),) * 3}, r"indices_tuple\[0\].* got 24"),
    (triplet(40), r"indices_tuple\[1\] must hold indices from 0 to 39, got 40"),
    (SMALL | triplet(30), r"indices_tuple\[1\] must .* from 0 to 29, got 30"),  # still empty
]


@pytest.mark.parametrize(
    ("error", "change", "message"),
    [*((TypeError, *x) for x in TYPE_ERRORS), *((ValueError, *x) for x in VALUE_ERRORS)],
)
def test_bad_input_is_named_and_changes_nothing(change, error, message):
    x, y = batch()
    ours = memory()
    ours(x, y)
    before = copy.deepcopy(ours.state_dict())
    arguments = {"x": x, "y": y, "tuple_": None, "mask": None} | change
    with pytest.raises(error, match=message):
        ours(*arguments.values())
    torch.testing.assert_close(ours.state_dict(), before)


NARROW = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.bool]
NARROW += [torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("loss", [None, *other_losses()], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("narrow", NARROW, ids=str)
def test_labels_of_a_narrower_type_cut_nothing(narrow, loss, device):
    x, y = batch(device=device)
    wide, narrowed = memory(loss=loss), memory(loss=loss)
    few = y % 2
    for ours in (wide, narrowed):
        ours(x, y + 2**40)
        assert ours.label_memory.dtype == torch.int64
    torch.testing.assert_close(
        value_and_grad(narrowed, x, few.to(narrow)), value_and_grad(wide, x, few)
    )
    assert torch.equal(narrowed.label_memory, wide.label_memory)
    assert (narrowed.label_memory[16:24] > 2**40).all()


@pytest.mark.parametrize("kind", [torch.float16, torch.float32, torch.float64])
def test_floating_labels_are_kept_in_float64(kind, device):
    x, y = batch(device=device)
    halves, integers = memory(), memory()
    for ours in (halves, integers):
        ours(x, y + 2**25 + 1)  # not in float32
    value = halves(x, (y / 2).to(kind))  # not in int64
    torch.testing.assert_close(value, integers(x, y))
    assert halves.label_memory.dtype == torch.float64
    assert halves.label_memory[20] == y[20] + 2**25 + 1
    torch.testing.assert_close(halves(x, y + 2**30), integers(x, y + 2**30))


def test_labels_may_be_on_another_device_and_of_a_subclass(device):
    x, y = batch(device=device)
    torch.testing.assert_close(memory()(x, y.cpu().as_subclass(Category)), memory()(x, y))


@pytest.fixture(params=["public", "of torch 2.4"])
def any_hook(request, monkeypatch):
    """The hook before a state is loaded, under either of its names."""
    if request.param != "public":
        name = "register_load_state_dict_pre_hook"
        monkeypatch.delattr(torch.nn.Module, name, raising=False)


@pytest.mark.parametrize("calls", [1, 2, 4])
@pytest.mark.parametrize(
    ("floating", "dtype"),
    [(False, torch.float32), (True, torch.float32), (False, torch.float64)],
)
def test_a_resumed_run_goes_on_with_its_memory(any_hook, calls, floating, dtype):
    ours = memory()
    batches = [batch(n=12, dtype=dtype) for _ in range(calls + 3)]
    batches = [(x / 3, y + 0.5 if floating else y) for x, y in batches]
    for x, y in batches[:calls]:
        ours(x, y)
    resumed = torch.nn.ModuleList([torch.nn.Linear(2, 2), memory()])
    state = torch.nn.ModuleList([torch.nn.Linear(2, 2), ours]).state_dict()
    resumed.load_state_dict(through_file(state, weights_only=True))
    assert resumed[1].has_been_filled == (calls == 4)
    for x, y in batches[calls:]:
        got, want = value_and_grad(resumed[1], x, y), value_and_grad(ours, x, y)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert resumed[1].queue_idx == ours.queue_idx
    torch.testing.assert_close(resumed[1].state_dict(), ours.state_dict())


def test_a_state_of_pmls_memory_loads_and_starts_the_queue_anew(any_hook):
    x, y = batch()
    theirs = pmls(loss=losses.ContrastiveLoss())
    ours, fresh = (memory(loss=losses.ContrastiveLoss()) for _ in range(2))
    theirs(x, y)
    ours(*batch(n=39))
    state = torch.nn.ModuleList([theirs]).state_dict()
    keys = set(state)
    with pytest.warns(UserWarning, match="_extra_state.*starts anew"):
        torch.nn.ModuleList([ours]).load_state_dict(state)
    assert set(state) == keys
    assert ours.queue_idx == 0 and not ours.has_been_filled
    torch.testing.assert_close(ours.embedding_memory, theirs.embedding_memory)
    torch.testing.assert_close(ours(x, y), fresh(x, y), rtol=0, atol=0)


def test_our_state_loads_into_pmls_memory_without_the_position():
    ours, theirs = memory(loss=losses.ContrastiveLoss()), pmls(loss=losses.ContrastiveLoss())
    ours(*batch())
    keys = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not keys.missing_keys and keys.unexpected_keys == ["_extra_state"]
    torch.testing.assert_close(theirs.embedding_memory, ours.embedding_memory)


@pytest.mark.parametrize("name", ["embedding_memory", "label_memory"])
def test_rows_that_were_not_loaded_are_no_references(name):
    ours, resumed = memory(), memory()
    ours(*batch())
    state = ours.state_dict()
    del state[name]
    with pytest.warns(UserWarning, match=f"does not hold {name}.*starts anew"):
        resumed.load_state_dict(state, strict=False)
    assert resumed.queue_idx == 0 and not resumed.has_been_filled
    untouched = memory()
    untouched(*batch(n=12))
    untouched.load_state_dict({}, strict=False)
    assert untouched.queue_idx == 12


def test_a_state_of_another_size_is_refused_and_changes_nothing():
    ours, other = memory(), memory(30)
    ours(*batch())
    x, y = batch(n=7)
    other(x, y / 2)
    with pytest.raises(RuntimeError, match="size mismatch for embedding_memory"):
        ours.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="embedding_memory"):
        ours.load_state_dict({})
    assert (ours.queue_idx, ours.has_been_filled) == (24, False)
    assert ours.label_memory.dtype == torch.int64


def test_training_goes_on_after_an_evaluation_in_inference_mode():
    ours, plain = memory(), memory()
    x, y = batch(dtype=torch.float64)
    with torch.inference_mode():
        ours(x, y / 2)  # makes the queue float64, and its labels too
    plain(x, y / 2)
    torch.testing.assert_close(value_and_grad(ours, x, y), value_and_grad(plain, x, y))


@pytest.mark.parametrize("miner", [None, miners.MultiSimilarityMiner()])
@pytest.mark.parametrize("loss", [None, *other_losses()], ids=lambda x: type(x).__name__)
def test_every_loss_may_be_called_several_times_before_a_backward(loss, miner, device):
    at_once, in_turn = (memory(30, loss, miner=miner) for _ in range(2))
    batches = [batch(n=12, device=device) for _ in range(4)]
    sum(at_once(x.requires_grad_(), y) for x, y in batches).backward()
    for x, y in batches:
        torch.testing.assert_close(x.grad, value_and_grad(in_turn, x, y)[1])


def test_the_usual_loss_gets_the_memory_itself():
    def gets_the_memory(ours):
        return arguments_of(ours, *batch(n=8))[3].data_ptr() == ours.embedding_memory.data_ptr()

    ours, copied = memory(), memory(loss=losses.PNPLoss(distance=distances.LpDistance()))
    assert gets_the_memory(ours) and not gets_the_memory(copied)
    with torch.no_grad():
        assert gets_the_memory(copied)


def replaced(owner, name, seen):
    """The method, which first keeps the tuple: what stands before references and their labels."""
    method = getattr(owner, name)

    def replacement(*args):
        seen.append(args[-3])
        return method(*args)

    return mock.patch.object(owner, name, replacement)


LOOKS = {
    "hook before forward": lambda loss, seen: loss.register_forward_pre_hook(
        lambda _, args: seen.append(args[2])
    ),
    "hook of all modules": lambda loss, seen: register_module_forward_pre_hook(
        lambda module, args: seen.append(args[2]) if module is loss else None
    ),
    "compute_loss": lambda loss, seen: replaced(loss, "compute_loss", seen),
    "forward": lambda loss, seen: replaced(loss, "forward", seen),
    "compute_loss of the class": lambda _, seen: replaced(losses.PNPLoss, "compute_loss", seen),
}


@pytest.mark.parametrize("look", LOOKS)
def test_hooks_and_replaced_methods_get_the_tuple_of_pml(look):
    x, y = batch()
    expected = memory()(x, y)
    seen, ours = [], memory()
    with LOOKS[look](ours.loss, seen):
        torch.testing.assert_close(ours(x, y), expected)
    (indices_tuple,) = seen
    assert type(indices_tuple) is tuple and len(indices_tuple) == 4
    assert all(i.dtype == torch.int64 for i in indices_tuple)


def test_nobody_looks_and_no_pairs_are_listed():
    ours = memory()
    assert isinstance(arguments_of(ours, *batch())[2], QueryColumns)


@pytest.mark.filterwarnings("ignore")
def test_in_pmls_distributed_wrapper_without_a_process_group():
    x, y = batch()
    wrapped = distributed.DistributedLossWrapper(memory())
    if distributed.DistributedLossWrapper.forward.__code__.co_varnames[1] == "emb":
        pytest.skip("this PML needs a process group there")
    torch.testing.assert_close(wrapped(x, y), memory()(x, y))
    with pytest.raises(TypeError, match="enqueue_mask must be bool, got torch.float32"):
        wrapped(x, y, ref_emb=x[:, 0])
    with pytest.raises(ValueError, match="neither ref_emb nor ref_labels"):
        wrapped(x, y, ref_emb=x, ref_labels=y)
