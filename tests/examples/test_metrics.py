"""Metrics in parts are those of PML's calculator, in bounded memory; what is not finite is said."""

import pytest
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from retrieval.embeddings import embed
from retrieval.errors import UserError
from retrieval.metrics import RetrievalAccuracy, build_tester, metric_names

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


@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
@pytest.mark.parametrize("sizes", [[300, 211, 97, 64, 5, 2], [400, 1, 120, 1, 1], [260]], ids=str)
def test_parts_give_what_pml_gives_at_once(small_parts, sizes, ties):
    embeddings, labels = example(sizes, ties)
    k = max(100, max(sizes) - 1)
    at_once = AccuracyCalculator(include=BOTH_HAVE, k=k, device=torch.device("cpu"))
    others = {"reference": embeddings[:250], "reference_labels": labels[:250]}
    for references in ({}, others):
        got = calculator().get_accuracy(embeddings, labels, **references)
        expected = at_once.get_accuracy(embeddings, labels, **references)
        assert {x: got[x] for x in BOTH_HAVE} == pytest.approx(expected, rel=1e-13, abs=0)
    assert len(small_parts) > 10


@pytest.mark.parametrize(
    "sizes", [[30, 30, 30], [3, 7, 2], [200, 5], [150, 150, 1], [300, 211, 97, 5]], ids=str
)
@pytest.mark.parametrize("recall_at", [(1, 10, 100), (1, 3, 50, 1000)], ids=str)
@pytest.mark.parametrize("parts", [1, 5])
def test_recall_is_that_of_its_definition(request, sizes, recall_at, parts):
    """Also for a larger k than there are images."""
    if parts > 1:
        request.getfixturevalue("small_parts")
    embeddings, labels = example(sizes, ties=False)
    got = RetrievalAccuracy(recall_at, device=torch.device("cpu")).get_accuracy(embeddings, labels)
    distances = torch.cdist(embeddings.double(), embeddings.double()).fill_diagonal_(torch.inf)
    matches = labels[distances.argsort(dim=1)[:, :-1]] == labels[:, None]
    matches = matches[labels.bincount()[labels] > 1]  # the rest have nothing to find
    assert got.keys() == metric_names(recall_at).keys()
    for k in recall_at:
        recall = got["precision_at_1" if k == 1 else f"recall_at_{k}"]
        assert recall == pytest.approx(matches[:, :k].any(1).double().mean().item(), abs=1e-12)


def test_a_part_never_holds_more_than_the_bound(small_parts):
    embeddings, labels = example([199, 199, 199], ties=False)
    calculator().get_accuracy(embeddings, labels)
    assert max(small_parts) <= 8000 < sum(small_parts)
    assert min(small_parts) > max(small_parts) / 2
    alone = calculator().get_accuracy(embeddings[:9], torch.arange(9))  # nothing can be found
    assert all(value != value for value in alone.values())


@pytest.mark.parametrize(("distance", "warned"), [(1e-3, True), (1e-2, False)])
def test_embeddings_that_are_nearly_the_same_are_named(capsys, distance, warned):
    embeddings, labels = example([50, 50], ties=False)
    embeddings = torch.tensor([3.0, 0, 0, 0, 0, 4]) + 5 * distance * embeddings
    calculator().get_accuracy(embeddings, labels)
    printed = capsys.readouterr().out
    assert ("warning: the embeddings of all images are nearly the same" in printed) is warned


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38], ids=str)
def test_embeddings_that_are_not_finite_are_refused_on_every_way(value):
    embeddings, labels = example([50, 50], ties=False)
    embeddings[70] = value
    with pytest.raises(UserError, match="the embeddings are not finite"):
        calculator().get_accuracy(embeddings, labels)
    images = torch.utils.data.TensorDataset(embeddings, labels)
    with pytest.raises(UserError, match="the embeddings are not finite"):
        build_tester(torch.device("cpu"), 0).test({"test": images}, 0, torch.nn.Identity())
    if value != 1e38:
        with pytest.raises(UserError, match="are not finite; the weights have diverged"):
            embed(torch.nn.Identity(), [*embeddings], 64)
