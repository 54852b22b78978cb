"""torch.compile gives the values and gradients of eager mode, and few graphs."""

import shutil

import pytest
import torch
from helpers import IS_TORCH_2_4, batch, value_and_grad
from pytorch_metric_learning import distances
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch._dynamo.testing import CompileCounterWithBackend

from pml_pnp import PNPLoss, losses

# torch 2.4 breaks graphs; versions between were not tried.
TRACES_PML = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)


@pytest.fixture(autouse=True)
def _nothing_is_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_equal(compiled, loss_func, *args, **tolerance):
    want = value_and_grad(loss_func, *args)
    assert want[1].abs().max() > 1e-3
    torch.testing.assert_close(value_and_grad(compiled, *args), want, **tolerance)


def test_a_training_step_with_inductor_equals_the_eager_one():
    if not any(map(shutil.which, ["c++", "g++", "clang++", "cl"])):
        pytest.skip("inductor needs a C++ compiler")
    (x, y), loss_func = batch(), PNPLoss(variant="Dq", alpha=4)

    def step(weight, x, y):
        return loss_func(x @ weight, y)

    compiled = torch.compile(step, fullgraph=TRACES_PML)
    assert_equal(compiled, step, torch.randn(8, 4), x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("distance", [distances.LpDistance, distances.DotProductSimilarity])
def test_references_make_one_graph(distance):
    loss_func = PNPLoss(distance=distance(), anneal=0.1, variant="Ib")
    compiled = torch.compile(loss_func, backend="aot_eager", fullgraph=TRACES_PML)
    assert_equal(compiled, loss_func, *batch(), None, *batch(n=9))


@pytest.mark.parametrize("kwargs", [{"variant": torch.log1p}, {"chunk_size": 7}])
def test_callable_variants_and_chunks_compile(kwargs):
    loss_func = PNPLoss(anneal=0.1, **kwargs)
    assert_equal(torch.compile(loss_func, backend="aot_eager"), loss_func, *batch())


@pytest.mark.parametrize(
    "make",
    [None, lmu.get_all_pairs_indices, lmu.get_all_triplets_indices],
    ids=["labels", "pairs", "triplets"],
)
def test_from_the_second_batch_size_on_nothing_is_compiled_anew(make):
    """The graphs of the second batch size are those of every later one."""
    if make is None and IS_TORCH_2_4:
        pytest.skip("torch 2.4 makes graphs for every batch size")
    loss_func = PNPLoss(variant="Dq", anneal=0.1)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss_func, backend=graphs)
    counts = []
    for n in (24, 24, 32, 27):
        x, y = batch(n=n)
        assert_equal(compiled, loss_func, x, y, None if make is None else make(y))
        counts.append(graphs.frame_count)
    first, again, second, third = counts
    if make is None and TRACES_PML:
        assert (first, second) == (1, 2)
    assert first == again and second == third


def test_the_position_of_a_memory_compiles_nothing_anew():
    """A step compiles the model; the memory and the loss in it break the graph."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    memories = [losses.CrossBatchMemory(PNPLoss(anneal=0.1), 8, 100) for _ in range(2)]
    graphs = CompileCounterWithBackend("aot_eager")

    def step(memory, x, y):
        return memory(model(x), y)

    compiled = torch.compile(step, backend=graphs)
    counts = []
    for _ in range(6):
        x, y = batch()
        torch.testing.assert_close(compiled(memories[0], x, y), step(memories[1], x, y))
        counts.append(graphs.frame_count)
    assert counts[-1] == counts[0]
    assert memories[0].queue_idx == memories[1].queue_idx == 44
