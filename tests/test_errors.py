"""Every bad input gets an error that says what was expected and what came."""

import runpy
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import VARIANTS

import pml_pnp.loss
from pml_pnp import PNPLoss


@pytest.mark.parametrize("name", ["anneal", "alpha", "b"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), 10**400])
def test_numbers_must_be_positive_and_finite(name, value):
    with pytest.raises(ValueError) as error:
        PNPLoss(**{name: value})
    assert str(error.value) == f"{name} must be a positive finite number, got {value!r}"


@pytest.mark.parametrize("name", ["anneal", "alpha", "b"])
@pytest.mark.parametrize("value", ["1", None, True, 1j, torch.tensor(1.0)], ids=repr)
def test_numbers_must_be_numbers(name, value):
    with pytest.raises(TypeError) as error:
        PNPLoss(**{name: value})
    assert str(error.value) == f"{name} must be a positive finite number, got {value!r}"


@pytest.mark.parametrize("value", [np.float32(0.5), np.int64(1), 1, Fraction(1, 2)])
@pytest.mark.parametrize("name", ["anneal", "alpha", "b"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_real_number_is_taken(variant, name, value):
    x, y = torch.randn(6, 2), torch.arange(6) // 2
    got = PNPLoss(variant=variant, **{name: value})(x, y)
    assert torch.equal(got, PNPLoss(variant=variant, **{name: float(value)})(x, y))


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_chunk_size_must_be_a_positive_integer(value, error):
    message = f"chunk_size must be a positive integer or None, got {value}"
    with pytest.raises(error, match=message):
        PNPLoss(chunk_size=value)
    loss_func = PNPLoss()
    loss_func.chunk_size = value
    with pytest.raises(error, match=message):
        loss_func(torch.randn(4, 2), torch.tensor([0, 0, 1, 1]))


def test_unknown_variant_lists_the_known_ones():
    with pytest.raises(ValueError) as error:
        PNPLoss(variant="Dx")
    known = ", ".join(VARIANTS)
    assert str(error.value) == f"variant must be one of {known} or a callable, got 'Dx'"
    with pytest.raises(TypeError, match="or a callable, got 3"):
        PNPLoss(variant=3)


X, Y, REF, REF_Y = torch.randn(4, 2), torch.arange(4) // 2, torch.randn(6, 2), torch.arange(6) // 3


def i(*values, dtype=torch.long):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((X,), ValueError, "expected labels or indices_tuple, got neither"),
        (
            (X, Y[:3]),
            ValueError,
            r"labels must have shape \(4,\), one per row of embeddings, got \(3,\)",
        ),
        ((X, Y.view(4, 1)), ValueError, r"labels must have shape \(4,\).* got \(4, 1\)"),
        ((X, [0, 0, 1, 1]), TypeError, "labels must be a tensor, got list"),
        ((X.numpy(), Y), TypeError, "embeddings must be a tensor, got ndarray"),
        ((X.long(), Y), TypeError, "embeddings must be floating point, got torch.int64"),
        (
            (X[0], Y),
            ValueError,
            r"embeddings must have shape \(batch size, embedding size\), got \(2,\)",
        ),
        ((X, Y, 3), TypeError, "indices_tuple must be 3 or 4 .* tensors of indices, got int"),
        ((X, Y, (i(0), i(1))), ValueError, "indices_tuple must be 3 or 4 .*, got 2"),
        ((X, Y, (i(0),) * 5), ValueError, "indices_tuple must be 3 or 4 .*, got 5"),
        ((X, Y, (i(0), i(1), [2])), TypeError, "indices_tuple must be .*, got list at position 2"),
        (
            (X, Y, (i(0), i(1), i(2).view(1, 1))),
            ValueError,
            r"indices_tuple must be .*, got shape \(1, 1\) at position 2",
        ),
        (
            (X, Y, (i(0), i(1, dtype=torch.float), i(2))),
            TypeError,
            "indices_tuple must be .*, got torch.float32 at position 1",
        ),
        (
            (X, Y, (i(0), i(1, dtype=torch.bool), i(2))),
            TypeError,
            "indices_tuple must be .*, got torch.bool at position 1",
        ),
        (
            (X, Y, (i(0), i(1), i(2, 3))),
            ValueError,
            r"as many anchors as positives, and as many as negatives, got lengths \[1, 1, 2\]",
        ),
        ((X, Y, (i(0), i(1, 2), i(0), i(3))), ValueError, r"got lengths \[1, 2, 1, 1\]"),
        ((X, Y, (i(0), i(1), i(0, 1), i(3))), ValueError, r"got lengths \[1, 1, 2, 1\]"),
        (
            (X, Y, (i(0, 4), i(1, 1), i(2, 2))),
            ValueError,
            r"indices_tuple\[0\] must hold indices from 0 to 3, got 4",
        ),
        (
            (X, Y, (i(0), i(-1), i(2))),
            ValueError,
            r"indices_tuple\[1\] must hold indices from 0 to 3, got -1",
        ),
        (
            (X, Y, (i(0), i(1), i(0), i(4))),
            ValueError,
            r"indices_tuple\[3\] must hold indices from 0 to 3, got 4",
        ),
        (
            (X, Y, (i(0), i(5), i(0), i(6)), REF, REF_Y),
            ValueError,
            r"indices_tuple\[3\] must hold indices from 0 to 5, got 6",
        ),
        (
            (X, Y, (i(4), i(5), i(0), i(1)), REF, REF_Y),
            ValueError,
            r"indices_tuple\[0\] must hold indices from 0 to 3, got 4",
        ),
        (
            (X, Y, None, REF),
            ValueError,
            "ref_emb needs labels and ref_labels, or indices_tuple, got no ref_labels",
        ),
        ((X, None, None, REF, REF_Y), ValueError, "ref_emb needs .* got no labels"),
        ((X, None, None, REF), ValueError, "ref_emb needs .* got no labels"),
        ((X, Y, None, None, REF_Y), ValueError, "ref_labels needs ref_emb, got ref_labels alone"),
        (
            (X, Y, None, REF, REF_Y[:2]),
            ValueError,
            r"ref_labels must have shape \(6,\), one per row of ref_emb, got \(2,\)",
        ),
        (
            (X, Y, None, REF[:, :1], REF_Y),
            ValueError,
            "ref_emb must have the embedding size of embeddings, 2, got 1",
        ),
        ((X, Y, None, REF.tolist(), REF_Y), TypeError, "ref_emb must be a tensor, got list"),
        ((X, Y, None, REF.long(), REF_Y), TypeError, "ref_emb must be floating point, got"),
    ],
)
def test_bad_input_is_named(args, error, message):
    with pytest.raises(error, match=message):
        PNPLoss()(*args)


def test_a_pml_that_does_not_ask_for_the_default_distance_is_named(monkeypatch):
    bases = PNPLoss.__mro__[1:]
    owner = next(x for x in bases if "get_default_distance" in vars(x))
    monkeypatch.delattr(owner, "get_default_distance")
    with pytest.raises(ImportError, match=r"expected pytorch-metric-learning 2, got \d"):
        runpy.run_path(pml_pnp.loss.__file__)
