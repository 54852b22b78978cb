"""The curves of a run: what is recorded as CSV, SQLite and for TensorBoard, and under which names.

Only what varies is recorded; the settings are in config.json. The names are the same for one
process and many, and with and without a memory, so that the curves of several runs line up.
"""

import csv
import os
import socket
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.testers import BaseTester
from pytorch_metric_learning.trainers import BaseTrainer
from pytorch_metric_learning.utils import logging_presets

from .data import RetrievalSplits
from .disk import writing
from .errors import UserError
from .metrics import PRIMARY_METRIC
from .processes import unwrap
from .run_folder import RunFolder

STEP = "~iteration~"  # record-keeper's name for the step column
DATABASE = "logs.db"
EPOCH = "epoch"  # a column of what is recorded once per epoch


class Records:
    """PML's hooks for one run: they record, evaluate and tell when to stop."""

    def __init__(self, run: RunFolder, tester: BaseTester, files: dict[str, torch.Tensor]):
        """Continue the records of a run from the `files` of its checkpoint."""
        self.run = run
        self.tester = tester
        with writing(run.logs):
            restore(run.logs, files)
        self.curves = Curves(run.tensorboard)
        with writing(run.logs, run.logs / DATABASE):
            replay(run.logs, self.curves)
            self.keeper, _, _ = logging_presets.get_record_keeper(str(run.logs))
        self.keeper.tensorboard_writer = self.curves
        self.keeper.save_records = self.save
        self.hooks = logging_presets.HookContainer(
            self.keeper,
            primary_metric=PRIMARY_METRIC,
            save_models=False,  # one atomic checkpoint instead of a file per object
        )
        tester.end_of_testing_hook = self.hooks.end_of_testing_hook

    def add(self, trainer: BaseTrainer) -> None:
        """Record an iteration, if it is its turn."""
        if trainer.is_recorded:
            for group, values in varying(trainer).items():
                self.keeper.update_records(
                    values, trainer.get_global_iteration(), parent_name=group
                )

    def evaluation(self, splits: RetrievalSplits, patience: int) -> Callable[[BaseTrainer], bool]:
        """A function that evaluates at the end of an epoch and returns whether to go on."""
        with writing(self.run.checkpoints):
            return self.hooks.end_of_epoch_hook(
                self.tester,
                {"val": splits.val},
                str(self.run.checkpoints),  # made by the hook, which saves nothing there
                patience=patience,
            )

    def best_epoch(self) -> int:
        """The epoch with the best validation so far."""
        return self.hooks.get_best_epoch_and_accuracy(self.tester, "val")[0]

    def files(self) -> dict[str, torch.Tensor]:
        """The files as they are, for a checkpoint."""
        return {
            path.name: torch.from_numpy(np.fromfile(path, np.uint8))
            for path in sorted(self.run.logs.iterdir())
            if path.suffix == ".csv" or path.name == DATABASE
        }

    def close(self) -> None:
        """Finish the files."""
        self.curves.close()

    def save(self) -> None:
        """Write the records; as record-keeper does, but table by table: an error names the file."""
        writer = self.keeper.record_writer
        for name, record in writer.records.items():
            writer.records = {name: record}
            with writing(self.run.logs / f"{name}.csv", self.run.logs / DATABASE):
                writer.save_records()


class Curves:
    """TensorBoard's scalars, each written at once, so that an error is told where it happens."""

    def __init__(self, folder: Path):
        """Begin a new file in `folder`, in the place of earlier ones, which cannot be cut."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.make_event = Event
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self.path = folder / name
        with writing(self.path):
            folder.mkdir(exist_ok=True)
            for earlier in folder.glob("events.*"):
                earlier.unlink()
            self.file = self.path.open("wb")
            self.writer = RecordWriter(self.file)
        self._write(file_version="brain.Event:2")

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Write one point; the number of the epoch is no curve."""
        from torch.utils.tensorboard.summary import scalar

        if not tag.endswith(f"/{EPOCH}"):
            self._write(summary=scalar(tag, value), step=step)

    def close(self) -> None:
        """Finish the file."""
        with writing(self.path):
            self.file.close()

    def _write(self, **content: Any) -> None:
        with writing(self.path):
            self.writer.write(self.make_event(wall_time=time.time(), **content).SerializeToString())
            self.writer.flush()


def varying(trainer: BaseTrainer) -> dict[str, dict[str, float]]:
    """What changes from iteration to iteration, by group: loss, its statistics, learning rates."""
    groups = {
        "loss_histories": {"total_loss": trainer.batch_loss},
        "metric_loss": {k: v for x in trainer.counting for k, v in statistics(x).items()},
        **{k: statistics(innermost(x)) for k, x in trainer.mining_funcs.items()},
    }
    if trainer.lr_schedulers:
        groups["learning_rates"] = {
            name.removesuffix("_optimizer"): optimizer.param_groups[0]["lr"]
            for name, optimizer in trainer.optimizers.items()
        }
    return {name: values for name, values in groups.items() if values}


def innermost(miner: torch.nn.Module) -> torch.nn.Module:
    """The miner inside the wrappers of processes."""
    miner = unwrap(miner)
    inside = getattr(miner, "miner", None)
    return innermost(inside) if isinstance(inside, torch.nn.Module) else miner


def statistics(module: torch.nn.Module) -> dict[str, float]:
    """What a loss or miner with `collect_stats=True` counted in its last batch."""
    return {name: getattr(module, name) for name in getattr(module, "_record_these_stats", [])}


# --- the files of record-keeper -------------------------------------------------------------


def restore(logs: Path, files: dict[str, torch.Tensor]) -> None:
    """Write what `Records.files` returned.

    What was recorded since will be recorded again, and what was damaged since counts for nothing.
    """
    logs.mkdir(exist_ok=True)
    # A journal that a kill left would be applied to the database.
    for path in [*logs.glob("*.csv"), *logs.glob(f"{DATABASE}*")]:
        path.unlink()
    for name, content in files.items():
        (logs / name).write_bytes(content.numpy().tobytes())


def replay(logs: Path, curves: Curves) -> None:
    """Write the records to a new TensorBoard file."""
    if not (logs / DATABASE).is_file():
        return
    connection = sqlite3.connect(logs / DATABASE)
    for name, columns in _tables(logs):
        for row in connection.execute(f"SELECT * FROM [{name}]"):
            values = dict(zip(columns, row, strict=True))
            for series in set(columns) - {"id", STEP}:
                if isinstance(values[series], int | float):
                    curves.add_scalar(f"{name}/{series}", values[series], values[STEP])
    connection.close()


def read(logs: Path, files: str, column: str) -> list[tuple[int, float]]:
    """Steps and values of a column in the first of the CSVs that has it.

    Args:
        logs: Their folder.
        files: A pattern of file names without the suffix.
        column: Its name.

    Raises:
        UserError: If what stands there is no number.
    """
    for path in sorted(logs.glob(f"{files}.csv")):
        header: list[str] = []  # a new one may stand anywhere
        values = []
        with path.open(newline="", errors="replace") as file:
            rows = csv.reader(file)
            for row in rows:
                if row and row[0] == STEP:
                    header = row
                elif column in header and len(row) == len(header):  # not cut off by a full disk
                    step, value = row[0], row[header.index(column)]
                    try:
                        values.append((int(step), float(value)))
                    except ValueError as error:
                        raise UserError(
                            f"{path}, line {rows.line_num}: expected numbers for {STEP} and "
                            f"{column}, got {step!r} and {value!r}; train --resume writes the "
                            "curves again"
                        ) from error
        if values:
            return values
    return []


def _tables(logs: Path) -> list[tuple[str, list[str]]]:
    connection = sqlite3.connect(logs / DATABASE)
    names = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    tables = [
        (name, [column[1] for column in connection.execute(f"PRAGMA table_info([{name}])")])
        for (name,) in names
        if not name.startswith("sqlite_")
    ]
    connection.close()
    return tables
