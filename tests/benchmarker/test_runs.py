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
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output[-6000:]
    return output


def found_by(*arguments, cwd=None):
    """What Python prints last, as JSON."""
    process = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=900
    )
    assert process.returncode == 0, process.stderr[-6000:]
    return json.loads(process.stdout.splitlines()[-1])


def results(folder):
    """The rows of the table, without when and how they were made."""
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows and all(row["date"] and row["command"] for row in rows)
    return [{k: v for k, v in row.items() if k not in ("date", "command")} for row in rows]


def benchmark_flags(folder, epochs=4):
    flags = ["--losses", "with_pnp", "--seeds", 0, "--epochs", epochs, "--output", folder]
    return [*flags, "--", *SMALL]


def benchmark(folder):
    return start("benchmark.py", *benchmark_flags(folder))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nobody stopped: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    output = end_of(benchmark(folder))
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
        assert len(history) >= 4  # one of each epoch at least
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
    models = tmp_path / "digits" / "with_pnp-0"
    (models / "configs").mkdir(parents=True)
    (models / "configs" / "config_models.yaml").write_text("models: {trunk:")
    output = kill_at(benchmark(tmp_path), models, "*_0/saved_models/embedder_4.pth")
    assert "with_pnp-0: training" in output
    output = kill_at(benchmark(tmp_path), models, "*_1/saved_models/embedder_1.pth")
    assert "with_pnp-0: continuing" in output
    assert "with_pnp-0: continuing" in end_of(benchmark(tmp_path))
    assert results(tmp_path / "digits") == results(finished[0])
    best = [path for name in ("trunk", "embedder") for path in models.glob(f"*/*/{name}_best?.pth")]
    assert len(best) >= 4
    for path in best:
        expected = finished[0] / path.relative_to(tmp_path / "digits")
        weights = (torch.load(x, weights_only=True) for x in (path, expected))
        torch.testing.assert_close(*weights, rtol=0, atol=0)


# What ends before training: (script, flags, part of the message). FINISHED and ROOT are folders.
NEW = ["--experiment_name", "x", "--root_experiment_folder", "ROOT"]
TAKEN = ["--experiment_name", "with_pnp-0", "--root_experiment_folder", "FINISHED/digits"]
OMNIGLOT = ["--config_dataset", "[default, omniglot]", "--dataset_root", "ROOT/no"]
OVERLAY = ["--config_loss_and_miners", "[default, nope]"]
OTHER = benchmark_flags("FINISHED", epochs=5)
NO_DATA = ["--dataset", "omniglot", "--dataset-root", "ROOT/no", "--output", "ROOT"]
NO_LOSS = ["--output", "ROOT", "--losses", "nope"]
NO_CONFIG = "no experiment to reproduce: no config in .*no/configs"
UNKNOWN = "unknown flag --sed: did you mean --seed"
NO_SEARCH = "needs a config with a key that ends in ~BAYESIAN~"
MISTAKES = {
    "other epochs": ("benchmark.py", OTHER, "error: with_pnp-0 was begun with {'epochs': 4"),
    "no data to benchmark": ("benchmark.py", NO_DATA, "benchmark.py: error: .*omniglot"),
    "no loss": ("benchmark.py", NO_LOSS, "--losses must be of contrastive, .* got nope"),
    "a folder that is taken": ("run.py", TAKEN, "continue it with --resume_training latest"),
    "no data": ("run.py", [*NEW, *OMNIGLOT], "run.py: error: .*omniglot"),
    "no overlay": ("run.py", [*NEW, *OVERLAY], "no nope.yaml in .* with_pnp,"),
    "nothing to resume": ("run.py", [*NEW, "--resume_training", "latest"], "no experiment 'x' in "),
    "nothing to reproduce": ("run.py", [*NEW, "--reproduce_results", "ROOT/no"], NO_CONFIG),
    "flag to reproduce": ("run.py", [*NEW, "--reproduce_results", "ROOT/old", "--sed", 0], UNKNOWN),
    "nothing to evaluate": ("run.py", [*NEW, "--evaluate"], "no experiment 'x' in "),
    "nothing to search": ("run.py", [*NEW, "--bayes_opt_iters", "3"], NO_SEARCH),
}


@pytest.fixture(scope="module")
def said(finished, tmp_path_factory):
    """{case: exit code, output, files written}, of one process that ran all command lines."""
    folder = finished[0].parent
    cases = {"finished before": ("benchmark.py", benchmark_flags("FINISHED"), ""), **MISTAKES}
    roots = {case: tmp_path_factory.mktemp("root") for case in cases}
    for root in roots.values():  # an experiment that lacks configs
        (root / "old" / "configs").mkdir(parents=True)
        (root / "old" / "configs" / "config_general.yaml").write_text("patience: 3")
    lines = []
    for case, (script, flags, _) in cases.items():
        flags = [str(x).replace("FINISHED", str(folder)) for x in flags]
        lines.append([str(EXAMPLE / script), [x.replace("ROOT", str(roots[case])) for x in flags]])
    found = found_by(Path(__file__).with_name("command_lines.py"), json.dumps(lines))
    files = [
        [path for path in root.rglob("*") if path.is_file() and root / "old" not in path.parents]
        for root in roots.values()
    ]
    return {case: (*x, y) for case, x, y in zip(cases, found, files, strict=True)}


def test_what_is_finished_is_not_run_again(finished, said):
    code, output, _ = said["finished before"]
    assert code == 0 and "with_pnp-0: finished before" in output
    table = [line for line in finished[1].splitlines() if line.startswith("|")]
    assert table and table == [line for line in output.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named_before_training(said, case):
    code, output, files = said[case]
    assert code in (1, 2) and re.search(MISTAKES[case][2], output), output
    assert "Traceback" not in output and not files


# What a script can do after a plain `prepare`; prints what it found as JSON.
SCRIPT = """
import json, sys
import torch
from pml_pnp import PNPLoss, benchmarker
from pml_pnp.benchmarker import command_line

args, words = command_line._parser().parse_known_args()
benchmarker.prepare()
runner = command_line.build_runner(args, words)
benchmarker.register(runner)
runner.set_YR()
read = runner.YR.load_yamls(runner.determine_where_to_get_yamls(runner.YR.args), max_merge_depth=9)
loss = runner.pytorch_getter.get("loss", yaml_dict=read[0].loss_funcs["metric_loss"])
found = {"ours": type(loss) is PNPLoss, "arguments": [loss.variant, loss.alpha, loss.anneal]}
found["dataset"] = list(read[0].dataset)

def factory(name):
    return runner.pytorch_getter.get("factory", yaml_dict={name: {"getter": runner.pytorch_getter}})

size, pnp = {"embedding_size": 8}, {"PNPLoss": {"variant": "Ds"}}
mined = {"loss": {"PNPLoss": None}, "miner": {"MultiSimilarityMiner": {}}, **size}
weights = {"PNPLoss": 0.5, "NormalizedSoftmaxLoss": 0.0}
both = {"losses": {**pnp, "NormalizedSoftmaxLoss": size}, "weights": weights}
losses = {
    "memory": {"CrossBatchMemory": {"loss": pnp, **size}},
    "mined": {"CrossBatchMemory": mined},
    "sum": {"MultipleLosses": both},
}
makes = factory("LossFactory")
for fold in range(2):
    made = makes.create(named_specs=losses, kwargs={"num_classes": 5})
torch.manual_seed(0)
x, y = torch.randn(16, 8), torch.arange(16) // 4
found["alone"] = PNPLoss(variant="Ds")(x, y).item()
found["nested"] = {name: made[name](x, y).item() for name in losses}
found["classes"] = made["sum"].losses["NormalizedSoftmaxLoss"].W.shape[1]
try:
    miner = {"MaximumLossMiner": {"loss": {"PNPLoss": {}}, "output_batch_size": 8}}
    found["mined"] = len(factory("MinerFactory").create(miner)(x, y))
except AttributeError:  # not of PML 2
    found["mined"] = None

by_epoch = {"StepLR": {"step_size": 1, "gamma": 0.1}}
sgd = {"SGD": {"lr": 1.0}, "scheduler_by_epoch": by_epoch, "clip_grad_norm": 0.5}
trunk = torch.nn.Linear(8, 2)
for fold in range(2):
    optimizers, schedulers, clippers = factory("OptimizerFactory").create(
        named_specs={"trunk_optimizer": sgd}, kwargs={"param_sources": [{"trunk": trunk}]}
    )
trunk(x).square().sum().backward()
clippers["trunk_grad_clipper"]()
found["norm"] = torch.nn.utils.get_total_norm([p.grad for p in trunk.parameters()]).item()
optimizers["trunk_optimizer"].step()
schedulers["trunk_scheduler_by_epoch"].step()
found["rate"] = optimizers["trunk_optimizer"].param_groups[0]["lr"]

sys.argv[1:] = ["--experiment_name", "search", "--loss_funcs~OVERRIDE~"]
sys.argv += "{metric_loss: {PNPLoss: {alpha~BAYESIAN~: [1.0, 16.0]}}}".split()
from powerful_benchmarker.runners.bayes_opt_runner import BayesOptRunner
search = BayesOptRunner(bayes_opt_iters=1, reproductions=0, root_experiment_folder="searches")
benchmarker.register(search)
client = search.get_ax_client()
client.get_next_trial()
search.save_new_log(client)
search.delete_sub_experiment_folder("search0")  # which there was no time to make
found["parameters"] = list(search.get_ax_client().get_trial_parameters(0))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """What a script found, on powerful-benchmarker's own configs, and its folder."""
    folder = tmp_path_factory.mktemp("script")
    flags = ["--experiment_name", "x", "--config_loss_and_miners", "[default,", "with_pnp]"]
    return found_by("-c", SCRIPT, *flags, cwd=folder), folder


def test_on_its_own_configs_a_search_and_what_is_named_inside_others_are_made(script):
    found, folder = script
    assert found["ours"] and found["arguments"] == ["Dq", 4, 0.01]
    assert found["dataset"] == ["CUB200"]
    alone, nested = found["alone"], found["nested"]
    assert nested["memory"] == pytest.approx(alone, rel=1e-5)  # of a memory that is the batch
    assert nested["sum"] == pytest.approx(alone / 2, rel=1e-5) and found["classes"] == 5
    assert nested["mined"] > 0
    assert found["mined"] == (8 if requirements.is_pinned() else None)
    assert found["norm"] == pytest.approx(0.5, rel=1e-4) and found["rate"] == pytest.approx(0.1)
    assert [path.name for path in folder.iterdir()] == ["searches"]
    assert found["parameters"] == ["loss_funcs/metric_loss/PNPLoss/alpha"]
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
