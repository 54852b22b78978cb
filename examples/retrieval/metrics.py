"""Evaluation: PML's tester and accuracy calculator, with Recall@k added."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import FaissKNN, return_results

from .data import Roles
from .errors import UserError
from .processes import say, unwrap

BATCH_SIZE = 128
# Neighbours of a part of the queries, all together; evaluation takes some 70 to 90 bytes each.
NEIGHBOURS_AT_ONCE = 2**21
# Half of it is the smallest part. Faiss rounds in another way for fewer than 20 queries at once.
QUERIES_AT_LEAST = 64
NEARLY_SAME = (
    "the embeddings of all images are nearly the same, so that rounding decides which are near: "
    "the figures say nothing"
)
PRIMARY_METRIC = "mean_average_precision_at_r"
RECALL_AT = (10, 100)
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
    """PML's calculator with Recall@k, which takes the queries part by part.

    A metric is a mean over queries, so the parts' means, weighted by their numbers of queries, give
    it. MAP@R looks at as many neighbours as the largest class has members; those of all queries at
    once would take memory in proportion to the images times that class.

    With `roles`, only some of the images that it is given are queries, or in the gallery.
    """

    def __init__(self, recall_at: Sequence[int] = RECALL_AT, roles: Roles | None = None, **kwargs):
        self.roles = roles
        self.recall_at = sorted({1, *recall_at})
        for k in self.recall_at[1:]:  # found by name, like methods
            setattr(self, f"calculate_recall_at_{k}", partial(_recall_at, k))
        super().__init__(
            include=tuple(metric_names(recall_at)),
            knn_func=FaissKNN(reset_before=False, reset_after=False),
            **kwargs,
        )

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
        include: tuple[str, ...] = (),
        exclude: tuple[str, ...] = (),
    ) -> dict[str, float]:
        """The metrics by name, as PML's calculator gives them for one-dimensional labels.

        A query without another member of its class among the references does not count.

        Raises:
            UserError: If embeddings are not finite.
        """
        if reference is None:
            reference, reference_labels, ref_includes_query = query, query_labels, True
        if self.roles is not None:
            gallery, ref_includes_query = self.roles.gallery, self.roles.holds_queries
            reference, reference_labels = reference[gallery], reference_labels[gallery]
            query, query_labels = query[self.roles.queries], query_labels[self.roles.queries]
        self.curr_function_dict = self.get_function_dict(include, exclude)
        query, query_labels, reference, reference_labels = (
            c_f.numpy_to_torch(x).to(self.device)
            for x in (query, query_labels, reference, reference_labels)
        )
        query, reference = query.float(), reference.float()
        require_finite(query)
        require_finite(reference)
        if are_nearly_same(reference):
            say(f"warning: {NEARLY_SAME}")
        classes, counts = reference_labels.unique(return_counts=True)
        k = self.determine_k(counts, len(reference), ref_includes_query)
        self.knn_func.train(reference)
        parts: list[tuple[int, dict[str, float]]] = []
        for part in _parts(len(query), k):
            labels = query_labels[part]
            here = torch.isin(classes, labels)
            not_lone = torch.isin(labels, classes[counts > int(ref_includes_query)])
            means = self._get_accuracy(
                self.curr_function_dict,
                query_labels=labels,
                knn_labels=reference_labels[self._neighbours(query, part, k, ref_includes_query)],
                not_lone_query_mask=not_lone,
                label_counts=(classes[here], counts[here]),
                ref_includes_query=ref_includes_query,
                label_comparison_fn=self.label_comparison_fn,
            )
            if count := int(not_lone.sum()):
                parts.append((count, means))
        self.knn_func.reset()
        total = sum(count for count, _ in parts)
        return {
            name: math.fsum(means[name] * (count / total) for count, means in parts)
            if parts
            else math.nan
            for name in self.curr_function_dict
        }

    def _neighbours(self, query: torch.Tensor, part: slice, k: int, itself: bool) -> torch.Tensor:
        """The positions of the `k` nearest references of some queries, without the query itself."""
        distances, indices = self.knn_func(query[part], k + int(itself))
        # PML looks for row i's own position at i.
        _, indices = return_results(distances, indices - part.start, itself)
        return indices + part.start


def _parts(queries: int, k: int) -> Iterator[slice]:
    """Parts of nearly equal size, each with a bounded number of neighbours."""
    most = max(QUERIES_AT_LEAST, NEIGHBOURS_AT_ONCE // (k + 1))
    count = math.ceil(queries / most)
    ends = [queries * i // count for i in range(count + 1)]
    return (slice(start, end) for start, end in itertools.pairwise(ends))


def _recall_at(k, knn_labels, query_labels, not_lone_query_mask, label_comparison_fn, **_) -> float:
    if not not_lone_query_mask.any():
        return math.nan
    matches = label_comparison_fn(query_labels[:, None], knn_labels[:, :k])[not_lone_query_mask]
    return matches.any(dim=1).double().mean().item()


def require_finite(embeddings: torch.Tensor) -> None:
    """Raise a `UserError` unless the embeddings, and their lengths, are finite."""
    if not torch.linalg.vector_norm(embeddings, dim=1).isfinite().all():
        raise UserError(
            "cannot evaluate: the embeddings are not finite; the weights have diverged, "
            "try a smaller --lr"
        )


def are_nearly_same(embeddings: torch.Tensor) -> bool:
    """Whether two or more embeddings differ by so little that rounding decides which are near.

    Their mean squared distance from their mean, at a length of 1, is below 1e-5; of similarities in
    float32 some 1e-7 is rounding.
    """
    mean = torch.nn.functional.normalize(embeddings).mean(dim=0, dtype=torch.float64)
    return len(embeddings) > 1 and 1 - float(mean @ mean) < 1e-5


class RetrievalTester(GlobalEmbeddingSpaceTester):
    """PML's tester, run on one process: DistributedDataParallel would wait for the others."""

    def get_embeddings_for_eval(self, trunk_model, embedder_model, input_imgs) -> torch.Tensor:
        """Embed one batch with the modules themselves."""
        embeddings = super().get_embeddings_for_eval(
            unwrap(trunk_model), unwrap(embedder_model), input_imgs
        )
        require_finite(embeddings)
        return embeddings


def build_tester(
    device: torch.device,
    workers: int,
    recall_at: Sequence[int] = RECALL_AT,
    roles: Roles | None = None,
) -> RetrievalTester:
    """A tester whose embeddings are normalised, as the default cosine similarity has them."""
    # The calculator works in float64, which mps does not know.
    accuracy_device = device if device.type == "cuda" else torch.device("cpu")
    return RetrievalTester(
        batch_size=BATCH_SIZE,
        dataloader_num_workers=workers,
        data_device=device,
        accuracy_calculator=RetrievalAccuracy(recall_at, roles, device=accuracy_device),
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


def table(title: str, columns: dict[str, dict[str, float | None]]) -> str:
    """Metrics side by side, for the terminal."""
    keys = dict.fromkeys(key for metrics in columns.values() for key in metrics)
    width = max(map(len, [title, *map(readable, keys)]))
    rows = ["  ".join([f"{title:<{width}}", *columns])]
    for key in keys:
        cells = [f"{_cell(metrics[key]):>{len(head)}}" for head, metrics in columns.items()]
        rows.append("  ".join([f"{readable(key):<{width}}", *cells]))
    return "\n".join(rows)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
