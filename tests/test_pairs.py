"""Who is a positive and a negative of whom: from labels, masks, a tuple, or a place in a memory."""

import pytest
import torch
from helpers import sets_from_labels, sets_from_tuple
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

from pml_pnp.pairs import Pairs, QueryColumns, Relation

CPU = torch.device("cpu")
LABELS = torch.tensor([3, 1, 3, 0, 1, 1, 7])
REF_LABELS = torch.tensor([1, 3, 1, 5, 3, 0, 1, 3, 9])


def sets(relation, m):
    """(positives, negatives, counted) of each query among m references.

    As in helpers.py, a query that is among the references is in neither set of its own.
    """
    n = len(relation.start)
    own = [None] * n if relation.query_column is None else relation.query_column.tolist()
    positives = []
    for a, (start, number) in enumerate(zip(relation.start, relation.number, strict=True)):
        columns = relation.columns[start : start + number].tolist()
        assert len(set(columns)) == len(columns)
        assert own[a] is None or columns.count(own[a]) == 1  # listed, once
        positives.append(set(columns) - {own[a]})
    rows, mask = slice(0, n), torch.ones(n, m, dtype=torch.bool)
    index = relation.positives(rows, *relation.sizes())
    relation.fill_non_negatives_(mask, rows, index, False)
    negatives = [set(row.nonzero().flatten().tolist()) for row in mask]
    return positives, negatives, relation.counted.tolist()


def expected(positives, negatives):
    return positives, negatives, [len(p) > 0 for p in positives]


def from_tuple(indices, rows, n, m, is_own_reference=False):
    return Pairs(None, indices, None, n, m, is_own_reference, CPU).of(rows)


def batch_with_itself(labels):
    return sets(Relation.from_labels(labels, labels, torch.arange(len(labels))), len(labels))


# --- labels


def test_equal_labels_are_positives_and_all_others_negatives():
    got = sets(Relation.from_labels(LABELS, REF_LABELS, None), len(REF_LABELS))
    assert got == expected(*sets_from_labels(LABELS, REF_LABELS))
    assert got[2] == [True] * 6 + [False]  # no reference has label 7


def test_in_a_batch_the_query_itself_is_no_positive_and_no_negative():
    got = batch_with_itself(LABELS)
    assert got == expected(*sets_from_labels(LABELS))
    assert got[2] == [True, True, True, False, True, True, False]  # 0 and 7 are alone


def test_in_a_memory_the_query_is_where_it_was_put():
    """Column own[a] is query a; another reference with its label is a positive."""
    own = torch.tensor([1, 0, 4, 5, 2, 6])
    positives, negatives = sets_from_labels(LABELS[:6], REF_LABELS)
    positives = [p - {column} for p, column in zip(positives, own.tolist(), strict=True)]
    got = sets(Relation.from_labels(LABELS[:6], REF_LABELS, own), len(REF_LABELS))
    assert got == expected(positives, negatives)
    assert got[2] == [True, True, True, False, True, True]  # label 0 has its own copy alone


# --- masks


def masks(n=4, m=6):
    """Random ones, where some references are both and some neither; query 1 has no positives."""
    positive, negative = torch.rand(n, m) < 0.4, torch.rand(n, m) < 0.5
    positive[0, 2] = True
    positive[1] = False
    return positive, negative


def sets_from_masks(positive, negative):
    return tuple(
        [set(row.nonzero().flatten().tolist()) for row in mask] for mask in (positive, negative)
    )


def test_masks_are_taken_as_they_are():
    positive, negative = masks()
    before = positive.clone(), negative.clone()
    got = sets(Relation.from_masks(positive, negative), 6)
    assert got == expected(*sets_from_masks(positive, negative))
    assert torch.equal(positive, before[0]) and torch.equal(negative, before[1])


def test_what_masks_say_of_a_query_and_its_own_reference_is_not_used():
    positive, negative = masks()
    own = torch.tensor([2, 5, 0, 1])
    got = sets(Relation.from_masks(positive, negative, own), 6)
    positive[torch.arange(4), own] = negative[torch.arange(4), own] = False
    assert got == expected(*sets_from_masks(positive, negative))
    assert not got[2][1]


# --- tuples


@pytest.mark.parametrize("rows", [slice(0, 7), slice(2, 5), slice(6, 7)], ids=str)
@pytest.mark.parametrize("kind", ["pairs", "triplets"])
def test_a_tuple_says_who_is_what_for_the_queries_of_a_block(kind, rows):
    make = lmu.get_all_pairs_indices if kind == "pairs" else lmu.get_all_triplets_indices
    indices = make(LABELS, REF_LABELS)
    keep1, keep2 = (torch.randperm(len(i))[: len(i) // 2] for i in (indices[0], indices[-1]))
    if kind == "pairs":
        indices = (*(i[keep1] for i in indices[:2]), *(i[keep2] for i in indices[2:]))
    else:
        indices = tuple(i[keep1] for i in indices)
    positives, negatives = (x[rows] for x in sets_from_tuple(indices, len(LABELS)))
    m = len(REF_LABELS)
    got = sets(from_tuple(indices, rows, len(LABELS), m), m)
    assert got == expected(positives, negatives)


# --- some queries of a batch


@pytest.mark.parametrize("rows", [slice(0, 7), slice(2, 5), slice(6, 7)], ids=str)
@pytest.mark.parametrize("kind", ["batch", "references", "memory"])
def test_a_block_has_the_pairs_of_its_queries(kind, rows):
    n, m = len(LABELS), len(LABELS) if kind == "batch" else len(REF_LABELS)
    ref_labels = {"batch": None, "references": REF_LABELS}.get(kind)
    indices = None
    if kind == "memory":
        own = torch.tensor([1, 0, 4, 5, 2, 6, 8])
        indices, ref_labels = QueryColumns(own), REF_LABELS.clone()
        ref_labels[8] = LABELS[6]
    pairs = Pairs(LABELS, indices, ref_labels, n, m, kind == "batch", CPU)
    whole = sets(pairs.of(slice(0, n)), m)
    assert sets(pairs.of(rows), m) == tuple(x[rows] for x in whole)


@pytest.mark.parametrize("kind", ["labels", "tuple"])
def test_pairs_are_those_of_what_was_given_whatever_becomes_of_it(kind):
    labels = LABELS.clone()
    indices = (
        None if kind == "labels" else tuple(i.clone() for i in lmu.get_all_pairs_indices(labels))
    )
    pairs = Pairs(labels, indices, None, 7, 7, True, CPU)
    want = sets(pairs.of(slice(0, 7)), 7)
    for given in (labels, *(indices or ())):
        given.zero_()
    assert sets(pairs.of(slice(0, 7)), 7) == want
