"""Input validation; every error message says what was expected and what was given."""

import math
from numbers import Integral, Real

import torch
from torch import Tensor

from pml_pnp.variants import VARIANTS

# Largest hyperparameter for which the formulas neither overflow nor underflow to zero in a dtype;
# the smallest is its inverse.
RANGES = {torch.float32: 1e30, torch.float64: 1e300}


def check_hyperparameters(
    b, alpha, anneal, variant, include_self, dtype: torch.dtype | None = None
) -> None:
    """Raise TypeError or ValueError unless these are valid, also for computing in `dtype`."""
    for name, value in (("b", b), ("alpha", alpha), ("anneal", anneal)):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a positive finite number, got {value!r}")
        if not 0 < _as_float(value) < math.inf:
            raise ValueError(f"{name} must be a positive finite number, got {value!r}")
        if dtype is not None and not 1 / RANGES[dtype] <= value <= RANGES[dtype]:
            raise ValueError(
                f"{name} must be from {1 / RANGES[dtype]:g} to {RANGES[dtype]:g} to be computed in "
                f"{str(dtype).removeprefix('torch.')}, got {value!r}"
            )
    if not (variant in VARIANTS if isinstance(variant, str) else callable(variant)):
        error = ValueError if isinstance(variant, str) else TypeError
        raise error(f"variant must be one of {', '.join(VARIANTS)} or a callable, got {variant!r}")
    if not isinstance(include_self, bool):
        raise TypeError(f"include_self must be True or False, got {include_self!r}")


def _as_float(number: Real) -> float:
    try:
        return float(number)
    except OverflowError:  # an int beyond the range of float
        return math.inf


def check_part(name: str, part) -> None:
    """Raise TypeError unless a reducer or regularizer is None or an instance of its class."""
    if part is None or (callable(part) and not isinstance(part, type)):
        return
    got = f"the class {part.__name__}" if isinstance(part, type) else repr(part)
    raise TypeError(f"{name} must be an instance of a {name} of pytorch_metric_learning, got {got}")


def check_chunk_size(chunk_size, or_none: bool = False) -> None:
    """Raise TypeError or ValueError unless this is a positive integer, or None if allowed."""
    if chunk_size is None and or_none:
        return
    expected = "a positive integer or None" if or_none else "a positive integer"
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, Integral):
        raise TypeError(f"chunk_size must be {expected}, got {chunk_size!r}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be {expected}, got {chunk_size}")


def check_inputs(embeddings, labels, indices_tuple, ref_emb, ref_labels) -> None:
    """Raise TypeError or ValueError unless these are valid arguments of a call of PNPLoss."""
    shape = "(batch size, embedding size)"
    check_matrix("embeddings", embeddings, shape)
    if labels is not None:
        check_labels("labels", labels, len(embeddings), ", one per row of embeddings")
    if ref_emb is None:
        if ref_labels is not None:
            raise ValueError("ref_labels needs ref_emb, got ref_labels alone")
        if labels is None and indices_tuple is None:
            raise ValueError("expected labels or indices_tuple, got neither")
        ref_emb = embeddings
    else:
        check_matrix("ref_emb", ref_emb, shape)
        if ref_labels is not None:
            check_labels("ref_labels", ref_labels, len(ref_emb), ", one per row of ref_emb")
        if ref_emb.shape[1] != embeddings.shape[1]:
            raise ValueError(
                "ref_emb must have the embedding size of embeddings, "
                f"{embeddings.shape[1]}, got {ref_emb.shape[1]}"
            )
        if indices_tuple is None and (labels is None or ref_labels is None):
            missing = "ref_labels" if labels is not None else "labels"
            raise ValueError(
                f"ref_emb needs labels and ref_labels, or indices_tuple, got no {missing}"
            )
    if indices_tuple is not None:
        check_tuple(indices_tuple, len(embeddings), len(ref_emb))


def check_tuple(indices_tuple, n: int, m: int) -> None:
    """Raise TypeError or ValueError unless this is a miner's tuple for n queries, m references."""
    expected = "indices_tuple must be 3 or 4 one-dimensional tensors of indices"
    if not isinstance(indices_tuple, (tuple, list)):
        raise TypeError(f"{expected}, got {type(indices_tuple).__name__}")
    if len(indices_tuple) not in (3, 4):
        raise ValueError(f"{expected}, got {len(indices_tuple)}")
    for position, indices in enumerate(indices_tuple):
        if not isinstance(indices, Tensor):
            raise TypeError(f"{expected}, got {type(indices).__name__} at position {position}")
        if indices.ndim != 1:
            raise ValueError(f"{expected}, got shape {tuple(indices.shape)} at position {position}")
        if len(indices) and (indices.is_floating_point() or indices.dtype == torch.bool):
            raise TypeError(f"{expected}, got {indices.dtype} at position {position}")
    lengths = [len(indices) for indices in indices_tuple]
    if lengths[0] != lengths[1] or lengths[-1] != lengths[-2]:
        raise ValueError(
            "indices_tuple must have as many anchors as positives, and as many as negatives, "
            f"got lengths {lengths}"
        )
    sizes = (n, m, m) if len(indices_tuple) == 3 else (n, m, n, m)
    filled = [position for position in range(len(sizes)) if lengths[position]]
    if not filled:
        return
    # One transfer from the device for all extremes. A bad index would end a CUDA process.
    extremes = torch.stack(
        [torch.stack(indices_tuple[i].long().aminmax()) for i in filled]
    ).tolist()
    for position, (low, high) in zip(filled, extremes, strict=True):
        size, wrong = sizes[position], low if low < 0 else high
        if low < 0 or high >= size:
            if indices_tuple[position].dtype == torch.uint64:
                wrong %= 2**64
            raise ValueError(
                f"indices_tuple[{position}] must hold indices from 0 to {size - 1}, got {wrong}"
            )


def check_matrix(name: str, matrix, shape: str) -> None:
    """Raise TypeError or ValueError unless this is a floating point matrix of shape `shape`."""
    if not isinstance(matrix, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(matrix).__name__}")
    if not matrix.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {matrix.dtype}")
    if matrix.ndim != 2:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(matrix.shape)}")


def check_vector(name: str, vector, length: int, meaning: str = "") -> None:
    """Raise TypeError or ValueError unless this is a tensor of shape (length,)."""
    if not isinstance(vector, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(vector).__name__}")
    if vector.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},){meaning}, got {tuple(vector.shape)}")


def check_labels(name: str, labels, length: int, meaning: str = "") -> None:
    """Raise TypeError or ValueError unless this is a real tensor of shape (length,)."""
    check_vector(name, labels, length, meaning)
    if labels.is_complex():
        raise TypeError(f"{name} must be real, got {labels.dtype}")


def check_in_int64(name: str, labels: Tensor) -> None:
    """Raise ValueError if labels that are kept in int64 are beyond it; a GPU waits for uint64."""
    if labels.dtype == torch.uint64 and (labels.long() < 0).any():
        largest = labels.long()[labels.long() < 0].max().item() % 2**64
        raise ValueError(f"{name} must be below 2**63 to be kept as int64, got {largest}")


def check_enqueue_mask(enqueue_mask, length: int) -> None:
    """Raise TypeError or ValueError unless this is a bool tensor of shape (length,)."""
    check_vector("enqueue_mask", enqueue_mask, length)
    if enqueue_mask.dtype != torch.bool:
        raise TypeError(f"enqueue_mask must be bool, got {enqueue_mask.dtype}")


def check_relation(similarity: Tensor, labels, ref_labels, positive_mask, negative_mask) -> None:
    """Raise TypeError or ValueError unless either valid labels or two valid masks are given."""
    given = {"labels": labels, "ref_labels": ref_labels}
    given |= {"positive_mask": positive_mask, "negative_mask": negative_mask}
    names = [name for name, value in given.items() if value is not None]
    n, m = similarity.shape
    if names == ["positive_mask", "negative_mask"]:
        check_masks(similarity, positive_mask, negative_mask)
    elif names not in (["labels"], ["labels", "ref_labels"]):
        raise ValueError(
            "expected either labels (and ref_labels) or both positive_mask and negative_mask, "
            f"got {', '.join(names) or 'none of them'}"
        )
    else:
        check_labels("labels", labels, n)
        if ref_labels is not None:
            check_labels("ref_labels", ref_labels, m)
        elif n != m:
            raise ValueError(
                "without ref_labels, similarity must be square (the references are the queries), "
                f"got shape {(n, m)}"
            )


def check_masks(similarity: Tensor, positive_mask: Tensor, negative_mask: Tensor) -> None:
    """Raise TypeError or ValueError unless both are bool, of the shape of `similarity`."""
    for name, mask in (("positive_mask", positive_mask), ("negative_mask", negative_mask)):
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"{name} must be a bool tensor, got {kind}")
        if mask.shape != similarity.shape:
            raise ValueError(
                f"{name} must have the shape of similarity, {tuple(similarity.shape)}, "
                f"got {tuple(mask.shape)}"
            )
