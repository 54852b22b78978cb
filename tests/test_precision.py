"""Half precision and autocast."""

import pytest
import torch
from helpers import RTOL, VARIANTS, batch, expected_mean, value_and_grad
from pytorch_metric_learning import reducers, regularizers

from pml_pnp import PNPLoss

ERRORS = {torch.float16: 1e-3, torch.bfloat16: 5e-3, torch.float32: 1e-4, torch.float64: 1e-10}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("low", ERRORS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_is_as_good_as_the_dtype(variant, low, autocast, device):
    """Autocast computes and returns at least float32."""
    x, y = batch(dtype=low, device=device)
    loss_func = PNPLoss(variant=variant, alpha=4)
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        value, grad = value_and_grad(loss_func, x, y)
    dtype = torch.promote_types(low, torch.float32) if autocast else low
    expected = expected_mean(x, y, variant=variant, alpha=4)
    assert value.item() == pytest.approx(expected, rel=RTOL[dtype])
    assert value.dtype == dtype and grad.dtype == low
    want = value_and_grad(loss_func, x.double(), y)[1]
    assert (grad.double() - want).norm() / want.norm() < ERRORS[low]


@pytest.mark.parametrize("regularized", [False, True])
@pytest.mark.parametrize("ranked", [False, True])
def test_result_is_float32_under_autocast_whatever_is_in_the_batch(ranked, regularized, device):
    x, y = batch(dtype=torch.bfloat16, device=device)
    y = y if ranked else torch.arange(len(x))
    regularizer = regularizers.LpRegularizer() if regularized else None
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert PNPLoss(embedding_regularizer=regularizer)(x, y).dtype == torch.float32


@pytest.mark.parametrize("with_references", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 7])
def test_backward_is_as_accurate_under_autocast(chunk_size, with_references):
    x, y = batch()
    args = (y, None, *batch(n=9)) if with_references else (y,)
    x.requires_grad_()
    loss_func = PNPLoss(variant="Ds", anneal=0.1, chunk_size=chunk_size)
    (want,) = torch.autograd.grad(loss_func(x, *args), x, create_graph=True)
    second = torch.autograd.grad(want.square().sum(), x)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_func(x, *args)
        for _ in range(2):
            torch.testing.assert_close(torch.autograd.grad(loss, x, retain_graph=True)[0], want)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(grad, want)
    torch.testing.assert_close(torch.autograd.grad(grad.square().sum(), x), second)


def test_a_compiled_gradient_is_as_accurate_under_autocast():
    x, y = batch()
    want = value_and_grad(PNPLoss(variant="Ds", anneal=0.1), x.double(), y)
    compiled = torch.compile(PNPLoss(variant="Ds", anneal=0.1), backend="aot_eager")
    z = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = compiled(z, y)
        with pytest.raises(TypeError, match="embeddings must be a tensor, got list"):
            compiled([1.0], y[:1])
    loss.backward()
    torch.testing.assert_close((loss.double(), z.grad.double()), want, rtol=1e-4, atol=1e-6)


def test_reducers_work_on_float32_elements(device):
    """A sum of 512 float16 losses would overflow before it is divided."""
    x = torch.randn(512, 8, dtype=torch.float16, device=device)
    y = torch.arange(512, device=device) // 4
    divided = PNPLoss(variant="Iu", reducer=reducers.DivisorReducer())(x, y)
    assert divided.isfinite() and divided == PNPLoss(variant="Iu")(x, y)
