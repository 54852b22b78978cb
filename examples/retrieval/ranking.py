"""Images as queries among all others: what comes first, and how well it is ranked."""

import dataclasses
from collections import Counter

import torch

# Similarities that are held at a time; sorting and counting take some 40 bytes for each.
PAIRS_AT_A_TIME = 2**20


@dataclasses.dataclass
class Ranking:
    """The images ranked for every query, by cosine similarity, without the query itself.

    Attributes:
        nearest: `(Q, k)`, the nearest images, nearest first.
        average_precision: `(Q,)`, average precision at R, where R is the number of other images
            of the query's class.
        right_first: `(Q,)`, whether the nearest image is of the query's class.
        negatives_before: How many (query, positive) pairs have 0, 1, 2, ... negatives ranked before
            the positive.
        confused: How many of the R nearest places of the queries of one class are taken by
            another class, by (class, other class).
    """

    nearest: torch.Tensor
    average_precision: torch.Tensor
    right_first: torch.Tensor
    negatives_before: torch.Tensor
    confused: Counter[tuple[int, int]]

    @property
    def mean_negatives_before(self) -> float:
        """Mean number of negatives ranked before a positive."""
        counts = self.negatives_before
        return float((counts * torch.arange(len(counts))).sum() / counts.sum())


def rank_all(
    embeddings: torch.Tensor,
    labels: torch.Tensor,
    neighbours: int,
    device: torch.device | str = "cpu",
    queries: torch.Tensor | None = None,
    gallery: torch.Tensor | None = None,
) -> Ranking:
    """Rank the gallery for each query, a block of queries at a time.

    Args:
        embeddings: `(N, d)`, of length 1.
        labels: `(N,)`, class numbers from 0.
        neighbours: How many nearest images to keep; all if there are fewer.
        device: Where to compute.
        queries: `(Q,)`, numbers of the images that are queries; by default all are. Each has
            another image of its class in the gallery.
        gallery: `(M,)`, numbers of the images that are ranked, all queries or none of them among
            these; by default all are.
    """
    embeddings, labels = embeddings.to(device), labels.to(device)
    classes = int(labels.max()) + 1
    queries = torch.arange(len(labels)) if queries is None else queries
    gallery = (torch.arange(len(labels)) if gallery is None else gallery).to(device)
    holds_queries = bool((gallery == queries[0].to(device)).any())
    references, sizes = embeddings[gallery], labels[gallery].bincount(minlength=classes)
    count = len(gallery) - holds_queries + 1
    places = torch.arange(1, count, device=device)
    nearest, precisions, first = [], [], []
    before = torch.zeros(count, dtype=torch.int64, device=device)
    confused: Counter[tuple[int, int]] = Counter()
    for block in queries.to(device).split(max(1, PAIRS_AT_A_TIME // count)):
        similarities = embeddings[block] @ references.T
        similarities[gallery == block.unsqueeze(1)] = -torch.inf  # itself comes last
        order = similarities.argsort(dim=1, descending=True, stable=True)
        order = gallery[order[:, : len(gallery) - holds_queries]]
        own = labels[block].unsqueeze(1)
        found = labels[order]
        right = found == own
        hits = right.cumsum(dim=1)
        r = sizes[own] - int(holds_queries)
        within = places <= r
        precision = torch.where(right & within, hits / places, 0)
        precisions.append((precision.sum(dim=1) / r.squeeze(1)).cpu())
        nearest.append(order[:, :neighbours].cpu())
        first.append(right[:, 0].cpu())
        before += (places - hits)[right].bincount(minlength=count)
        wrong = (own * classes + found)[within & ~right]
        pairs, times = (x.tolist() for x in wrong.unique(return_counts=True))
        for pair, number in zip(pairs, times, strict=True):
            confused[divmod(pair, classes)] += number
    return Ranking(
        torch.cat(nearest), torch.cat(precisions), torch.cat(first), before.cpu(), confused
    )
