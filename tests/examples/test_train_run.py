"""Runs of train.py, from the command line to the table."""

import csv
import os
import sqlite3
from pathlib import Path

import pytest
import torch

METRICS = {
    "mean_average_precision_at_r": "MAP@R",
    "precision_at_1": "precision@1 = Recall@1",
    "r_precision": "R-precision",
    "recall_at_10": "Recall@10",
    "recall_at_100": "Recall@100",
}


pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")


@pytest.fixture(scope="module")
def finished(script, tmp_path_factory):
    """The first epochs of the default run, in a process of its own that lists what it imports."""
    folder = tmp_path_factory.mktemp("default")
    process = script("--output-dir", folder, "--epochs", 2, launcher=["-X", "importtime"])
    assert process.returncode == 0, process.stderr
    (run,) = folder.iterdir()
    return process, run


@pytest.fixture(scope="module")
def metrics(finished, strict_json):
    return strict_json(finished[1] / "metrics.json")


def test_run_folder_holds_everything(finished):
    run = finished[1]
    assert {p.name for p in run.iterdir()} == {
        "config.json",
        "classes.csv",
        "skipped.csv",
        "logs",
        "tensorboard",
        "checkpoints",
        "metrics.json",
        "report.html",
    }
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"last.pt", "best.pt"}


def test_default_lifts_map_at_r_on_unseen_digits(metrics):
    before, after = (metrics[x]["mean_average_precision_at_r"] for x in ("untrained", "trained"))
    assert after > before + 0.03


def test_timm_and_torchvision_stay_out_of_the_default_path(finished):
    lines = finished[0].stderr.splitlines()
    imported = {x.rpartition("|")[2].strip() for x in lines if x.startswith("import time:")}
    assert "torch" in imported and not {"timm", "torchvision"} & imported


def test_metrics_are_all_there(metrics):
    for part in ("untrained", "trained", "validation"):
        assert metrics[part].keys() == METRICS.keys()
        assert all(0 <= value <= 1 for value in metrics[part].values())
        assert metrics[part]["precision_at_1"] <= metrics[part]["recall_at_10"]
        assert metrics[part]["recall_at_10"] <= metrics[part]["recall_at_100"]
    assert 1 <= metrics["best_epoch"] <= metrics["epochs_trained"]


def test_table_shows_untrained_against_trained(finished, metrics):
    rows = {line[:24].strip(): line[24:].split() for line in finished[0].stdout.splitlines()}
    for key, name in METRICS.items():
        assert rows[name] == [f"{metrics[x][key]:.4f}" for x in ("untrained", "trained")]


def test_progress_bars_are_shown(finished):
    assert "total_loss=" in finished[0].stderr
    assert "100%" in finished[0].stderr


def test_config_records_arguments_and_versions(finished, strict_json):
    config = strict_json(finished[1] / "config.json")
    assert config["dataset"] == "digits"
    assert config["loss"] == "PNPLoss"
    assert config["world_size"] == 1
    assert config["versions"]["torch"] and config["versions"]["pytorch-metric-learning"]


def test_csv_sqlite_and_tensorboard_agree_on_every_epoch(finished, metrics):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, epochs = finished[1], metrics["epochs_trained"]
    (path,) = (run / "logs").glob("accuracies_*_VAL_*.csv")
    with path.open() as file:
        from_csv = [float(x["mean_average_precision_at_r_level0"]) for x in csv.DictReader(file)]
    connection = sqlite3.connect(run / "logs" / "logs.db")
    query = f"SELECT mean_average_precision_at_r_level0 FROM {path.stem} ORDER BY epoch"
    from_sqlite = [x for (x,) in connection.execute(query)]
    connection.close()
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    scalars = events.Scalars(f"{path.stem}/mean_average_precision_at_r_level0")
    assert len(from_csv) == epochs
    assert from_sqlite == from_csv
    assert [x.step for x in scalars] == list(range(1, epochs + 1))
    assert [x.value for x in scalars] == pytest.approx(from_csv, rel=1e-6)
    assert max(from_csv) == metrics["validation"]["mean_average_precision_at_r"]
    assert events.Scalars("loss_histories/total_loss")


def test_best_checkpoint_gives_the_reported_metrics(finished, metrics):
    from retrieval.data import load_splits
    from retrieval.metrics import build_tester, metrics_of
    from retrieval.network import load_best

    model, transform = load_best(finished[1])
    splits = load_splits("digits", None, 0.2, 0)
    splits.test.transform = transform
    tester = build_tester(torch.device("cpu"), 0)
    tester.test({"test": splits.test}, 0, model)
    assert metrics_of(tester, "test") == pytest.approx(metrics["trained"], abs=1e-6)


def test_finished_run_says_so_and_shows_its_table(finished, main, capsys):
    assert main("--resume", finished[1]) == 0
    out = capsys.readouterr().out
    assert "is finished" in out
    assert "MAP@R" in out


def test_name_that_exists_is_refused_and_left_alone(finished, main, capsys):
    run = finished[1]
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    assert main("--output-dir", run.parent, "--name", run.name) == 2
    assert "exists; take another --name, or continue it with --resume" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


OPTIONS = {
    "": [],
    "ema-decay 0": ["--ema-decay", 0],
    "amp": ["--amp"],
    "memory": ["--memory-size", 128],
    "memory, miner": [
        *("--memory-size", 128, "--miner", "MultiSimilarityMiner", "--miner-args", "epsilon=0.2")
    ],
    "miner": ["--miner", "TripletMarginMiner"],
    "proxies": ["--loss", "ProxyAnchorLoss", "--loss-lr", 0.1],
    "loss-args": [
        *("--loss-args", "variant=Ib", "b=4", "distance=LpDistance", "reducer=SumReducer")
    ],
    "freeze-batchnorm, workers": ["--freeze-batchnorm", "--workers", 1],
}


@pytest.fixture(scope="module")
def run_of(main, quick, tmp_path_factory):
    """A run of one epoch with an option, which several tests look at; its folder."""
    folder = tmp_path_factory.mktemp("options")
    runs = {}

    def get(option):
        if option not in runs:
            before = set(folder.iterdir())
            arguments = [*quick, *OPTIONS[option]]  # the last of two wins
            assert main("--output-dir", folder, "--epochs", 1, *arguments) == 0
            (runs[option],) = set(folder.iterdir()) - before
        return runs[option]

    return get


@pytest.mark.parametrize("option", OPTIONS)
def test_option_trains_to_the_end(run_of, strict_json, option):
    assert strict_json(run_of(option) / "metrics.json")["epochs_trained"] == 1


def test_each_new_run_gets_a_new_folder(run_of):
    names = [run_of(option).name for option in ("", "ema-decay 0", "memory")]
    stems, numbers = zip(*(name.rsplit("-", 1) for name in names), strict=True)
    assert set(stems) == {"folder-PNPLoss-Ds"}
    assert len(set(numbers)) == 3 and min(map(int, numbers)) == 1


def last_and_best(run):
    return [
        torch.load(run / "checkpoints" / name, weights_only=True) for name in ("last.pt", "best.pt")
    ]


def test_frozen_batchnorm_keeps_its_statistics(run_of):
    means = {}
    for option in ("freeze-batchnorm, workers", ""):
        trunk = last_and_best(run_of(option))[0]["shared"]["models"]["trunk"]
        means[option] = torch.cat([v for k, v in trunk.items() if k.endswith("running_mean")])
    assert not means["freeze-batchnorm, workers"].any()
    assert means[""].any()


@pytest.mark.parametrize("option", ["", "ema-decay 0"])
def test_what_is_kept_are_the_averaged_weights_if_there_are_any(run_of, option):
    last, best = last_and_best(run_of(option))
    for name, model in last["shared"]["models"].items():
        if option == "":
            average = last["shared"]["averages"][name]
            assert any(not torch.equal(average[f"module.{k}"], v) for k, v in model.items())
            model = {k: average[f"module.{k}"] for k in model}
        for k, v in best["models"][name].items():
            torch.testing.assert_close(v, model[k], rtol=0, atol=0)


def test_training_stops_early_when_validation_does_not_improve(main, quick, tmp_path, strict_json):
    # So small a rate changes nothing that the metric would show.
    arguments = ["--lr", 1e-30, "--freeze-batchnorm", "--patience", 1, "--epochs", 9, *quick]
    assert main("--output-dir", tmp_path, "--name", "run", *arguments) == 0
    metrics = strict_json(tmp_path / "run" / "metrics.json")
    assert metrics["stopped_early"]
    assert (metrics["best_epoch"], metrics["epochs_trained"]) == (1, 3)


def test_diverging_loss_is_named(main, quick, tmp_path, capsys):
    assert main("--output-dir", tmp_path, "--lr", 1e30, "--epochs", 2, *quick) == 2
    assert "no longer finite in epoch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "folder"), [("omniglot", "omniglot-small"), ("grocery", "grocery64")]
)
def test_real_images_train_to_the_end(main, tmp_path, strict_json, name, folder):
    root = Path(os.environ.get("PML_PNP_DATA", ""))
    if "PML_PNP_DATA" not in os.environ or not (root / folder).is_dir():
        pytest.skip(f"the environment variable PML_PNP_DATA names no folder with {folder} in it")
    settings = ["--output-dir", tmp_path, "--name", "run", "--epochs", 1, "--image-size", 16]
    assert main(*settings, "--dataset", name, "--samples-per-class", 4, "--batch-size", 128) == 0
    metrics = strict_json(tmp_path / "run" / "metrics.json")
    before, after = (metrics[x]["mean_average_precision_at_r"] for x in ("untrained", "trained"))
    assert after > before


@pytest.mark.parametrize("zero", [True, False])
def test_loss_that_is_zero_from_the_first_step_is_reported(
    main, quick, tmp_path, capsys, monkeypatch, zero
):
    from pml_pnp import PNPLoss

    forward = PNPLoss.forward
    if zero:
        monkeypatch.setattr(PNPLoss, "forward", lambda *args: 0 * forward(*args))
    assert main(*quick, "--epochs", 1, "--output-dir", tmp_path) == 0
    assert ("the loss has been zero since the first step" in capsys.readouterr().out) is zero


def test_weights_that_diverge_in_the_last_iteration_end_in_one_line(
    main, quick, tmp_path, capsys, monkeypatch
):
    from retrieval.training import RetrievalTrainer

    step = RetrievalTrainer.step_optimizers

    def diverge(self):
        step(self)
        for parameter in self.trained_models["embedder"].parameters():
            parameter.data.fill_(float("nan"))

    monkeypatch.setattr(RetrievalTrainer, "step_optimizers", diverge)
    few = ["--batch-size", 64, "--samples-per-class", 16, "--patience", 0]
    assert main(*quick, *few, "--epochs", 1, "--output-dir", tmp_path) == 2
    assert "the embeddings are not finite" in capsys.readouterr().err


@pytest.mark.parametrize("by", ["flag", "variable"])
def test_saved_data_root_is_absolute(main, quick, tmp_path, strict_json, monkeypatch, by):
    arguments = list(quick)
    at = arguments.index("--data-root")
    root = arguments[at + 1]
    monkeypatch.chdir(root.parent)
    if by == "variable":
        del arguments[at : at + 2]
        monkeypatch.setenv("PML_PNP_DATA", root.name)
    else:
        arguments[at + 1] = root.name
    assert main(*arguments, "--epochs", 1, "--output-dir", tmp_path, "--name", "run") == 0
    assert strict_json(tmp_path / "run" / "config.json")["data_root"] == str(root)
