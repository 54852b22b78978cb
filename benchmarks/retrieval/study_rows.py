"""The rows of the study: a CSV file for each data set, one line for each run, added as it ends.

They are all that a later session needs to carry on: what has a row is not run again, and the trials
of the tuning are made of them where the SQLite file is missing.
"""

import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from fitting import Outcome
from study_data import DataSet

sys.path.insert(0, str(Path(__file__).parents[1]))
import pages  # noqa: E402
from rows import add as add  # noqa: E402
from rows import processor  # noqa: E402

RESULTS = Path(__file__).parents[1] / "results" / "retrieval_study"
PACKAGES = ("torch", "pytorch-metric-learning", "optuna")
# What tells one run from another; the other columns are what came of it and where.
KEY = ("stage", "loss", "setting", "seed")
Row = dict[str, str]


def path_of(dataset: str, folder: Path = RESULTS) -> Path:
    """Where the rows of a data set are."""
    return folder / f"{dataset}.csv"


def read(path: Path) -> list[Row]:
    """All rows of a file; none if it is not there. A line cut short by a kill is left out."""
    if not path.exists():
        return []
    rows = pages.read([path], dtype=str, keep_default_na=False)
    return rows.dropna().to_dict("records")  # a line with fewer cells is not a row


def done(rows: Iterable[Row]) -> set[tuple[str, ...]]:
    """The keys of all runs that have a row."""
    return {tuple(str(row[k]) for k in KEY) for row in rows}


def row_of(
    data: DataSet,
    stage: str,
    loss: str,
    setting: str,
    seed: int,
    measured_on: str,
    parameters: dict[str, Any],
    outcome: Outcome,
    device: torch.device,
) -> dict[str, Any]:
    """The row of a run that just ended, on this machine; the arguments are its columns.

    `setting` is the number of a trial, or what a probe changes; `parameters` are the candidate's.
    """
    return {
        "dataset": data.name,
        "stage": stage,
        "loss": loss,
        "setting": setting,
        "seed": seed,
        "measured_on": measured_on,
        **{k: f"{v:.6f}" for k, v in outcome.metrics.items()},
        "parameters": json.dumps(parameters, sort_keys=True),
        "steps": data.steps,
        "batch_size": data.classes_per_batch * data.examples_per_class,
        "train_seconds": f"{outcome.train_seconds:.2f}",
        "evaluation_seconds": f"{outcome.evaluation_seconds:.2f}",
        **here(device),
    }


def here(device: torch.device) -> dict[str, str]:
    """Machine, versions, date and command of a row."""
    script = Path(sys.argv[0])
    root = Path(__file__).parents[2]
    name = script.resolve().relative_to(root) if root in script.resolve().parents else script.name
    return {
        "machine": f"{processor()}, {os.cpu_count()} cores{_accelerator(device)}",
        "python": platform.python_version(),
        **{p: metadata.version(p) for p in PACKAGES},
        "pml_pnp": metadata.version("pml_pnp"),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", str(name), *sys.argv[1:]]),
    }


def _accelerator(device: torch.device) -> str:
    return f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
