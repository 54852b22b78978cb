"""Pairs and triplets of queries among references that hold a copy of each query."""

import warnings
from collections.abc import Callable
from contextlib import ExitStack

import torch
from pytorch_metric_learning.utils import common_functions as c_f
from torch import Tensor


def mine(miner, queries, labels, references, ref_labels, columns: Tensor | None):
    """Call a miner, and leave out the pairs of query a and reference `columns[a]`, its copy.

    A miner that chooses the most similar positive of each query chooses the copy. Such a miner is
    called again for the queries that have lost all their positives in this way although they have
    others, and its distances then make the copy the least similar reference of all. If no query has
    a positive even then, a warning says so.

    Args:
        miner: of PML, or any callable like it
        queries: (N, d)
        labels: (N,)
        references: (M, d)
        ref_labels: (M,)
        columns: (N,) int64, or None if the references do not hold the queries

    Returns:
        pairs or triplets, as the miner returns them
    """
    if len(queries) == 0 or len(references) == 0:  # some miners fail with empty tensors
        return tuple(torch.empty(0, dtype=torch.int64, device=queries.device) for _ in range(4))
    found = miner(queries, labels, references, ref_labels)
    kept = without_self_pairs(found, columns)
    if len(kept[0]) == len(found[0]):
        return kept
    lost = torch.zeros(len(queries), dtype=torch.bool, device=columns.device)
    lost[found[0]] = True
    lost[kept[0]] = False
    rows = lost.nonzero().squeeze(1)
    rows = rows[(labels[rows].unsqueeze(1) == ref_labels).sum(dim=1) > 1]
    if len(rows) == 0:
        return kept
    hide, distance = _hiding(columns[rows], len(references)), getattr(miner, "distance", None)
    with ExitStack() as stack:
        if isinstance(distance, torch.nn.Module):
            stack.callback(distance.register_forward_hook(hide).remove)
        again = miner(queries[rows], labels[rows], references, ref_labels)
    number, again = len(again[0]), without_self_pairs(again, columns[rows])
    is_still_shown = len(again[0]) < number
    again = [rows[x] if i in anchors_of(again) else x for i, x in enumerate(again)]
    lost.zero_()[rows] = True
    kept = c_f.concatenate_indices_tuples(select_pairs(kept, lambda a, _: ~lost[a]), again)
    if is_still_shown and len(kept[0]) == 0:
        warnings.warn(
            f"{type(miner).__name__} chooses for every query its own copy among the references, "
            "so that no query counts and the loss is zero; a miner that computes similarities by "
            "its attribute `distance` is not shown the copy",
            stacklevel=3,
        )
    return kept


def without_self_pairs(indices_tuple, columns: Tensor | None):
    """Drop the pairs or triplets that compare a query a with reference `columns[a]`, its copy.

    Without `columns`, nothing is dropped.
    """
    if columns is None:
        return indices_tuple
    return select_pairs(indices_tuple, lambda a, reference: columns[a] != reference)


def select_pairs(indices_tuple, is_kept: Callable[[Tensor, Tensor], Tensor]):
    """Keep the pairs where `is_kept(queries, references)` is true, or triplets of such pairs."""
    if len(indices_tuple) == 3:
        a, p, n = indices_tuple
        keep = is_kept(a, p) & is_kept(a, n)
        return a[keep], p[keep], n[keep]
    a1, p, a2, n = indices_tuple
    keep1, keep2 = is_kept(a1, p), is_kept(a2, n)
    return a1[keep1], p[keep1], a2[keep2], n[keep2]


def anchors_of(indices_tuple) -> tuple[int, ...]:
    """Return the positions of the anchors in a tuple of triplets or pairs."""
    return (0,) if len(indices_tuple) == 3 else (0, 2)


def _hiding(columns: Tensor, m: int):
    """Return a hook on a distance, which makes `columns[a]` the reference least similar to a."""

    def hide(distance, _, matrix):
        if not isinstance(matrix, Tensor) or matrix.shape != (len(columns), m):
            return None
        extreme = matrix.amin() if distance.is_inverted else matrix.amax()
        beyond = extreme.abs() + 1
        least = extreme - beyond if distance.is_inverted else extreme + beyond
        return matrix.index_put((torch.arange(len(columns), device=matrix.device), columns), least)

    return hide
