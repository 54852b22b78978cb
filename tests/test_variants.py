import mpmath
import pytest
import torch
from helpers import VARIANTS_OF_THE_PAPER

from pml_pnp.variants import VARIANTS, apply_variant

mpmath.mp.dps = 60
ALPHA, B = 4, 2
EXACT = {
    "O": lambda r: r,
    "Iu": lambda r: (1 + r) * mpmath.log(1 + r),
    "Ib": lambda r: (B * r - mpmath.log(1 + B * r)) / B**2,
    "Ds": lambda r: mpmath.log(1 + r),
    "Dq": lambda r: 1 - (1 + r) ** -ALPHA,
}
RANKS = [1e-12, 1e-8, 1e-4, 1e-2, 0.2, 0.249, 0.25, 0.251, 0.7, 1.0, 3.0, 50.0, 1e4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", VARIANTS)
def test_value_and_gradient_keep_their_digits_from_tiny_to_large_ranks(name, dtype):
    r = torch.tensor(RANKS, dtype=dtype, requires_grad=True)
    value = apply_variant(name, r, alpha=ALPHA, b=B)
    (grad,) = torch.autograd.grad(value.sum(), r)
    # The exact values at the numbers that float32 rounds the ranks to.
    exact = [mpmath.mpf(x) for x in r.tolist()]
    eps = torch.finfo(dtype).eps
    for i, x in enumerate(exact):
        assert value[i].item() == pytest.approx(float(EXACT[name](x)), rel=32 * eps, abs=0)
        assert grad[i].item() == pytest.approx(
            float(mpmath.diff(EXACT[name], x)), rel=32 * eps, abs=1e-300
        )


@pytest.mark.parametrize("name", VARIANTS)
def test_no_negative_before_a_positive_costs_nothing_and_nan_stays_nan(name):
    costs = apply_variant(name, torch.tensor([0.0, float("nan")]), alpha=ALPHA, b=B)
    assert costs[0] == 0 and costs[1].isnan()


def test_table_holds_the_variants_of_the_paper():
    equations = {name: VARIANTS[name].equation for name in VARIANTS_OF_THE_PAPER}
    assert equations == VARIANTS_OF_THE_PAPER


@pytest.mark.parametrize(
    ("name", "slope"), [("O", 0), ("Iu", 1), ("Ib", 1), ("Ds", -1), ("Dq", -1)]
)
def test_gradient_assignment_is_constant_rising_or_falling_as_the_paper_says(name, slope):
    r = torch.linspace(0.01, 30, 200, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(apply_variant(name, r, alpha=ALPHA, b=B).sum(), r)
    assert (grad.diff().sign() == slope).all()
    if name == "Ib":
        assert (grad < 1 / B).all() and grad[-1] > 0.98 / B
