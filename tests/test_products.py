"""What is spared where similarities are products: the same values, where nobody would notice."""

import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance

from pml_pnp import PNPLoss, products


class Cosine(CosineSimilarity):
    """Exactly what it derives from, but who knows."""


PRODUCTS = {
    "cosine": CosineSimilarity(),
    "dot product": DotProductSimilarity(normalize_embeddings=False),
    "normalized dot product": DotProductSimilarity(),
    "another norm": CosineSimilarity(p=1),
}


@pytest.fixture(params=PRODUCTS)
def product(request):
    return PRODUCTS[request.param]


@pytest.mark.parametrize("n", [0, 1, 4, 5, 11])
def test_values_and_gradient_are_those_of_the_distance(n, product, monkeypatch):
    monkeypatch.setattr(products, "CPU_TILE", 5)
    x = torch.randn(n, 3, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(n, n, dtype=torch.float64)  # not symmetric
    want = product(x)
    s = products.self_product(x, product)
    assert torch.equal(s, want)
    (want,) = torch.autograd.grad(want, x, cotangent)
    torch.testing.assert_close(torch.autograd.grad(s, x, cotangent)[0], want)
    s = products.self_product(x, product)
    again = torch.autograd.grad(s, x, cotangent, create_graph=True)[0]
    torch.testing.assert_close(again, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_embeddings_of_no_length_and_of_any_other(dtype):
    x = torch.randn(9, 4, dtype=dtype)
    x *= torch.tensor([0, 1e-20, 1e-13, 1e-11, 1e-3, 1, 1e3, 1e10, 1e15]).to(dtype).unsqueeze(1)
    x.requires_grad_()
    cotangent = torch.randn(9, 9, dtype=dtype)
    (want,) = torch.autograd.grad(CosineSimilarity()(x), x, cotangent)
    (got,) = torch.autograd.grad(products.self_product(x, CosineSimilarity()), x, cotangent)
    scale = x.detach().norm(dim=1, keepdim=True).clamp(min=1e-12)
    torch.testing.assert_close(got * scale, want * scale)


def test_the_gradient_that_came_is_left_alone(product):
    n = products.CPU_TILE + 1
    for size in (6, n):
        x = torch.randn(size, 3, requires_grad=True)
        cotangent = torch.randn(size, size)
        before = cotangent.clone()
        products.self_product(x, product).backward(cotangent)
        assert torch.equal(cotangent, before)


def test_second_derivative(product):
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: products.self_product(x, product), x)


def seen(make):
    """A distance that something looks on at, or changes."""
    distance = CosineSimilarity()
    make(distance)
    return distance


ORDINARY = {
    "subclass": Cosine(),
    "power": CosineSimilarity(power=2),
    "statistics": CosineSimilarity(collect_stats=True),
    "forward hook": seen(lambda d: d.register_forward_hook(lambda *_: None)),
    "forward pre-hook": seen(lambda d: d.register_forward_pre_hook(lambda *_: None)),
    "backward hook": seen(lambda d: d.register_full_backward_hook(lambda *_: None)),
    "forward of its own": seen(lambda d: setattr(d, "forward", lambda *_: None)),
    "normalize of its own": seen(lambda d: setattr(d, "normalize", lambda *_, **__: None)),
    "compute_mat of its own": seen(lambda d: setattr(d, "compute_mat", lambda *_: None)),
    "no product": LpDistance(),
}


def test_what_is_a_product(product):
    assert products.is_product(product)


@pytest.mark.parametrize("name", ORDINARY)
def test_what_is_left_to_the_distance(name):
    assert not products.is_product(ORDINARY[name])


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_a_hook_on_the_distance_is_called_all_the_same(chunk_size):
    calls = []
    loss_func = PNPLoss(chunk_size=chunk_size)
    loss_func.distance.register_forward_hook(lambda *_: calls.append(1))
    loss_func(torch.randn(8, 3, requires_grad=True), torch.arange(8) // 2).backward()
    assert calls


@pytest.mark.parametrize("distance", [CosineSimilarity(), DotProductSimilarity(power=1)])
@pytest.mark.parametrize("chunk_size", [None, 3, 8])
def test_loss_equals_that_with_the_distance_as_it_is(distance, chunk_size, monkeypatch):
    x = torch.randn(10, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(10) // 2
    loss_func = PNPLoss(variant="Dq", anneal=0.2, distance=distance, chunk_size=chunk_size)
    got = loss_func(x, labels)
    gradient = torch.autograd.grad(3 * got, x)
    monkeypatch.setattr("pml_pnp.loss.is_product", lambda distance: False)
    want = loss_func(x, labels)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradient, torch.autograd.grad(3 * want, x))


def test_a_hook_of_all_modules_sees_what_the_distance_returned():
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append((module, output))
    )
    distance = CosineSimilarity()
    try:
        x = torch.randn(6, 3, requires_grad=True)
        PNPLoss(distance=distance)(x, torch.arange(6) // 2).backward()
    finally:
        handle.remove()
    (similarity,) = (output for module, output in seen if module is distance)
    torch.testing.assert_close(similarity, distance(x))
