"""A run's folder: its name, its files, its lock, and what makes a killed run continue."""

import errno
import json
import os
import random
import socket
import textwrap
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from pytorch_metric_learning.trainers import BaseTrainer

from pml_pnp.benchmarker.checkpoints import load_checked

from .disk import BESIDE, remove_incomplete, replace, write_csv, writing
from .errors import UserError
from .processes import say, unwrap

CONFIG = "config.json"
METRICS = "metrics.json"  # of a run that has ended
CHECKSUM = "crc32"  # of a JSON file's other content, in its first line
LAST = "last.pt"
PREVIOUS = "previous.pt"
BEST = "best.pt"
LOCK = "lock"
LOG = "log.txt"
MENDED_BY = "move it elsewhere, and --resume writes it again if a checkpoint holds it"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunFolder:
    """The paths and files of one run."""

    def __init__(self, path: Path):
        self.path = path
        self.logs = path / "logs"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.log = path / LOG
        self.last_is_whole = False  # as far as is known

    @classmethod
    def create(
        cls, parent: Path, name: str | None, stem: str, may_exist: bool = False
    ) -> "RunFolder":
        """Make a new folder: `name`, or the first free one of `stem-1`, `stem-2`, ...

        Args:
            parent: Where to make it.
            name: Its name, or None.
            stem: What its name begins with if there is no `name`.
            may_exist: Take a folder that a run made before it was killed, and did not fill.

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
                if name and may_exist and is_unfilled(path):
                    return cls(path)
                if name:
                    raise UserError(taken(path)) from error
                number += 1
            except OSError as error:
                raise UserError(f"cannot make the run folder {path}: {error}") from error

    @staticmethod
    def is_at(path: Path) -> bool:
        """Whether there is a run, which can be continued."""
        checkpoints = (RunFolder(path).checkpoints / x for x in (LAST, PREVIOUS))
        return any(x.is_file() for x in (path / CONFIG, *checkpoints))

    @classmethod
    def existing(cls, path: str) -> "RunFolder":
        """The folder of an earlier run.

        Raises:
            UserError: If there is none.
        """
        run = cls(Path(path))
        if not cls.is_at(run.path):
            below = sorted(run.path.glob(f"*/{CONFIG}"))
            hint = f"; there is a run in {below[0].parent}" if below else ""
            raise UserError(f"no run in {path}: it holds no {CONFIG}{hint}")
        return run

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write strict JSON with its checksum, whole or not at all."""
        content = {CHECKSUM: _checksum(content), **content}
        text = json.dumps(content, indent=2, allow_nan=False)
        replace(self.path / name, lambda path: path.write_text(text + "\n"))

    def write_table(self, name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Write a CSV, whole or not at all."""
        replace(self.path / name, lambda path: write_csv(path, [header, *rows]))

    def write_arrays(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Write numpy arrays to an npz, whole or not at all."""
        with writing(self.path / name):
            (self.path / name).parent.mkdir(exist_ok=True)
        replace(self.path / name, lambda path: _write_arrays(path, arrays))

    def write_text(self, name: str, text: str) -> None:
        """Write a text, whole or not at all; what cannot be encoded is written as an escape."""
        replace(
            self.path / name,
            lambda path: path.write_text(text, encoding="utf-8", errors="backslashreplace"),
        )

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The content of a JSON file of this run, None if it is not there.

        Raises:
            UserError: If it cannot be read, or does not have the checksum that is in it.
        """
        path = self.path / name
        try:
            content = json.loads(path.read_text()) if path.is_file() else None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"cannot read {path}: {error}; {MENDED_BY}") from error
        if not isinstance(content, dict | None):
            raise UserError(f"cannot read {path}: it holds no settings or results; {MENDED_BY}")
        if content and CHECKSUM in content and content.pop(CHECKSUM) != _checksum(content):
            raise UserError(
                f"{path} is not as it was written: if it was changed on purpose, remove its line "
                f'"{CHECKSUM}"; if it was damaged, {MENDED_BY}'
            )
        return content

    def read_config(self) -> dict[str, Any]:
        """The settings, from `config.json` or, if that was removed, from the last checkpoint."""
        config = self.read_json(CONFIG)
        if config is None:
            checkpoint = self.load_checkpoint() or {}
            if "config" not in checkpoint:
                raise UserError(f"{self.path} holds neither {CONFIG} nor a checkpoint with it")
            config = json.loads(checkpoint["config"])
        return config

    def read_metrics(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """The results, None if the run has not ended or is to train for more epochs than it did."""
        metrics = self.read_json(METRICS)
        ended = metrics and (
            metrics["stopped_early"] or metrics["epochs_trained"] >= config["epochs"]
        )
        return metrics if ended else None

    def check_can_continue(self, checkpoint: dict[str, Any] | None) -> None:
        """Raise UserError if it has trained and nothing is left to continue from."""
        left = [x for x in (self.checkpoints / BEST, self.path / METRICS) if x.exists()]
        if checkpoint is None and left:
            raise UserError(
                f"{self.path} has trained, since there is {left[0]}, but {LAST} and {PREVIOUS} are "
                f"gone, from which it would continue: put {LAST} back into {self.checkpoints}, or "
                "start the run anew, under another --name"
            )

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write `last.pt`, which holds everything, and then `best.pt`, a copy of its best part.

        The `last.pt` before it becomes `previous.pt`.
        """
        with writing(self.checkpoints):
            self.checkpoints.mkdir(exist_ok=True)
        self._save(LAST, state)
        self.last_is_whole = True
        if state["best"] and state["best"]["epoch"] == state["epoch"]:
            self.save_best(state)

    def save_best(self, state: dict[str, Any]) -> None:
        """Write `best.pt`."""
        self._save(BEST, state["best"])

    def _save(self, name: str, content: dict[str, Any]) -> None:
        def write(path: Path) -> None:
            with path.open("wb") as file:  # of a file that it opens itself, torch hides the reason
                torch.save(content, file)
            if name == LAST and self.last_is_whole:
                os.replace(self.checkpoints / LAST, self.checkpoints / PREVIOUS)

        replace(self.checkpoints / name, write)

    def remove_incomplete(self) -> None:
        """Remove the files that a kill interrupted; they are of no use and take up space."""
        for folder in (self.path, self.logs, self.checkpoints):
            remove_incomplete(folder)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """What `save_checkpoint` wrote last, None before the first time.

        If that is damaged, the one before.
        """
        try:
            last = self._load(LAST)
            self.last_is_whole = last is not None
        except Damaged as error:
            last = None
            try:
                previous = self._load(PREVIOUS)
            except Damaged:
                previous = None
            if previous is None:
                raise UserError(
                    f"{error}; there is no {PREVIOUS} that can be read: start the run anew, under "
                    "another --name"
                ) from error
            say(f"warning: {error}; {PREVIOUS} is used, of epoch {previous['epoch']}")
        else:
            # A kill came between the renaming of the one and of the other.
            previous = None if last else self._load(PREVIOUS)
        return last or previous

    def load_best(self) -> dict[str, Any] | None:
        """The best epoch and its weights, None if there is no file of it."""
        try:
            return self._load(BEST)
        except Damaged as error:
            checkpoint = self.load_checkpoint()
            if not checkpoint or not checkpoint["best"]:
                raise
            say(f"warning: {error}; what the last checkpoint holds of it is used")
            return checkpoint["best"]

    def _load(self, name: str) -> dict[str, Any] | None:
        path = self.checkpoints / name
        try:
            with path.open("rb") as file:
                return load_checked(file)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from error
        except MemoryError:
            raise
        except Exception as error:  # in many ways, and torch advises to load it all the same
            raise Damaged(
                f"cannot read the checkpoint {path}: it is damaged, or not of this program "
                f"({type(error).__name__})"
            ) from error


class Damaged(UserError):
    """A checkpoint that can be read from the disk and is not what was written."""


def _checksum(content: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content).encode()):08x}"


def is_unfilled(path: Path) -> bool:
    """Whether it is the folder of a run that was killed before it wrote its settings."""
    try:
        return {x.name for x in path.iterdir()} <= {LOCK, LOG, CONFIG + BESIDE}
    except OSError:  # not a folder
        return False


def taken(path: Path) -> str:
    """Why a new run cannot have this folder."""
    if RunFolder.is_at(path):
        return f"{path} exists; take another --name, or continue it with --resume {path}"
    return f"{path} exists and holds no run; take another --name"


class RunLock:
    """Lets one process at a time write to a run's folder; the system lets go if it dies.

    It is not part of `RunFolder`, since each process of `torchrun` has a copy of that.
    """

    def __init__(self):
        self.lock: FileLock | None = None

    def take(self, run: RunFolder) -> None:
        """Lock the folder, and keep in its file which process has it.

        Raises:
            UserError: If another process has it.
        """
        if self.lock is not None:
            return
        path = run.path / LOCK
        # A lock that is only a file would outlive a killed process.
        self.lock = FileLock(path, blocking=False, fallback_to_soft=False)
        try:
            self.lock.acquire()
        except Timeout as error:
            holder = path.read_text(errors="replace").strip() or "another process"
            raise UserError(
                f"{run.path} is in use by {holder}; a run can be continued when that has ended"
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise UserError(f"cannot lock {run.path}: {error.strerror}") from error
            say(
                f"warning: {run.path} cannot be locked on this system; take care that no two "
                "processes continue it at once"
            )
        with writing(path):
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *exception: object) -> None:
        """Let go."""
        if self.lock is not None:
            self.lock.release()


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:  # numpy would add a suffix to a name
        np.savez(file, **arrays)


# --- the state of a trainer -----------------------------------------------------------------


def shared_state(trainer: BaseTrainer) -> dict[str, Any]:
    """What is the same in every process."""
    return {
        "models": {k: unwrap(v).state_dict() for k, v in trainer.models.items()},
        "averages": {k: v.state_dict() for k, v in trainer.averages.items()},
        "optimizers": {k: v.state_dict() for k, v in trainer.optimizers.items()},
        "schedulers": {k: v.state_dict() for k, v in trainer.lr_schedulers.items()},
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
    """Put both states back; the random state comes last, right before training goes on.

    Raises:
        UserError: If they are not of such a trainer.
    """
    try:
        for name, model in trainer.models.items():
            unwrap(model).load_state_dict(shared["models"][name])
        for name, average in trainer.averages.items():
            average.load_state_dict(shared["averages"][name])
        for name, optimizer in trainer.optimizers.items():
            optimizer.load_state_dict(shared["optimizers"][name])
        for name, scheduler in trainer.lr_schedulers.items():
            scheduler.load_state_dict(shared["schedulers"][name])
        trainer.scaler.load_state_dict(shared["scaler"])
        unwrap(trainer.loss_funcs["metric_loss"]).load_state_dict(own["loss"])
    except torch.cuda.OutOfMemoryError:  # a RuntimeError that says nothing of the checkpoint
        raise
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(
            "the checkpoint last.pt does not fit the settings of its run; another version of this "
            f"program, or of torch, may have written it ({misfit(error)})"
        ) from error
    trainer.sampler.labels[:] = own["sampler"]
    _set_random_state(own["random"], trainer.data_device)


def misfit(error: Exception) -> str:
    """Why a state does not fit, in a line, from what was raised when it was loaded."""
    return f"no {error}" if isinstance(error, KeyError) else textwrap.shorten(str(error), 200)


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
