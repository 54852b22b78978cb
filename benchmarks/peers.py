"""Ranking losses of other papers, to compare PNPLoss with.

pytorch-metric-learning (PML) lacks two of them, and its SmoothAPLoss is right only for batches of
n classes with n examples each; these take any class sizes and any order of labels. For every query
a of the batch, with positives P(a), negatives N(a) and similarities s, they rank each positive p: a
sigmoid of (s[a,j] - s[a,p]) / temperature stands for "j is ranked before p".
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.utils import common_functions as c_f
from torch import Tensor


class RankingLoss(BaseMetricLossFunction, ABC):
    """What the losses below share: similarities, masks, checks and the reduction.

    Args:
        temperature: of the sigmoid that compares two similarities, positive.
        **kwargs: PML's own: `distance` (a `CosineSimilarity`), `reducer`, `embedding_regularizer`.

    Call with embeddings (N, d) and labels (N,). A query counts if it has a positive besides itself;
    no counted query gives a zero that is connected to the graph.

    Memory: some tensors of N x (size of the largest class) x N, kept for backward.

    Raises:
        ValueError: a hyperparameter out of its range, a distance other than `CosineSimilarity`,
            embeddings or labels of another shape, no labels, `indices_tuple` or `ref_emb`.
    """

    query_is_positive = True

    def __init__(self, temperature: float = 0.01, **kwargs):
        super().__init__(**kwargs)
        if not isinstance(self.distance, CosineSimilarity):
            raise ValueError(
                f"distance must be a CosineSimilarity, got {type(self.distance).__name__}"
            )
        self.temperature = _positive("temperature", temperature)
        self.add_to_recordable_attributes(list_of_names=["temperature"], is_stat=False)

    def get_default_distance(self):
        """Return what `distance=None` stands for."""
        return CosineSimilarity()

    def forward(self, embeddings, labels=None, indices_tuple=None, ref_emb=None, ref_labels=None):
        """Compute the loss of embeddings (N, d) with labels (N,)."""
        c_f.labels_required(labels)
        shape, of_labels = tuple(embeddings.shape), tuple(labels.shape)
        if len(shape) != 2 or of_labels != shape[:1]:
            raise ValueError(
                f"expected embeddings (N, d) and labels (N,), got {shape} and {of_labels}"
            )
        c_f.indices_tuple_not_supported(indices_tuple)
        return super().forward(embeddings, labels, None, ref_emb, ref_labels)

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        """Return the losses of the counted queries for the reducer."""
        c_f.ref_not_supported(embeddings, labels, ref_emb, ref_labels)
        same = labels[:, None] == labels
        counted = (same.sum(1) > 1).nonzero().squeeze(1)
        if len(counted) == 0:
            zero = embeddings.sum() * 0
            return {"loss": {"losses": zero, "indices": None, "reduction_type": "already_reduced"}}
        s, same = self.distance(embeddings)[counted], same[counted]
        itself = counted[:, None] == torch.arange(len(labels), device=labels.device)
        positive = same if self.query_is_positive else same & ~itself
        compared = torch.ones_like(same) if self.query_is_positive else ~itself
        losses = self.losses_of(s, positive, compared)
        return {"loss": {"losses": losses, "indices": counted, "reduction_type": "element"}}

    @abstractmethod
    def losses_of(self, s: Tensor, positive: Tensor, compared: Tensor) -> Tensor:
        """L(a) of each row: similarities, which are positives, which take part in the ranking."""

    def _ranked(self, s: Tensor, positive: Tensor, compared: Tensor):
        """Differences s[a,j] - s[a,p] and the masks that go with them.

        Returns:
            difference: (rows, P, N), P the largest number of positives of a row.
            there: (rows, P), whether the row has so many positives.
            others: (rows, P, N), j takes part in the ranking of p.
            positive: (rows, 1, N), j is a positive.
        """
        number = positive.sum(1)
        columns = positive.int().argsort(dim=1, descending=True)[:, : int(number.max())]
        there = torch.arange(columns.shape[1], device=s.device) < number[:, None]
        difference = s[:, None, :] - s.gather(1, columns)[:, :, None]
        others = compared[:, None, :].expand_as(difference)
        others = others.scatter(2, columns[:, :, None], False)
        return difference, there, others, positive[:, None, :]


class SmoothAP(RankingLoss):
    r"""One minus a smooth average precision (Brown et al., ECCV 2020, arXiv 2007.12163).

    .. math::
        L(a) = 1 - \frac{1}{|P(a)|} \sum_{p \in P(a)}
        \frac{1 + \sum_{j \in P(a) \setminus p} \sigma((s_{aj} - s_{ap}) / \tau)}
             {1 + \sum_{j \ne p} \sigma((s_{aj} - s_{ap}) / \tau)}

    The query is one of its own positives, as in the authors' code and in PML 2.9's SmoothAPLoss.
    The latter takes the number of classes for the number of examples per class: its value is this
    one if the two are equal and the labels sorted, and otherwise not zero for perfect embeddings.

    Args:
        temperature: :math:`\tau`, 0.01 in the paper.
        **kwargs: see `RankingLoss`.
    """

    def losses_of(self, s, positive, compared):
        """L(a) of each row."""
        difference, there, others, positive = self._ranked(s, positive, compared)
        before = (difference / self.temperature).sigmoid()
        rank = 1 + (before * others).sum(2)
        rank_among_positives = 1 + (before * (others & positive)).sum(2)
        return 1 - _mean(rank_among_positives / rank, there)


class SupAP(RankingLoss):
    r"""An upper bound of one minus average precision (Ramzi et al.; SupAP, or SupRank).

    ROADMAP (NeurIPS 2021, arXiv 2110.01445) and *Optimization of Rank Losses for Image Retrieval*
    (arXiv 2309.08250). Positives are ranked by the step H, which has no gradient, negatives by an
    upper bound of it whose gradient does not vanish:

    .. math::
        L(a) = 1 - \frac{1}{|P(a)|} \sum_{p \in P(a)} \frac{r^+(p)}{r^+(p) + r^-(p)}, \quad
        r^+(p) = 1 + \sum_{j \in P(a) \setminus p} H(s_{aj} - s_{ap}), \quad
        r^-(p) = \sum_{n \in N(a)} H^-(s_{an} - s_{ap})

    with H(t) = 1 for t >= 0, else 0, and

    .. math::
        H^-(t) = \sigma(t/\tau) \; (t \le 0), \quad
        \sigma(t/\tau) + 1/2 \; (0 < t \le \delta), \quad
        \rho (t - \delta) + \sigma(\delta/\tau) + 1/2 \; (t > \delta)

    The query is one of its own positives, as in the authors' code. ROADMAP adds a contrastive term,
    which is left out here.

    Args:
        temperature: :math:`\tau`, 0.01 in the paper.
        slope: :math:`\rho`, 100 in the paper.
        margin: :math:`\delta`, 0.05 in the authors' code.
        **kwargs: see `RankingLoss`.
    """

    def __init__(
        self, temperature: float = 0.01, slope: float = 100.0, margin: float = 0.05, **kwargs
    ):
        super().__init__(temperature, **kwargs)
        self.slope = _positive("slope", slope)
        self.margin = _positive("margin", margin)
        self.add_to_recordable_attributes(list_of_names=["slope", "margin"], is_stat=False)

    def losses_of(self, s, positive, compared):
        """L(a) of each row."""
        difference, there, others, positive = self._ranked(s, positive, compared)
        step = (difference.detach() >= 0).to(difference.dtype)
        rank_among_positives = 1 + (step * (others & positive)).sum(2)
        beyond = (difference - self.margin).clamp(min=0)  # beyond the margin sigma stays as it is
        bound = (difference.clamp(max=self.margin) / self.temperature).sigmoid()
        bound = bound + self.slope * beyond + 0.5 * (difference.detach() > 0)
        negatives_before = (bound * (others & ~positive)).sum(2)
        precision = rank_among_positives / (rank_among_positives + negatives_before)
        return 1 - _mean(precision, there)


class RecallAtK(RankingLoss):
    r"""One minus a smooth recall@k, averaged over k (Patel et al., CVPR 2022, arXiv 2108.11179).

    .. math::
        L(a) = 1 - \frac{1}{|K|} \sum_{k \in K} \frac{1}{\min(k, |P(a)|)}
        \sum_{p \in P(a)} \sigma\left(\frac{k - r(p)}{\tau_1}\right), \quad
        r(p) = 1 + \sum_{j \ne a, p} \sigma((s_{aj} - s_{ap}) / \tau_2)

    The query is neither a positive nor ranked. The loss of a perfect ranking is not zero: at rank k
    the outer sigmoid is at 1/2. The paper's similarity mixup is left out.

    Args:
        temperature: :math:`\tau_2`, 0.01 in the paper.
        k_values: K, (1, 2, 4, 8, 16) in the paper.
        outer_temperature: :math:`\tau_1`, 1 in the paper.
        **kwargs: see `RankingLoss`.
    """

    query_is_positive = False

    def __init__(
        self,
        temperature: float = 0.01,
        k_values: Sequence[int] = (1, 2, 4, 8, 16),
        outer_temperature: float = 1.0,
        **kwargs,
    ):
        super().__init__(temperature, **kwargs)
        self.k_values = tuple(k_values)
        if not self.k_values or any(not isinstance(k, int) or k < 1 for k in self.k_values):
            raise ValueError(f"k_values must be positive integers, got {k_values!r}")
        self.outer_temperature = _positive("outer_temperature", outer_temperature)
        self.add_to_recordable_attributes(
            list_of_names=["k_values", "outer_temperature"], is_stat=False
        )

    def losses_of(self, s, positive, compared):
        """L(a) of each row."""
        difference, there, others, _ = self._ranked(s, positive, compared)
        rank = 1 + ((difference / self.temperature).sigmoid() * others).sum(2)
        k = torch.tensor(self.k_values, device=s.device, dtype=s.dtype)
        among_first = ((k - rank[:, :, None]) / self.outer_temperature).sigmoid()
        found = (among_first * there[:, :, None]).sum(1)
        return 1 - (found / torch.minimum(k, there.sum(1, keepdim=True))).mean(1)


def _mean(values: Tensor, there: Tensor) -> Tensor:
    return (values * there).sum(1) / there.sum(1)


def _positive(name: str, value: float) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")
    return value
