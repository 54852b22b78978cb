"""Which references are positives and negatives of which query."""

from typing import NamedTuple

import torch
from torch import Tensor


def blocks_of(n: int, size: int) -> list[slice]:
    """Cut n rows or columns into blocks of at most `size`."""
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


class Relation(NamedTuple):
    """Positives and negatives of N queries among M references.

    The positives of query a are `columns[start[a] : start[a] + number[a]]`, so that no shape
    depends on how many there are. If the references contain the queries, a itself is one of them.
    """

    columns: Tensor  # (K,) int64, columns of the similarity matrix, which are references
    start: Tensor  # (N,) int64
    number: Tensor  # (N,) int64, of positives in `columns`
    not_negative: Tensor | None  # (N, M) bool, or None if all but the positives are negatives
    query_column: Tensor | None  # (N,) int64, the column of each query itself; None if it has none

    @staticmethod
    def from_labels(labels: Tensor, ref_labels: Tensor, query_column: Tensor | None) -> "Relation":
        """Equal labels (N,) and (M,) make a positive, unequal ones a negative; NaN equals nothing.

        With `query_column`, `labels` must be `ref_labels[query_column]`. A query then equals itself
        even if its label is NaN.
        """
        labels, ref_labels = _as_integers(labels, ref_labels, query_column)
        ordered, columns = ref_labels.sort(stable=True)
        start = torch.searchsorted(ordered, labels)
        number = torch.searchsorted(ordered, labels, right=True).sub_(start)
        return Relation(columns, start, number, None, query_column)

    @staticmethod
    def from_masks(
        positive_mask: Tensor, negative_mask: Tensor, query_column: Tensor | None = None
    ) -> "Relation":
        """Masks (N, M) bool define the pairs; their entries at `query_column` are ignored."""
        not_negative = ~negative_mask
        if query_column is not None:
            positive_mask = positive_mask.scatter(1, query_column.unsqueeze(1), True)
            not_negative.scatter_(1, query_column.unsqueeze(1), True)
        number = positive_mask.sum(dim=1)
        columns = positive_mask.nonzero()[:, 1].contiguous()
        start = number.cumsum(0) - number
        return Relation(columns, start, number, not_negative, query_column)

    # Not a property, which torch.compile did not read from a tuple before torch 2.10.
    def counted(self) -> Tensor:
        """Whether each query has a positive besides itself, and thus counts, (N,) bool."""
        return self.number > (0 if self.query_column is None else 1)

    def of(self, rows: slice) -> "Relation":
        """Return the relation of the queries in `rows`."""
        if rows.stop - rows.start == self.start.shape[0]:
            return self
        columns, *of_queries = self
        return Relation(columns, *(None if x is None else x[rows] for x in of_queries))

    def sizes(self) -> tuple[int, int]:
        """Smallest and largest `number`; the host waits for a GPU."""
        if len(self.number) == 0:
            return 0, 0
        low, high = self.number.aminmax()
        return int(low), int(high)

    def positives(self, smallest: int, width: int) -> Tensor:
        """Columns of the positives of each query, (N, width); the result of `sizes` is given.

        Shorter lists are padded with their last column, empty ones with arbitrary columns.
        """
        place = torch.arange(width, device=self.start.device)
        if smallest < width:
            place = torch.minimum(place, (self.number - 1).clamp_(min=0).unsqueeze(1))
        place = place + self.start.unsqueeze(1)
        if smallest == 0:
            place.clamp_(max=max(0, len(self.columns) - 1))
        return self.columns.take(place) if width else place

    def used(self, index: Tensor, with_query: bool) -> Tensor:
        """Which entries of `index`, the result of `positives`, enter the loss, (N, width) bool.

        Padding and queries that do not count do not, and the query itself only `with_query`.
        """
        number = (self.number * self.counted()).unsqueeze(1)
        used = torch.arange(index.shape[1], device=index.device) < number
        if self.query_column is not None and not with_query:
            used.logical_and_(index != self.query_column.unsqueeze(1))
        return used

    def fill_non_negatives_(self, x: Tensor, index: Tensor, value: float) -> None:
        """Set x (N, M) to `value` if not a negative; `index` is the result of `positives`."""
        if self.not_negative is not None:
            x.masked_fill_(self.not_negative, value)
        else:  # also at arbitrary columns of a query without positives, of which nothing is used
            x.scatter_(1, index, value)


class QueryColumns(NamedTuple):
    """What `CrossBatchMemory` passes to PNPLoss as `indices_tuple` instead of N x M pairs.

    It stands for all pairs of queries and references except those of a query and its own copy.
    """

    columns: Tensor  # (N,) int64, the reference that is the copy of each query


class Pairs:
    """Positives and negatives of a batch, for any block of its queries.

    Labels are sorted once, in the constructor. The masks of a tuple are made for one block at a
    time, so that with chunks no N x M mask exists. The arguments are copied: changing them in place
    later has no effect.
    """

    def __init__(
        self, labels, indices_tuple, ref_labels, n: int, m: int, is_own_reference: bool, device
    ) -> None:
        """Take the arguments of a PML loss, with n queries and m references."""
        self._m = m
        self._query_column = self._by_labels = self._tuple = None
        if is_own_reference:
            self._query_column, ref_labels = torch.arange(n, device=device), labels
        if isinstance(indices_tuple, QueryColumns):
            self._query_column, indices_tuple = indices_tuple.columns, None
        if indices_tuple is None:
            labels, ref_labels = plain(labels).to(device), plain(ref_labels).to(device)
            self._by_labels = Relation.from_labels(labels, ref_labels, self._query_column)
        else:
            self._tuple = [plain(i).to(device, torch.int64, copy=True) for i in indices_tuple]

    def of(self, rows: slice) -> Relation:
        """Return the relation of the queries in `rows`."""
        if self._by_labels is not None:
            return self._by_labels.of(rows)
        anchors, positives, *rest = self._tuple
        negative_anchors, negatives = rest if len(rest) == 2 else (anchors, *rest)
        column = None if self._query_column is None else self._query_column[rows]
        negative_mask = self._mask(rows, negative_anchors, negatives)
        return Relation.from_masks(self._mask(rows, anchors, positives), negative_mask, column)

    def _mask(self, rows: slice, queries: Tensor, references: Tensor) -> Tensor:
        """Mask (rows, M) bool of the pairs whose query is in `rows`."""
        inside = (queries >= rows.start) & (queries < rows.stop)
        height = rows.stop - rows.start
        mask = torch.zeros(height, self._m, dtype=torch.bool, device=queries.device)
        mask.view(-1)[((queries - rows.start) * self._m + references)[inside]] = True
        return mask


def plain(x):
    """Turn a tensor subclass that only adds methods (fastai, torchvision) into a plain tensor.

    Other values are returned unchanged, also a subclass with its own dispatch, such as DTensor.
    """
    if type(x) is Tensor or not isinstance(x, Tensor):
        return x
    has_own_dispatch = type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return x if has_own_dispatch else x.as_subclass(Tensor)


def _as_integers(
    labels: Tensor, ref_labels: Tensor, query_column: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Replace labels by integers that are equal where the labels are."""
    if not (labels.is_floating_point() or ref_labels.is_floating_point()):
        if (labels.dtype == torch.uint64) == (ref_labels.dtype == torch.uint64):
            return labels.long().contiguous(), ref_labels.long()
        # As int64, 2**64 - 1 is -1: a second row tells them apart.
        both = torch.cat([_int64_and_overflow(labels), _int64_and_overflow(ref_labels)], dim=1)
        ids = torch.unique(both, dim=1, return_inverse=True)[1]
        return ids.split([len(labels), len(ref_labels)])
    if query_column is not None:
        ref_ids = torch.unique(ref_labels.double(), return_inverse=True)[1]
        return ref_ids[query_column], ref_ids
    both = torch.cat([labels.double(), ref_labels.double()])
    return torch.unique(both, return_inverse=True)[1].split([len(labels), len(ref_labels)])


def _int64_and_overflow(labels: Tensor) -> Tensor:
    """Integer labels (N,) as int64, and whether each is beyond it; (2, N)."""
    wrapped = labels.long()
    return torch.stack([wrapped, (wrapped < 0).long() * (labels.dtype == torch.uint64)])
