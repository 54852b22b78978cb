"""Cosine similarity and dot product under a mean: the same values as by the distance's own call."""

import gc
import weakref
from unittest import mock

import pytest
import torch
from helpers import Manhattan, batch
from pytorch_metric_learning import distances
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity

from pml_pnp import PNPLoss
from pml_pnp.distances import has_global_hooks, is_product
from pml_pnp.ops import product

PRODUCTS = {
    "cosine": (CosineSimilarity, {}),
    "dot product": (DotProductSimilarity, {"normalize_embeddings": False}),
    "normalized dot product": (DotProductSimilarity, {}),
}


def subclass(cls):
    """The same distance, but for all that is known of a subclass it could be anything."""
    return type("Subclass", (cls,), {})


def values(loss_func, *args):
    """Loss, gradients, those of a second backward, and second derivatives."""
    inputs = [t for t in args if t is not None and t.requires_grad]
    loss = loss_func(*args)
    first = torch.autograd.grad(2 * loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs, retain_graph=True)
    graph = torch.autograd.grad(loss, inputs, create_graph=True)
    total = sum((g * g.detach().cos()).sum() for g in graph)
    return [loss.detach(), *first, *second, *graph, *torch.autograd.grad(total, inputs)]


@pytest.mark.usefixtures("sigmoids")
@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("wanted", [None, "batch", "references", "both"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_value_and_gradients_are_those_by_the_distance(
    name, wanted, include_self, chunk_size, monkeypatch
):
    """Of the batch alone, or among references, with respect to either or both."""
    monkeypatch.setattr(product, "CPU_TILE", 5)
    monkeypatch.setattr(product, "REFERENCES_BLOCK", 13 * 4)
    (x, y), (ref, ref_y) = batch(dtype=torch.float64), batch(n=13, dtype=torch.float64)
    x.requires_grad_(wanted != "references")
    args = x, y, *([] if wanted is None else [None, ref.requires_grad_(wanted != "batch"), ref_y])
    kwargs = {"variant": "Iu", "anneal": 0.2, "include_self": include_self}
    distance, settings = PRODUCTS[name]
    got = values(PNPLoss(distance=distance(**settings), chunk_size=chunk_size, **kwargs), *args)
    want = values(PNPLoss(distance=subclass(distance)(**settings), **kwargs), *args)
    torch.testing.assert_close(got, want)


def test_a_large_embedding_is_left_to_a_distance_that_does_not_normalize():
    distance = Manhattan()
    distance.p = 2  # whatever it means there
    x, y = batch()
    x[2] = 1e20
    assert PNPLoss(distance=distance)(x, y).isfinite()


def with_own(method):
    distance = CosineSimilarity()
    setattr(distance, method, lambda *_, **__: None)
    return distance


ORDINARY = {
    "subclass": subclass(CosineSimilarity)(),
    "power": CosineSimilarity(power=2),
    "another norm": CosineSimilarity(p=1),
    "statistics": CosineSimilarity(collect_stats=True),
    **{f"own {name}": with_own(name) for name in ("forward", "normalize", "compute_mat")},
    "no product": distances.LpDistance(),
}


@pytest.mark.parametrize("name", [*PRODUCTS, *ORDINARY])
def test_what_is_a_product_and_what_is_left_to_the_distance(name):
    is_one = name in PRODUCTS
    distance = PRODUCTS[name][0](**PRODUCTS[name][1]) if is_one else ORDINARY[name]
    assert is_product(distance) is is_one


@pytest.mark.parametrize("method", ["forward", "compute_mat", "normalize", "maybe_normalize"])
def test_a_method_replaced_in_the_class_is_called(method):
    own = getattr(CosineSimilarity, method)
    with mock.patch.object(CosineSimilarity, method, autospec=True, side_effect=own) as replaced:
        PNPLoss()(*batch())
    assert replaced.called


HOOKS = "forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(
    "make", [CosineSimilarity, lambda: distances.BatchedDistance(CosineSimilarity(), batch_size=3)]
)
def test_hooks_on_the_distance_are_called(make, hook, chunk_size):
    calls = []
    loss_func = PNPLoss(distance=make(), chunk_size=chunk_size)
    if isinstance(loss_func.distance, distances.BatchedDistance) and "backward" in hook:
        pytest.skip("returns nothing, so that PyTorch calls no backward hook")
    getattr(loss_func.distance, f"register_{hook}")(lambda *_: calls.append(1) or None)
    loss_func(torch.randn(8, 3, requires_grad=True), torch.arange(8) // 2).backward()
    assert calls


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_on_all_modules_see_the_distance(hook):
    seen = []
    distance = CosineSimilarity()
    x = torch.randn(6, 3, requires_grad=True)
    assert not has_global_hooks()
    register = getattr(torch.nn.modules.module, f"register_module_{hook}")
    with register(lambda module, *_: seen.append(module)):  # removed at the end
        PNPLoss(distance=distance)(x, torch.arange(6) // 2).backward()
    assert distance in seen


def test_only_a_second_derivative_refuses_references_that_were_changed():
    x, y = batch()
    refs = batch()[0]
    loss = PNPLoss()(x.requires_grad_(), y, None, refs, y)
    (want,) = torch.autograd.grad(loss, x, retain_graph=True)
    refs.mul_(2)  # a memory may move on
    assert torch.equal(torch.autograd.grad(loss, x, retain_graph=True)[0], want)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("with_references", [False, True])
def test_a_loss_that_is_kept_does_not_keep_the_embeddings(with_references):
    x, y = batch()
    refs = (x + 0.1, y) if with_references else (None, None)
    embeddings = x.requires_grad_() * 2
    loss = PNPLoss()(embeddings, y, None, *refs)
    loss.backward()
    watched = [weakref.ref(t) for t in (embeddings, refs[0]) if t is not None]
    del refs, embeddings
    gc.collect()
    assert loss.grad_fn is not None and all(ref() is None for ref in watched)
