"""The losses of the study: how each is made, its defaults, and what tuning may change.

A default is the value that PML documents, or the paper's for the losses of peers.py; PNPLoss has
several settings. Tuning also searches the learning rate of the network, for every loss over the
same range. Two losses side by side are a sum: the other loss, plus PNPLoss or SupAP times a weight.
"""

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from networks import EMBEDDING_SIZE
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from pytorch_metric_learning import miners
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.utils import common_functions as c_f
from torch import Tensor, nn
from torch.nn.functional import normalize

from pml_pnp import losses

sys.path.insert(0, str(Path(__file__).parents[1]))
import peers  # noqa: E402

# PML's documentation gives the proxies of a loss an optimizer of their own, at 0.01.
PROXY_LEARNING_RATE = 0.01
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A loss of the study.

    Attributes:
        build: (parameters, number of training classes) -> module of (embeddings, labels).
        defaults: the parameters of the untuned runs.
        space: what tuning searches, by parameter; without one there is an untuned run alone.
        group: "PNP", "peer" or "other", what the tables compare.
    """

    build: Callable[[Params, int], nn.Module]
    defaults: Params
    space: dict[str, BaseDistribution]
    group: str

    @property
    def tuned(self) -> bool:
        """Whether the loss takes part in the tuning."""
        return bool(self.space)


class Mined(nn.Module):
    """A loss behind its miner."""

    def __init__(self, loss: nn.Module, miner: nn.Module):
        super().__init__()
        self.loss, self.miner = loss, miner

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of the pairs or triplets that the miner picks."""
        return self.loss(embeddings, labels, self.miner(embeddings, labels))


class TemperatureOfBatch(nn.Module):
    """PNPLoss whose temperature is a share of the standard deviation of the batch's negatives.

    anneal = share * std of s[a,n] over all queries a and their negatives n, by cosine similarity.
    """

    def __init__(self, loss: losses.PNPLoss, share: float):
        super().__init__()
        self.loss, self.share = loss, share

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Set the temperature, and compute the loss."""
        self.loss.anneal = self.share * std_of_negatives(embeddings, labels)
        return self.loss(embeddings, labels)


class FallingTemperature(nn.Module):
    """PNPLoss whose temperature falls from one value to another, by the same factor every step."""

    def __init__(self, loss: losses.PNPLoss, first: float, last: float, steps: int):
        super().__init__()
        self.loss = loss
        self.loss.anneal = first
        self.factor = (last / first) ** (1 / max(1, steps - 1))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss, and lower the temperature."""
        loss = self.loss(embeddings, labels)
        self.loss.anneal *= self.factor
        return loss


class Rounded(nn.Module):
    """A loss of embeddings that are rounded to another dtype."""

    def __init__(self, loss: nn.Module, dtype: str):
        super().__init__()
        self.loss, self.dtype = loss, getattr(torch, dtype)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Round, and compute the loss."""
        return self.loss(embeddings.to(self.dtype), labels).float()


@torch.no_grad()
def std_of_negatives(embeddings: Tensor, labels: Tensor) -> float:
    """Standard deviation of the cosine similarities of all pairs with different labels."""
    s, _, negative = similarities(embeddings, labels)
    return s[negative].std().item()


def similarities(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine similarities of a batch, and which of them are of positives and of negatives."""
    unit = normalize(embeddings)
    s, same = unit @ unit.T, labels[:, None] == labels
    return s, same ^ torch.eye(len(s), dtype=torch.bool, device=s.device), ~same


class Sum(nn.Module):
    """Two losses, added."""

    def __init__(self, first: nn.Module, second: nn.Module, weight: float):
        super().__init__()
        self.first, self.second, self.weight = first, second, weight

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Compute first + weight * second."""
        return self.first(embeddings, labels) + self.weight * self.second(embeddings, labels)


class NTXentInRows(BaseMetricLossFunction):
    """PML's NTXentLoss for a batch with labels, in one row of exponentials for each query.

    PML's compares every positive pair with every negative pair, which takes a hundred times as long
    at the batch sizes of the study; value and gradient are the same.
    """

    def __init__(self, temperature: float = 0.07, **kwargs):
        super().__init__(**kwargs)
        self.temperature = temperature

    def get_default_distance(self):
        """Return what `distance=None` stands for."""
        return CosineSimilarity()

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        """Return the loss of every positive pair."""
        c_f.indices_tuple_not_supported(indices_tuple)
        c_f.ref_not_supported(embeddings, labels, ref_emb, ref_labels)
        s = self.distance(embeddings) / self.temperature
        same = labels[:, None] == labels
        negatives = s.masked_fill(same, -math.inf).logsumexp(1, keepdim=True)
        anchor, positive = (same ^ torch.eye(len(s), dtype=torch.bool, device=s.device)).nonzero(
            as_tuple=True
        )
        elements = (torch.logaddexp(s, negatives) - s)[anchor, positive]
        return {
            "loss": {
                "losses": elements,
                "indices": (anchor, positive),
                "reduction_type": "pos_pair",
            }
        }


class Thresholds(nn.Module):
    """MultiSimilarityLoss of a batch with labels, of which one part can be left out.

    mean over queries a of f(alpha, base - s[a,p]) + f(beta, s[a,n] - base), with cosine
    similarities s and, over the positives p or the negatives n of a,

        whole:      f(c, x) = log(1 + sum exp(c x)) / c   as in MultiSimilarityLoss
        threshold:  f(c, x) = log(sum exp(c x)) / c       pairs beyond `base` never rest
        hardest:    f(c, x) = mean of log(1 + exp(c x)) / c   no pair weighs more for being harder

    Args:
        alpha, beta, base: of MultiSimilarityLoss.
        without: "threshold", "hardest", or nothing for the whole.
    """

    def __init__(self, alpha: float, beta: float, base: float, without: str = ""):
        super().__init__()
        self.alpha, self.beta, self.base, self.without = alpha, beta, base, without

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of every query that has a positive and a negative."""
        s, positive, negative = similarities(embeddings, labels)
        of_query = self._f(self.alpha, self.base - s, positive)
        of_query = of_query + self._f(self.beta, s - self.base, negative)
        return of_query[positive.any(1) & negative.any(1)].mean()

    def _f(self, c: float, x: Tensor, among: Tensor) -> Tensor:
        if self.without == "hardest":
            rows = nn.functional.softplus(c * x).masked_fill(~among, 0)
            return rows.sum(1) / among.sum(1).clamp(min=1) / c
        x = (c * x).masked_fill(~among, torch.finfo(x.dtype).min).logsumexp(1)
        return (x if self.without == "threshold" else nn.functional.softplus(x)) / c


class CircleWithoutWeights(nn.Module):
    """CircleLoss whose pairs all have the weight 1: it compares similarities with each other alone.

    mean over queries a of log(1 + sum over n, p of exp(gamma (s[a,n] - s[a,p] + 1 - 2 m))), the
    margins being those of CircleLoss, m for negatives and 1 - m for positives.
    """

    def __init__(self, m: float, gamma: float):
        super().__init__()
        self.m, self.gamma = m, gamma

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of every query that has a positive and a negative."""
        s, positive, negative = similarities(embeddings, labels)
        least = torch.finfo(s.dtype).min
        of_query = (self.gamma * (s - self.m)).masked_fill(~negative, least).logsumexp(1)
        x = (self.gamma * (1 - self.m - s)).masked_fill(~positive, least).logsumexp(1)
        of_query = nn.functional.softplus(of_query + x)
        return of_query[positive.any(1) & negative.any(1)].mean()


def _log(low: float, high: float) -> FloatDistribution:
    return FloatDistribution(low, high, log=True)


def _loss(cls: Callable[..., nn.Module], fixed: Params | None = None) -> Callable:
    return lambda p, classes: cls(**(fixed or {}), **p)


def _with_miner(cls, miner_cls) -> Callable:
    """Parameters of the miner start with `miner_`."""

    def build(p: Params, classes: int) -> nn.Module:
        of_miner = {k.removeprefix("miner_"): v for k, v in p.items() if k.startswith("miner_")}
        return Mined(
            cls(**{k: v for k, v in p.items() if not k.startswith("miner_")}), miner_cls(**of_miner)
        )

    return build


def _with_memory(cls, fixed: Params | None = None) -> Callable:
    def build(p: Params, classes: int) -> nn.Module:
        p = dict(p)
        size = p.pop("memory_size")
        return losses.CrossBatchMemory(cls(**(fixed or {}), **p), EMBEDDING_SIZE, memory_size=size)

    return build


def _with_proxies(cls) -> Callable:
    return lambda p, classes: cls(num_classes=classes, embedding_size=EMBEDDING_SIZE, **p)


def _auto(variant: str) -> Callable:
    return lambda p, classes: TemperatureOfBatch(losses.PNPLoss(variant=variant), p["share"])


def _falling(p: Params, classes: int) -> nn.Module:
    return FallingTemperature(losses.PNPLoss(variant="Ds"), p["first"], p["last"], p["steps"])


def _rounded(p: Params, classes: int) -> nn.Module:
    return Rounded(losses.PNPLoss(variant="Ds", anneal=p["anneal"]), p["dtype"])


def _beside(build: Callable, ranking_cls, names: tuple[str, ...], fixed: Params | None = None):
    """Another loss plus a ranking loss times `weight`; `names` are the latter's parameters."""

    def both(p: Params, classes: int) -> nn.Module:
        ranking = ranking_cls(**(fixed or {}), **{k: p[k] for k in names})
        others = {k: v for k, v in p.items() if k not in (*names, "weight")}
        return Sum(build(others, classes), ranking, p["weight"])

    return both


_TEMPERATURE = _log(0.003, 0.3)
_MEMORY = CategoricalDistribution([512, 1024, 2048, 4096])
_WEIGHT = _log(0.1, 10)
# What tuning searches of losses that stand alone, behind a miner or in a sum.
_MARGINS = {"pos_margin": FloatDistribution(0, 0.6), "neg_margin": FloatDistribution(0.3, 1.4)}
_MULTI_SIMILARITY = {
    "alpha": _log(0.5, 20),
    "beta": _log(5, 100),
    "base": FloatDistribution(0, 1),
}
_SUP_AP = {"temperature": _TEMPERATURE, "slope": _log(5, 300), "margin": _log(0.01, 0.3)}
_PNP = losses.PNPLoss
_TRIPLETS = CategoricalDistribution(["all", "hard", "semihard"])

CANDIDATES = {
    # The five variants, at the defaults of PNPLoss.
    "PNP-O": Candidate(
        _loss(_PNP, {"variant": "O"}), {"anneal": 0.01}, {"anneal": _TEMPERATURE}, "PNP"
    ),
    "PNP-Iu": Candidate(
        _loss(_PNP, {"variant": "Iu"}), {"anneal": 0.01}, {"anneal": _TEMPERATURE}, "PNP"
    ),
    "PNP-Ib": Candidate(
        _loss(_PNP, {"variant": "Ib"}),
        {"anneal": 0.01, "b": 2.0},
        {"anneal": _TEMPERATURE, "b": _log(0.5, 8)},
        "PNP",
    ),
    "PNP-Ds": Candidate(
        _loss(_PNP, {"variant": "Ds"}), {"anneal": 0.01}, {"anneal": _TEMPERATURE}, "PNP"
    ),
    "PNP-Dq": Candidate(
        _loss(_PNP, {"variant": "Dq"}),
        {"anneal": 0.01, "alpha": 1.0},
        {"anneal": _TEMPERATURE, "alpha": _log(0.5, 8)},
        "PNP",
    ),
    "PNP-Ds, memory": Candidate(
        _with_memory(_PNP, {"variant": "Ds"}),
        {"anneal": 0.01, "memory_size": 1024},
        {"anneal": _TEMPERATURE, "memory_size": _MEMORY},
        "PNP",
    ),
    # Other settings of it, untuned.
    "PNP-Dq alpha 4": Candidate(
        _loss(_PNP, {"variant": "Dq"}), {"anneal": 0.01, "alpha": 4.0}, {}, "PNP"
    ),
    "PNP-Ds at .05": Candidate(_loss(_PNP, {"variant": "Ds"}), {"anneal": 0.05}, {}, "PNP"),
    "PNP-Ds at .1": Candidate(_loss(_PNP, {"variant": "Ds"}), {"anneal": 0.1}, {}, "PNP"),
    "PNP-Dq at .05": Candidate(
        _loss(_PNP, {"variant": "Dq"}), {"anneal": 0.05, "alpha": 1.0}, {}, "PNP"
    ),
    "PNP-Ds auto 1/4": Candidate(_auto("Ds"), {"share": 0.25}, {}, "PNP"),
    "PNP-Ds auto 1/2": Candidate(_auto("Ds"), {"share": 0.5}, {}, "PNP"),
    "PNP-Dq auto 1/4": Candidate(_auto("Dq"), {"share": 0.25}, {}, "PNP"),
    "PNP-Dq auto 1/2": Candidate(_auto("Dq"), {"share": 0.5}, {}, "PNP"),
    # Beside a loss of another kind.
    "PNP-Ds + ProxyAnchor": Candidate(
        _beside(_with_proxies(losses.ProxyAnchorLoss), _PNP, ("anneal",), {"variant": "Ds"}),
        {"anneal": 0.05, "weight": 1.0},
        {
            "anneal": _TEMPERATURE,
            "weight": _WEIGHT,
            "proxy_learning_rate": _log(1e-3, 1e-1),
        },
        "PNP",
    ),
    "PNP-Ds + Contrastive": Candidate(
        _beside(_loss(losses.ContrastiveLoss), _PNP, ("anneal",), {"variant": "Ds"}),
        {"anneal": 0.1, "weight": 1.0, "pos_margin": 0.0, "neg_margin": 1.0},
        {
            "anneal": _TEMPERATURE,
            "weight": _WEIGHT,
            **_MARGINS,
        },
        "PNP",
    ),
    "PNP-Ds + MultiSimilarity": Candidate(
        _beside(_loss(losses.MultiSimilarityLoss), _PNP, ("anneal",), {"variant": "Ds"}),
        {"anneal": 0.1, "weight": 1.0, "alpha": 2.0, "beta": 50.0, "base": 0.5},
        {
            "anneal": _TEMPERATURE,
            "weight": _WEIGHT,
            **_MULTI_SIMILARITY,
        },
        "PNP",
    ),
    # Its peers.
    "MultiSimilarity": Candidate(
        _loss(losses.MultiSimilarityLoss),
        {"alpha": 2.0, "beta": 50.0, "base": 0.5},
        _MULTI_SIMILARITY,
        "peer",
    ),
    "MultiSimilarity, miner": Candidate(
        _with_miner(losses.MultiSimilarityLoss, miners.MultiSimilarityMiner),
        {"alpha": 2.0, "beta": 50.0, "base": 0.5, "miner_epsilon": 0.1},
        {
            **_MULTI_SIMILARITY,
            "miner_epsilon": FloatDistribution(0.02, 0.5),
        },
        "peer",
    ),
    "Triplet": Candidate(
        _loss(losses.TripletMarginLoss),
        {"margin": 0.05},
        {"margin": _log(0.01, 0.6)},
        "peer",
    ),
    "Triplet, miner": Candidate(
        _with_miner(losses.TripletMarginLoss, miners.TripletMarginMiner),
        {"margin": 0.05, "miner_margin": 0.2, "miner_type_of_triplets": "semihard"},
        {
            "margin": _log(0.01, 0.6),
            "miner_margin": FloatDistribution(0.05, 0.6),
            "miner_type_of_triplets": _TRIPLETS,
        },
        "peer",
    ),
    "Contrastive": Candidate(
        _loss(losses.ContrastiveLoss),
        {"pos_margin": 0.0, "neg_margin": 1.0},
        _MARGINS,
        "peer",
    ),
    "Contrastive, miner": Candidate(
        _with_miner(losses.ContrastiveLoss, miners.PairMarginMiner),
        {
            "pos_margin": 0.0,
            "neg_margin": 1.0,
            "miner_pos_margin": 0.2,
            "miner_neg_margin": 0.8,
        },
        {
            **_MARGINS,
            "miner_pos_margin": FloatDistribution(0, 0.6),
            "miner_neg_margin": FloatDistribution(0.3, 1.4),
        },
        "peer",
    ),
    "Contrastive, memory": Candidate(
        _with_memory(losses.ContrastiveLoss),
        {"pos_margin": 0.0, "neg_margin": 1.0, "memory_size": 1024},
        {
            **_MARGINS,
            "memory_size": _MEMORY,
        },
        "peer",
    ),
    "NTXent": Candidate(
        _loss(NTXentInRows), {"temperature": 0.07}, {"temperature": _log(0.01, 0.5)}, "peer"
    ),
    "SupCon": Candidate(
        _loss(losses.SupConLoss), {"temperature": 0.1}, {"temperature": _log(0.01, 0.5)}, "peer"
    ),
    "Circle": Candidate(
        _loss(losses.CircleLoss),
        {"m": 0.4, "gamma": 80.0},
        {"m": FloatDistribution(0.1, 0.6), "gamma": _log(8, 512)},
        "peer",
    ),
    "FastAP": Candidate(
        _loss(losses.FastAPLoss), {"num_bins": 10}, {"num_bins": IntDistribution(4, 50)}, "peer"
    ),
    "ProxyAnchor": Candidate(
        _with_proxies(losses.ProxyAnchorLoss),
        {"margin": 0.1, "alpha": 32.0},
        {
            "margin": FloatDistribution(0, 0.4),
            "alpha": _log(4, 64),
            "proxy_learning_rate": _log(1e-3, 1e-1),
        },
        "peer",
    ),
    "ArcFace": Candidate(
        _with_proxies(losses.ArcFaceLoss),
        {"margin": 28.6, "scale": 64.0},
        {
            "margin": FloatDistribution(5, 45),
            "scale": _log(8, 128),
            "proxy_learning_rate": _log(1e-3, 1e-1),
        },
        "peer",
    ),
    "SmoothAP": Candidate(
        _loss(peers.SmoothAP), {"temperature": 0.01}, {"temperature": _TEMPERATURE}, "peer"
    ),
    "SupAP": Candidate(
        _loss(peers.SupAP),
        {"temperature": 0.01, "slope": 100.0, "margin": 0.05},
        _SUP_AP,
        "peer",
    ),
    "SupAP + Contrastive": Candidate(
        _beside(_loss(losses.ContrastiveLoss), peers.SupAP, ("temperature", "slope", "margin")),
        {
            "temperature": 0.01,
            "slope": 100.0,
            "margin": 0.05,
            "weight": 1.0,
            "pos_margin": 0.0,
            "neg_margin": 1.0,
        },
        {
            **_SUP_AP,
            "weight": _WEIGHT,
            **_MARGINS,
        },
        "peer",
    ),
    "RecallAtK": Candidate(
        _loss(peers.RecallAtK),
        {"temperature": 0.01, "outer_temperature": 1.0},
        {"temperature": _TEMPERATURE, "outer_temperature": _log(0.3, 5)},
        "peer",
    ),
}

# What only the probes and the grid run.
PROBED = {
    "MultiSimilarity without threshold": Candidate(
        _loss(Thresholds, {"without": "threshold"}), {}, {}, "other"
    ),
    "MultiSimilarity without weights": Candidate(
        _loss(Thresholds, {"without": "hardest"}), {}, {}, "other"
    ),
    "Circle without weights": Candidate(_loss(CircleWithoutWeights), {}, {}, "other"),
    "PNP-Ds, falling temperature": Candidate(_falling, {}, {}, "PNP"),
    "PNP-Ds, rounded": Candidate(_rounded, {}, {}, "PNP"),
}


def candidate(name: str) -> Candidate:
    """A loss of the comparison or of a probe."""
    return CANDIDATES[name] if name in CANDIDATES else PROBED[name]


def objective(name: str, params: Params, classes: int) -> nn.Module:
    """The module of a candidate, of the parameters that are its own."""
    own = {k: v for k, v in params.items() if not k.endswith("learning_rate")}
    return candidate(name).build(own, classes)
