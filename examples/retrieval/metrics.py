"""Evaluation: PML's tester and accuracy calculator, with Recall@10 and Recall@100 added."""

import torch
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

from .errors import UserError
from .processes import unwrap

BATCH_SIZE = 128
PRIMARY_METRIC = "mean_average_precision_at_r"
# Key in the calculator -> name for people. Recall@1 is precision@1.
METRICS = {
    PRIMARY_METRIC: "MAP@R",
    "precision_at_1": "precision@1 = Recall@1",
    "r_precision": "R-precision",
    "recall_at_10": "Recall@10",
    "recall_at_100": "Recall@100",
}


class RetrievalAccuracy(AccuracyCalculator):
    """PML's calculator with Recall@k: the share of queries that find a match in the first k."""

    def __init__(self, **kwargs):
        super().__init__(include=tuple(METRICS), **kwargs)

    def requires_knn(self) -> list[str]:
        """Names of the metrics that need the nearest neighbours."""
        return [*super().requires_knn(), "recall_at_10", "recall_at_100"]

    def determine_k(
        self, bin_counts: torch.Tensor, num_reference_embeddings: int, ref_includes_query: bool
    ) -> int:
        """As many neighbours as the metrics look at, and no more than there are."""
        itself = int(ref_includes_query)
        wanted = max(100, int(bin_counts.max()) - itself)
        return min(wanted, num_reference_embeddings - itself)

    def calculate_recall_at_10(self, **kwargs) -> float:
        """Share of queries with a match among their 10 nearest neighbours."""
        return _recall_at(10, **kwargs)

    def calculate_recall_at_100(self, **kwargs) -> float:
        """Share of queries with a match among their 100 nearest neighbours."""
        return _recall_at(100, **kwargs)


def _recall_at(k, knn_labels, query_labels, not_lone_query_mask, label_comparison_fn, **_) -> float:
    if not not_lone_query_mask.any():
        return float("nan")
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


def build_tester(device: torch.device, workers: int) -> RetrievalTester:
    """A tester whose embeddings are normalised, as the default cosine similarity has them."""
    # The calculator works in float64, which mps does not know.
    accuracy_device = device if device.type == "cuda" else torch.device("cpu")
    return RetrievalTester(
        batch_size=BATCH_SIZE,
        dataloader_num_workers=workers,
        data_device=device,
        accuracy_calculator=RetrievalAccuracy(device=accuracy_device),
    )


def metrics_of(tester: RetrievalTester, split: str) -> dict[str, float]:
    """The metrics of the tester's last run, by the calculator's names."""
    accuracies = tester.all_accuracies[split]
    return {name: float(accuracies[tester.accuracies_keyname(name)]) for name in METRICS}


def table(untrained: dict[str, float], trained: dict[str, float], title: str) -> str:
    """Untrained against trained, for the terminal."""
    width = max(map(len, [title, *METRICS.values()]))
    rows = [f"{title:<{width}}  untrained  trained"]
    for key, name in METRICS.items():
        rows.append(f"{name:<{width}}  {_cell(untrained[key]):>9}  {_cell(trained[key]):>7}")
    return "\n".join(rows)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
