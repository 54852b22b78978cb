"""The images of a folder, embedded by the network of a run and kept for search."""

import dataclasses
import hashlib
import os
from pathlib import Path

import faiss
import numpy as np
import torch

from .configuration import of_run
from .data import Sample
from .embeddings import embed_samples
from .errors import UserError
from .image_tree import Skipped, read_trees
from .metrics import NEARLY_SAME, are_nearly_same
from .network import Trained, load_best
from .processes import say
from .run_folder import BEST, RunFolder


@dataclasses.dataclass(frozen=True)
class File:
    """An image file, and what tells whether it has changed since it was embedded."""

    name: str
    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> "File":
        """The file as it is now."""
        status = path.stat()
        return cls(str(path), status.st_size, status.st_mtime_ns)


@dataclasses.dataclass(frozen=True)
class Neighbor:
    """A found image and its cosine similarity to the query."""

    name: str
    similarity: float


class Index:
    """Embeddings of the images below a folder, in the run's folder.

    It is brought up to date whenever it is opened: files that are new or have changed are embedded,
    those that are gone are left out. Other weights make another index.

    Attributes:
        files: The images, in the order of `embeddings`.
        embeddings: `(n, d)`, of length 1.
        embedded: How many were embedded now.
        removed: How many of the last time are gone, or have changed.
        skipped: What below the folder is no image that can be read.
        kept: Where it is kept, or why it is not, in words.
    """

    def __init__(self, run: str, folder: str, device: torch.device, workers: int = 0):
        self.run = RunFolder.existing(run)
        of_run(self.run)
        root = Path(folder)
        if not root.is_dir():
            raise UserError(f"--index: expected a folder of images, got {folder}")
        weights, trained = _loaded(self.run)
        self.network, self.transform = trained
        self.device, self.workers = device, workers
        of = hashlib.sha256(os.fsencode(root.resolve()) + weights).hexdigest()[:12]
        self.name = f"index/{root.resolve().name}-{of}.npz"
        self.skipped: list[Skipped] = []
        self._update([File.of(x.path) for x in read_trees([root.resolve()], 0, self.skipped)[0]])
        if not self.files:
            raise UserError(f"--index: no image that can be read below {folder}")
        if are_nearly_same(torch.from_numpy(self.embeddings)):
            say(f"warning: {NEARLY_SAME}")

    def _update(self, present: list[File]) -> None:
        kept, vectors = self._read()
        row = {file: i for i, file in enumerate(kept)}
        old = [file for file in present if file in row]
        new = [file for file in present if file not in row]
        vectors = vectors[[row[file] for file in old]]
        if new:
            added, places = self.embed([file.name for file in new], self.skipped)
            new = [new[i] for i in places]
            vectors = np.concatenate([x for x in (vectors, added) if len(x)] or [vectors])
        self.files, self.embeddings = [*old, *new], vectors
        self.embedded, self.removed = len(new), len(kept) - len(old)
        self.kept = f"kept in {self.run.path / self.name}"
        if self.embedded or self.removed:
            try:
                self._write()
            except UserError as error:  # a run that may only be read can be searched all the same
                self.kept = f"not kept: {error}"

    def _read(self) -> tuple[list[File], np.ndarray]:
        path = self.run.path / self.name
        if not path.is_file():
            return [], np.empty((0, 0), np.float32)
        try:
            with np.load(path) as stored:  # which looks at checksums, and unpickles nothing
                columns = (stored[field.name].tolist() for field in dataclasses.fields(File))
                return [File(*row) for row in zip(*columns, strict=True)], stored["embeddings"]
        except Exception as error:  # in many ways, and it can be made again
            say(
                f"warning: {path} is damaged ({type(error).__name__}): every image is embedded anew"
            )
            return [], np.empty((0, 0), np.float32)

    def _write(self) -> None:
        columns = {
            field.name: np.array([getattr(file, field.name) for file in self.files])
            for field in dataclasses.fields(File)
        }
        self.run.write_arrays(self.name, {"embeddings": self.embeddings, **columns})

    def embed(self, names: list[str], skipped: list[Skipped]) -> tuple[np.ndarray, list[int]]:
        """Embeddings of image files, and which of them could be read."""
        samples = [Sample(name, "", Path(name)) for name in names]
        embeddings, places = embed_samples(
            self.network, self.transform, samples, self.device, self.workers, skipped
        )
        return embeddings.numpy(), places

    def nearest(self, names: list[str], embeddings: np.ndarray, k: int) -> list[list[Neighbor]]:
        """The k nearest images of each query, without the query's own file."""
        vectors = faiss.IndexFlatIP(self.embeddings.shape[1])
        vectors.add(self.embeddings)
        similarities, rows = vectors.search(embeddings, min(k + 1, len(self.files)))
        found = []
        for name, *ranking in zip(names, similarities.tolist(), rows.tolist(), strict=True):
            neighbors = [
                Neighbor(self.files[row].name, similarity)
                for similarity, row in zip(*ranking, strict=True)
                if not _is_same_file(self.files[row].name, name)
            ]
            found.append(neighbors[:k])
        return found


def _loaded(run: RunFolder) -> tuple[bytes, Trained]:
    """The file of the weights and the network with them, also while the run goes on training."""
    path = run.checkpoints / BEST
    before = path.read_bytes() if path.exists() else b""
    trained = load_best(run.path)
    while before != (now := path.read_bytes()):
        before, trained = now, load_best(run.path)
    return now, trained


def _is_same_file(one: str, other: str) -> bool:
    """Whether two names, also by links, are of one file; False for a file that has gone."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False
