"""Runs of train.py, from the command line to the table."""

import functools
import itertools
import re
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers import csv_rows, sql_rows
from pytorch_metric_learning.losses import ContrastiveLoss
from retrieval.network import load_best
from retrieval.progress import still_rising
from retrieval.training import RetrievalTrainer, Training

from pml_pnp import PNPLoss

METRICS = {
    "mean_average_precision_at_r": "MAP@R",
    "precision_at_1": "precision@1 = Recall@1",
    "r_precision": "R-precision",
    "recall_at_10": "Recall@10",
    "recall_at_100": "Recall@100",
}
SCRIPT = Path(__file__).parents[2] / "examples" / "train.py"


@pytest.fixture(scope="module")
def finished(python, once):
    """Output, errors and folder of a default run of two epochs, in a process of its own."""

    def train(folder):
        process = python("-X", "importtime", SCRIPT, "--output-dir", folder / "runs", "--epochs", 2)
        assert process.returncode == 0, process.stderr
        (folder / "out").write_text(process.stdout)
        (folder / "err").write_text(process.stderr)

    folder = once("default run", train)
    (run,) = (folder / "runs").iterdir()
    return (folder / "out").read_text(), (folder / "err").read_text(), run


@pytest.fixture(scope="module")
def metrics(finished, strict_json):
    return strict_json(finished[2] / "metrics.json")


def test_run_folder_holds_everything_and_its_name_is_taken(finished, refused, strict_json):
    run = finished[2]
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    assert {p.name for p in run.iterdir()} == {
        *("config.json", "classes.csv", "skipped.csv", "images.csv", "lock", "log.txt", "logs"),
        *("tensorboard", "checkpoints", "metrics.json", "report.html"),
    }
    checkpoints = {p.name for p in (run / "checkpoints").iterdir()}
    assert checkpoints == {"last.pt", "previous.pt", "best.pt"}
    config = strict_json(run / "config.json")
    assert (config["dataset"], config["loss"], config["world_size"]) == ("digits", "PNPLoss", 1)
    assert config["versions"]["torch"] and config["versions"]["pytorch-metric-learning"]
    error = refused("--output-dir", run.parent, "--name", run.name)
    assert "exists; take another --name, or continue it with --resume" in error
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_metrics_are_all_there_and_rise_on_unseen_digits(metrics):
    for part in ("untrained", "trained", "validation"):
        assert metrics[part].keys() == METRICS.keys()
        assert all(0 <= value <= 1 for value in metrics[part].values())
        assert metrics[part]["precision_at_1"] <= metrics[part]["recall_at_10"]
        assert metrics[part]["recall_at_10"] <= metrics[part]["recall_at_100"]
    assert 1 <= metrics["best_epoch"] <= metrics["epochs_trained"]
    before, after = (metrics[x]["mean_average_precision_at_r"] for x in ("untrained", "trained"))
    assert after > before + 0.03


def test_what_is_printed_to_a_file_and_what_is_imported(finished, metrics):
    """Without progress bars, and without timm and torchvision."""
    out, err, _ = finished
    rows = {line[:24].strip(): line[24:].split() for line in out.splitlines()}
    for key, name in METRICS.items():
        assert rows[name] == [f"{metrics[x][key]:.4f}" for x in ("untrained", "trained")]
    assert "Training made retrieval" not in out and "the loss has been zero" not in out
    assert "%|" not in err and "it/s" not in err
    imported = {
        x.rpartition("|")[2].strip() for x in err.splitlines() if x.startswith("import time:")
    }
    assert "torch" in imported and not {"timm", "torchvision"} & imported


def test_line_of_an_epoch(trained, capsys, monkeypatch, strict_json):
    """Its training loss is the mean; with progress bars, as on a terminal."""
    losses, best = [], []
    hook = Training._end_of_iteration

    def watch(self, trainer):
        losses.append(float(trainer.losses["total_loss"]))
        hook(self, trainer)

    monkeypatch.setattr(Training, "_end_of_iteration", watch)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run = trained("--epochs", 2)
    out, err = capsys.readouterr()
    assert "total_loss=" in err
    first, last = (x for x in out.splitlines() if x.startswith("epoch "))
    number, time = r"(\d\.\d{4})", r"(\d+\.\d s|\d+ s|\d+ min \d+ s)"
    for i, line, left in ((0, first, f", at most about {time} left"), (1, last, "")):
        loss = f"{sum(losses[11 * i : 11 * i + 11]) / 11:.4f}"
        found = re.fullmatch(
            f"epoch {i + 1} of 2: training loss {loss}, validation MAP@R {number}, "
            f"best {number} in epoch \\d, {time}{left}",
            line,
        )
        best.append(float(found[1]))
        assert float(found[2]) == max(best)
    metrics = strict_json(run / "metrics.json")["validation"]
    assert metrics["mean_average_precision_at_r"] == pytest.approx(max(best), abs=1e-4)


def test_log_holds_what_was_on_the_screen(finished):
    first, *rest = (finished[2] / "log.txt").read_text().splitlines()
    # However long the epochs took.
    assert max(len(re.sub(r"\d+ min \d+ s", "59 s", x)) for x in rest) <= 120
    settings = rest[rest.index("settings:") + 1 :]
    shown = " ".join(x.strip() for x in itertools.takewhile(lambda x: x[:2] == "  ", settings))
    assert shown.startswith("dataset=digits, ") and "loss_args={'variant': 'Ds', 'an" in shown
    assert re.match(r"--- \d{4}-\d\d-\d\d .*, process \d+ on ", first)
    assert rest == finished[0].splitlines()


def test_log_holds_errors_warnings_and_tracebacks(main, trained, tmp_path, monkeypatch):
    def fail(self):
        warnings.warn("how odd", stacklevel=1)
        raise failure

    monkeypatch.setattr(Training, "train", fail)
    failure = ZeroDivisionError("by zero")
    with pytest.raises(ZeroDivisionError), pytest.warns(UserWarning, match="how odd"):
        trained()
    failure = KeyboardInterrupt()
    with pytest.warns(UserWarning, match="how odd"):
        assert main("--resume", tmp_path / "run") == 130
    monkeypatch.undo()
    assert main("--resume", tmp_path / "run", "--lr", 3) == 2  # not the run's: no line in its log
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("\n--- ") == 1 and log.startswith("--- ")
    assert log.count("UserWarning: how odd") == 2
    assert "Traceback" in log and "ZeroDivisionError: by zero" in log
    assert f"interrupted; continue with --resume {tmp_path / 'run'}\n" in log
    assert "--lr" not in log.partition("interrupted")[2]


def worse(self):
    """Instead of the test of what was trained."""
    return {k: v - 0.01 for k, v in self.state["untrained"].items()}


def test_loss_of_zero_and_worse_retrieval_are_told(trained, capsys, monkeypatch):
    forward = ContrastiveLoss.forward
    monkeypatch.setattr(Training, "test_best", worse)
    monkeypatch.setattr(ContrastiveLoss, "forward", lambda *args: 0 * forward(*args))
    trained("--ema-decay", 0, "--loss", "ContrastiveLoss")
    out = capsys.readouterr().out
    assert "the loss has been zero since the first step" in out
    assert "Training made retrieval of unseen classes worse: MAP@R fell from" in out
    for tried in ("a smaller --lr", "--ema-decay 0.997", "variant=Ds anneal=0.03"):
        assert tried in out
    assert "--memory-size 0;" not in out and "--turned-classes" not in out


def test_threads_are_set_and_recorded(trained, main, strict_json, capsys, request):
    import faiss

    request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
    before = faiss.omp_get_max_threads()
    request.addfinalizer(functools.partial(faiss.omp_set_num_threads, before))
    run = trained("--threads", 2)
    assert torch.get_num_threads() == 2
    assert strict_json(run / "config.json")["threads"] == 2
    assert "threads of each: 2 (--threads; their number changes" in capsys.readouterr().out
    assert main("--resume", run, "--epochs", 2, "--threads", 1) == 0
    assert torch.get_num_threads() == 1
    assert strict_json(run / "config.json")["threads"] == 1


def test_csv_sqlite_and_tensorboard_agree_on_every_epoch(finished, metrics, curves):
    run, epochs = finished[2], metrics["epochs_trained"]
    (path,) = (run / "logs").glob("accuracies_*_VAL_*.csv")
    metric = "mean_average_precision_at_r_level0"
    from_csv = [float(x[metric]) for x in csv_rows(path)]
    rows = sql_rows(run / "logs" / "logs.db", path.stem)
    steps, values = zip(*curves(run)[f"{path.stem}/{metric}"], strict=True)
    assert values == pytest.approx(from_csv, rel=1e-6)
    assert sorted((x["epoch"], x[metric]) for x in rows) == [*zip(steps, from_csv, strict=True)]
    assert list(steps) == list(range(1, epochs + 1))
    assert max(from_csv) == metrics["validation"]["mean_average_precision_at_r"]
    assert curves(run)["loss_histories/total_loss"]


FROZEN, MEMORY = "--ema-decay 0 --freeze-batchnorm --workers 1", "--memory-size 128"
MINER = "--miner TripletMarginMiner"
BESIDE = "--loss-args variant=Dq --beside MultiSimilarityLoss"
BESIDE_ANOTHER = "--loss MultiSimilarityLoss --beside PNPLoss"
OPTIONS = ["", FROZEN, MEMORY, MINER, BESIDE, BESIDE_ANOTHER]
OPTIONS += [f"{MEMORY} --miner MultiSimilarityMiner --miner-args epsilon=0.2"]
OPTIONS += ["--amp --loss-args variant=Ib b=4 distance=LpDistance reducer=SumReducer"]


@pytest.fixture(scope="module")
def run_of(main, quick, once):
    """The run of one epoch with an option, in a folder where the first two names are taken."""

    def train(folder, option):
        for number in (1, 2):
            (folder / f"folder-PNPLoss-Ds-{number}").mkdir()
        assert main(*quick, "--output-dir", folder, "--epochs", 1, *option.split()) == 0

    def get(option):
        folder = once(f"run with {option}", functools.partial(train, option=option))
        (run,) = (x for x in folder.iterdir() if any(x.iterdir()))
        return run

    return get


@pytest.mark.parametrize("option", OPTIONS)
def test_option_trains_to_the_end(run_of, strict_json, option):
    assert strict_json(run_of(option) / "metrics.json")["epochs_trained"] == 1


def test_each_new_run_gets_a_new_folder_named_after_its_losses(run_of, strict_json):
    assert {run_of(x).name for x in ("", MEMORY, FROZEN)} == {"folder-PNPLoss-Ds-3"}
    assert run_of(BESIDE).name == "folder-PNPLoss-Dq-MultiSimilarityLoss-1"
    config = strict_json(run_of(BESIDE_ANOTHER) / "config.json")
    assert config["loss_args"] == {}  # and PNPLoss has its defaults also beside another
    assert config["beside_args"] == strict_json(run_of("") / "config.json")["loss_args"]
    assert strict_json(run_of(BESIDE) / "config.json")["beside_args"] == {}


CURVES = {
    "loss_histories/total_loss",
    *(f"metric_loss/{name}" for name in PNPLoss(collect_stats=True)._record_these_stats),
    *(
        f"accuracies_normalized_RetrievalTester_level_0_VAL_vs_self/{name}"
        for name in ("best_accuracy", "best_epoch", *(f"{x}_level0" for x in METRICS))
    ),
}


@pytest.mark.parametrize("option", ["", MEMORY, MINER, BESIDE, BESIDE_ANOTHER])
def test_curves_are_of_what_varies_and_have_the_same_names(run_of, curves, option):
    assert curves(run_of(option)).keys() == CURVES


@pytest.mark.parametrize("plain", [True, False])
def test_averaged_weights_are_kept_and_statistics_may_be_frozen(run_of, plain):
    checkpoints = run_of("" if plain else FROZEN) / "checkpoints"
    last, best = (torch.load(checkpoints / x, weights_only=True) for x in ("last.pt", "best.pt"))
    for name, model in last["shared"]["models"].items():
        if plain:
            average = last["shared"]["averages"][name]
            assert any(not torch.equal(average[f"module.{k}"], v) for k, v in model.items())
            model = {k: average[f"module.{k}"] for k in model}
        for k, v in best["models"][name].items():
            torch.testing.assert_close(v, model[k], rtol=0, atol=0)
    trunk = last["shared"]["models"]["trunk"]
    means = torch.cat([v for k, v in trunk.items() if k.endswith("running_mean")])
    assert bool(means.any()) is plain


def test_training_stops_early_when_validation_does_not_improve(trained, strict_json):
    # So small a rate changes nothing that the metric would show.
    run = trained("--lr", 1e-30, "--freeze-batchnorm", "--patience", 1, "--epochs", 9)
    metrics = strict_json(run / "metrics.json")
    assert metrics["stopped_early"]
    assert (metrics["best_epoch"], metrics["epochs_trained"]) == (1, 3)


def test_diverging_loss_and_weights_are_named(main, quick, tmp_path, capsys, monkeypatch):
    step = RetrievalTrainer.step_optimizers

    def diverge(self):
        step(self)
        for parameter in self.trained_models["embedder"].parameters():
            parameter.data.fill_(float("nan"))

    new = [*quick, "--output-dir", tmp_path]
    assert main(*new, "--lr", 1e30, "--epochs", 2) == 2
    assert "no longer finite in epoch" in capsys.readouterr().err
    monkeypatch.setattr(RetrievalTrainer, "step_optimizers", diverge)
    new += ["--epochs", 1, "--batch-size", 64, "--samples-per-class", 16]  # one iteration
    assert main(*new, "--patience", 0, "--val-fraction", 0, "--test-fraction", 0) == 2
    assert "the weights are no longer finite after" in capsys.readouterr().err


@pytest.mark.parametrize("test", [[], ["--test-fraction", 0]], ids=["", "without a test"])
def test_without_validation_the_last_epoch_is_kept(
    main, trained, refused, digits, quick, tmp_path, strict_json, capsys, curves, test
):
    """Also with two images of each class, of which none can be held out."""
    root = shutil.copytree(
        digits, tmp_path / "images", ignore=lambda folder, names: {*names} - KEPT
    )
    new = ["--data-root", root, *test]
    error = refused(*quick, *new, "--output-dir", tmp_path)
    assert "--val-fraction 0 trains on all of it" in error
    run = trained(*new, "--val-fraction", 0, "--patience", 0, "--batch-size", 4)
    assert main("--resume", run, "--epochs", 3, "--report") == 0
    assert "continues after epoch 1 of 3\n" in (run / "log.txt").read_text()
    out = capsys.readouterr().out
    assert "validation: none, the last epoch is kept" in out
    assert "weights of epoch 3, the last one; there was no validation" in out
    assert "validation MAP@R" not in out and "still rising" not in out
    metrics = strict_json(run / "metrics.json")
    assert metrics["validation"] is None and metrics["best_epoch"] == 3
    assert ("trained" in metrics) is (not test)
    assert torch.load(run / "checkpoints" / "best.pt")["epoch"] == 3
    assert curves(run)["loss_histories/total_loss"]
    assert (run / "report.html").is_file()


KEPT = {*"0123456789", "00.png", "01.png"}


@pytest.mark.parametrize(("best", "last", "said"), [(3, 3, True), (2, 3, False), (1, 1, False)])
def test_validation_that_was_still_rising_is_told(best, last, said):
    validation = {"mean_average_precision_at_r": 0.5}
    metrics = {"validation": validation, "best_epoch": best, "epochs_trained": last}
    assert bool(still_rising(metrics)) is said


def test_without_a_test_nothing_is_tested(main, trained, strict_json, capsys):
    run = trained("--test-fraction", 0)
    metrics = strict_json(run / "metrics.json")
    assert not {"untrained", "trained"} & metrics.keys()
    assert metrics["test_classes"] == 0
    assert metrics["split"] == "no test, every class is trained on"
    assert strict_json(run / "config.json")["data"]["train"]["classes"] == 10
    lines = [x.split() for x in capsys.readouterr().out.splitlines()]
    assert "split: no test, every class is trained on".split() in lines
    assert "folder, no test, every class is trained on validation".split() in lines
    assert ["MAP@R", f"{metrics['validation']['mean_average_precision_at_r']:.4f}"] in lines
    assert load_best(run)[0](torch.zeros(1, 3, 8, 8)).shape == (1, 128)
    # It continues, and a finished run shows the same table.
    assert main("--resume", run, "--epochs", 2) == 0
    assert main("--resume", run) == 0
    out = capsys.readouterr().out
    assert "is finished" in out and out.count("MAP@R  ") == 2


def test_closed_set_is_called_so_and_the_data_root_saved_is_absolute(
    main, quick, digits, tmp_path, strict_json, capsys, monkeypatch
):
    for part in ("train", "test"):
        shutil.copytree(digits, tmp_path / "data" / part)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PML_PNP_DATA", "data")
    at = quick.index("--data-root")
    monkeypatch.setattr(Training, "test_best", worse)
    arguments = [*quick[:at], *quick[at + 2 :], "--epochs", 1, "--output-dir", tmp_path]
    assert main(*arguments, "--name", "run", "--report") == 0
    metrics, config = (strict_json(tmp_path / "run" / x) for x in ("metrics.json", "config.json"))
    assert metrics["closed_set"] and metrics["test_classes"] == 10
    assert config["split"] == metrics["split"]
    assert config["data_root"] == str(tmp_path / "data")
    out = capsys.readouterr().out
    assert "split: closed set, the classes of the test are trained on" in out
    assert "folder, 10 known classes, closed set  untrained  trained" in out
    assert "Training made retrieval of known classes worse" in out
    page = (tmp_path / "run" / "report.html").read_text()
    for told in (">10 known", "Training made the retrieval of known", "Map of the known"):
        assert f"{told} classes" in page
