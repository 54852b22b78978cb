"""The grid of the study: what is trained on and measured on, and what is observed."""

import functools
import json

import grid
import pytest
import study_rows as rows
import torch
from candidates import CANDIDATES, Thresholds, objective
from fitting import retrieval_metrics, train
from grid import SETTINGS, SWITCHES, TEMPERATURES, Watch, observed
from networks import embed
from pytorch_metric_learning.losses import MultiSimilarityLoss
from study_data import other_splits
from torch.nn.functional import normalize


@pytest.fixture
def run_grid(shorter, tmp_path, monkeypatch):
    """Runs the command line on the tiny data set, and returns its rows."""
    monkeypatch.setitem(grid.DATA_SETS, "tiny", shorter)
    monkeypatch.setattr(grid, "WATCHED", 1)
    object.__setattr__(shorter, "steps_of_grid", (1, 2))

    def run(words):
        command = ["grid.py", "--dataset", "tiny", "--results", str(tmp_path), *words.split()]
        monkeypatch.setattr("sys.argv", command)
        grid.main()
        return rows.read(tmp_path / "tiny.csv")

    return run


@pytest.mark.parametrize("name", SETTINGS)
def test_each_loss_has_five_settings(name):
    candidate, settings = SETTINGS[name]
    assert len({json.dumps(p, sort_keys=True) for p in settings}) == 5
    if name.startswith("PNP"):
        assert tuple(p["anneal"] for p in settings) == TEMPERATURES
    else:  # the first is the default
        own = {k: v for k, v in settings[0].items() if k != "proxy_learning_rate"}
        assert own == CANDIDATES[candidate].defaults


@pytest.mark.parametrize("name", SWITCHES)
def test_a_loss_without_one_of_its_parts_is_another_loss(name):
    candidate, settings = SWITCHES[name]
    whole, same = SETTINGS[name.partition(" without")[0]]
    assert settings == same
    x, labels = torch.randn(24, 128, requires_grad=True), torch.arange(24) // 4
    gradients = []
    for which in (candidate, whole):
        (gradient,) = torch.autograd.grad(objective(which, settings[0], 6)(x, labels), x)
        gradients.append(normalize(gradient.flatten(), dim=0))
    assert 0 < (gradients[0] - gradients[1]).norm() < 2**0.5


def test_with_all_of_its_parts_it_is_pmls():
    x, labels = torch.randn(24, 8, dtype=torch.float64), torch.arange(24) // 4
    for p in SETTINGS["MultiSimilarity"][1]:
        torch.testing.assert_close(
            Thresholds(**p)(x, labels), MultiSimilarityLoss(**p)(x, labels).squeeze()
        )


def test_a_run_trains_on_fit_and_is_measured_on_all_three_parts(run_grid, shorter):
    (row,) = run_grid("--losses SupCon --settings 0 --seeds 2 --lengths short --rates 1")
    training, test = shorter.read("training", None), shorter.read("test", None)
    parts = other_splits(training, test, 2, [12, 16])
    assert [len(p.classes) for p in parts] == [12, 4, 6]
    make = functools.partial(objective, "SupCon", {"temperature": 0.1})
    network = train(shorter, parts[0], make, 1e-3, 0.0, 2)
    for name, part in zip(("fit", "validation", "test"), parts, strict=True):
        metrics = retrieval_metrics(embed(network, part.inputs), part.labels)
        for metric in ("map_at_r", "precision_at_1"):
            assert float(row[f"{name} {metric}"]) == pytest.approx(metrics[metric], abs=1e-4)


def test_every_setting_runs_at_every_length_and_rate_once_unless_some_are_named(run_grid):
    words = "--losses PNP-Ds --seeds 1 2"
    made = run_grid(words)
    keys = {(r["loss"], r["setting"], r["steps"], r["learning_rate"], r["seed"]) for r in made}
    assert len(keys) == len(made) == 5 * 2 * 2 * 2
    assert {r["steps"] for r in made} == {"1", "2"}
    assert {r["learning_rate"] for r in made} == {"0.001", "0.0003"}
    assert run_grid(words) == made
    assert len(run_grid("--losses PNP-Ds FastAP --seeds 1")) == len(made) + 5 * 2 * 2
    made = run_grid("--losses NTXent --settings 1 3 --steps 1 --rates 1 --seeds 1")[-2:]
    assert sorted((r["setting"], r["steps"]) for r in made) == [("1", "1"), ("3", "1")]


def test_a_part_of_a_seed_is_a_fair_sample(shorter, tmp_path):
    args = grid._parser().parse_args(["--dataset", "omniglot", "--seeds", "1"])
    runs = list(grid._missing(shorter, args, tmp_path / "none.csv"))
    for name in ("loss", "setting", "steps", "learning_rate"):
        part, whole = ({getattr(run, name) for run in x} for x in (runs[: len(runs) // 4], runs))
        assert part == whole
    assert runs == list(grid._missing(shorter, args, tmp_path / "none.csv"))


def test_many_examples_are_measured_in_part_by_whole_classes(tiny, monkeypatch):
    monkeypatch.setattr(grid, "MOST_MEASURED", 50)
    part = tiny.read("fit", None)
    some = grid._some(part)
    assert 16 <= len(some.labels) <= 50
    assert set(some.labels.bincount().tolist()) <= {0, 8}


def test_a_batch_is_observed_as_it_is_ranked():
    x = torch.randn(12, 8)
    labels = torch.arange(12) % 3
    s, same = normalize(x) @ normalize(x).T, labels[:, None] == labels
    positive = same & ~torch.eye(12, dtype=torch.bool)
    before = [(s[a, ~same[a]] > s[a, p]).sum().item() for a, p in positive.nonzero()]
    got = observed(x, labels)
    assert got["negatives_before_positive"] == pytest.approx(sum(before) / len(before))
    assert got["std_of_negatives"] == pytest.approx(s[~same].std().item())
    assert got["mean_gap"] == pytest.approx((s[positive].mean() - s[~same].mean()).item())


def test_watching_leaves_the_training_alone(tiny):
    part, watch = tiny.read("fit", None), Watch(tiny.steps)
    make = functools.partial(objective, "PNP-Ds", {"anneal": 0.1})
    watched, alone = (train(tiny, part, make, 1e-3, 0, 1, *x).weight for x in ([watch], []))
    assert watched.equal(alone)
    assert {"std_of_negatives first", "std_of_negatives last"} <= set(watch.means())
