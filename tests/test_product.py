"""Cosine similarity and dot product under a mean: the same values as by the distance's own call."""

import weakref

import pytest
import torch
from helpers import Manhattan, batch
from pytorch_metric_learning import distances, reducers
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity

from pml_pnp import PNPLoss, losses
from pml_pnp.distances import has_global_hooks, is_product
from pml_pnp.ops import dispatch, eager, product
from pml_pnp.ops.settings import Settings
from pml_pnp.pairs import Pairs


class Cosine(CosineSimilarity):
    """The same, but for all that is known of a subclass it could be anything."""


class Dot(DotProductSimilarity):
    """Likewise."""


PRODUCTS = {
    "cosine": (CosineSimilarity, Cosine),
    "dot product": (
        lambda: DotProductSimilarity(normalize_embeddings=False),
        lambda: Dot(normalize_embeddings=False),
    ),
    "normalized dot product": (DotProductSimilarity, Dot),
}


def cases(x, y, ref, ref_y):
    """Arguments of a call for the batch, for references, and for the batch in a memory."""
    return {"batch": (x, y), "references": (x, y, None, ref, ref_y)}


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
@pytest.mark.parametrize("kind", ["batch", "references"])
@pytest.mark.parametrize("variant", ["Iu", "Dq"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_value_and_gradients_are_those_by_the_distance(
    name, variant, kind, include_self, chunk_size, monkeypatch
):
    monkeypatch.setattr(product, "CPU_TILE", 5)
    monkeypatch.setattr(product, "REFERENCES_BLOCK", 13 * 4)
    (x, y), (ref, ref_y) = batch(dtype=torch.float64), batch(n=13, dtype=torch.float64)
    args = cases(x.requires_grad_(), y, ref.requires_grad_(), ref_y)[kind]
    kwargs = {"variant": variant, "anneal": 0.2, "include_self": include_self}
    fast, plain = PRODUCTS[name]
    got = values(PNPLoss(distance=fast(), chunk_size=chunk_size, **kwargs), *args)
    want = values(PNPLoss(distance=plain(), **kwargs), *args)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("wanted", ["embeddings", "references"])
def test_gradient_for_one_of_both_sides(wanted):
    (x, y), (ref, ref_y) = batch(dtype=torch.float64), batch(n=13, dtype=torch.float64)
    x.requires_grad_(wanted == "embeddings")
    ref.requires_grad_(wanted == "references")
    got = values(PNPLoss(anneal=0.2), x, y, None, ref, ref_y)
    want = values(PNPLoss(anneal=0.2, distance=Cosine()), x, y, None, ref, ref_y)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("distance", [CosineSimilarity(), DotProductSimilarity()])
def test_a_memory_that_holds_the_batch(distance):
    (x, y), (earlier, _) = batch(n=8, dtype=torch.float64), batch(n=8, dtype=torch.float64)
    results = []
    for reducer in (reducers.MeanReducer(), reducers.SumReducer()):  # only the mean is of products
        memory = losses.CrossBatchMemory(PNPLoss(distance=distance, reducer=reducer), 8, 20)
        memory(earlier, y)
        v = x.clone().requires_grad_()
        loss = memory(v, y)
        if isinstance(reducer, reducers.SumReducer):
            loss = loss / (y.unsqueeze(1) == memory.label_memory[:16]).sum(dim=1).gt(1).sum()
        results.append([loss.detach(), torch.autograd.grad(loss, v)[0]])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_embeddings_of_no_length_and_of_any_other(dtype):
    x, y = torch.randn(9, 4, dtype=dtype), torch.arange(9) // 3
    x *= torch.tensor([0, 1e-20, 1e-13, 1e-11, 1e-3, 1, 1e3, 1e10, 1e15]).to(dtype).unsqueeze(1)
    x.requires_grad_()
    (want,) = torch.autograd.grad(PNPLoss(anneal=0.5, distance=Cosine())(x, y), x)
    (got,) = torch.autograd.grad(PNPLoss(anneal=0.5)(x, y), x)
    scale = x.detach().norm(dim=1, keepdim=True).clamp(min=1e-12)
    torch.testing.assert_close(got * scale, want * scale)


@pytest.mark.parametrize("distance", [CosineSimilarity(), Cosine(), distances.LpDistance()])
@pytest.mark.parametrize("where", ["batch", "references"])
def test_a_length_beyond_the_dtype_gives_nan_instead_of_a_zero_vector(distance, where):
    (x, y), (ref, ref_y) = batch(), batch(n=9)
    (x if where == "batch" else ref)[2] = 1e20
    assert PNPLoss(distance=distance)(x, y, ref_emb=ref, ref_labels=ref_y).isnan()
    assert where == "references" or PNPLoss(distance=distance)(x, y).isnan()


def test_a_large_embedding_is_left_to_a_distance_that_does_not_normalize():
    distance = Manhattan()
    distance.p = 2  # whatever it means there
    x, y = batch()
    x[2] = 1e20
    assert PNPLoss(distance=distance)(x, y).isfinite()


def test_counts_have_no_gradient_and_are_not_made_unasked():
    x, y = batch()
    pairs = Pairs(y, None, None, len(x), len(x), True, x.device)
    settings = Settings(10.0, "O", 1.0, 1.0, True)
    arguments = x.requires_grad_(), None, pairs, settings
    flags = {"normalized": True, "chunk_size": None}
    mean, counts = product.mean_of_losses(*arguments, **flags, with_counts=True)
    assert mean.requires_grad and not counts.requires_grad
    assert product.mean_of_losses(*arguments, **flags, with_counts=False)[1] is None


def changed(change):
    """A distance that something looks on at, or that is changed."""
    distance = CosineSimilarity()
    change(distance)
    return distance


ORDINARY = {
    "subclass": Cosine(),
    "power": CosineSimilarity(power=2),
    "another norm": CosineSimilarity(p=1),
    "statistics": CosineSimilarity(collect_stats=True),
    "forward hook": changed(lambda d: d.register_forward_hook(lambda *_: None)),
    "forward pre-hook": changed(lambda d: d.register_forward_pre_hook(lambda *_: None)),
    "backward hook": changed(lambda d: d.register_full_backward_hook(lambda *_: None)),
    "backward pre-hook": changed(lambda d: d.register_full_backward_pre_hook(lambda *_: None)),
    "forward of its own": changed(lambda d: setattr(d, "forward", lambda *_: None)),
    "normalize of its own": changed(lambda d: setattr(d, "normalize", lambda *_, **__: None)),
    "compute_mat of its own": changed(lambda d: setattr(d, "compute_mat", lambda *_: None)),
    "no product": distances.LpDistance(),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_what_is_a_product(name):
    assert is_product(PRODUCTS[name][0]())


@pytest.mark.parametrize("name", ORDINARY)
def test_what_is_left_to_the_distance(name):
    assert not is_product(ORDINARY[name])


@pytest.mark.parametrize("method", ["forward", "compute_mat", "normalize", "maybe_normalize"])
def test_a_method_replaced_in_the_class_is_called(method, monkeypatch):
    called = []
    original = getattr(CosineSimilarity, method)

    def replacement(self, *args, **kwargs):
        called.append(method)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(CosineSimilarity, method, replacement)
    PNPLoss()(*batch())
    assert called


HOOKS = {
    "forward": "register_forward_hook",
    "forward pre": "register_forward_pre_hook",
    "full backward": "register_full_backward_hook",
    "full backward pre": "register_full_backward_pre_hook",
}


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("register", HOOKS.values(), ids=list(HOOKS))
@pytest.mark.parametrize(
    "make", [CosineSimilarity, lambda: distances.BatchedDistance(CosineSimilarity(), batch_size=3)]
)
def test_hooks_on_the_distance_are_called(make, register, chunk_size):
    calls = []
    loss_func = PNPLoss(distance=make(), chunk_size=chunk_size)
    if isinstance(loss_func.distance, distances.BatchedDistance) and "backward" in register:
        pytest.skip("returns nothing, so that PyTorch calls no backward hook")
    getattr(loss_func.distance, register)(lambda *_: calls.append(1) or None)
    loss_func(torch.randn(8, 3, requires_grad=True), torch.arange(8) // 2).backward()
    assert calls


HOOKS_OF_ALL = [
    "register_module_forward_hook",
    "register_module_forward_pre_hook",
    "register_module_full_backward_hook",
    "register_module_full_backward_pre_hook",
]


@pytest.mark.parametrize("register", HOOKS_OF_ALL)
def test_hooks_on_all_modules_see_the_distance(register):
    seen = []
    distance = CosineSimilarity()
    x = torch.randn(6, 3, requires_grad=True)
    assert not has_global_hooks()
    hook = getattr(torch.nn.modules.module, register)(lambda module, *_: seen.append(module))
    try:
        PNPLoss(distance=distance)(x, torch.arange(6) // 2).backward()
    finally:
        hook.remove()
    assert distance in seen


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_matrices_are_freed_before_the_next_is_made(chunk_size, monkeypatch):
    """By a kernel that makes a matrix for the gradient, as the one for GPUs does."""
    made = []

    def kernel(s, *args, overwrite):
        assert all(grad() is None for grad in made)
        results = eager.losses_and_gradient(s, *args)
        made.append(weakref.ref(results[1]))
        similarities.append(weakref.ref(s))
        return results

    def times_both(grad, z):
        assert all(s() is None for s in similarities)
        return (grad + grad.T) @ z

    similarities = []
    monkeypatch.setattr(dispatch, "kernel_for", lambda s: kernel)
    monkeypatch.setattr(product, "_times_both", times_both)
    x, y = batch()
    PNPLoss(chunk_size=chunk_size)(x.requires_grad_(), y).backward()
    assert len(made) == (1 if chunk_size is None else 4)
