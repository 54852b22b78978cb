"""Which references are positives and negatives of which query."""

from typing import NamedTuple

import torch
from torch import Tensor


class Relation(NamedTuple):
    """Positives and negatives of N queries among M references.

    The positives of query a are `columns[start[a]:stop[a]]`, so that no shape depends on how many
    there are. Where the references are the queries, a itself is among them, once.
    """

    columns: Tensor
    """(K,) int64, references."""
    start: Tensor
    """(N,) int64."""
    stop: Tensor
    """(N,) int64."""
    counted: Tensor
    """(N,) bool, the queries with a positive besides themselves."""
    absent: Tensor | None
    """(N, M) bool, what is no negative; None if that is the positives, and nothing else."""
    own: Tensor | None
    """(N,) int64, which reference is query a; None if the queries are not among the references."""

    @staticmethod
    def from_labels(labels: Tensor, ref_labels: Tensor, own: Tensor | None) -> "Relation":
        """Equal labels make a positive, unequal ones a negative; those of `own` are equal."""
        if torch.promote_types(labels.dtype, ref_labels.dtype).is_floating_point:
            labels, ref_labels = _as_integers(labels, ref_labels, own)
        labels, ref_labels = labels.long().contiguous(), ref_labels.long()
        ordered, columns = ref_labels.sort(stable=True)
        start = torch.searchsorted(ordered, labels)
        stop = torch.searchsorted(ordered, labels, right=True)
        counted = stop - start > (0 if own is None else 1)
        return Relation(columns, start, stop, counted, None, own)

    @staticmethod
    def from_masks(
        positive_mask: Tensor, negative_mask: Tensor, own: Tensor | None = None
    ) -> "Relation":
        """Both (N, M) bool; what they say of a query and its `own` reference is not used."""
        absent = ~negative_mask
        if own is not None:
            positive_mask = positive_mask.scatter(1, own.unsqueeze(1), True)
            absent.scatter_(1, own.unsqueeze(1), True)
        counts = positive_mask.sum(dim=1)
        stop = counts.cumsum(0)
        counted = counts > (0 if own is None else 1)
        columns = positive_mask.nonzero()[:, 1].contiguous()
        return Relation(columns, stop - counts, stop, counted, absent, own)

    @staticmethod
    def from_tuple(
        indices_tuple, rows: slice, m: int, device: torch.device, own: Tensor | None
    ) -> "Relation":
        """Triplets or pairs of PML, of which those count whose anchor lies in `rows`."""
        *anchors_and_positives, negatives = (i.to(device).long() for i in indices_tuple)
        anchors, positives, *rest = anchors_and_positives
        negative_anchors = rest[0] if rest else anchors  # pairs or triplets
        n = rows.stop - rows.start

        def mask(queries: Tensor, references: Tensor) -> Tensor:
            inside = (queries >= rows.start) & (queries < rows.stop)
            flat = torch.zeros(n * m, dtype=torch.bool, device=device)
            flat[((queries - rows.start) * m + references)[inside]] = True
            return flat.view(n, m)

        negative_mask = mask(negative_anchors, negatives)
        return Relation.from_masks(mask(anchors, positives), negative_mask, own)

    @property
    def number_of_own(self) -> int:
        """How many of its own listed positives a query is: 1 or 0."""
        return 0 if self.own is None else 1

    def sizes(self) -> tuple[int, int]:
        """Smallest and largest number of positives of a query, itself included; waits for a GPU."""
        if len(self.start) == 0:
            return 0, 0
        low, high = (self.stop - self.start).aminmax()
        return int(low), int(high)

    def share(self, with_own: bool, with_self_similarity: bool, dtype: torch.dtype) -> Tensor:
        """(N,), what a positive weighs in the mean of its query: 1 / their number, or 1 if none.

        Args:
            with_own: whether the query is one, if it is among the references
            with_self_similarity: whether it is one besides the references
            dtype: of the result
        """
        without = 0 if with_own else self.number_of_own
        number = self.stop - self.start + (int(with_self_similarity) - without)
        return number.clamp_(min=1).to(dtype).reciprocal_()

    def positives(self, rows: slice, width: int, smallest: int) -> Tensor:
        """Columns of the positives of some queries, (rows, width).

        Beyond their number, which is at least `smallest`, the last one is repeated; of a query
        without any, they mean nothing.
        """
        place = self.start[rows].unsqueeze(1) + torch.arange(width, device=self.start.device)
        if smallest < width:
            place.clamp_(max=(self.stop[rows] - 1).unsqueeze(1)).clamp_(min=0)
        return self.columns.take(place) if width else place

    def used(self, rows: slice, index: Tensor, with_own: bool) -> Tensor:
        """Which of `positives` enter a loss, (rows, width) bool.

        Not the repeated ones, those of a query that does not count, and the query itself unless
        `with_own`.
        """
        number = (self.stop - self.start)[rows] * self.counted[rows]
        used = torch.arange(index.shape[1], device=index.device) < number.unsqueeze(1)
        if self.own is not None and not with_own:
            used.logical_and_(index != self.own[rows].unsqueeze(1))
        return used

    def silence_(self, x: Tensor, rows: slice, index: Tensor, value: float) -> None:
        """Set x (rows, M) to `value` at what is no negative; `index` as from `positives`."""
        if self.absent is not None:
            x.masked_fill_(self.absent[rows], value)
        elif self.own is not None:
            x.scatter_(1, index, value)
        else:  # `index` is of no meaning where a query has no positives
            has_positives = (self.stop > self.start)[rows].unsqueeze(1)
            x.scatter_(1, index, x.gather(1, index).masked_fill_(has_positives, value))

    def negative_mask(self, m: int) -> Tensor:
        """(N, M) bool."""
        if self.absent is not None:
            return ~self.absent
        place = torch.empty_like(self.columns)
        place[self.columns] = torch.arange(m, device=place.device)
        return (place < self.start.unsqueeze(1)) | (place >= self.stop.unsqueeze(1))


def _as_integers(labels: Tensor, ref_labels: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """Numbers that are equal where the labels are; NaN is equal to nothing, as ever."""
    if own is not None:
        ref_ids = torch.unique(ref_labels, return_inverse=True)[1]
        return ref_ids[own], ref_ids
    dtype = torch.promote_types(labels.dtype, ref_labels.dtype)
    both = torch.cat([labels.to(dtype), ref_labels.to(dtype)])
    return torch.unique(both, return_inverse=True)[1].split([len(labels), len(ref_labels)])
