"""Which files below a folder are images of which class; what is left out, and why."""

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

IGNORED_FOLDERS = ("__MACOSX", "__pycache__")


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A file, folder or class that is not used."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Found:
    """An image file and its class: the names of the first folders below the root."""

    path: Path
    label: str
    depth: int


def read_trees(roots: Sequence[Path], levels: int, skipped: list[Skipped]) -> list[list[Found]]:
    """The images below each root; no file counts twice, in one tree or in two.

    Links are followed after everything that is there itself, so that a link never takes the place
    of what it leads to. Hidden folders are left out.
    """
    walk = _Walk(roots, levels, skipped)
    return [sorted(x, key=lambda found: found.path) for x in walk.found]


def warnings_of(trees: Sequence[Sequence[Found]], levels: int) -> list[str]:
    """What suggests that the folders are not the classes that were meant."""
    lines = []
    images = [x for tree in trees for x in tree]
    deep = [x for x in images if x.depth > levels]
    if deep:
        lines.append(
            f"warning: {len(deep)} images lie in folders inside a class folder, for instance "
            f"{deep[0].path}, which counts for the class {deep[0].label}; is the data root one "
            "level too high?"
        )
    spelt: dict[str, set[str]] = {}
    for x in images:
        spelt.setdefault(x.label.casefold(), set()).add(x.label)
    alike = [" and ".join(sorted(names)) for names in spelt.values() if len(names) > 1]
    if alike:
        lines.append(f"warning: class names that differ in case alone: {', '.join(alike[:5])}")
    return lines


class _Walk:
    def __init__(self, roots: Sequence[Path], levels: int, skipped: list[Skipped]):
        self.roots = roots
        self.levels = levels
        self.skipped = skipped
        self.found: list[list[Found]] = [[] for _ in roots]
        self.seen: dict[tuple[int, int], Path] = {}
        self.class_folders: list[tuple[int, Path, str]] = []
        self.links: list[tuple[int, Path]] = []
        for i, root in enumerate(roots):
            if self._is_new(root):
                self._folder(i, root)
        while self.links:
            links, self.links = self.links, []
            for i, path in links:
                self._link(i, path)
        used = [{x.label for x in tree} for tree in self.found]
        for i, path, label in self.class_folders:
            if label not in used[i]:
                self._skip(path, "a class folder without an image that can be used")

    def _folder(self, i: int, folder: Path) -> None:
        parts = folder.relative_to(self.roots[i]).parts
        if len(parts) == self.levels:
            self.class_folders.append((i, folder, "/".join(parts)))
        try:
            entries = sorted(folder.iterdir())
        except OSError as error:
            self._skip(folder, f"a folder that cannot be read: {error.strerror}")
            return
        for path in entries:
            if path.is_symlink():
                self.links.append((i, path))
            elif path.is_dir():
                self._subfolder(i, path)
            else:
                self._file(i, path)

    def _link(self, i: int, path: Path) -> None:
        if not path.exists():
            self._skip(path, "a link that leads nowhere")
        elif path.is_dir():
            target = path.resolve()
            if any(root.resolve().is_relative_to(target) for root in self.roots):
                self._skip(path, f"a link back to a folder above: {target}")
            else:
                self._subfolder(i, path)
        else:
            self._file(i, path)

    def _subfolder(self, i: int, path: Path) -> None:
        if path.name.startswith(".") or path.name in IGNORED_FOLDERS:
            self._skip(path, "a hidden folder")
        elif self._is_new(path):
            self._folder(i, path)

    def _file(self, i: int, path: Path) -> None:
        parts = path.relative_to(self.roots[i]).parts[:-1]
        if path.name.startswith("."):
            self._skip(path, "a hidden file")
        elif not is_image_name(path.name):
            self._skip(path, f"not a format that Pillow opens ({path.suffix or 'no suffix'})")
        elif len(parts) < self.levels:
            self._skip(path, "an image outside the class folders")
        elif self._is_new(path):
            label = "/".join(parts[: self.levels])
            self.found[i].append(Found(path, label, len(parts)))

    def _is_new(self, path: Path) -> bool:
        """Whether this file or folder was not met before, under this name or another."""
        status = os.stat(path)
        first = self.seen.setdefault((status.st_dev, status.st_ino), path)
        if first != path:
            self._skip(path, f"the same as another: {first}")
        return first == path

    def _skip(self, path: Path, reason: str) -> None:
        self.skipped.append(Skipped(str(path), reason))


def is_image_name(name: str) -> bool:
    """Whether Pillow has a reader for files of this suffix."""
    return Image.registered_extensions().get(Path(name).suffix.lower()) in Image.OPEN


def summary(skipped: Sequence[Skipped]) -> list[str]:
    """How many were skipped for each kind of reason, for the screen."""
    kinds = Counter(x.reason.partition(":")[0] for x in skipped)
    return [f"  {count} x {kind}" for kind, count in kinds.most_common()]
