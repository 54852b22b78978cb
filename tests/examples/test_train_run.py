"""Runs of train.py, from the command line to the table."""

import csv
import itertools
import re
import shutil
import sqlite3
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from pml_pnp import PNPLoss

METRICS = {
    "mean_average_precision_at_r": "MAP@R",
    "precision_at_1": "precision@1 = Recall@1",
    "r_precision": "R-precision",
    "recall_at_10": "Recall@10",
    "recall_at_100": "Recall@100",
}


pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")


class Printed(NamedTuple):
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def finished(script, once):
    """The first epochs of the default run, in a process of its own that lists what it imports.

    What it printed, and the run.
    """

    def train(folder):
        arguments = ["--output-dir", folder / "runs", "--epochs", 2]
        process = script(*arguments, launcher=["-X", "importtime"])
        assert process.returncode == 0, process.stderr
        for name in Printed._fields:
            (folder / name).write_text(getattr(process, name))

    folder = once("default run", train)
    (run,) = (folder / "runs").iterdir()
    return Printed(*((folder / name).read_text() for name in Printed._fields)), run


@pytest.fixture(scope="module")
def metrics(finished, strict_json):
    return strict_json(finished[1] / "metrics.json")


def test_run_folder_holds_everything(finished):
    run = finished[1]
    assert {p.name for p in run.iterdir()} == {
        "config.json",
        "classes.csv",
        "skipped.csv",
        "images.csv",
        "lock",
        "log.txt",
        "logs",
        "tensorboard",
        "checkpoints",
        "metrics.json",
        "report.html",
    }
    assert {p.name for p in (run / "checkpoints").iterdir()} == {
        "last.pt",
        "previous.pt",
        "best.pt",
    }


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


def test_output_to_a_file_has_no_progress_bars(finished):
    assert "%|" not in finished[0].stderr and "it/s" not in finished[0].stderr


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_bars_are_shown_on_a_terminal(
    main, quick, tmp_path, capsys, monkeypatch, terminal
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert main(*quick, "--epochs", 1, "--output-dir", tmp_path) == 0
    assert ("total_loss=" in capsys.readouterr().err) is terminal


def test_line_of_an_epoch(finished, metrics):
    epochs = [x for x in finished[0].stdout.splitlines() if x.startswith("epoch ")]
    number, time = r"(\d\.\d{4})", r"(\d+\.\d s|\d+ s|\d+ min \d+ s)"
    first, last = (
        re.fullmatch(
            f"epoch {i} of 2: training loss {number}, validation MAP@R {number}, "
            f"best {number} in epoch \\d, {time}{left}",
            line,
        )
        for i, line, left in zip([1, 2], epochs, [f", at most about {time} left", ""], strict=True)
    )
    best = metrics["validation"]["mean_average_precision_at_r"]
    assert float(last[3]) == pytest.approx(best, abs=1e-4)
    assert float(last[3]) == max(float(first[2]), float(last[2]))
    assert float(last[1]) < float(first[1])


def test_training_loss_is_the_mean_over_the_epoch(main, quick, tmp_path, capsys, monkeypatch):
    from retrieval.training import Training

    losses = []
    hook = Training._end_of_iteration

    def watch(self, trainer):
        losses.append(float(trainer.losses["total_loss"]))
        hook(self, trainer)

    monkeypatch.setattr(Training, "_end_of_iteration", watch)
    assert main(*quick, "--epochs", 2, "--output-dir", tmp_path) == 0
    half = len(losses) // 2
    out = capsys.readouterr().out
    for epoch, part in ((1, losses[:half]), (2, losses[half:])):
        assert f"epoch {epoch} of 2: training loss {sum(part) / half:.4f}" in out


def test_log_holds_what_was_on_the_screen(finished):
    first, *rest = (finished[1] / "log.txt").read_text().splitlines()
    assert max(map(len, rest)) <= 120
    settings = rest[rest.index("settings:") + 1 :]
    shown = " ".join(x.strip() for x in itertools.takewhile(lambda x: x[:2] == "  ", settings))
    assert shown.startswith("dataset=digits, ") and "loss_args={'variant': 'Ds', 'an" in shown
    assert re.match(r"--- \d{4}-\d\d-\d\d .*, process \d+ on ", first)
    assert rest == finished[0].stdout.splitlines()


def test_log_holds_errors_warnings_and_tracebacks(main, quick, tmp_path, monkeypatch):
    from retrieval.training import Training

    def fail(self):
        warnings.warn("how odd", stacklevel=1)
        raise failure

    arguments = [*quick, "--epochs", 1, "--output-dir", tmp_path, "--name", "run"]
    monkeypatch.setattr(Training, "train", fail)
    failure = ZeroDivisionError("by zero")
    with pytest.raises(ZeroDivisionError), pytest.warns(UserWarning, match="how odd"):
        main(*arguments)
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


@pytest.mark.parametrize("worse", [True, False])
def test_training_that_makes_retrieval_worse_is_told(
    main, quick, tmp_path, capsys, monkeypatch, worse
):
    from retrieval.training import Training

    monkeypatch.setattr(
        Training,
        "test_best",
        lambda self: {k: v - 0.01 if worse else v for k, v in self.state["untrained"].items()},
    )
    settings = ["--ema-decay", 0, "--loss", "ContrastiveLoss"]
    assert main(*quick, *settings, "--epochs", 1, "--output-dir", tmp_path) == 0
    out = capsys.readouterr().out
    assert ("Training made retrieval of unseen classes worse: MAP@R fell from" in out) is worse
    for tried in ("a smaller --lr", "--ema-decay 0.997", "variant=Ds anneal=0.03"):
        assert (tried in out) is worse
    assert "--memory-size 0;" not in out and "--turned-classes" not in out


def test_threads_are_set_and_recorded(main, quick, tmp_path, strict_json, capsys, threads):
    run = tmp_path / "run"
    new = [*quick, "--epochs", 1, "--output-dir", tmp_path, "--name", "run"]
    assert main(*new, "--threads", 2) == 0
    assert torch.get_num_threads() == 2
    assert strict_json(run / "config.json")["threads"] == 2
    assert "threads of each: 2 (--threads; their number changes" in capsys.readouterr().out
    assert main("--resume", run, "--epochs", 2, "--threads", 1) == 0
    assert torch.get_num_threads() == 1
    assert strict_json(run / "config.json")["threads"] == 1


@pytest.fixture
def threads():
    """Set back what a test changes."""
    import faiss

    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    yield
    torch.set_num_threads(before[0])
    faiss.omp_set_num_threads(before[1])


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


def test_finished_run_says_so_and_shows_its_table(finished, main, tmp_path, capsys):
    run = shutil.copytree(finished[1], tmp_path / "run")  # which adds to its log
    assert main("--resume", run) == 0
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
    "beside": ["--loss-args", "variant=Dq", "--beside", "MultiSimilarityLoss"],
    "beside another": ["--loss", "MultiSimilarityLoss", "--beside", "PNPLoss"],
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
    runs = [run_of(option) for option in ("", "ema-decay 0", "memory")]
    assert len(set(runs)) == 3
    stem = "folder-PNPLoss-Ds"
    made = {x.name for x in runs[0].parent.iterdir() if x.name.startswith(stem)}
    assert made == {f"{stem}-{number}" for number in range(1, len(made) + 1)}


CURVES = {
    "loss_histories/total_loss",
    *(f"metric_loss/{name}" for name in PNPLoss(collect_stats=True)._record_these_stats),
    *(
        f"accuracies_normalized_RetrievalTester_level_0_VAL_vs_self/{name}"
        for name in ("best_accuracy", "best_epoch", *(f"{x}_level0" for x in METRICS))
    ),
}


def test_the_folder_is_named_after_both_losses(run_of):
    assert run_of("beside").name == "folder-PNPLoss-Dq-MultiSimilarityLoss-1"


def test_pnp_beside_another_loss_has_the_same_defaults(run_of, strict_json):
    config = strict_json(run_of("beside another") / "config.json")
    assert config["loss_args"] == {}
    assert config["beside_args"] == strict_json(run_of("") / "config.json")["loss_args"]
    assert strict_json(run_of("beside") / "config.json")["beside_args"] == {}


@pytest.mark.parametrize("option", ["", "memory", "miner", "beside", "beside another"])
def test_curves_are_of_what_varies_and_have_the_same_names(run_of, curves, option):
    assert curves(run_of(option)).keys() == CURVES


def test_learning_rates_are_recorded_where_they_change(main, quick, tmp_path, curves, monkeypatch):
    from retrieval import train

    def build(*args, original=train.build_trainer):
        trainer = original(*args)
        trainer.lr_schedulers = {
            "trunk_scheduler_by_iteration": torch.optim.lr_scheduler.ExponentialLR(
                trainer.optimizers["trunk_optimizer"], 0.5
            )
        }
        return trainer

    monkeypatch.setattr(train, "build_trainer", build)
    assert main(*quick, "--epochs", 1, "--output-dir", tmp_path, "--name", "run") == 0
    rates = [value for _, value in curves(tmp_path / "run")["learning_rates/trunk"]]
    assert rates[:2] == pytest.approx([1e-3, 1e-3 / 4])  # every second iteration is recorded


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
def test_real_images_train_to_the_end(run_of_real_images, strict_json, name, folder):
    metrics = strict_json(run_of_real_images(name, folder) / "metrics.json")
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "the embeddings are not finite"),
        (["--val-fraction", 0, "--test-fraction", 0], "the weights are no longer finite after"),
    ],
)
def test_weights_that_diverge_in_the_last_iteration_end_in_one_line(
    main, quick, tmp_path, capsys, monkeypatch, settings, message
):
    from retrieval.training import RetrievalTrainer

    step = RetrievalTrainer.step_optimizers

    def diverge(self):
        step(self)
        for parameter in self.trained_models["embedder"].parameters():
            parameter.data.fill_(float("nan"))

    monkeypatch.setattr(RetrievalTrainer, "step_optimizers", diverge)
    few = ["--batch-size", 64, "--samples-per-class", 16, "--patience", 0]
    assert main(*quick, *few, *settings, "--epochs", 1, "--output-dir", tmp_path) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("test", [[], ["--test-fraction", 0]])
def test_without_validation_the_last_epoch_is_kept(
    main, quick, tmp_path, strict_json, capsys, curves, test
):
    """Also with two images of each class, of which none can be held out."""
    root, run = tmp_path / "images", tmp_path / "run"
    shutil.copytree(quick[quick.index("--data-root") + 1], root)
    for path in root.glob("*/*.png"):
        if path.name not in ("00.png", "01.png"):
            path.unlink()
    arguments = [*quick, "--data-root", root, "--output-dir", tmp_path, "--name", "run", *test]
    assert main(*arguments) == 2
    assert "--val-fraction 0 trains on all of it" in capsys.readouterr().err
    arguments += ["--val-fraction", 0, "--patience", 0, "--batch-size", 4]
    assert main(*arguments, "--epochs", 1) == 0
    assert main("--resume", run, "--epochs", 3, "--report") == 0
    assert "continues after epoch 1 of 3\n" in (run / "log.txt").read_text()
    out = capsys.readouterr().out
    assert "validation: none, the last epoch is kept" in out
    assert "weights of epoch 3, the last one; there was no validation" in out
    assert "validation MAP@R" not in out and "still rising" not in out
    metrics = strict_json(run / "metrics.json")
    assert metrics["validation"] is None and metrics["best_epoch"] == 3
    assert ("trained" in metrics) is not test
    assert torch.load(run / "checkpoints" / "best.pt")["epoch"] == 3
    assert curves(run)["loss_histories/total_loss"]
    assert (run / "report.html").is_file()


@pytest.mark.parametrize(("best", "last", "said"), [(3, 3, True), (2, 3, False), (1, 1, False)])
def test_validation_that_was_still_rising_is_told(best, last, said):
    from retrieval.progress import still_rising

    metrics = {"validation": {}, "best_epoch": best, "epochs_trained": last}
    metrics["validation"] = {"mean_average_precision_at_r": 0.5}
    assert bool(still_rising(metrics)) is said
    assert not still_rising({**metrics, "validation": None})


def test_without_a_test_nothing_is_tested(main, quick, tmp_path, strict_json, capsys):
    from retrieval.network import load_best

    run = tmp_path / "run"
    arguments = [*quick, "--output-dir", tmp_path, "--name", "run", "--test-fraction", 0]
    assert main(*arguments, "--epochs", 1) == 0
    metrics = strict_json(run / "metrics.json")
    assert not {"untrained", "trained"} & metrics.keys()
    assert metrics["test_classes"] == 0
    assert metrics["split"] == "no test, every class is trained on"
    assert strict_json(run / "config.json")["data"]["train"]["classes"] == 10
    lines = capsys.readouterr().out.splitlines()
    assert "split: no test, every class is trained on" in lines
    map_at_r = f"{metrics['validation']['mean_average_precision_at_r']:.4f}"
    assert ["folder,", "no", "test,", "every", "class", "is", "trained", "on", "validation"] in [
        x.split() for x in lines
    ]
    assert ["MAP@R", map_at_r] in [x.split() for x in lines]
    assert load_best(run)[0](torch.zeros(1, 3, 8, 8)).shape == (1, 128)
    # It continues, and a finished run shows the same table.
    assert main("--resume", run, "--epochs", 2) == 0
    assert main("--resume", run) == 0
    assert "is finished" in capsys.readouterr().out


def test_closed_set_is_called_so(main, quick, tmp_path, strict_json, capsys):
    arguments = list(quick)
    data = Path(arguments[arguments.index("--data-root") + 1])
    for part, first in (("train", 0), ("test", 16)):
        for label in data.iterdir():
            (tmp_path / "data" / part / label.name).mkdir(parents=True)
            for i in range(first, first + 8):
                link = tmp_path / "data" / part / label.name / f"{i}.png"
                link.symlink_to(label / f"{i:02d}.png")
    arguments[arguments.index("--data-root") + 1] = tmp_path / "data"
    assert main(*arguments, "--epochs", 1, "--output-dir", tmp_path, "--name", "run") == 0
    metrics = strict_json(tmp_path / "run" / "metrics.json")
    assert metrics["closed_set"] and metrics["test_classes"] == 10
    assert strict_json(tmp_path / "run" / "config.json")["split"] == metrics["split"]
    out = capsys.readouterr().out
    assert "split: closed set, the classes of the test are trained on" in out
    assert "folder, 10 known classes, closed set  untrained  trained" in out


@pytest.mark.parametrize("when", ["untrained", "validation", "test"])
def test_every_evaluation_of_what_is_not_finite_ends_in_one_line(
    main, quick, tmp_path, capsys, monkeypatch, when
):
    from retrieval import metrics

    moments = ["untrained", "validation", "test"]
    calls = []
    evaluate = metrics.RetrievalTester.test

    def test(self, datasets, epoch, trunk, embedder, *more):
        if moments[len(calls)] == when:
            embedder.bias.data.fill_(float("inf"))
        calls.append(set(datasets))
        return evaluate(self, datasets, epoch, trunk, embedder, *more)

    monkeypatch.setattr(metrics.RetrievalTester, "test", test)
    assert main(*quick, "--epochs", 1, "--output-dir", tmp_path) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("train.py: error: cannot evaluate: the embeddings are not finite")
    assert calls == [{"test"}, {"val"}, {"test"}][: moments.index(when) + 1]


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


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1] * 9),
        ({"lr_milestones": [1, 2]}, [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]),
        ({"warmup_epochs": 1}, [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1]),
        ({"warmup_epochs": 2, "lr_milestones": [2]}, [*(i / 6 for i in range(1, 7)), *[0.5] * 3]),
        (
            {"warmup_epochs": 1, "lr_cosine": True},
            [1 / 3, 2 / 3, 1, 1, 0.9330, 0.75, 0.5, 0.25, 0.0670],
        ),
    ],
)
def test_schedule_of_the_learning_rates(settings, expected):
    """Three epochs of three iterations."""
    from retrieval.configuration import configured
    from retrieval.training import schedule

    config = configured({"epochs": 3, "lr_gamma": 0.5, **settings})
    rates = [schedule(config, step / 3, 1 / 3) for step in range(9)]
    assert rates == pytest.approx(expected, abs=1e-4)


def test_warmup_and_cosine_reach_every_optimizer(main, quick, tmp_path, curves):
    arguments = ["--epochs", 3, "--lr", 0.01, "--lr-cosine", "--warmup-epochs", 1]
    assert main(*quick, *arguments, "--output-dir", tmp_path, "--name", "run") == 0
    for name in ("trunk", "embedder"):
        rates = [value for _, value in curves(tmp_path / "run")[f"learning_rates/{name}"]]
        assert rates[0] == pytest.approx(0.01 / 11) and max(rates) == pytest.approx(0.01, rel=0.1)
        assert 0 < rates[-1] < 0.001
    shared = torch.load(tmp_path / "run" / "checkpoints" / "last.pt")["shared"]
    assert all(abs(x["param_groups"][0]["lr"]) < 1e-12 for x in shared["optimizers"].values())


def test_learning_rates_fall_at_the_milestones(main, quick, tmp_path):
    arguments = ["--epochs", 3, "--lr", 0.01, "--loss-lr", 0.1, "--loss", "ProxyAnchorLoss"]
    arguments += ["--lr-milestones", 1, 2, "--lr-gamma", 0.5, "--output-dir", tmp_path]
    assert main(*quick, *arguments, "--name", "run") == 0
    shared = torch.load(tmp_path / "run" / "checkpoints" / "last.pt")["shared"]
    rates = {k: v["param_groups"][0]["lr"] for k, v in shared["optimizers"].items()}
    assert rates == pytest.approx(
        {
            "trunk_optimizer": 0.0025,
            "embedder_optimizer": 0.0025,
            "metric_loss_optimizer": 0.025,
        }
    )
