"""A run's list of its images: a run that continues must have the same ones in the same splits."""

import csv
import functools
import os
import zlib
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .data import RetrievalSplits, Sample
from .errors import UserError
from .processes import say
from .run_folder import CONFIG, RunFolder

FILE = "images.csv"


class Entry(NamedTuple):
    """A line of the list, all of it text.

    Attributes:
        path: From the data root, with `/`, or the name in a zip.
        bytes: Size of the file.
        crc32: Checksum of the file; empty where training was to start without reading all files.
    """

    path: str
    bytes: str
    crc32: str
    label: str
    split: str


class ImageList:
    """The images of a run as they are now."""

    def __init__(self, splits: RetrievalSplits, config: dict[str, Any]):
        self.splits = splits
        self.root = config["data_root"]
        self.with_checksums = not config["skip_verify"]

    @functools.cached_property
    def entries(self) -> list[Entry]:
        """One for each image, in the order of the splits."""
        named = [(x, s) for x in ("train", "val", "test") for s in getattr(self.splits, x).samples]
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            return list(pool.map(self._entry, named))

    def write(self, run: RunFolder) -> None:
        """Write the list to the run's folder."""
        run.write_table(FILE, ("path", "bytes", "crc32", "class", "split"), self.entries)

    def check(self, run: RunFolder, accept_changed_files: bool) -> None:
        """Compare with the list of the run or, if an earlier version made it, with its numbers.

        Args:
            run: The run.
            accept_changed_files: Only warn of files whose content has changed.

        Raises:
            UserError: If an image is gone, new, in another class or split, or has changed.
        """
        before, now = _by_path(_read(run)), _by_path(self.entries)
        differences = _differences(before, now) if before else self._other_numbers(run)
        if differences:
            raise UserError(
                f"the images in {self.root} are not those of the run {run.path}: {differences}; "
                "name the folder that holds the images of the run with --data-root"
            )
        changed = [x for x in before if not _same_content(before[x][0], now[x][0])]
        if changed:
            told = (
                f"of the {len(now)} image files of the run {run.path} {len(changed)} have changed "
                f"since it began, such as {changed[0]}"
            )
            if not accept_changed_files:
                raise UserError(f"{told}; --accept-changed-files continues with them")
            say(f"warning: {told}")

    def _entry(self, named: tuple[str, Sample]) -> Entry:
        split, sample = named
        path, source = sample.name, sample.source
        if isinstance(source, Path):
            path = Path(os.path.relpath(path, self.root)).as_posix()
            size = source.stat().st_size
            content = source.read_bytes() if self.with_checksums else b""
        else:
            content = source.tobytes() if isinstance(source, np.ndarray) else source
            size = len(content)
        checksum = f"{zlib.crc32(content):08x}" if self.with_checksums else ""
        return Entry(_utf8(path), str(size), checksum, _utf8(sample.label), split)

    def _other_numbers(self, run: RunFolder) -> str:
        before, now = run.read_json(CONFIG)["data"], self.splits.summary()
        return "" if before == now else f"were {before}, are {now}"


def _differences(before: dict[str, list[Entry]], now: dict[str, list[Entry]]) -> str:
    """What is gone, new, or elsewhere, with an example of each."""
    gone = [x for x in before if x not in now]
    new = [x for x in now if x not in before]
    moved = [x for x in before if x in now and _places(before[x]) != _places(now[x])]
    parts = []
    if gone:
        parts.append(f"{len(gone)} are gone, such as {gone[0]}")
    if new:
        parts.append(f"{len(new)} are new, such as {new[0]}")
    if moved:
        was, is_ = (" and ".join(_places(x[moved[0]])) for x in (before, now))
        parts.append(
            f"{len(moved)} are in another class or split, such as {moved[0]}, which was in {was} "
            f"and is in {is_}"
        )
    return ", ".join(parts)


def _places(entries: list[Entry]) -> list[str]:
    return sorted(f"{x.split} (class {x.label})" for x in entries)


def _same_content(before: Entry, now: Entry) -> bool:
    both_read = before.crc32 and now.crc32
    return before.bytes == now.bytes and (not both_read or before.crc32 == now.crc32)


def _by_path(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """The entries of each file, which is in several classes where turned copies are classes."""
    by_path = defaultdict(list)
    for x in entries:
        by_path[x.path].append(x)
    return dict(by_path)


def _read(run: RunFolder) -> list[Entry]:
    try:
        with (run.path / FILE).open(newline="", encoding="utf-8") as file:
            return [Entry(*row) for row in list(csv.reader(file))[1:]]
    except FileNotFoundError:  # an earlier version made the run
        return []
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"cannot read {run.path / FILE}: {error}") from error


def _utf8(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()
