"""Which files below a folder or in a zip are images of which class; what is left out, and why."""

import dataclasses
import os
import stat
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath, PurePosixPath

from PIL import Image

from .errors import UserError
from .run_folder import CONFIG, LOG

# What systems and network drives keep beside the user's folders, in lower case.
IGNORED_FOLDERS = (
    "__macosx",
    "__pycache__",
    "@eadir",
    "#recycle",
    "#snapshot",
    "@recycle",
    "@recently-snapshot",
    "$recycle.bin",
    "recycler",
    "system volume information",
    "lost+found",
)
HIDDEN_FOLDER = "a hidden folder"
RUNS = "a folder of this program's runs"
NO_FILE = "a pipe, socket or device"
# What a zip may hold, unpacked: images hardly shrink in it, what is made to fill a memory does.
ALWAYS_HELD = 2**30  # bytes
TIMES_THE_ZIP = 100
NO_FORMAT = "not a format that Pillow opens"
WITHOUT_IMAGE = "a class folder without an image that can be used"
SAME_AS = "the same as another: {}"


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A file, folder or class that is not used."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Found:
    """An image file and its class: the names of the first folders below the root.

    A file of a zip comes with its content: an open zip cannot be shared with loader processes.
    """

    path: PurePath
    label: str
    depth: int
    content: bytes | None = None


def read_trees(roots: Sequence[Path], levels: int, skipped: list[Skipped]) -> list[list[Found]]:
    """The images below each root; no file counts twice, in one tree or in two.

    Links are followed after everything that is there itself, so that a link never takes the place
    of what it leads to. Hidden folders are left out.
    """
    walk = _Walk(roots, levels, skipped)
    return [sorted(x, key=lambda found: found.path) for x in walk.found]


def read_zip(
    file: Path, levels: int, skipped: list[Skipped], top: str | None = None
) -> list[Found]:
    """The images in a zip, by the rules of `read_trees`.

    Of several members of one name the last counts, which is the one that unpacking leaves. Links
    are left out.

    Args:
        file: The zip.
        levels: How many folders make the class.
        skipped: What is left out is appended.
        top: If the zip has a folder of this name, that is the root.

    Raises:
        UserError: If it cannot be read.
    """
    with opened_zip(file) as archive:
        return _Members(archive, file, levels, skipped, top).found


@contextmanager
def opened_zip(file: Path) -> Iterator[zipfile.ZipFile]:
    """A zip whose members can all be read into memory.

    Raises:
        UserError: If it cannot be read, or holds far more than its own size.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(x.file_size for x in archive.infolist())  # zipfile reads no more of any
            if size > max(ALWAYS_HELD, TIMES_THE_ZIP * file.stat().st_size):
                raise UserError(
                    f"cannot read {file}: unpacked it would have {size:,} bytes, more than "
                    f"{TIMES_THE_ZIP} times its own size; unpack it yourself if that is right"
                )
            yield archive
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {file}: {error}") from error


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
    return lines + warnings_of_labels(x.label for x in images)


def warnings_of_labels(labels: Iterable[str]) -> list[str]:
    """What suggests that one class has two names."""
    spelt: dict[str, set[str]] = {}
    for label in set(labels):
        plain = unicodedata.normalize("NFKC", label).casefold().strip()
        spelt.setdefault(plain, set()).add(label)
    alike = [" and ".join(map(repr, sorted(x))) for x in spelt.values() if len(x) > 1]
    if not alike:
        return []
    return [
        "warning: class names that differ in case, blanks or Unicode form alone: "
        + ", ".join(sorted(alike)[:5])
    ]


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
                self._skip(path, WITHOUT_IMAGE)

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
        if _is_hidden(path.name):
            self._skip(path, HIDDEN_FOLDER)
        elif _holds_runs(path):
            self._skip(path, RUNS)
        elif self._is_new(path):
            self._folder(i, path)

    def _file(self, i: int, path: Path) -> None:
        parts = path.relative_to(self.roots[i]).parts[:-1]
        if reason := _objection(path.name, len(parts), self.levels):
            self._skip(path, reason)
        elif not path.is_file():  # reading it would wait for ever
            self._skip(path, NO_FILE)
        elif self._is_new(path):
            label = "/".join(parts[: self.levels])
            self.found[i].append(Found(path, label, len(parts)))

    def _is_new(self, path: Path) -> bool:
        """Whether this file or folder was not met before, under this name or another."""
        status = os.stat(path)
        first = self.seen.setdefault((status.st_dev, status.st_ino), path)
        if first != path:
            self._skip(path, SAME_AS.format(first))
        return first == path

    def _skip(self, path: Path, reason: str) -> None:
        self.skipped.append(Skipped(str(path), reason))


class _Members:
    def __init__(
        self,
        archive: zipfile.ZipFile,
        file: Path,
        levels: int,
        skipped: list[Skipped],
        top: str | None,
    ):
        self.archive = archive
        self.file = file
        self.levels = levels
        self.skipped = skipped
        self.found: list[Found] = []
        self.hidden: set[tuple[str, ...]] = set()
        self.class_folders: dict[str, tuple[str, ...]] = {}
        members = [(PurePosixPath(x.filename).parts, x) for x in archive.infolist()]
        self.last = dict(members)
        self.root = (top,) if any(parts[:1] == (top,) for parts, _ in members) else ()
        for parts, info in members:
            self._member(parts, info)
        self.found.sort(key=lambda found: str(found.path))
        used = {x.label for x in self.found}
        for label, parts in self.class_folders.items():
            if label not in used:
                self._skip(parts, WITHOUT_IMAGE)

    def _member(self, parts: tuple[str, ...], info: zipfile.ZipInfo) -> None:
        folders = parts if info.is_dir() else parts[:-1]
        if hidden := next((i for i, x in enumerate(folders, 1) if _is_hidden(x)), 0):
            if folders[:hidden] not in self.hidden:
                self.hidden.add(folders[:hidden])
                self._skip(folders[:hidden], HIDDEN_FOLDER)
            return
        # What lies beside the root is outside the class folders.
        below = folders[len(self.root) :] if folders[: len(self.root)] == self.root else ()
        label = "/".join(below[: self.levels])
        if len(below) >= self.levels:
            self.class_folders.setdefault(label, parts[: len(self.root) + self.levels])
        if info.is_dir():
            return
        if stat.S_ISLNK(info.external_attr >> 16):
            self._skip(parts, "a link in a zip")
        elif reason := _objection(parts[-1], len(below), self.levels):
            self._skip(parts, reason)
        elif info is not self.last[parts]:
            self._skip(parts, SAME_AS.format("a later one of this name"))
        else:
            path = PurePosixPath(info.filename)
            self.found.append(Found(path, label, len(below), self._content(info)))

    def _content(self, info: zipfile.ZipInfo) -> bytes:
        try:
            return self.archive.read(info)
        except Exception:  # a damaged member is an unreadable image, not an unreadable data set
            return b""

    def _skip(self, parts: Sequence[str], reason: str) -> None:
        self.skipped.append(Skipped(str(self.file.joinpath(*parts)), reason))


def _is_hidden(folder: str) -> bool:
    return folder.startswith(".") or folder.casefold() in IGNORED_FOLDERS


def _holds_runs(folder: Path) -> bool:
    """Whether this is the folder of a run, or one whose folders all are runs."""
    if _is_run(folder):
        return True
    try:
        with os.scandir(folder) as entries:
            runs = (_is_run(Path(x)) for x in entries if x.is_dir())
            return next(runs, False) and all(runs)
    except OSError:  # it is told of where it is read
        return False


def _is_run(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / LOG).is_file()


def _objection(name: str, depth: int, levels: int) -> str | None:
    """Why a file of this name, so many folders deep, is not an image of a class."""
    if name.startswith("."):
        return "a hidden file"
    if not is_image_name(name):
        return f"{NO_FORMAT} ({Path(name).suffix or 'no suffix'})"
    return "an image outside the class folders" if depth < levels else None


def is_image_name(name: str) -> bool:
    """Whether Pillow has a reader for files of this suffix."""
    return Image.registered_extensions().get(Path(name).suffix.lower()) in Image.OPEN


def summary(skipped: Sequence[Skipped]) -> list[str]:
    """How many were skipped for each kind of reason, for the screen."""
    kinds = Counter(x.reason.partition(":")[0] for x in skipped)
    return [f"  {count} x {kind}" for kind, count in kinds.most_common()]
