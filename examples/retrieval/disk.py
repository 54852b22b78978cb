"""Writing files whole or not at all, an error of one line where the disk refuses, and paths."""

import csv
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import UserError

BESIDE = ".tmp"  # ends the name of a file that is not complete


def plain_path(path: str | Path) -> str:
    """A path without `.` and `..`, of what the system finds: it follows a link before a `..`."""
    plain = os.path.normpath(path)
    if ".." in Path(path).parts and os.path.realpath(plain) != os.path.realpath(path):
        return os.path.realpath(path)
    return plain


@contextmanager
def writing(path: Path, database: Path | None = None) -> Iterator[None]:
    """Around everything that writes to `path`, and to an SQLite `database` beside it.

    Raises:
        UserError: Where the system refuses: a full disk, a quota, no permission, read-only.
    """
    try:
        yield
    except (OSError, RuntimeError, sqlite3.Error) as error:
        reason = _reason(error)
        if reason is None:
            raise
        refused = database if isinstance(error, sqlite3.Error) else path
        raise UserError(f"cannot write {refused}: {reason}") from error


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside `path`, then rename: a kill or a power cut leaves the old file or the new one.

    Raises:
        UserError: As `writing`; the file beside it is removed.
    """
    beside = path.with_name(path.name + BESIDE)
    with writing(path):
        try:
            write(beside)
            with beside.open("r+b") as file:  # on the disk before its name is
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


@contextmanager
def new(path: Path) -> Iterator[Path]:
    """Where to write a new file or folder, which comes to `path` whole or not at all.

    Missing folders above it are made.

    Raises:
        UserError: As `writing`, or if there is something at `path`; nothing is left of it.
    """
    missing = [x for x in path.parents if not x.exists()]
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(
                prefix=f"{path.name[:100]}-", suffix=".incomplete", dir=path.parent
            ) as folder:
                part = Path(folder) / path.name
                yield part
                if not part.is_dir():  # a folder that holds anything is not replaced
                    path.touch(exist_ok=False)
                os.replace(part, path)
        except BaseException:
            for x in missing:
                with suppress(OSError):  # another program may have put something there
                    x.rmdir()
            raise


def remove_incomplete(folder: Path) -> None:
    """Remove what `replace` left in `folder` when it was killed."""
    for path in folder.glob("*" + BESIDE):
        with writing(path):
            path.unlink()


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write rows, the first of which is the header; what UTF-8 cannot hold as an escape."""
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file).writerows(rows)


def _reason(error: BaseException | None) -> str | None:
    """What the system said; torch's writer replaces it by an error of its own, which follows it."""
    if isinstance(error, sqlite3.Error):
        return str(error)
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        error = error.__cause__ or error.__context__
    return None
