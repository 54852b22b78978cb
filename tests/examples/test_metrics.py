"""Metrics in parts are those of PML's calculator, in bounded memory; what is not finite is said."""

import json
import sys
from pathlib import Path

import pytest
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from retrieval.errors import UserError
from retrieval.metrics import RetrievalAccuracy, build_tester, metric_names

EXAMPLES = Path(__file__).parents[2] / "examples"
EVERY_CLASS = {
    "several classes": [300, 211, 97, 64, 5, 2],
    "with classes of one": [400, 1, 120, 1, 1],
    "one class": [260],
}
BOTH_HAVE = ("mean_average_precision_at_r", "precision_at_1", "r_precision")


@pytest.fixture
def small_parts(monkeypatch):
    """Let a part hold 8,000 neighbours, and record how many each part holds."""
    from retrieval import metrics

    monkeypatch.setattr(metrics, "NEIGHBOURS_AT_ONCE", 8000)
    monkeypatch.setattr(metrics, "QUERIES_AT_LEAST", 40)
    held = []
    evaluate = metrics.RetrievalAccuracy._get_accuracy

    def recording(self, functions, **kwargs):
        held.append(kwargs["knn_labels"].numel())
        return evaluate(self, functions, **kwargs)

    monkeypatch.setattr(metrics.RetrievalAccuracy, "_get_accuracy", recording)
    return held


def example(sizes, ties):
    generator = torch.Generator().manual_seed(len(sizes))
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    order = torch.randperm(len(labels), generator=generator)
    embeddings = torch.randn(len(labels), 6, generator=generator)
    return (embeddings.round() if ties else embeddings), labels[order]


def calculator():
    return RetrievalAccuracy(device=torch.device("cpu"))


def of_pml(sizes):
    k = max(100, max(sizes) - 1)
    return AccuracyCalculator(include=BOTH_HAVE, k=k, device=torch.device("cpu"))


@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
@pytest.mark.parametrize("sizes", EVERY_CLASS.values(), ids=EVERY_CLASS)
def test_parts_give_what_pml_gives_at_once(small_parts, sizes, ties):
    embeddings, labels = example(sizes, ties)
    got = calculator().get_accuracy(embeddings, labels)
    assert len(small_parts) > 5
    expected = of_pml(sizes).get_accuracy(embeddings, labels)
    assert {x: got[x] for x in BOTH_HAVE} == pytest.approx(expected, rel=1e-13, abs=0)


@pytest.mark.parametrize(
    "sizes", [[30, 30, 30], [3, 7, 2], [200, 5], [150, 150, 1], [300, 211, 97, 5]], ids=str
)
@pytest.mark.parametrize("recall_at", [(1, 10, 100), (1, 3, 50, 1000)], ids=str)
@pytest.mark.parametrize("parts", [1, 5])
def test_metrics_are_those_of_their_definition(request, sizes, recall_at, parts):
    """Recall@k also for more than there are images."""
    if parts > 1:
        request.getfixturevalue("small_parts")
    embeddings, labels = example(sizes, ties=False)
    got = RetrievalAccuracy(recall_at, device=torch.device("cpu")).get_accuracy(embeddings, labels)
    distances = torch.cdist(embeddings.double(), embeddings.double()).fill_diagonal_(torch.inf)
    r = labels.bincount()[labels] - 1
    matches = labels[distances.argsort(dim=1)[:, :-1]] == labels[:, None]
    matches, r = matches[r > 0], r[r > 0]  # the rest have nothing to find
    position = torch.arange(1, len(labels))
    within = position <= r[:, None]
    hits = matches.double().cumsum(1)
    expected = {
        "mean_average_precision_at_r": (hits / position * matches * within).sum(1) / r,
        "r_precision": (matches * within).double().sum(1) / r,
        "precision_at_1": matches[:, 0].double(),
        **{f"recall_at_{k}": matches[:, :k].any(1).double() for k in recall_at[1:]},
    }
    assert got.keys() == metric_names(recall_at).keys()
    assert got == pytest.approx({k: v.mean().item() for k, v in expected.items()}, abs=1e-12)


def test_queries_that_are_no_references(small_parts):
    embeddings, labels = example([300, 200, 100, 3], ties=False)
    split = {"reference": embeddings[:400], "reference_labels": labels[:400]}
    got = calculator().get_accuracy(embeddings[400:], labels[400:], **split)
    expected = of_pml([300]).get_accuracy(embeddings[400:], labels[400:], **split)
    assert {x: got[x] for x in BOTH_HAVE} == pytest.approx(expected, rel=1e-13, abs=0)


def test_a_part_never_holds_more_than_the_bound(small_parts):
    embeddings, labels = example([199, 199, 199], ties=False)
    calculator().get_accuracy(embeddings, labels)
    assert max(small_parts) <= 8000 < sum(small_parts)
    assert min(small_parts) > max(small_parts) / 2
    alone = calculator().get_accuracy(embeddings[:9], torch.arange(9))  # nothing can be found
    assert all(value != value for value in alone.values())


# 64 bytes for each of 3,000 x 999 neighbours are 192 MB.
PEAK = """
import json, sys
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
sys.path.insert(0, sys.argv[1])
from retrieval import metrics
metrics.NEIGHBOURS_AT_ONCE = 2**18
cpu = torch.device("cpu")
parts = metrics.RetrievalAccuracy(device=cpu)
at_once = AccuracyCalculator(include=list(metrics.METRICS)[:3], k="max_bin_count", device=cpu)
embeddings = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0))
labels = torch.arange(3000) % 3
def peak():
    with open("/proc/self/status") as status:
        return int(next(x for x in status if x.startswith("VmHWM:")).split()[1]) * 1024
parts.get_accuracy(embeddings[:600], labels[:600])
peaks, found = [peak()], []
for calculator in (parts, at_once):
    found.append(calculator.get_accuracy(embeddings, labels))
    peaks.append(peak())
print(json.dumps([*found, *peaks]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak in /proc")
def test_memory_does_not_grow_with_the_largest_class(python):
    process = python("-c", PEAK, EXAMPLES)
    assert process.returncode == 0, process.stderr
    metrics, expected, before, parts, at_once = json.loads(process.stdout)
    assert {x: metrics[x] for x in expected} == pytest.approx(expected, rel=1e-13, abs=0)
    assert parts - before < 60e6 < 120e6 < at_once - before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38], ids=str)
def test_embeddings_that_are_not_finite_are_refused_on_every_way(value):
    embeddings, labels = example([50, 50], ties=False)
    embeddings[70] = value
    with pytest.raises(UserError, match="the embeddings are not finite"):
        calculator().get_accuracy(embeddings, labels)
    images = torch.utils.data.TensorDataset(embeddings, labels)
    with pytest.raises(UserError, match="the embeddings are not finite"):
        build_tester(torch.device("cpu"), 0).test({"test": images}, 0, torch.nn.Identity())
