"""How PNPLoss calls a distance, and when it may compute the matrix product itself instead."""

import copy

import torch
from pytorch_metric_learning import distances
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity
from torch import Tensor
from torch.nn.modules import module as torch_module

from pml_pnp.precision import at_least_float32

# PML 0.9.92, which powerful-benchmarker pins, has no BatchedDistance; isinstance(x, ()) is False.
BatchedDistance = getattr(distances, "BatchedDistance", ())
SELF_SIMILARITY_BLOCK = 128


def similarity_matrix(distance, queries: Tensor, references: Tensor | None) -> Tensor:
    """Call `distance` and return its matrix, (N, M), in at least float32.

    Args:
        distance: of PML, or any callable like it
        queries: (N, d)
        references: (M, d), or None to compare the queries with each other

    Raises:
        TypeError: the distance does not return a floating point tensor.
        ValueError: the matrix has another shape.
    """
    expected = (len(queries), len(queries if references is None else references))
    if isinstance(distance, BatchedDistance):
        matrix = _joined_blocks(distance, queries, references)
    else:
        matrix = distance(queries, references)
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        kind = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
        raise TypeError(f"distance must return a floating point tensor, got {kind}")
    if matrix.shape != expected:
        raise ValueError(
            f"distance must return a matrix of shape {expected}, got {tuple(matrix.shape)}"
        )
    return matrix.to(at_least_float32(matrix.dtype))


def _joined_blocks(distance, queries: Tensor, references: Tensor | None):
    """Join the blocks of rows that a BatchedDistance computes.

    The call is made on a copy, with the hooks and methods of the original, so that the `iter_fn` of
    the user is neither called nor replaced.
    """
    if len(queries) == 0:  # there would be no block
        return distance.distance(queries, references)
    blocks = []
    batched = copy.copy(distance)
    batched.iter_fn = lambda mat, start, end: blocks.append(mat)
    returned = batched(queries, references)
    return torch.cat(blocks) if returned is None else returned


def self_similarities(distance, queries: Tensor) -> Tensor:
    """Similarity of each query to itself by `distance`, (N,), from the diagonals of blocks."""
    blocks = queries.split(SELF_SIMILARITY_BLOCK)
    return torch.cat([similarity_matrix(distance, block, None).diagonal() for block in blocks])


def is_product(distance) -> bool:
    """Whether `distance(x, y)` is the matrix product of x and y, or of their directions.

    True for PML's CosineSimilarity and DotProductSimilarity, not for a subclass, and only if their
    methods have not been replaced and no hook or record receives what they compute.
    """
    return (
        type(distance) in (CosineSimilarity, DotProductSimilarity)
        and distance.power == 1
        and (distance.p == 2 or not distance.normalize_embeddings)
        and not distance.collect_stats
        and is_unmodified(distance, "forward", "compute_mat", "maybe_normalize", "normalize")
    )


def is_unmodified(module: torch.nn.Module, *methods: str) -> bool:
    """Whether a module has no hooks, and the methods are those of PML or of this package.

    A method may have been replaced in the class or in the instance.
    """
    attributes, cls = vars(module), type(module)
    origins = [getattr(getattr(cls, name), "__module__", None) or "" for name in methods]
    return (
        not any([attributes[name] for name in _HOOKS_OF_A_MODULE])
        and not any([name in attributes for name in methods])
        and all([x.startswith(("pytorch_metric_learning.", "pml_pnp.")) for x in origins])
    )


_HOOKS_OF_A_MODULE = [name for name in vars(torch.nn.Identity()) if name.endswith("_hooks")]


# The dictionaries that a module's call reads; the functions that register such hooks fill them.
_GLOBAL_HOOKS = [
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
]


def has_global_hooks() -> bool:
    """Whether hooks are registered on all modules of the process."""
    return any(_GLOBAL_HOOKS)


def frozen(module):
    """Copy a module as it is now, with the same parameters and copies of its buffers.

    With the copy, backward computes again what forward computed, even if the module has been
    changed since. An object that is not a module is returned unchanged.

    Raises:
        TypeError: If the module cannot be copied.
    """
    if not isinstance(module, torch.nn.Module):
        return module
    try:
        return copy.deepcopy(module, {id(p): p for p in module.parameters()})
    except Exception as error:  # in many ways
        raise TypeError(
            f"with a chunk_size, distance and variant are copied for backward, and "
            f"{type(module).__name__} cannot be copied: {error}"
        ) from error
