"""torch.compile gives the values and gradients of eager mode."""

import shutil

import pytest
import torch
from helpers import batch
from pytorch_metric_learning import distances

from pml_pnp import PNPLoss

# torch 2.4 breaks the graph where it is asked about autocast; versions between were not tried.
TRACES_PML = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


@pytest.mark.parametrize("variant", ["Dq", torch.log1p], ids=["Dq", "callable"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training_step_equals_the_eager_one(backend, variant):
    if backend == "inductor" and not any(map(shutil.which, ["c++", "g++", "clang++", "cl"])):
        pytest.skip("inductor needs a C++ compiler")
    model = torch.nn.Linear(8, 4)
    x, y = batch()
    loss_func = PNPLoss(variant=variant, alpha=4)

    def step(x, y):
        return loss_func(model(x), y)

    def run(step):
        model.zero_grad()
        loss = step(x, y)
        loss.backward()
        return loss.detach(), model.weight.grad.clone()

    eager = run(step)
    torch._dynamo.reset()
    try:
        whole = variant == "Dq" and TRACES_PML
        compiled = torch.compile(step, backend=backend, fullgraph=whole)
        for got, want in zip(run(compiled), eager, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("distance", [distances.LpDistance, distances.DotProductSimilarity])
def test_compiled_with_references_equals_the_eager_one(distance):
    (x, y), (ref, ref_y) = batch(), batch(n=9)
    x.requires_grad_()
    loss_func = PNPLoss(distance=distance(), anneal=0.1, variant="Ib")
    torch._dynamo.reset()
    try:
        compiled = torch.compile(loss_func, backend="aot_eager", fullgraph=TRACES_PML)
        got = torch.autograd.grad(compiled(x, y, None, ref, ref_y), x)
    finally:
        torch._dynamo.reset()
    torch.testing.assert_close(got, torch.autograd.grad(loss_func(x, y, None, ref, ref_y), x))


def test_chunks_compile_with_a_break_in_the_graph():
    x, y = batch()
    x.requires_grad_()
    loss_func = PNPLoss(chunk_size=7)
    torch._dynamo.reset()
    try:
        got = torch.autograd.grad(torch.compile(loss_func, backend="aot_eager")(x, y), x)
    finally:
        torch._dynamo.reset()
    torch.testing.assert_close(got, torch.autograd.grad(PNPLoss()(x, y), x))
