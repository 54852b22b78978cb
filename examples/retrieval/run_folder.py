"""A run's folder: its name, its files, and what makes a killed run continue."""

import csv
import json
import math
import os
import random
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.trainers import BaseTrainer

from .errors import UserError
from .processes import unwrap

STEP = "~iteration~"  # record-keeper's name for the step column


class RunFolder:
    """The paths and files of one run."""

    def __init__(self, path: Path):
        self.path = path
        self.logs = path / "logs"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"

    @classmethod
    def create(cls, parent: Path, name: str | None, stem: str) -> "RunFolder":
        """Make a new folder: `name`, or the first free one of `stem-1`, `stem-2`, ...

        Raises:
            UserError: If `name` is taken or no folder can be made.
        """
        number = 1
        while True:
            path = parent / (name or f"{stem}-{number}")
            try:
                path.mkdir(parents=True)
                return cls(path)
            except FileExistsError as error:
                if name:
                    raise UserError(
                        f"{path} exists; take another --name, or continue it with --resume {path}"
                    ) from error
                number += 1
            except OSError as error:
                raise UserError(f"cannot make the run folder {path}: {error}") from error

    @classmethod
    def existing(cls, path: str, asked_by: str = "--resume") -> "RunFolder":
        """The folder of an earlier run.

        Raises:
            UserError: If there is none.
        """
        run = cls(Path(path))
        if not (run.path / "config.json").is_file():
            raise UserError(f"{asked_by}: no run in {path}: it holds no config.json")
        return run

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write strict JSON, whole or not at all."""
        text = json.dumps(content, indent=2, allow_nan=False)
        _replace(self.path / name, lambda path: path.write_text(text + "\n"))

    def write_table(self, name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Write a CSV, whole or not at all."""
        _replace(self.path / name, lambda path: _write_csv(path, [header, *rows]))

    def write_text(self, name: str, text: str) -> None:
        """Write a text, whole or not at all; what cannot be encoded is written as an escape."""
        _replace(
            self.path / name,
            lambda path: path.write_text(text, encoding="utf-8", errors="backslashreplace"),
        )

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The content of a JSON file of this run, None if it is not there."""
        path = self.path / name
        try:
            return json.loads(path.read_text()) if path.is_file() else None
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}") from error

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write `last.pt`, which holds everything, and then `best.pt`, a copy of its best part."""
        self.checkpoints.mkdir(exist_ok=True)
        _replace(self.checkpoints / "last.pt", lambda path: torch.save(state, path))
        if state["best"] and state["best"]["epoch"] == state["epoch"]:
            _replace(self.checkpoints / "best.pt", lambda path: torch.save(state["best"], path))

    def load_checkpoint(self, name: str = "last.pt") -> dict[str, Any] | None:
        """What `save_checkpoint` wrote last, None before the first time."""
        path = self.checkpoints / name
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        except Exception as error:  # a damaged file fails in many ways
            raise UserError(f"cannot read the checkpoint {path}: {error}") from error

    def cut_records(self, epoch: int, iterations_per_epoch: int) -> None:
        """Remove what was recorded after `epoch` ended, since it will be recorded again."""

        def last_step(columns: list[str]) -> int:
            # Accuracies are recorded once per epoch, the rest by iterations counted from 0.
            return epoch if "epoch" in columns else epoch * iterations_per_epoch - 1

        for path in self.logs.glob("*.csv"):
            rows = _rows_up_to(last_step, path)
            _replace(path, lambda new, rows=rows: _write_csv(new, rows))
        if (self.logs / "logs.db").is_file():
            for name, columns in _tables(self.logs):
                with sqlite3.connect(self.logs / "logs.db") as connection:
                    connection.execute(
                        f"DELETE FROM [{name}] WHERE [{STEP}] > ?", (last_step(columns),)
                    )
                connection.close()

    def records(self, files: str, column: str) -> list[tuple[int, float]]:
        """Steps and values of a column in the first of the logs' CSVs that has it.

        Args:
            files: A pattern of file names without the suffix.
            column: Its name.
        """
        for path in sorted(self.logs.glob(f"{files}.csv")):
            values = [
                (int(row[STEP]), float(row[column]))
                for row in _as_dicts(_rows_up_to(lambda _: math.inf, path))
                if column in row
            ]
            if values:
                return values
        return []

    def replay_records(self, writer: Any) -> None:
        """Write the records to a new TensorBoard file; the old ones cannot be cut."""
        if not (self.logs / "logs.db").is_file():
            return
        connection = sqlite3.connect(self.logs / "logs.db")
        for name, columns in _tables(self.logs):
            for row in connection.execute(f"SELECT * FROM [{name}]"):
                values = dict(zip(columns, row, strict=True))
                for series in set(columns) - {"id", STEP}:
                    if isinstance(values[series], int | float):
                        writer.add_scalar(f"{name}/{series}", values[series], values[STEP])
        connection.close()


def _replace(path: Path, write: Any) -> None:
    """Write beside `path`, then rename: a kill leaves the old file or the new one."""
    beside = path.with_name(path.name + ".tmp")
    write(beside)
    os.replace(beside, path)


def _rows_up_to(last_step: Any, path: Path) -> list[list[str]]:
    """Rows of a record-keeper CSV, in which a new header may stand anywhere."""
    kept: list[list[str]] = []
    header: list[str] = []
    with path.open(newline="") as file:
        for row in csv.reader(file):
            if row and row[0] == STEP:
                header = row
                kept.append(row)
            elif row and len(row) == len(header) and int(row[0]) <= last_step(header):
                kept.append(row)
    return kept


def _as_dicts(rows: Iterable[list[str]]) -> Iterator[dict[str, str]]:
    header: list[str] = []
    for row in rows:
        if row[0] == STEP:
            header = row
        else:
            yield dict(zip(header, row, strict=True))


def _write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def _tables(logs: Path) -> list[tuple[str, list[str]]]:
    connection = sqlite3.connect(logs / "logs.db")
    names = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    tables = [
        (name, [column[1] for column in connection.execute(f"PRAGMA table_info([{name}])")])
        for (name,) in names
        if not name.startswith("sqlite_")
    ]
    connection.close()
    return tables


# --- the state of a trainer -----------------------------------------------------------------


def shared_state(trainer: BaseTrainer) -> dict[str, Any]:
    """What is the same in every process."""
    return {
        "models": {k: unwrap(v).state_dict() for k, v in trainer.models.items()},
        "averages": {k: v.state_dict() for k, v in trainer.averages.items()},
        "optimizers": {k: v.state_dict() for k, v in trainer.optimizers.items()},
        "scaler": trainer.scaler.state_dict(),
    }


def own_state(trainer: BaseTrainer) -> dict[str, Any]:
    """What each process has for itself."""
    return {
        "loss": unwrap(trainer.loss_funcs["metric_loss"]).state_dict(),
        # MPerClassSampler shuffles its labels in place, each time from where it left them.
        "sampler": [int(x) for x in trainer.sampler.labels],
        "random": _random_state(trainer.data_device),
    }


def restore(trainer: BaseTrainer, shared: dict[str, Any], own: dict[str, Any]) -> None:
    """Put both states back; the random state comes last, right before training goes on."""
    for name, model in trainer.models.items():
        unwrap(model).load_state_dict(shared["models"][name])
    for name, average in trainer.averages.items():
        average.load_state_dict(shared["averages"][name])
    for name, optimizer in trainer.optimizers.items():
        optimizer.load_state_dict(shared["optimizers"][name])
    trainer.scaler.load_state_dict(shared["scaler"])
    unwrap(trainer.loss_funcs["metric_loss"]).load_state_dict(own["loss"])
    trainer.sampler.labels[:] = own["sampler"]
    _set_random_state(own["random"], trainer.data_device)


def _random_state(device: torch.device) -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        # As a tensor, so that the checkpoint loads without unpickling arbitrary objects.
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
