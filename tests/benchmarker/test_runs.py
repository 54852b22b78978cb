"""powerful-benchmarker itself, on few digits. Runs where a recipe is installed: .ci/benchmarker."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers import sql_rows

from pml_pnp.benchmarker import requirements

pytestmark = [
    pytest.mark.benchmarker,
    pytest.mark.skipif(
        not requirements.is_there("powerful_benchmarker"),
        reason="powerful-benchmarker is not installed; .ci/benchmarker makes an environment",
    ),
]
EXAMPLE = Path(__file__).parents[2] / "examples" / "powerful_benchmarker"
# The digits as they are, and few steps.
SMALL = [
    *("--dataset~OVERRIDE~", "{Digits: {turned_classes: False}}"),
    *("--trainer", "{MetricLossOnly: {iterations_per_epoch: 4}}"),
]


def start(script, *flags):
    command = [sys.executable, str(EXAMPLE / script), *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, text=True, start_new_session=True, **pipes)


def end_of(process):
    try:
        output, _ = process.communicate(timeout=900)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output[-6000:]
    return output


def results(folder):
    """The rows of the table, without when and how they were made."""
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows and all(row["date"] and row["command"] for row in rows)
    return [{k: v for k, v in row.items() if k not in ("date", "command")} for row in rows]


def benchmark_flags(folder, epochs=2):
    flags = ["--losses", "with_pnp", "--seeds", 0, "--epochs", epochs, "--output", folder]
    return [*flags, "--", *SMALL]


# What ends before training: (script, flags, part of the message), each in a folder beside others.
NEW = ["--experiment_name", "x", "--root_experiment_folder", "."]
TAKEN = ["--experiment_name", "with_pnp-0", "--root_experiment_folder", "../finished/digits"]
OMNIGLOT = ["--config_dataset", "[default, omniglot]", "--dataset_root", "no"]
OVERLAY = ["--config_loss_and_miners", "[default, nope]"]
OTHER = benchmark_flags("../finished", epochs=5)
NO_DATA = ["--dataset", "omniglot", "--dataset-root", "no", "--output", "."]
NO_LOSS = ["--output", ".", "--losses", "nope"]
NO_CONFIG = "no experiment to reproduce: no config in no/configs"
UNKNOWN = "unknown flag --sed: did you mean --seed"
NO_SEARCH = "needs a config with a key that ends in ~BAYESIAN~"
MISTAKES = {
    "other epochs": ("benchmark.py", OTHER, "error: with_pnp-0 was begun with {'epochs': 2"),
    "no data to benchmark": ("benchmark.py", NO_DATA, "benchmark.py: error: .*omniglot"),
    "no loss": ("benchmark.py", NO_LOSS, "--losses must be of contrastive, .* got nope"),
    "a folder that is taken": ("run.py", TAKEN, "continue it with --resume_training latest"),
    "no data": ("run.py", [*NEW, *OMNIGLOT], "run.py: error: .*omniglot"),
    "no overlay": ("run.py", [*NEW, *OVERLAY], "no nope.yaml in .* with_pnp,"),
    "nothing to resume": ("run.py", [*NEW, "--resume_training", "latest"], "no experiment 'x' in "),
    "nothing to reproduce": ("run.py", [*NEW, "--reproduce_results", "no"], NO_CONFIG),
    "flag to reproduce": ("run.py", [*NEW, "--reproduce_results", "../old", "--sed", 0], UNKNOWN),
    "nothing to evaluate": ("run.py", [*NEW, "--evaluate"], "no experiment 'x' in "),
    "nothing to search": ("run.py", [*NEW, "--bayes_opt_iters", "3"], NO_SEARCH),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """{case: exit code, output, folder}, of one process that ran all command lines."""
    root, folder = tmp_path_factory.mktemp("said"), Path(__file__).parent
    overlay = ["--experiment_name", "x", "--config_loss_and_miners", "[default,", "with_pnp]"]
    cases = {
        "finished": ("benchmark.py", benchmark_flags(".")),
        "finished before": ("benchmark.py", benchmark_flags("../finished")),
        **{case: line[:2] for case, line in MISTAKES.items()},
        "own script": (folder / "own_script.py", overlay),
    }
    (root / "old" / "configs").mkdir(parents=True)  # an experiment that lacks configs
    (root / "old" / "configs" / "config_general.yaml").write_text("patience: 3")
    lines = []
    for case, (script, flags) in cases.items():
        (root / case).mkdir()
        lines.append([str(EXAMPLE / script), [*map(str, flags)], str(root / case)])
    (root / "lines").write_text(json.dumps(lines))
    end_of(start(folder / "command_lines.py", root / "lines"))
    found = json.loads((root / "lines").read_text())
    return {case: (*x, root / case) for case, x in zip(cases, found, strict=True)}


@pytest.fixture(scope="module")
def finished(said):
    """A run that nobody stopped: its folder, and what it printed."""
    code, output, folder = said["finished"]
    assert code == 0, output
    return folder / "digits", output


def test_a_run_trains_evaluates_and_ensembles_every_fold(finished):
    """And its logs, in CSV, SQLite and TensorBoard, hold arguments and records of this loss."""
    folder, output = finished
    assert "| with_pnp | " in output and "| untrained | " in output
    rows = results(folder)
    kinds = [row["models"] for row in rows]
    assert sorted(kinds) == ["ensemble", "fold", "fold", "untrained", "untrained"]
    assert all(0 < float(r["mean_average_precision_at_r"]) <= 1 for r in rows)
    folds = sorted((folder / "with_pnp-0").glob("Test50_50_Partitions*"))
    assert len(folds) == 2
    for fold in folds:
        logs = fold / "saved_csvs"
        assert (logs / "metric_loss_PNPLoss.csv").is_file()
        rows = sql_rows(logs / "logs.db", "metric_loss_PNPLoss")
        assert {row["variant"] for row in rows} == {"Dq"} and {r["alpha"] for r in rows} == {4}
        history = sql_rows(logs / "logs.db", "loss_histories")
        assert len(history) >= 2  # one of each epoch at least
        assert all(0 <= row["metric_loss"] <= 1 for row in history)
        assert list((fold / "tensorboard_logs").glob("events.*"))


def kill_at(process, folder, path):
    """SIGKILL as soon as a file is there; what the process had printed."""
    end = time.monotonic() + 600
    while not list(folder.glob(path)):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0]


def test_a_run_killed_at_any_time_goes_on_to_the_same_end(finished, tmp_path):
    """While its configs are written, and the checkpoint of an epoch of either fold."""
    command = ["benchmark.py", *benchmark_flags(tmp_path)]
    models = tmp_path / "digits" / "with_pnp-0"
    (models / "configs").mkdir(parents=True)
    (models / "configs" / "config_models.yaml").write_text("models: {trunk:")
    output = kill_at(start(*command), models, "*_0/saved_models/embedder_2.pth")
    assert "with_pnp-0: training" in output
    output = kill_at(start(*command), models, "*_1/saved_models/embedder_1.pth")
    assert "with_pnp-0: continuing" in output
    assert "with_pnp-0: continuing" in end_of(start(*command))
    assert results(tmp_path / "digits") == results(finished[0])
    best = [path for name in ("trunk", "embedder") for path in models.glob(f"*/*/{name}_best?.pth")]
    assert len(best) >= 4
    for path in best:
        expected = finished[0] / path.relative_to(tmp_path / "digits")
        weights = (torch.load(x, weights_only=True) for x in (path, expected))
        torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_what_is_finished_is_not_run_again(finished, said):
    code, output, _ = said["finished before"]
    assert code == 0 and "with_pnp-0: finished before" in output
    table = [line for line in finished[1].splitlines() if line.startswith("|")]
    assert table and table == [line for line in output.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named_before_training(said, case):
    code, output, folder = said[case]
    assert code in (1, 2) and re.search(MISTAKES[case][2], output), output
    assert "Traceback" not in output and not any(x.is_file() for x in folder.rglob("*"))


def test_on_its_own_configs_a_search_and_what_is_named_inside_others_are_made(said):
    code, output, folder = said["own script"]
    assert code == 0, output
    assert [path.name for path in folder.iterdir()] == ["searches"]
    logs = folder / "searches" / "search" / "bayes_opt_ax_logs"
    assert [path.name for path in logs.iterdir()] == ["log00000.json"]


def test_three_trials_of_a_search_that_is_killed_after_one_that_diverged(tmp_path):
    seed = 4 if requirements.is_pinned() else 2  # the first trial's learning rate is above 1e20
    flags = ["--experiment_name", "search", "--root_experiment_folder", tmp_path, "--seed", seed]
    rates = "{SGD: {lr~LOG_BAYESIAN~: [1.e-30, 1.e+38]}}"
    optimizers = f"{{trunk_optimizer: {rates}, embedder_optimizer: {{SGD: {{lr: 0.01}}}}}}"
    flags += ["--optimizers~OVERRIDE~", optimizers]
    flags += ["--config_loss_and_miners", "[default,", "with_pnp_bayes_opt]"]
    flags += ["--bayes_opt_iters", 3, "--reproductions", 2, "--num_epochs_train", 1]
    folder = tmp_path / "search"
    kill_at(start("run.py", *flags, *SMALL), folder, "search1/*/saved_models/embedder_1.pth")
    first = sorted((folder / "search0").rglob("*.pth"))
    times = [path.stat().st_mtime for path in first]
    end_of(start("run.py", *flags, *SMALL))
    assert first and times == [path.stat().st_mtime for path in first]  # not trained again
    best = yaml.safe_load((folder / "best_parameters.yaml").read_text())
    parameters = {k.rpartition("/")[2]: v for k, v in best["best_parameters"].items()}
    assert 1 <= parameters["alpha"] <= 16 and 0.003 <= parameters["anneal"] <= 0.1
    rows = sql_rows(folder / "bayes_opt_record_keeper_logs" / "logs.db", "bayes_opt")
    assert [row["trial_index"] for row in rows] == [0, 1, 2]
    assert len({row["loss_funcs_metric_loss_PNPLoss_anneal"] for row in rows}) == 3
    found = [row["mean_average_precision_at_r"] for row in rows]
    assert rows[0]["optimizers_trunk_optimizer_SGD_lr"] > 1e20
    assert found[0] == 0 and 0 < found[1] <= max(found)
    name = best["best_sub_experiment_name"]
    (report,) = folder.glob("report_ConcatenateEmbeddings*.yaml")
    trained = yaml.safe_load(report.read_text())["trained"]["mean_average_precision_at_r_level0"]
    assert 0 < trained["mean"] <= 1
    assert 0 < trained["95%_confidence_interval_width"]  # reproductions have seeds of their own
    assert {p.name for p in folder.glob(f"{name}*")} == {
        name, f"{name}_reproduction0", f"{name}_reproduction1"
    }  # fmt: skip
    assert (folder / "optimization_plots.html").stat().st_size > 1000
