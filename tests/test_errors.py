"""Every bad input gets an error that says what was expected and what came."""

import math
import runpy
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import VARIANTS, batch

import pml_pnp.loss
from pml_pnp import PNPLoss
from pml_pnp.functional import pnp_loss

X, Y, REF, REF_Y = torch.randn(4, 2), torch.arange(4) // 2, torch.randn(6, 2), torch.arange(6) // 3
HUGE = 10**400
NUMBERS = ["anneal", "alpha", "b"]
NO_NUMBER = "{name} must be a positive finite number, got {value!r}"
NO_INTEGER = "chunk_size must be a positive integer or None, got {value!r}"
NO_VARIANT = f"variant must be one of {', '.join(VARIANTS)} or a callable, got {{value!r}}"
NO_BOOL = "include_self must be True or False, got {value!r}"
SETTINGS = [
    *((x, v, ValueError, NO_NUMBER) for x in NUMBERS for v in (0, -1.0, math.nan, math.inf, HUGE)),
    *((x, v, TypeError, NO_NUMBER) for x in NUMBERS for v in ("1", None, True, 1j, X)),
    *(("chunk_size", v, ValueError, NO_INTEGER) for v in (0, -1)),
    *(("chunk_size", v, TypeError, NO_INTEGER) for v in (1.5, True)),
    ("variant", "Dx", ValueError, NO_VARIANT),
    *(("variant", v, TypeError, NO_VARIANT) for v in (3, None)),
    *(("include_self", v, TypeError, NO_BOOL) for v in ("no", 1, None)),
]


@pytest.mark.parametrize(
    ("name", "value", "error", "message"), SETTINGS, ids=[f"{x[0]} {x[1]!r:.9}" for x in SETTINGS]
)
def test_a_bad_setting_is_named(name, value, error, message):
    """Given or set later, and given to pml_pnp.functional."""
    loss_func = PNPLoss()
    good = getattr(loss_func, name)
    setattr(loss_func, name, value)
    calls = [lambda: PNPLoss(**{name: value}), lambda: loss_func(X, Y)]
    if name != "chunk_size":
        calls.append(lambda: pnp_loss(X @ X.T, Y, **{name: value}))
    for call in calls:
        with pytest.raises(error) as raised:
            call()
        assert str(raised.value) == message.format(name=name, value=value)
    setattr(loss_func, name, good)
    assert torch.equal(loss_func(X, Y), PNPLoss()(X, Y))


@pytest.mark.parametrize("value", [np.float32(0.5), np.int64(1), 1, Fraction(1, 2)])
@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_real_number_is_taken(variant, name, value):
    x, y = torch.randn(6, 2), torch.arange(6) // 2
    got = PNPLoss(variant=variant, **{name: value})(x, y)
    assert torch.equal(got, PNPLoss(variant=variant, **{name: float(value)})(x, y))


def i(*values):
    return torch.tensor(values)


T = i(0), i(1), i(2)  # a triplet
UNSIGNED = torch.tensor([2**64 - 3], dtype=torch.uint64)
TYPE_ERRORS = [
    ((X, [0, 0, 1, 1]), "labels must be a tensor, got list"),
    ((X, Y * 1j), "labels must be real, got torch.complex64"),
    ((X, Y, None, REF, REF_Y * 1j), "ref_labels must be real, got torch.complex64"),
    ((X.numpy(), Y), "embeddings must be a tensor, got ndarray"),
    ((X.long(), Y), "embeddings must be floating point, got torch.int64"),
    ((X * 1j, Y), "embeddings must be floating point, got torch.complex64"),
    ((X, Y, 3), "indices_tuple must be 3 or 4 .* tensors of indices, got int"),
    ((X, Y, (*T[:2], [2])), "indices_tuple must be .*, got list at position 2"),
    ((X, Y, (T[0], T[1].float(), T[2])), "got torch.float32 at position 1"),
    ((X, Y, (T[0], T[1].bool(), T[2])), "got torch.bool at position 1"),
    ((X, Y, None, REF.tolist(), REF_Y), "ref_emb must be a tensor, got list"),
    ((X, Y, None, REF.long(), REF_Y), "ref_emb must be floating point, got torch.int64"),
]
VALUE_ERRORS = [
    ((X,), "expected labels or indices_tuple, got neither"),
    ((X, Y[:3]), r"labels must have shape \(4,\), one per row of embeddings, got \(3,\)"),
    ((X, Y.view(4, 1)), r"labels must have shape \(4,\).* got \(4, 1\)"),
    ((X[0], Y), r"embeddings must have shape \(batch size, embedding size\), got \(2,\)"),
    ((X[None], Y), r"embeddings must have shape .*, got \(1, 4, 2\)"),
    ((X, Y, T[:2]), "indices_tuple must be 3 or 4 .*, got 2"),
    ((X, Y, T[:1] * 5), "indices_tuple must be 3 or 4 .*, got 5"),
    ((X, Y, (*T[:2], T[2].view(1, 1))), r"one-dimensional.*, got shape \(1, 1\) at position 2"),
    ((X, Y, (*T[:2], i(2, 3))), r"as many anchors as positives, .* got lengths \[1, 1, 2\]"),
    ((X, Y, (i(0), i(1, 2), i(0), i(3))), r"got lengths \[1, 2, 1, 1\]"),
    ((X, Y, (i(0), i(1), i(0, 1), i(3))), r"got lengths \[1, 1, 2, 1\]"),
    ((X, Y, (i(0, 4), i(1, 1), i(2, 2))), r"indices_tuple\[0\] must hold .* 0 to 3, got 4"),
    ((X, Y, (i(0), i(-1), i(2))), r"indices_tuple\[1\] must hold indices from 0 to 3, got -1"),
    ((X, Y, (*T, i(4))), r"indices_tuple\[3\] must hold indices from 0 to 3, got 4"),
    ((X, Y, (UNSIGNED,) * 3), f"indices from 0 to 3, got {2**64 - 3}"),
    ((X, Y, (i(0), i(5), i(0), i(6)), REF, REF_Y), r"\[3\] must hold .* from 0 to 5, got 6"),
    ((X, Y, (i(4), i(5), i(0), i(1)), REF, REF_Y), r"\[0\] must hold .* from 0 to 3, got 4"),
    ((X, Y, None, REF), "ref_emb needs labels and ref_labels, or .*, got no ref_labels"),
    ((X, None, None, REF, REF_Y), "ref_emb needs .* got no labels"),
    ((X, None, None, REF), "ref_emb needs .* got no labels"),
    ((X, Y, None, None, REF_Y), "ref_labels needs ref_emb, got ref_labels alone"),
    ((X, Y, None, REF, REF_Y[:2]), r"ref_labels must have .*, one per row of ref_emb, got \(2,\)"),
    ((X, Y, None, REF[:, :1], REF_Y), "ref_emb must have the embedding size of .*, 2, got 1"),
]


KEPT = ("anneal", "alpha", "b", "variant", "include_self", "chunk_size", "reducer", "distance")


@pytest.mark.parametrize(
    ("error", "args", "message"),
    [*((TypeError, *x) for x in TYPE_ERRORS), *((ValueError, *x) for x in VALUE_ERRORS)],
)
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_bad_input_is_named_and_leaves_the_loss_as_it_was(args, error, message, chunk_size):
    loss_func = PNPLoss(chunk_size=chunk_size, collect_stats=True)
    expected = loss_func(X, Y)
    keys = set(vars(loss_func))
    settings = {name: getattr(loss_func, name) for name in KEPT}
    with pytest.raises(error, match=message):
        loss_func(*args)
    assert set(vars(loss_func)) == keys
    assert {name: getattr(loss_func, name) for name in KEPT} == settings
    assert torch.equal(loss_func(X, Y), expected)


def test_a_pml_that_does_not_ask_for_the_default_distance_is_named(monkeypatch):
    bases = PNPLoss.__mro__[1:]
    owner = next(x for x in bases if "get_default_distance" in vars(x))
    monkeypatch.delattr(owner, "get_default_distance")
    with pytest.raises(ImportError, match=r"expected pytorch-metric-learning 2, got \d"):
        runpy.run_path(pml_pnp.loss.__file__)


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
