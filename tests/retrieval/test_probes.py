"""The probes of the study: what they train on and measure on, and the signal they look at."""

import itertools
import math

import probes
import pytest
import study_rows as rows
import torch
from candidates import objective
from probes import PROBES, Signal, coarse_and_fine, run_probes, saturated_share
from torch.nn.functional import normalize

from pml_pnp import losses


@pytest.mark.parametrize("stage", PROBES)
def test_probes_never_read_the_test_classes(stage, study_of, monkeypatch):
    study = study_of(None)
    monkeypatch.setattr(probes, "TEMPERATURES", (0.01,))
    monkeypatch.setattr(probes, "SHARES", (0.5,))
    monkeypatch.setattr(probes, "BATCHES", ((3, 2), (500, 2)))  # the second is more than there are
    object.__setattr__(study.data, "large_batches", ((12, 3), (13, 2)))  # as well
    run_probes(study, stage, seeds=1)
    assert set(study.data.read.parts) <= {"fit", "validation"}
    found = study.rows(stage)
    assert len(found) == {"temperature": 7, "batch": 10, "settings": 20, "coarse": 12}[stage]
    assert len(rows.done(found)) == len(found)
    if stage == "batch":
        assert {row["setting"] for row in found} == {"3 x 2", "12 x 3"}
    run_probes(study, stage, seeds=1)
    assert study.rows(stage) == found


def test_the_signal_is_written_beside_the_rows(study_of, monkeypatch):
    monkeypatch.setattr(probes, "TEMPERATURES", (0.01, 0.1))
    study = study_of(["PNP-Ds", "SmoothAP"])
    run_probes(study, "temperature", seeds=1)
    signal = rows.read(study.path.with_name("signal.csv"))
    assert {r["loss"] for r in signal} == {"PNP-Ds"}
    saturated = {r["setting"]: float(r["saturated"]) for r in signal}
    assert saturated.keys() == {"0.01", "0.1"} and saturated["0.01"] > saturated["0.1"]


def test_the_temperature_falls_from_the_first_to_the_last_and_embeddings_are_rounded():
    x, labels = torch.randn(8, 4, requires_grad=True), torch.arange(8) // 2
    falling = {"first": 0.2, "last": 0.02, "steps": 3}
    module = objective("PNP-Ds, falling temperature", falling, 4)
    for expected in (0.2, (0.2 * 0.02) ** 0.5, 0.02):
        assert module.loss.anneal == pytest.approx(expected)
        fixed = losses.PNPLoss(variant="Ds", anneal=expected)
        assert module(x, labels).item() == pytest.approx(fixed(x, labels).item())
    module = objective("PNP-Ds, rounded", {"anneal": 0.05, "dtype": "bfloat16"}, 4)
    rounded = x.detach().bfloat16().float()
    expected = losses.PNPLoss(variant="Ds", anneal=0.05)(rounded, labels)
    assert module(x, labels).item() == pytest.approx(expected.item(), rel=2**-8)


def test_saturated_sigmoids_are_those_without_slope():
    x, labels = normalize(torch.randn(9, 3)), torch.arange(9) // 3
    s = x @ x.T
    flat = []
    for a, p, n in itertools.product(range(9), repeat=3):
        if p != a and labels[p] == labels[a] != labels[n]:
            y = 1 / (1 + math.exp(-(s[a, n] - s[a, p]) / 0.1))
            flat.append(y * (1 - y) < 0.01 * 0.25)
    assert 0 < sum(flat) < len(flat)
    assert saturated_share(x, labels, 0.1) == pytest.approx(sum(flat) / len(flat))


def test_the_signal_leaves_the_training_alone():
    x, labels = torch.randn(8, 4, requires_grad=True), torch.arange(8) // 2
    signal = Signal(steps=3)
    signal.objective = losses.PNPLoss(variant="Ds")
    for step in range(3):
        signal(step, x, labels)
    assert x.grad is None
    assert [m["step"] for m in signal.measurements] == ["first", "middle", "last"]
    assert all(float(m["gradient_norm"]) > 0 for m in signal.measurements)


def test_coarse_labels_train_and_fine_ones_are_found(tiny):
    part = tiny.read("fit", None)
    train, measured = coarse_and_fine(part)
    assert len(train.labels) + len(measured.labels) == len(part.labels)
    assert train.labels.equal(train.coarse)
    assert len(train.classes) == len(part.coarse.unique()) < len(part.classes)
    assert measured.labels.bincount().tolist() == [2] * 12  # the fourth and the eighth of eight
    fine, also_measured = coarse_and_fine(part, fine=True)
    assert fine.inputs.equal(train.inputs) and also_measured.labels.equal(measured.labels)
    assert fine.classes == part.classes
    both = {x.numpy().tobytes() for x in torch.cat([train.inputs, measured.inputs])}
    assert len(both) == len(part.labels)
