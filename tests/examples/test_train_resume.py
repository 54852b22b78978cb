"""A killed run continues to the same end."""

import csv
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "train.py"
EPOCHS = 4
pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")
# Everything that has a state of its own: loss parameters, augmentation and a memory.
SETTINGS = {
    "default": [],
    "memory": ["--memory-size", 96, "--ema-decay", 0],
    "proxies": ["--loss", "ProxyAnchorLoss", "--freeze-batchnorm"],
    "chunks": ["--grad-cache", 16],
}


class Killed(BaseException):
    """Stands for SIGKILL where a test must hit one certain moment."""


@pytest.fixture(scope="module")
def whole(main, quick, tmp_path_factory):
    """Uninterrupted runs, by setting."""
    folder = tmp_path_factory.mktemp("whole")
    made = {}

    def get(setting):
        if setting not in made:
            arguments = ["--output-dir", folder, "--name", setting, "--epochs", EPOCHS, *quick]
            assert main(*arguments, *SETTINGS[setting]) == 0
            made[setting] = folder / setting
        return made[setting]

    return get


def results(run, strict_json):
    """What must not depend on an interruption."""
    metrics = strict_json(run / "metrics.json")
    del metrics["seconds"]
    tables = {}
    connection = sqlite3.connect(run / "logs" / "logs.db")
    for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'"):
        if name == "sqlite_sequence":
            continue
        tables[name] = connection.execute(f"SELECT * FROM [{name}] ORDER BY 2").fetchall()
    connection.close()
    tables = {name: [row[1:] for row in rows] for name, rows in tables.items()}
    texts = {}
    for path in (run / "logs").glob("*.csv"):
        with path.open() as file:
            texts[path.name] = [row for row in csv.reader(file) if row[0] != "~iteration~"]
    return metrics, tables, texts, scalars(run)


def scalars(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return {
        tag: [(x.step, x.value) for x in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_sigkill_during_an_epoch(whole, environment, main, quick, tmp_path, strict_json):
    command = [sys.executable, "-u", SCRIPT, "--epochs", EPOCHS]
    command += ["--output-dir", tmp_path, "--name", "run", *quick]
    process = subprocess.Popen(
        list(map(str, command)),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        for line in process.stdout:
            if line.startswith("epoch 2:"):
                process.kill()
    assert process.returncode == -9
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert main("--resume", tmp_path / "run") == 0
    assert results(tmp_path / "run", strict_json) == results(whole("default"), strict_json)


# (function of RunFolder, which call of it, before or after it)
MOMENTS = {
    "before the first checkpoint": ("save_checkpoint", 1, "before"),
    "after the untrained evaluation": ("save_checkpoint", 1, "after"),
    "between records and checkpoint": ("save_checkpoint", 3, "before"),
    "after the last epoch": ("save_checkpoint", EPOCHS + 1, "after"),
    "before metrics.json": ("write_json", 2, "before"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill(whole, main, tmp_path, strict_json, monkeypatch, quick, moment):
    kill_run(monkeypatch, main, tmp_path, MOMENTS[moment], quick)
    assert main("--resume", tmp_path / "run") == 0
    assert results(tmp_path / "run", strict_json) == results(whole("default"), strict_json)


@pytest.mark.parametrize("setting", [x for x in SETTINGS if x != "default"])
def test_kill_with_more_state(whole, main, tmp_path, strict_json, monkeypatch, quick, setting):
    arguments = [*quick, *SETTINGS[setting]]
    kill_run(monkeypatch, main, tmp_path, ("save_checkpoint", 3, "after"), arguments)
    assert main("--resume", tmp_path / "run") == 0
    assert results(tmp_path / "run", strict_json) == results(whole(setting), strict_json)


def kill_run(monkeypatch, main, tmp_path, moment, arguments):
    from run_folder import RunFolder

    name, call, when = moment
    original, calls = getattr(RunFolder, name), []

    def killing(self, *args):
        calls.append(args)
        if len(calls) == call and when == "before":
            raise Killed
        original(self, *args)
        if len(calls) == call:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunFolder, name, killing)
        main("--output-dir", tmp_path, "--name", "run", "--epochs", EPOCHS, *arguments)


def test_kill_while_the_checkpoint_is_written_leaves_the_last_one(
    whole, main, quick, tmp_path, strict_json, monkeypatch
):
    import torch

    def torn(state, path):
        if state.get("epoch") == 3:
            path.write_bytes(b"half a checkpoint")
            raise Killed
        save(state, path)

    save = torch.save
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch, "save", torn)
        main("--output-dir", tmp_path, "--name", "run", "--epochs", EPOCHS, *quick)
    assert main("--resume", tmp_path / "run") == 0
    assert results(tmp_path / "run", strict_json) == results(whole("default"), strict_json)


def test_more_epochs_continue_a_finished_run(whole, main, quick, tmp_path, strict_json):
    assert main("--output-dir", tmp_path, "--name", "run", "--epochs", 2, *quick) == 0
    assert main("--resume", tmp_path / "run", "--epochs", EPOCHS) == 0
    assert results(tmp_path / "run", strict_json) == results(whole("default"), strict_json)


@pytest.fixture
def short(main, quick, tmp_path):
    """A finished run of one epoch."""
    assert main("--output-dir", tmp_path, "--name", "run", "--epochs", 1, *quick) == 0
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", 0.5], "the run has --lr"),
        (["--loss-args", "variant=O"], "the run has --loss-args"),
        (["--name", "other"], "leave out --name"),
    ],
)
def test_resume_refuses_what_contradicts_the_run(short, main, capsys, arguments, message):
    assert main("--resume", short, *arguments) == 2
    assert message in capsys.readouterr().err


def test_resume_refuses_fewer_epochs(whole, main, capsys):
    assert main("--resume", whole("default"), "--epochs", 1) == 2
    assert f"--epochs can only be raised from {EPOCHS}, got 1" in capsys.readouterr().err


def test_resume_accepts_what_the_run_has_anyway(short, main):
    assert main("--resume", short, "--dataset", "digits", "--epochs", 1) == 0


def test_resume_with_and_without_chunks(whole, main, quick, tmp_path, strict_json):
    """BatchNorm frozen, chunks change nothing but the memory."""
    arguments = ["--output-dir", tmp_path, "--name", "run", "--epochs", 1, *quick]
    assert main(*arguments, *SETTINGS["proxies"], "--grad-cache", 16) == 0
    assert main("--resume", tmp_path / "run", "--epochs", 2, "--grad-cache", 0) == 0
    assert main("--resume", tmp_path / "run", "--epochs", EPOCHS, "--grad-cache", 7) == 0
    ends = [strict_json(run / "metrics.json") for run in (tmp_path / "run", whole("proxies"))]
    assert ends[0]["trained"] == pytest.approx(ends[1]["trained"], rel=1e-3)
    assert ends[0]["validation"] == pytest.approx(ends[1]["validation"], rel=1e-3)


def test_resume_names_a_damaged_checkpoint(short, main, capsys):
    (short / "checkpoints" / "last.pt").write_bytes(b"garbage")
    assert main("--resume", short) == 2
    assert "cannot read the checkpoint" in capsys.readouterr().err


def test_resume_refuses_another_number_of_processes(short, main, capsys, strict_json):
    import json

    config = strict_json(short / "config.json")
    (short / "config.json").write_text(json.dumps({**config, "world_size": 2}))
    assert main("--resume", short) == 2
    assert "started with 2 processes" in capsys.readouterr().err
