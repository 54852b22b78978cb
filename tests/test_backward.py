"""Backward more than once, second derivatives, and torch.func."""

import gc
import weakref

import pytest
import torch
from helpers import BUILT_IN, batch, needs_built_in, value_and_grad
from pytorch_metric_learning import distances

from pml_pnp import PNPLoss
from pml_pnp.functional import pnp_loss

PRODUCTS = {"cosine": distances.CosineSimilarity, "dot product": distances.DotProductSimilarity}


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("with_references", [False, True], ids=["batch", "references"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_backward_may_run_again(name, with_references, chunk_size, device):
    """The gradient takes the place of the similarities; later calls must not notice."""
    x, y = batch(dtype=torch.float64, device=device)
    refs = batch(n=30, dtype=torch.float64, device=device) if with_references else ()
    loss_func = PNPLoss(variant="Iu", anneal=0.2, distance=PRODUCTS[name](), chunk_size=chunk_size)
    loss = loss_func(x.requires_grad_(), y, None, *refs)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert first.abs().max() > 1e-3
    assert torch.equal(torch.autograd.grad(loss, x, retain_graph=True)[0], first)
    torch.testing.assert_close(torch.autograd.grad(2 * loss, x, retain_graph=True)[0], 2 * first)
    torch.testing.assert_close(torch.autograd.grad(loss, x, create_graph=True)[0], first)
    assert torch.equal(torch.autograd.grad(loss, x)[0], first)


@pytest.mark.parametrize("with_references", [False, True], ids=["batch", "references"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_second_derivatives(name, with_references):
    x, y = batch(n=8, d=3, classes=2, dtype=torch.float64)
    refs = batch(n=9, d=3, classes=2, dtype=torch.float64) if with_references else ()
    loss_func = PNPLoss(variant="Iu", anneal=0.2, distance=PRODUCTS[name]())
    assert torch.autograd.gradgradcheck(lambda x: loss_func(x, y, None, *refs), x.requires_grad_())


def test_only_a_second_derivative_refuses_references_that_were_changed():
    x, y = batch()
    refs = batch()[0]
    loss = PNPLoss()(x.requires_grad_(), y, None, refs, y)
    (want,) = torch.autograd.grad(loss, x, retain_graph=True)
    refs.mul_(2)  # a memory may move on
    assert torch.equal(torch.autograd.grad(loss, x, retain_graph=True)[0], want)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("wanted", ["embeddings", "references", "both"])
def test_second_derivative_for_some_of_the_inputs(wanted):
    (x, y), (ref, ref_y) = batch(n=8, dtype=torch.float64), batch(n=9, dtype=torch.float64)
    x.requires_grad_(wanted != "references")
    ref.requires_grad_(wanted != "embeddings")
    inputs = [t for t in (x, ref) if t.requires_grad]
    loss = PNPLoss(anneal=0.2, variant="Iu")(x, y, None, ref, ref_y)
    whole = torch.autograd.grad(loss, inputs, create_graph=True)
    torch.testing.assert_close(whole, torch.autograd.grad(
        PNPLoss(anneal=0.2, variant="Iu")(x, y, None, ref, ref_y), inputs))  # fmt: skip
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(whole[0].square().sum(), inputs))


@needs_built_in
def test_second_derivative_equals_that_of_the_built_in():
    x, y = batch(n=12, d=4, classes=3, dtype=torch.float64)
    x.requires_grad_()
    got, want = (
        torch.autograd.grad(
            torch.autograd.grad(loss_func(x, y), x, create_graph=True)[0].square().sum(), x
        )[0]
        for loss_func in (PNPLoss(anneal=0.2), BUILT_IN(anneal=0.2))
    )
    assert want.abs().max() > 1e-3
    torch.testing.assert_close(got, want)


def test_functional_gradient():
    x, y = batch()
    loss_func = PNPLoss(variant="Dq")
    got = torch.func.grad(lambda x: loss_func(x, y))(x)
    torch.testing.assert_close(got, value_and_grad(loss_func, x, y)[1])


def test_functional_gradient_with_a_constant_self_similarity():
    s, y, ref_y = torch.randn(4, 5), torch.arange(4) % 2, torch.arange(5) % 2

    def call(s, own):
        return pnp_loss(s, y, ref_y, self_similarity=own, anneal=0.5)[0].sum()

    own = torch.ones(4)
    want = torch.autograd.functional.jacobian(call, (s, own))
    torch.testing.assert_close(torch.func.grad(call)(s, own), want[0])
    torch.testing.assert_close(torch.func.grad(call, argnums=1)(s, own), want[1])


@pytest.mark.parametrize("with_references", [False, True])
def test_a_loss_that_is_kept_does_not_keep_the_embeddings(with_references):
    x, y = batch()
    refs = (x + 0.1, y) if with_references else (None, None)
    given = [t for t in (x, refs[0]) if t is not None]
    embeddings = x.requires_grad_() * 2
    given.append(embeddings)
    loss = PNPLoss()(embeddings, y, None, *refs)
    loss.backward()
    watched = [weakref.ref(t) for t in given[1:]]  # the graph leads to the first, a leaf
    del x, refs, given, embeddings
    gc.collect()
    assert loss.grad_fn is not None and all(ref() is None for ref in watched)
