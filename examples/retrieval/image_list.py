"""A run's list of its images: a run that continues must have the same ones in the same splits."""

import csv
import functools
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .data import RetrievalSplits, Sample
from .disk import plain_path
from .errors import UserError
from .processes import say
from .run_folder import RunFolder

FILE = "images.csv"
OTHER_ROOT = "name the folder of the run's images, of a csv the table, with --data-root"
Key = tuple[str, str]  # path and class; turned copies of a file are in other classes


class Entry(NamedTuple):
    """What is listed of an image, all of it text; without a look at every image no checksum.

    The split of an image that is only a query, or only in the gallery, says so.
    """

    split: str
    bytes: str
    crc32: str

    def has_content_of(self, other: "Entry") -> bool:
        """Whether the files are the same, as far as is known."""
        unknown = not (self.crc32 and other.crc32)
        return self.bytes == other.bytes and (unknown or self.crc32 == other.crc32)

    def filled_by(self, earlier: "Entry | None") -> "Entry":
        """This one, with the checksum of an earlier one if it has none and the size is the same."""
        if self.crc32 or earlier is None or self.bytes != earlier.bytes:
            return self
        return self._replace(crc32=earlier.crc32)


HEADER = ["path", "class", *Entry._fields]


class ImageList:
    """The images of a run as they are now."""

    def __init__(self, splits: RetrievalSplits, config: dict[str, Any]):
        self.splits = splits
        self.root = config["data_root"]
        is_table = self.root is not None and os.path.isfile(self.root)
        self.folder = plain_path(os.path.dirname(self.root)) if is_table else self.root
        self.with_checksums = not config["skip_verify"]

    def read(self) -> None:
        """Look at every image, once."""
        _ = self.entries

    @functools.cached_property
    def entries(self) -> dict[Key, Entry]:
        """Each image, in the order of the splits.

        Paths begin in the zip, at the data root or, where that is a table, at its folder.

        Raises:
            UserError: If a file is gone or cannot be read.
        """
        named = [(x, s) for x in ("train", "val", "test") for s in getattr(self.splits, x).samples]
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            return dict(pool.map(self._entry, named))

    def write(self, run: RunFolder) -> None:
        """Write the list to the run's folder; what is not known now stays as it was."""
        before = read(run)
        rows = ([*key, *entry.filled_by(before.get(key))] for key, entry in self.entries.items())
        run.write_table(FILE, HEADER, rows)

    def check(self, run: RunFolder, accept_changed_files: bool) -> None:
        """Compare with the list of the run or, if an earlier version made it, with its numbers.

        Args:
            run: The run.
            accept_changed_files: Only warn of files whose content has changed.

        Raises:
            UserError: If an image is gone, new, in another class or split, or has changed.
        """
        before, now = read(run), self.entries
        if not before:
            self._check_numbers(run)
            return
        both = [x for x in before if x in now]
        moved = [x for x in both if before[x].split != now[x].split]
        differences = [
            f"{what}: {len(images)}, such as {images[0][0]}"
            for what, images in (
                ("gone", [x for x in before if x not in now]),
                ("new", [x for x in now if x not in before]),
                ("in another split", moved),
            )
            if images
        ]
        if moved:
            differences[-1] += f" ({before[moved[0]].split} then, {now[moved[0]].split} now)"
        if differences:
            raise UserError(
                f"the images in {self.root} are not those of the run {run.path} "
                f"({'; '.join(differences)}); {OTHER_ROOT}"
            )
        changed = [x for x in both if not now[x].has_content_of(before[x])]
        if changed:
            told = (
                f"images that changed since the run {run.path} began: {len(changed)} of "
                f"{len(now)}, such as {changed[0][0]}"
            )
            if not accept_changed_files:
                raise UserError(f"{told}; --accept-changed-files continues with them")
            say(f"warning: {told}")

    def _check_numbers(self, run: RunFolder) -> None:
        before, now = run.read_config()["data"], self.splits.summary()
        if before != now:
            raise UserError(
                f"the images in {self.root} are not those of the run {run.path}: were {before}, "
                f"are {now}; {OTHER_ROOT}"
            )

    def _entry(self, named: tuple[str, Sample]) -> tuple[Key, Entry]:
        split, sample = named
        if not (sample.query and sample.gallery):
            split += ", query" if sample.query else ", gallery"
        path, source = sample.name, sample.source
        if isinstance(source, Path):
            box = path.removeprefix(str(source)) if sample.box else ""
            path = Path(os.path.relpath(source, self.folder)).as_posix() + box
            try:
                size = source.stat().st_size
                content = source.read_bytes() if self.with_checksums else b""
            except OSError as error:
                raise UserError(f"cannot read the image {source}: {error.strerror}") from error
        else:
            content = source.tobytes() if isinstance(source, np.ndarray) else source
            size = len(content)
        checksum = f"{zlib.crc32(content):08x}" if self.with_checksums else ""
        return (_utf8(path), _utf8(sample.label)), Entry(split, str(size), checksum)


def read(run: RunFolder) -> dict[Key, Entry]:
    """The list of a run; empty if an earlier version made the run, which wrote none."""
    try:
        with (run.path / FILE).open(newline="", encoding="utf-8") as file:
            header, *rows = [*csv.reader(file)] or [[]]
            if header != HEADER or not rows:  # no list of earlier versions
                raise ValueError(f"expected {','.join(HEADER)} and a line for each image")
            return {(path, label): Entry(*rest) for path, label, *rest in rows}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"cannot read {run.path / FILE}: {error}") from error


def are_same(one: dict[Key, Entry], other: dict[Key, Entry]) -> bool:
    """Whether two lists name the same images with, as far as is known, the same content."""
    return one.keys() == other.keys() and all(
        x.has_content_of(other[key]) for key, x in one.items()
    )


def fingerprint(images: dict[Key, Entry]) -> str | None:
    """The number of images and a checksum of their paths, classes and sizes; None of no list."""
    rows = sorted((*key, entry.bytes) for key, entry in images.items())
    return f"{len(rows)} ({zlib.crc32(repr(rows).encode()):08x})" if rows else None


def _utf8(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()
