"""How PNPLoss calls a distance of the user, and when it may compute it itself instead."""

import copy

import torch
from pytorch_metric_learning import distances
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity
from torch import Tensor
from torch.nn.modules import module as torch_module

from pml_pnp.precision import at_least_float32

# PML 0.9.92, which powerful-benchmarker pins, has none; nothing is an instance of ().
BatchedDistance = getattr(distances, "BatchedDistance", ())
SELF_SIMILARITY_BLOCK = 128


def similarity_matrix(distance, queries: Tensor, references: Tensor | None) -> Tensor:
    """What `distance` returns, (N, M), in at least float32; without references, for the queries.

    Raises:
        TypeError: it is no floating point tensor.
        ValueError: it has another shape.
    """
    expected = (len(queries), len(queries if references is None else references))
    if isinstance(distance, BatchedDistance) and len(queries) == 0:
        distance = distance.distance
    if isinstance(distance, BatchedDistance):
        matrix = _collected(distance, queries, references)
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


def _collected(distance, queries: Tensor, references: Tensor | None):
    """The parts that a BatchedDistance makes, in one matrix.

    A copy is called, with the hooks and methods of the original, so that the user's own `iter_fn`
    is left alone.
    """
    parts = []
    batched = copy.copy(distance)
    batched.iter_fn = lambda mat, start, end: parts.append(mat)
    returned = batched(queries, references)
    return torch.cat(parts) if returned is None else returned


def self_similarities(distance, queries: Tensor) -> Tensor:
    """What `distance` returns for each query and itself, (N,), from the diagonals of blocks."""
    blocks = queries.split(SELF_SIMILARITY_BLOCK)
    return torch.cat([similarity_matrix(distance, block, None).diagonal() for block in blocks])


def is_product(distance) -> bool:
    """Whether `distance(x, y)` is the product of both, or of their directions, and no more.

    That is so for PML's cosine similarity and dot product themselves, not for a subclass, and only
    while nobody has changed their methods or looks on through hooks.
    """
    return (
        type(distance) in (CosineSimilarity, DotProductSimilarity)
        and distance.power == 1
        and (distance.p == 2 or not distance.normalize_embeddings)
        and not distance.collect_stats
        and is_unmodified(distance, "forward", "compute_mat", "maybe_normalize", "normalize")
    )


def is_unmodified(module: torch.nn.Module, *methods: str) -> bool:
    """Whether a module of PML, or of this package, does what its class was written to do.

    Not if one of the methods has been replaced, in the class or the instance, or if a hook sees its
    calls.
    """
    own, cls = vars(module), type(module)
    origins = [getattr(getattr(cls, name), "__module__", None) or "" for name in methods]
    return (
        not any([own[name] for name in _HOOKS_OF_ONE])
        and not any([name in own for name in methods])
        and all([x.startswith(("pytorch_metric_learning.", "pml_pnp.")) for x in origins])
    )


_HOOKS_OF_ONE = [name for name in vars(torch.nn.Identity()) if name.endswith("_hooks")]


def _table(register):
    """Weak reference to the table in which hooks on all modules are registered."""
    handle = register(lambda *_: None)
    handle.remove()
    return handle.hooks_dict_ref


_HOOKS_OF_ALL = [
    _table(torch_module.register_module_forward_hook),
    _table(torch_module.register_module_forward_pre_hook),
    _table(torch_module.register_module_full_backward_pre_hook),
]
_IDENTITY, _PROBE = torch.nn.Identity(), torch.empty(0, requires_grad=True)


def all_modules_are_watched() -> bool:
    """Whether hooks see the calls of all modules."""
    if any([table() for table in _HOOKS_OF_ALL]):
        return True
    # Backward hooks make a module return another tensor than it was given.
    return torch.is_grad_enabled() and _IDENTITY(_PROBE) is not _PROBE


def frozen(module):
    """A copy of a module as it is now, with the same parameters and copies of its buffers.

    What is computed with it in backward is what was computed in forward. An object that is no
    module is returned as it is.
    """
    if not isinstance(module, torch.nn.Module):
        return module
    return copy.deepcopy(module, {id(p): p for p in module.parameters()})
