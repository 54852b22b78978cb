"""Evaluation: PML's tester and accuracy calculator, with Recall@k, in bounded memory."""

import math
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

from .errors import UserError
from .processes import unwrap

BATCH_SIZE = 128
PRIMARY_METRIC = "mean_average_precision_at_r"
RECALL_AT = (10, 100)
# Neighbours of all queries that are looked at together; each takes some 64 bytes.
NEIGHBOURS_AT_ONCE = 2**22
# Key in the calculator -> name for people. Recall@1 is precision@1.
_ALWAYS = {
    PRIMARY_METRIC: "MAP@R",
    "precision_at_1": "precision@1 = Recall@1",
    "r_precision": "R-precision",
}


def metric_names(recall_at: Iterable[int] = RECALL_AT) -> dict[str, str]:
    """Keys and names of the metrics, with Recall@k for each k; of 1 there is always one."""
    return _ALWAYS | {f"recall_at_{k}": f"Recall@{k}" for k in sorted(set(recall_at) - {1})}


METRICS = metric_names()


class RetrievalAccuracy(AccuracyCalculator):
    """PML's calculator with Recall@k: the share of queries that find a match in the first k.

    Queries are taken some at a time, so that memory does not grow with the number of images times
    the number of neighbours. With `r_precision` and MAP@R, neighbours are as many as the largest
    class has images.
    """

    def __init__(self, recall_at: Sequence[int] = RECALL_AT, **kwargs):
        self.recall_at = sorted({1, *recall_at})
        for k in self.recall_at[1:]:  # found by name, like methods
            setattr(self, f"calculate_recall_at_{k}", partial(_recall_at, k))
        super().__init__(include=tuple(metric_names(recall_at)), **kwargs)

    def requires_knn(self) -> list[str]:
        """Names of the metrics that need the nearest neighbours."""
        return [*super().requires_knn(), *(f"recall_at_{k}" for k in self.recall_at)]

    def determine_k(
        self, bin_counts: torch.Tensor, num_reference_embeddings: int, ref_includes_query: bool
    ) -> int:
        """As many neighbours as the metrics look at, and no more than there are."""
        itself = int(ref_includes_query)
        wanted = max(self.recall_at[-1], int(bin_counts.max()) - itself)
        return min(wanted, num_reference_embeddings - itself)

    def get_accuracy(
        self,
        query: torch.Tensor,
        query_labels: torch.Tensor,
        reference: torch.Tensor | None = None,
        reference_labels: torch.Tensor | None = None,
        ref_includes_query: bool = False,
    ) -> dict[str, float]:
        """The metrics as PML has them, of some queries after the other."""
        if reference is None:
            reference, reference_labels, ref_includes_query = query, query_labels, True
        counts = torch.unique(reference_labels, return_counts=True)[1]
        rows = max(1, NEIGHBOURS_AT_ONCE // max(self.recall_at[-1], int(counts.max())))
        total = dict.fromkeys(self.original_function_dict, 0.0)
        counted = 0
        for start in range(0, len(query), rows):
            labels = query_labels[start : start + rows]
            matches = _matches(labels, reference_labels) - int(ref_includes_query)
            weight = int((matches > 0).sum())
            if weight == 0:
                continue
            # PML takes the first references for the queries, if these are among them.
            first = -start if ref_includes_query else 0
            part = super().get_accuracy(
                query[start : start + rows],
                labels,
                reference.roll(first, 0),
                reference_labels.roll(first, 0),
                ref_includes_query,
            )
            for name, value in part.items():
                total[name] += value * weight
            counted += weight
        return {name: x / counted if counted else math.nan for name, x in total.items()}


def _matches(labels: torch.Tensor, reference_labels: torch.Tensor) -> torch.Tensor:
    """How many references have the label of each query."""
    known, counts = torch.unique(reference_labels, return_counts=True)
    place = torch.searchsorted(known, labels).clamp_(max=len(known) - 1)
    return counts[place] * (known[place] == labels)


def _recall_at(k, knn_labels, query_labels, not_lone_query_mask, label_comparison_fn, **_) -> float:
    if not not_lone_query_mask.any():
        return math.nan
    matches = label_comparison_fn(query_labels[:, None], knn_labels[:, :k])[not_lone_query_mask]
    return matches.any(dim=1).float().mean().item()


class RetrievalTester(GlobalEmbeddingSpaceTester):
    """PML's tester, run on one process: DistributedDataParallel would wait for the others."""

    def get_embeddings_for_eval(self, trunk_model, embedder_model, input_imgs) -> torch.Tensor:
        """Embed one batch with the modules themselves."""
        embeddings = super().get_embeddings_for_eval(
            unwrap(trunk_model), unwrap(embedder_model), input_imgs
        )
        if not embeddings.isfinite().all():
            raise UserError(
                "cannot evaluate: the embeddings are not finite; the weights have diverged, "
                "try a smaller --lr"
            )
        return embeddings


def build_tester(
    device: torch.device, workers: int, recall_at: Sequence[int] = RECALL_AT
) -> RetrievalTester:
    """A tester whose embeddings are normalised, as the default cosine similarity has them."""
    # The calculator works in float64, which mps does not know.
    accuracy_device = device if device.type == "cuda" else torch.device("cpu")
    return RetrievalTester(
        batch_size=BATCH_SIZE,
        dataloader_num_workers=workers,
        data_device=device,
        accuracy_calculator=RetrievalAccuracy(recall_at, device=accuracy_device),
    )


def metrics_of(tester: RetrievalTester, split: str) -> dict[str, float]:
    """The metrics of the tester's last run, by the calculator's names."""
    accuracies = tester.all_accuracies[split]
    names = metric_names(tester.accuracy_calculator.recall_at)
    return {name: float(accuracies[tester.accuracies_keyname(name)]) for name in names}


def readable(key: str) -> str:
    """The name for people of a key, before which a part of the test set may stand: `small/...`."""
    part, _, metric = key.rpartition("/")
    name = _ALWAYS.get(metric) or metric.replace("recall_at_", "Recall@")
    return f"{part}: {name}" if part else name


def table(untrained: dict[str, float], trained: dict[str, float], title: str) -> str:
    """Untrained against trained, for the terminal."""
    width = max(map(len, [title, *map(readable, trained)]))
    rows = [f"{title:<{width}}  untrained  trained"]
    for key in trained:
        before, after = _cell(untrained[key]), _cell(trained[key])
        rows.append(f"{readable(key):<{width}}  {before:>9}  {after:>7}")
    return "\n".join(rows)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
