"""A callable f(R), or a module with parameters, in the place of a variant's name."""

import pytest
import torch
from helpers import Scale, batch, value_and_grad

from pml_pnp import PNPLoss


def test_a_callable_variant_is_any_f(device):
    x, y = batch(dtype=torch.float64, device=device)
    for name, f in {"Ds": torch.log1p, "O": lambda r: r}.items():
        for got, want in zip(
            value_and_grad(PNPLoss(variant=f), x, y),
            value_and_grad(PNPLoss(variant=name), x, y),
            strict=True,
        ):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("f", "error", "message"),
    [
        (lambda r: r.sum(), ValueError, r"one value per entry: expected shape .*, got \(\)"),
        (lambda r: r.sum(dim=1, keepdim=True), ValueError, "one value per entry"),
        (lambda r: 1.0, TypeError, "variant must return a tensor, got float"),
    ],
)
def test_a_callable_that_does_not_return_one_value_per_entry_is_named(f, error, message):
    with pytest.raises(error, match=message):
        PNPLoss(variant=f)(*batch())


def test_a_module_as_variant_is_part_of_the_loss():
    loss_func = PNPLoss(variant=Scale())
    assert [name for name, _ in loss_func.named_parameters()] == ["variant.weight"]
    x, y = batch()
    loss_func(x, y).backward()
    expected = PNPLoss()(x, y)
    torch.testing.assert_close(loss_func.variant.weight.grad, expected)
