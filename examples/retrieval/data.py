"""Data sets for open-set retrieval, by name: found, checked, split and ready to load."""

import csv
import dataclasses
import io
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tqdm
from PIL import Image
from torch.utils.data import Dataset

from .errors import UserError
from .image_tree import Skipped, read_trees, summary, warnings_of
from .images import as_eight_bits
from .processes import on_rank_zero, say

DATA_ROOT_VARIABLE = "PML_PNP_DATA"
PML_DATASETS = ("CUB", "Cars196", "StanfordOnlineProducts", "INaturalist2018")
# From so many training classes on, whole classes are held out for validation.
CLASSES_FOR_DISJOINT_VALIDATION = 20
NAMED_AT_MOST = 5


@dataclasses.dataclass(frozen=True)
class Sample:
    """One image: where it is, or what it holds, and its class."""

    name: str
    label: str
    source: Path | bytes | np.ndarray
    turn: Image.Transpose | None = None

    def open(self) -> Image.Image:
        """Decode the image to mode `L` or `RGB`, and turn it if it belongs to a turned class.

        Raises:
            UserError: If it cannot be read.
        """
        try:
            image = as_eight_bits(self._decode())
            return image if self.turn is None else image.transpose(self.turn)
        except Exception as error:  # PIL's decoders raise many types for a broken file
            message = f"cannot read the image {self.name}: {error}"
            raise UserError(message, common=False) from error

    def _decode(self) -> Image.Image:
        if isinstance(self.source, np.ndarray):
            return Image.fromarray(self.source)
        stream = io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source
        with Image.open(stream) as image:
            image.load()
            return image


# Training samples and test samples.
Split = tuple[list[Sample], list[Sample]]


class LabelledImages(Dataset):
    """The form in which PML's trainer and tester take images: `(tensor, class number)`."""

    def __init__(self, samples: Sequence[Sample], classes: Sequence[str]):
        number = {name: i for i, name in enumerate(classes)}
        self.samples = list(samples)
        self.labels = np.array([number[s.label] for s in samples], dtype=np.int64)
        self.transform: Callable[[Image.Image], torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.samples[index].open()), int(self.labels[index])

    @property
    def num_classes(self) -> int:
        """Number of different classes that occur."""
        return len(np.unique(self.labels))

    def summary(self) -> dict[str, int]:
        """Numbers of images and classes."""
        return {"images": len(self), "classes": self.num_classes}


@dataclasses.dataclass
class RetrievalSplits:
    """Training, validation and test images; the test classes are never trained on."""

    train: LabelledImages
    val: LabelledImages
    test: LabelledImages
    val_kind: str
    skipped: list[Skipped] = dataclasses.field(default_factory=list)

    def class_rows(self) -> list[tuple[str, str, int]]:
        """Name, split and number of images of each class."""
        return [
            (label, split, count)
            for split in ("train", "val", "test")
            for label, count in sorted(
                Counter(s.label for s in getattr(self, split).samples).items()
            )
        ]

    def summary(self) -> dict[str, dict[str, int]]:
        """Numbers of images and classes of each split."""
        return {name: getattr(self, name).summary() for name in ("train", "val", "test")}


def load_splits(
    name: str,
    data_root: str | None,
    val_fraction: float,
    seed: int,
    turned_classes: bool = False,
    skip_verify: bool = False,
) -> RetrievalSplits:
    """Find a data set, leave out what cannot be used, and split it.

    Args:
        name: A key of `READERS`.
        data_root: The folder to look in; by default what `PML_PNP_DATA` names.
        val_fraction: Share of the training classes, or images, that is held out.
        seed: Decides which ones are held out.
        turned_classes: Make further training classes, see `with_turned_classes`.
        skip_verify: Do not decode every image first.

    Raises:
        UserError: If the data set is missing, broken, or too small once cleaned.
    """
    skipped: list[Skipped] = []
    train, test = READERS[name](data_root, skipped)
    if skipped:
        say(f"skipped {len(skipped)} files and folders:", *summary(skipped))
    if not skip_verify:
        train, test = _without_unreadable(skipped, train, test)
    train = _without_single_image_classes(train, "training", skipped)
    test = _without_single_image_classes(test, "test", skipped)
    for split, samples in (("training", train), ("test", test)):
        if len({s.label for s in samples}) < 2:
            raise UserError(
                f"{name}: too little {split} data remains: expected at least 2 classes of at "
                f"least 2 readable images, got {len(samples)} usable images"
            )
    few = len({s.label for s in train}) < CLASSES_FOR_DISJOINT_VALIDATION
    if turned_classes and few:  # then there are enough to hold out whole ones
        train = with_turned_classes(train)
    train, val, kind = _hold_out(train, val_fraction, seed)
    if turned_classes and not few:
        train = with_turned_classes(train)
    # Training classes get the lowest numbers: a loss with one proxy per class counts on that.
    seen = sorted({s.label for s in train})
    seen += sorted({s.label for s in val}.difference(seen))
    unseen = sorted({s.label for s in test})
    return RetrievalSplits(
        LabelledImages(train, seen),
        LabelledImages(val, seen),
        LabelledImages(test, unseen),
        kind,
        skipped,
    )


def splits_of(config: dict[str, Any]) -> RetrievalSplits:
    """The splits of a run, from its configuration."""
    return load_splits(
        config["dataset"],
        config["data_root"],
        config["val_fraction"],
        config["seed"],
        config["turned_classes"],
        config["skip_verify"],
    )


def with_turned_classes(samples: list[Sample]) -> list[Sample]:
    """Eight classes for each: as it is, and turned and mirrored in the other seven ways.

    An embedding that has seen few classes serves only those; a character on its side is as good
    a class as one that stands.
    """
    turned = [
        dataclasses.replace(s, label=f"{s.label} {turn.name}", turn=turn)
        for turn in Image.Transpose
        for s in samples
    ]
    return samples + turned


# --- cleaning and splitting ---------------------------------------------------------------


def _without_unreadable(skipped: list[Skipped], *splits: list[Sample]) -> list[list[Sample]]:
    """Decode every image once, now, so that none can stop the training later."""
    samples = [s for split in splits for s in split if not isinstance(s.source, np.ndarray)]
    if not samples:
        return list(splits)

    def error_of(sample: Sample) -> str | None:
        try:
            sample.open()
        except UserError as error:
            return str(error)
        return None

    def check() -> dict[str, str]:
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            errors = tqdm.tqdm(
                pool.map(error_of, samples), total=len(samples), desc="checking images"
            )
            return {s.name: e for s, e in zip(samples, errors, strict=True) if e}

    bad = on_rank_zero(check)
    if bad:
        say(f"skipped {len(bad)} of {len(samples)} images:", *_first(bad.values()))
        skipped += [Skipped(name, str(error)) for name, error in bad.items()]
    return [[s for s in split if s.name not in bad] for split in splits]


def _without_single_image_classes(
    samples: list[Sample], split: str, skipped: list[Skipped]
) -> list[Sample]:
    counts = Counter(s.label for s in samples)
    single = sorted(label for label, count in counts.items() if count == 1)
    if single:
        say(f"skipped {len(single)} {split} classes with only one image:", *_first(single))
        skipped += [Skipped(x, f"a {split} class with only one image") for x in single]
    return [s for s in samples if counts[s.label] > 1]


def _first(lines: Sequence[str]) -> list[str]:
    lines = list(lines)
    more = len(lines) - NAMED_AT_MOST
    return [f"  {x}" for x in lines[:NAMED_AT_MOST]] + ([f"  and {more} more"] if more > 0 else [])


def _hold_out(
    samples: list[Sample], fraction: float, seed: int
) -> tuple[list[Sample], list[Sample], str]:
    """Split off validation data: whole classes if there are many, else images of each class.

    Whole classes measure what the test measures, retrieval of unseen classes. With few classes
    that would leave too little to train on.
    """
    generator = np.random.default_rng(seed)
    members: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        members.setdefault(sample.label, []).append(i)
    labels = sorted(members)
    if len(labels) >= CLASSES_FOR_DISJOINT_VALIDATION:
        kind = "held-out classes"
        count = min(max(2, round(fraction * len(labels))), len(labels) - 2)
        chosen = [members[labels[i]] for i in generator.permutation(len(labels))[:count]]
    else:
        kind = "held-out images of the training classes"
        chosen = [_some_images(generator.permutation(members[x]), fraction) for x in labels]
    held_out = {int(i) for indices in chosen for i in indices}
    if not held_out:
        raise UserError(
            "too little training data for validation: expected a class of at least 4 images "
            f"or {CLASSES_FOR_DISJOINT_VALIDATION} classes"
        )
    train = [s for i, s in enumerate(samples) if i not in held_out]
    return train, [samples[i] for i in sorted(held_out)], kind


def _some_images(shuffled: Sequence[int], fraction: float) -> Sequence[int]:
    """At least two images, so that a query has a match; two must stay to train on."""
    if len(shuffled) < 4:
        return []
    return shuffled[: min(max(2, round(fraction * len(shuffled))), len(shuffled) - 2)]


# --- readers: each returns (training samples, test samples) ---------------------------------


def _read_digits(data_root: str | None, skipped: list[Skipped]) -> Split:
    """The 8x8 digits inside scikit-learn: 0-4 to train on, 5-9 to test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)
    samples = [
        Sample(f"digit {i}", str(label), image)
        for i, (image, label) in enumerate(zip(images, digits.target, strict=True))
    ]
    return [s for s in samples if s.label < "5"], [s for s in samples if s.label >= "5"]


def _read_omniglot(data_root: str | None, skipped: list[Skipped]) -> Split:
    """Omniglot, small or in torchvision's layout; folders or zips.

    A class is a character. Alphabets that stand in both parts are left out of the test.
    """
    pairs = (
        ("images_background_small1", "images_background_small2"),
        ("images_background", "images_evaluation"),
    )
    for folder in _places("omniglot", data_root, "omniglot-small", "omniglot-py", "omniglot"):
        for names in pairs:
            parts = [_read_tree_or_zip(folder, name, skipped) for name in names]
            if all(parts):
                break
        else:
            continue
        train, test = parts
        trained_on = {s.label.split("/")[0] for s in train}
        return train, [s for s in test if s.label.split("/")[0] not in trained_on]
    raise _missing(
        "omniglot",
        data_root,
        "images_background_small1 and images_background_small2, or images_background and "
        "images_evaluation, as folders or as .zip files",
    )


def _read_grocery(data_root: str | None, skipped: list[Skipped]) -> Split:
    """The grocery store photographs: fine classes with an even number train, odd ones test."""
    for folder in _places("grocery", data_root, "grocery64"):
        if (folder / "labels.csv").is_file():
            table = (folder / "labels.csv").read_text()
            contents: dict[str, bytes] | None = None
        elif (folder / "grocery64.zip").is_file():
            contents = _read_zip(folder / "grocery64.zip")
            table = contents.get("labels.csv", b"").decode()
        else:
            continue
        rows = list(csv.DictReader(io.StringIO(table)))
        if not rows or not {"path", "fine"} <= rows[0].keys():
            raise UserError(f"grocery: expected labels.csv with columns path and fine in {folder}")
        # A file that the table names and the zip lacks counts as unreadable.
        samples = [
            Sample(
                row["path"],
                row["fine"].zfill(3),
                folder / row["path"] if contents is None else contents.get(row["path"], b""),
            )
            for row in rows
        ]
        return (
            [s for s in samples if int(s.label) % 2 == 0],
            [s for s in samples if int(s.label) % 2 == 1],
        )
    raise _missing("grocery", data_root, "grocery64.zip, or its contents with labels.csv")


def _read_folder(data_root: str | None, skipped: list[Skipped]) -> Split:
    """An ImageFolder tree, one folder per class.

    With `train/` and `test/` in it, those; otherwise the first half of the sorted classes
    trains and the second half tests.
    """
    (root,) = _places("folder", data_root)
    if (root / "train").is_dir() and (root / "test").is_dir():
        train, test = _read_trees([root / "train", root / "test"], 1, skipped)
        both = sorted({s.label for s in train} & {s.label for s in test})
        if both:
            raise UserError(
                "folder: train/ and test/ must hold different classes, but both hold "
                + ", ".join(both[:NAMED_AT_MOST])
            )
        return train, test
    (samples,) = _read_trees([root], 1, skipped)
    classes = sorted({s.label for s in samples})
    if len(classes) < 4:
        raise UserError(
            f"folder: expected at least 4 class folders with images in {root}, got {len(classes)}"
        )
    first_half = set(classes[: len(classes) // 2])
    return (
        [s for s in samples if s.label in first_half],
        [s for s in samples if s.label not in first_half],
    )


def _reader_of_pml(name: str) -> Callable[[str | None, list[Skipped]], Split]:
    """A reader for one of PML's own data sets, which knows the layout and the split."""

    def read(data_root: str | None, skipped: list[Skipped]) -> Split:
        errors = []
        for folder in _places(name, data_root, name):
            try:
                return _pml_split(name, folder, "train"), _pml_split(name, folder, "test")
            except Exception as error:  # whatever a missing or broken index file leads to
                errors.append(f"{folder}: {type(error).__name__}: {error}")
        raise UserError(
            f"{name} could not be read ({'; '.join(errors)}); fetch it with "
            f"pytorch_metric_learning.datasets.{name}(root=..., download=True)"
        )

    return read


def _pml_split(name: str, folder: Path, split: str) -> list[Sample]:
    from pytorch_metric_learning import datasets as pml_datasets  # not in PML 0.9

    data = getattr(pml_datasets, name)(root=str(folder), split=split)
    return [
        Sample(path, f"{label:05d}", Path(path))
        for path, label in zip(data.paths, data.labels, strict=True)
    ]


READERS = {
    "digits": _read_digits,
    "omniglot": _read_omniglot,
    "grocery": _read_grocery,
    "folder": _read_folder,
    **{name: _reader_of_pml(name) for name in PML_DATASETS},
}


# --- files ----------------------------------------------------------------------------------


def _places(dataset: str, data_root: str | None, *subfolders: str) -> list[Path]:
    """The root, and those of its sub-folders that are there."""
    root = data_root or os.environ.get(DATA_ROOT_VARIABLE)
    if not root:
        raise UserError(
            f"{dataset} needs --data-root, or the environment variable {DATA_ROOT_VARIABLE}"
        )
    if not Path(root).is_dir():
        raise UserError(f"{dataset}: the data root is not a folder: {root}")
    return [Path(root)] + [Path(root, x) for x in subfolders if Path(root, x).is_dir()]


def _missing(dataset: str, data_root: str | None, expected: str) -> UserError:
    root = data_root or os.environ.get(DATA_ROOT_VARIABLE)
    return UserError(f"{dataset} not found in {root}: expected {expected}")


def _read_tree_or_zip(folder: Path, name: str, skipped: list[Skipped]) -> list[Sample]:
    """Samples of `folder/name/alphabet/character/image`, or of the same in `name.zip`."""
    if (folder / name).is_dir():
        return _read_trees([folder / name], 2, skipped)[0]
    if not (folder / f"{name}.zip").is_file():
        return []
    return [
        Sample(path, "/".join(path.split("/")[-3:-1]), content)
        for path, content in sorted(_read_zip(folder / f"{name}.zip").items())
        if path.count("/") >= 2
    ]


def _read_trees(roots: Sequence[Path], levels: int, skipped: list[Skipped]) -> list[list[Sample]]:
    """Samples of the images below each root; the first `levels` folder names are the class."""
    trees = read_trees(roots, levels, skipped)
    say(*warnings_of(trees, levels))
    return [[Sample(str(x.path), x.label, x.path) for x in tree] for tree in trees]


def _read_zip(path: Path) -> dict[str, bytes]:
    """All files of a zip, in memory: an open zip cannot be shared with loader processes."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [i.filename for i in archive.infolist() if not i.is_dir()]
            return {name: _member(archive, name) for name in names}
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        return archive.read(name)
    except Exception:  # a damaged member is an unreadable image, not an unreadable data set
        return b""
