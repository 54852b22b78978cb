"""`train.py` killed at random moments ends as if nobody had touched it."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from damage import same
from kills import Program
from retrieval import commands

from .test_train_resume import results

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
PHASES = {
    "retrieval.training:Training.train": "epoch",
    "retrieval.records:Records.__init__": "records",
    "retrieval.records:Records.save": "records",
    "retrieval.run_folder:RunFolder._save": "checkpoint",
}
IMPORTS = (
    "record_keeper",
    "retrieval.train",
    "tensorboard.compat.proto.event_pb2",
    "tensorboard.summary.writer.record_writer",
    "torch._dynamo",
    "torch.utils.tensorboard.summary",
)


def train(arguments):
    return commands.run("train", arguments, "train.py")


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.kills)])
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(
    quick, tmp_path, monkeypatch, strict_json, curves, kills
):
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*sys.path, root]))
    program = Program(f"{__name__}:train", PHASES, tmp_path, IMPORTS)
    common = [*quick, "--output-dir", tmp_path, "--epochs", 2, "--resume-if-exists", "--name"]
    program.measure([*common, "whole"])
    whole = tmp_path / "whole"

    def check(number):
        run = tmp_path / f"run{number}"
        assert results(run, strict_json) == results(whole, strict_json)
        assert curves(run) == curves(whole)
        for name in ("best.pt", "last.pt"):
            assert same(*(numbers(x / "checkpoints" / name) for x in (run, whole)))
        assert not list(run.rglob("*.tmp"))
        shutil.rmtree(run)

    program.kill(lambda number: [*common, f"run{number}"], kills, 5, check)


def numbers(path):
    """Every number in a checkpoint but for seconds, and for what `results` compares."""
    content = torch.load(path, weights_only=True)
    for name in ("seconds", "records", "config"):
        content.pop(name, None)
    return content
