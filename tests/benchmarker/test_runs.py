"""powerful-benchmarker itself, on few digits. Runs where a recipe is installed: .ci/benchmarker."""

import csv
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from pml_pnp.benchmarker.requirements import is_there

pytestmark = [
    pytest.mark.benchmarker,
    pytest.mark.skipif(
        not is_there("powerful_benchmarker"),
        reason="powerful-benchmarker is not installed; .ci/benchmarker makes an environment",
    ),
]
EXAMPLE = Path(__file__).parents[2] / "examples" / "powerful_benchmarker"
# The digits as they are, and few steps.
SMALL = [
    *("--dataset~OVERRIDE~", "{Digits: {turned_classes: False}}"),
    *("--trainer", "{MetricLossOnly: {iterations_per_epoch: 4}}"),
]


def start(script, *flags, **kwargs):
    command = [sys.executable, str(EXAMPLE / script), *map(str, flags)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs
    )


def run(script, *flags):
    process = start(script, *flags)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output[-6000:]
    return output


def query(path, sql):
    connection = sqlite3.connect(path)
    connection.row_factory = sqlite3.Row
    return [dict(row) for row in connection.execute(sql)]


def results(folder):
    """The rows of the table, without when and how they were made."""
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows and all(row["date"] and row["command"] for row in rows)
    return [{k: v for k, v in row.items() if k not in ("date", "command")} for row in rows]


def benchmark(folder, epochs=4):
    flags = ["--losses", "with_pnp", "--seeds", 0, "--epochs", epochs, "--output", folder]
    return start("benchmark.py", *flags, "--", *SMALL, start_new_session=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nobody stopped: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    process = benchmark(folder)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output[-6000:]
    return folder / "digits", output


def test_a_run_trains_evaluates_and_ensembles_every_fold(finished):
    folder, output = finished
    assert "| with_pnp | " in output and "| untrained | " in output
    rows = results(folder)
    kinds = [row["models"] for row in rows]
    assert sorted(kinds) == ["ensemble", "fold", "fold", "untrained", "untrained"]
    assert all(0 < float(r["mean_average_precision_at_r"]) <= 1 for r in rows)


def test_the_logs_hold_the_arguments_and_records_of_this_loss(finished):
    """CSV, SQLite and TensorBoard."""
    folder, _ = finished
    folds = sorted((folder / "with_pnp-0").glob("Test50_50_Partitions*"))
    assert len(folds) == 2
    for fold in folds:
        logs = fold / "saved_csvs"
        assert (logs / "metric_loss_PNPLoss.csv").is_file()
        rows = query(logs / "logs.db", "SELECT * FROM metric_loss_PNPLoss")
        assert {row["variant"] for row in rows} == {"Dq"} and {r["alpha"] for r in rows} == {4}
        history = query(logs / "logs.db", "SELECT * FROM loss_histories")
        assert len(history) >= 4  # one of each epoch at least
        assert all(0 <= row["metric_loss"] <= 1 for row in history)
        assert list((fold / "tensorboard_logs").glob("events.*"))


@pytest.mark.parametrize(("fold", "epoch"), [(0, 4), (1, 1)])
def test_a_killed_run_goes_on_to_the_same_end(finished, tmp_path, fold, epoch):
    """SIGKILL while the checkpoint of an epoch is written."""
    process = benchmark(tmp_path)
    models = tmp_path / "digits" / "with_pnp-0"
    end = time.monotonic() + 600
    while not list(models.glob(f"*_{fold}/saved_models/embedder_{epoch}.pth")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    process = benchmark(tmp_path)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output[-6000:]
    assert "with_pnp-0: continuing" in output
    assert results(tmp_path / "digits") == results(finished[0])
    best = [*models.glob("*/saved_models/trunk_best?.pth")]
    best += models.glob("*/saved_models/embedder_best?.pth")
    assert len(best) >= 4
    for path in best:
        weights = torch.load(path, weights_only=True)
        expected = finished[0] / path.relative_to(tmp_path / "digits")
        torch.testing.assert_close(weights, torch.load(expected, weights_only=True), rtol=0, atol=0)


def test_what_is_finished_is_not_run_again_and_not_mixed(finished):
    folder, first = finished
    before = (folder / "results.csv").read_text()
    output, _ = benchmark(folder.parent).communicate(timeout=900)
    assert (
        "with_pnp-0: finished before" in output and (folder / "results.csv").read_text() == before
    )
    process = benchmark(folder.parent, epochs=5)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 1 and "was begun with {'epochs': 4" in output
    assert "Traceback" not in output


def test_a_run_that_was_killed_while_its_configs_were_written_begins_anew(finished, tmp_path):
    configs = tmp_path / "digits" / "with_pnp-0" / "configs"
    configs.mkdir(parents=True)
    (configs / "config_models.yaml").write_text("models: {trunk:")
    output, _ = benchmark(tmp_path).communicate(timeout=900)
    assert results(tmp_path / "digits") == results(finished[0]), output[-6000:]


def test_a_folder_that_is_taken_is_left_alone(finished):
    flags = ["--experiment_name", "with_pnp-0", "--root_experiment_folder", finished[0]]
    process = start("run.py", *flags)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "continue it with --resume_training latest" in output


@pytest.mark.parametrize("script", ["benchmark.py", "run.py"])
def test_a_missing_data_set_is_named_before_training(script, tmp_path):
    flags = ["--dataset", "omniglot", "--dataset-root", tmp_path / "no", "--output", tmp_path / "x"]
    if script == "run.py":
        flags = ["--experiment_name", "x", "--config_dataset", "[default, omniglot]"]
        flags += ["--dataset_root", tmp_path / "no", "--root_experiment_folder", tmp_path]
    process = start(script, *flags)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and f"{script}: error: " in output and "omniglot" in output
    assert "Traceback" not in output and not list(tmp_path.rglob("*.pth"))


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("benchmark.py", ["--losses", "nope"], "--losses must be of contrastive, .* got nope"),
        ("run.py", ["--config_loss_and_miners", "[default, nope]"], "no nope.yaml in .* with_pnp,"),
        ("run.py", ["--resume_training", "latest"], "no experiment 'x' in "),
        ("run.py", ["--evaluate"], "no experiment 'x' in "),
        ("run.py", ["--reproductions", "a"], "--reproductions"),
        ("run.py", ["--bayes_opt_iters", "3"], "needs a config with a key that ends in ~BAYESIAN~"),
    ],
)
def test_what_is_not_there_is_named(script, flags, message, tmp_path):
    if script == "run.py":
        flags = ["--experiment_name", "x", "--root_experiment_folder", tmp_path, *flags]
    else:
        flags = ["--output", tmp_path / "out", *flags]
    process = start(script, *flags)
    output, _ = process.communicate(timeout=300)
    assert process.returncode in (1, 2) and re.search(message, output), output
    assert "Traceback" not in output
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_on_its_own_configs_the_overlay_is_found_and_the_loss_is_this_one(tmp_path):
    code = """
import sys
from pml_pnp import PNPLoss, benchmarker
from pml_pnp.benchmarker import command_line

args, _ = command_line._parser().parse_known_args()
benchmarker.prepare()
runner = command_line.build_runner(args)
benchmarker.register(runner)
runner.set_YR()
read = runner.YR.load_yamls(runner.determine_where_to_get_yamls(runner.YR.args), max_merge_depth=9)
spec = read[0].loss_funcs["metric_loss"]
loss = runner.pytorch_getter.get("loss", yaml_dict=spec)
assert type(loss) is PNPLoss and (loss.variant, loss.alpha, loss.anneal) == ("Dq", 4, 0.01), loss
assert list(read[0].dataset) == ["CUB200"], read[0].dataset
"""
    flags = ["--experiment_name", "x", "--config_loss_and_miners", "[default,", "with_pnp]"]
    subprocess.run([sys.executable, "-c", code, *flags], check=True, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_three_trials_of_a_hyperparameter_search_that_is_killed_in_between(tmp_path):
    flags = ["--experiment_name", "search", "--root_experiment_folder", tmp_path, "--seed", 0]
    flags += ["--config_loss_and_miners", "[default,", "with_pnp_bayes_opt]"]
    flags += ["--bayes_opt_iters", 3, "--reproductions", 2, "--num_epochs_train", 1]
    folder = tmp_path / "search"
    process = start("run.py", *flags, *SMALL, start_new_session=True)
    end = time.monotonic() + 600
    while not list(folder.glob("search1/*/saved_models/embedder_1.pth")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    first = sorted((folder / "search0").rglob("*.pth"))
    times = [path.stat().st_mtime for path in first]
    run("run.py", *flags, *SMALL)
    assert first and times == [path.stat().st_mtime for path in first]  # not trained again
    best = yaml.safe_load((folder / "best_parameters.yaml").read_text())
    parameters = {k.rpartition("/")[2]: v for k, v in best["best_parameters"].items()}
    assert 1 <= parameters["alpha"] <= 16 and 0.003 <= parameters["anneal"] <= 0.1
    rows = query(folder / "bayes_opt_record_keeper_logs" / "logs.db", "SELECT * FROM bayes_opt")
    assert [row["trial_index"] for row in rows] == [0, 1, 2]
    assert len({row["loss_funcs_metric_loss_PNPLoss_anneal"] for row in rows}) == 3
    name = best["best_sub_experiment_name"]
    (report,) = folder.glob("report_ConcatenateEmbeddings*.yaml")
    trained = yaml.safe_load(report.read_text())["trained"]["mean_average_precision_at_r_level0"]
    assert 0 < trained["mean"] <= 1
    assert 0 < trained["95%_confidence_interval_width"]  # reproductions have seeds of their own
    assert {p.name for p in folder.glob(f"{name}*")} == {
        name, f"{name}_reproduction0", f"{name}_reproduction1"
    }  # fmt: skip
    assert (folder / "optimization_plots.html").stat().st_size > 1000
