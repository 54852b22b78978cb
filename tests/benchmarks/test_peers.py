"""benchmarks/peers.py against loops that look like the papers' formulas."""

import math

import pytest
import torch
from peers import RecallAtK, SmoothAP, SupAP
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.reducers import DoNothingReducer
from torch.nn.functional import normalize

LABELS = {
    "equal sizes, sorted": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    "equal sizes, mixed": [2, 0, 1, 0, 1, 2, 2, 1, 0],
    "other sizes and a lone query": [5, 7, 5, 1, 7, 7, 5, 7, 7, 9, 9],
    "one class": [3, 3, 3, 3],
}


def positives(labels, a, with_query):
    return [j for j, x in enumerate(labels) if x == labels[a] and (with_query or j != a)]


def queries(labels):
    return [a for a in range(len(labels)) if positives(labels, a, with_query=False)]


def one_minus_means(precision, labels):
    targets = {a: positives(labels, a, True) for a in queries(labels)}
    return [1 - sum(precision(a, p) for p in found) / len(found) for a, found in targets.items()]


def smooth_ap(s, labels, temperature=0.01):
    def precision(a, p):
        before = {
            j: torch.sigmoid((s[a][j] - s[a][p]) / temperature) for j in range(len(s)) if j != p
        }
        among = sum(before[j] for j in positives(labels, a, True) if j != p)
        return (1 + among) / (1 + sum(before.values()))

    return one_minus_means(precision, labels)


def sup_ap(s, labels, temperature=0.01, slope=100.0, margin=0.05):
    def bound(t):
        if t <= 0:
            return torch.sigmoid(t / temperature)
        if t <= margin:
            return torch.sigmoid(t / temperature) + 0.5
        return slope * (t - margin) + 1 / (1 + math.exp(-margin / temperature)) + 0.5

    def precision(a, p):
        targets = positives(labels, a, True)
        among = 1 + sum(1 for j in targets if j != p and s[a][j] >= s[a][p])
        before = sum(bound(s[a][n] - s[a][p]) for n in range(len(s)) if n not in targets)
        return among / (among + before + 0 * s[a][p])  # a tensor also without negatives

    return one_minus_means(precision, labels)


def recall_at_k(s, labels, temperature=0.01, k_values=(1, 2, 4, 8, 16), outer_temperature=1.0):
    def rank(a, p):
        others = [j for j in range(len(s)) if j not in (a, p)]
        return 1 + sum(torch.sigmoid((s[a][j] - s[a][p]) / temperature) for j in others)

    def recall(a, k):
        targets = positives(labels, a, False)
        found = sum(torch.sigmoid((k - rank(a, p)) / outer_temperature) for p in targets)
        return found / min(k, len(targets))

    return [1 - sum(recall(a, k) for k in k_values) / len(k_values) for a in queries(labels)]


PEERS = {SmoothAP: smooth_ap, SupAP: sup_ap, RecallAtK: recall_at_k}
OTHER = {
    SmoothAP: {"temperature": 0.1},
    SupAP: {"temperature": 0.1, "slope": 3.0, "margin": 0.2},
    RecallAtK: {"temperature": 0.1, "k_values": (1, 3), "outer_temperature": 0.5},
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("settings", [{}, OTHER], ids=["default", "set"])
@pytest.mark.parametrize("peer", PEERS)
def test_value_and_gradient_are_those_of_the_formula(peer, settings, labels):
    setting = settings.get(peer, {})
    # Vectors close to each other, so that no sigmoid is saturated at every pair.
    x = (torch.ones(16) + 0.4 * torch.randn(len(labels), 16)).double().requires_grad_()
    loss_func = peer(reducer=DoNothingReducer(), **setting)
    result = loss_func(x, torch.tensor(labels))["loss"]
    weight = torch.randn(len(result["losses"]), dtype=torch.float64)
    (got,) = torch.autograd.grad((result["losses"] * weight).sum(), x)
    unit = normalize(x)
    expected_losses = torch.stack(PEERS[peer](unit @ unit.T, labels, **setting))
    if len(set(labels)) > 1:
        assert expected_losses.min() > 1e-6
    (expected,) = torch.autograd.grad((expected_losses * weight).sum(), x)
    assert result["indices"].tolist() == queries(labels)
    torch.testing.assert_close(result["losses"], expected_losses, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("peer", PEERS)
def test_no_positive_gives_a_zero_connected_to_the_graph(peer):
    x = torch.randn(4, 3, requires_grad=True)
    loss = peer()(x, torch.arange(4))
    loss.backward()
    assert loss.item() == 0 and x.grad.eq(0).all()


X, Y, SOME = torch.ones(6, 2), torch.arange(6) // 2, torch.tensor([0])
SHAPES = r"expected embeddings \(N, d\) and labels \(N,\), got"


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X[:, 0], Y), SHAPES),
        ((X[..., None], Y), SHAPES),
        ((X, Y[:5]), SHAPES),
        ((X, Y[:, None]), SHAPES),
        ((X,), "labels are required"),
        ((X, Y, (SOME,) * 3), "indices_tuple is not supported"),
        ((X, Y, None, X + 1, Y), "ref_emb is not supported"),
    ],
)
def test_what_is_not_supported_is_refused(peer, args, message):
    with pytest.raises(ValueError, match=message):
        peer()(*args)


@pytest.mark.parametrize(
    ("peer", "name"),
    [(peer, name) for peer, names in OTHER.items() for name in names if name != "k_values"],
)
def test_hyperparameters_are_checked(peer, name):
    for value in (0, -1.0, math.inf, math.nan):
        with pytest.raises(
            ValueError, match=f"{name} must be a positive finite number, got {value}"
        ):
            peer(**{name: value})
    with pytest.raises(ValueError, match="must be a CosineSimilarity, got LpDistance"):
        peer(distance=LpDistance())
    for k_values in ((), (0,), (1, -2), (1.5,)):
        with pytest.raises(ValueError, match="k_values must be positive integers"):
            RecallAtK(k_values=k_values)
