"""Data sets for retrieval, by name: found, split, checked and ready to load."""

import csv
import dataclasses
import io
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tqdm
from PIL import Image
from torch.utils.data import Dataset

from . import benchmark_sets
from .benchmark_sets import BENCHMARK_SETS
from .disk import plain_path
from .errors import UserError
from .image_tree import (
    NO_FORMAT,
    SAME_AS,
    Found,
    Skipped,
    opened_zip,
    read_trees,
    read_zip,
    summary,
    warnings_of,
    warnings_of_labels,
)
from .prepare import Ranges, as_eight_bits, extremes, range_of
from .processes import on_rank_zero, say

DATA_ROOT_VARIABLE = "PML_PNP_DATA"
PML_DATASETS = ("CUB", "Cars196")
# From so many training classes on, whole classes are held out for validation.
CLASSES_FOR_DISJOINT_VALIDATION = 20
# Of a data set that has no split of its own, the share of the classes to test on.
TEST_FRACTION = 0.5
NAMED_AT_MOST = 5
KINDS = {"I": "integers", "F": "floating point"}
WITHOUT_TEST = "; --test-fraction 0 trains on every class, without a test"
# The pixels of 32 bits of other formats are looked at even with --skip-verify.
NEVER_32_BITS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")
# Pillow warns, without a name, of EXIF data that say nothing and of images that are named below.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One image: where it is, or what it holds, its class, and its part in the test.

    Attributes:
        name: What it is called in messages and tables; only turned copies share it.
        label: Its class.
        source: Its file, the content of that, or its pixels.
        turn: What is done to it in a turned class.
        parts: The test sets that it belongs to, where there are several.
        box: Left, top, right and bottom of the part that counts, in pixels of the upright image.
        query: It is searched with, in a test.
        gallery: It is searched for, in a test.
    """

    name: str
    label: str
    source: Path | bytes | np.ndarray
    turn: Image.Transpose | None = None
    parts: tuple[str, ...] = ()
    box: tuple[float, float, float, float] | None = None
    query: bool = True
    gallery: bool = True

    def open(self, ranges: Ranges | None = None) -> Image.Image:
        """Decode the image to mode `L` or `RGB`, and turn it if it belongs to a turned class.

        Args:
            ranges: What is black and white in images of 32 bits, see `as_eight_bits`.

        Raises:
            UserError: If it cannot be read.
        """
        with self.errors_named():
            image = as_eight_bits(self._decode(), ranges)
            if self.box is not None:
                image = _cropped(image, self.box)
            return image if self.turn is None else image.transpose(self.turn)

    def extremes(self) -> tuple[str, float, float] | None:
        """Of a 32-bit image, its kind and its smallest and largest pixel; else None.

        Raises:
            UserError: If it cannot be read.
        """
        path = self.source if isinstance(self.source, Path) else Path(self.name)
        form = Image.registered_extensions().get(path.suffix.lower())
        if isinstance(self.source, np.ndarray) or form in NEVER_32_BITS:
            return None
        with self.errors_named(), Image.open(self._stream()) as image:
            return extremes(image)

    @contextmanager
    def errors_named(self) -> Iterator[None]:
        """Around what is done with the image: an error becomes a `UserError` with its name."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # PIL's decoders raise many types for a broken file
            message = f"cannot read the image {self.name}: {error}"
            raise UserError(message, common=False) from error

    def _stream(self) -> io.BytesIO | Path:
        return io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source

    def _decode(self) -> Image.Image:
        if isinstance(self.source, np.ndarray):
            return Image.fromarray(self.source)
        with Image.open(self._stream()) as image:
            image.load()
            return image


def _cropped(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    left, top, right, bottom = box
    inside = max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height)
    inside = tuple(map(round, inside))
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        raise ValueError(f"the box {box} is outside of its {image.width} x {image.height} pixels")
    return image.crop(inside)


@dataclasses.dataclass(frozen=True)
class Roles:
    """Which test images are searched with and which are searched for, where these are not all.

    Attributes:
        queries: Numbers of the first.
        gallery: Numbers of the second. If it holds the queries, they come first.
        holds_queries: Whether it does.
    """

    queries: torch.Tensor
    gallery: torch.Tensor
    holds_queries: bool


# Training samples and test samples; None instead of these if the data set has no split of its own.
Split = tuple[list[Sample], list[Sample] | None]


class LabelledImages(Dataset):
    """The form in which PML's trainer and tester take images: `(tensor, class number)`."""

    def __init__(
        self,
        samples: Sequence[Sample],
        classes: Sequence[str],
        transform: Callable[[Image.Image], torch.Tensor] | None = None,
        pixel_ranges: Ranges | None = None,
    ):
        number = {name: i for i, name in enumerate(classes)}
        self.samples = list(samples)
        self.labels = np.array([number[s.label] for s in samples], dtype=np.int64)
        self.transform = transform
        self.pixel_ranges = pixel_ranges

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        sample = self.samples[index]
        with sample.errors_named():
            return self.transform(sample.open(self.pixel_ranges)), int(self.labels[index])

    @property
    def num_classes(self) -> int:
        """Number of different classes that occur."""
        return len(np.unique(self.labels))

    @property
    def roles(self) -> Roles | None:
        """Queries and gallery of a test; None if every image is both."""
        if all(s.query and s.gallery for s in self.samples):
            return None
        numbers = range(len(self.samples))
        queries = [i for i in numbers if self.samples[i].query]
        gallery = [i for i in numbers if self.samples[i].gallery]
        gallery.sort(key=lambda i: not self.samples[i].query)
        holds_queries = gallery[: len(queries)] == queries
        return Roles(torch.tensor(queries), torch.tensor(gallery), holds_queries)

    def summary(self) -> dict[str, int]:
        """Numbers of images and classes."""
        return {"images": len(self), "classes": self.num_classes}


@dataclasses.dataclass
class RetrievalSplits:
    """Training, validation and test images.

    The test classes are never trained on, unless the test is closed-set. It may be empty.

    Attributes:
        train: To train on.
        val: To choose the best epoch by. It may be empty.
        test: To measure the result by.
        val_kind: What is held out for `val`.
        split_kind: What decides which classes or images are in `test`.
        closed_set: The test classes are trained on, with other images.
        skipped: What is in none of them, and why.
        pixel_ranges: What is black and white in images of 32 bits.
    """

    train: LabelledImages
    val: LabelledImages
    test: LabelledImages
    val_kind: str
    split_kind: str
    closed_set: bool
    skipped: list[Skipped]
    pixel_ranges: Ranges

    @property
    def seen(self) -> LabelledImages:
        """What was trained and validated on, without turned copies, as the test sees images."""
        seen = [s for s in (*self.train.samples, *self.val.samples) if s.turn is None]
        classes = sorted({s.label for s in seen})
        return LabelledImages(seen, classes, self.test.transform, self.pixel_ranges)

    def class_rows(self) -> list[tuple[str, str, int, str]]:
        """Name, split and number of images of each class, and what decides its split."""
        decided_by = dict.fromkeys(("train", "test"), self.split_kind)
        decided_by["val"] = f"{self.val_kind}, drawn by --val-fraction and --seed"
        return [
            (label, split, count, decided_by[split])
            for split in ("train", "val", "test")
            for label, count in sorted(
                Counter(s.label for s in getattr(self, split).samples).items()
            )
        ]

    def summary(self) -> dict[str, dict[str, int]]:
        """Numbers of images and classes of each split."""
        return {
            "train": self.train.summary(),
            "val": self.val.summary(),
            **{name: images.summary() for name, images in self.tests().items()},
        }

    def tests(self) -> dict[str, LabelledImages]:
        """All test images as `test`, and each test set by its name where there are several."""
        sets = {"test": self.test}
        for part in dict.fromkeys(x for s in self.test.samples for x in s.parts):
            samples = [s for s in self.test.samples if part in s.parts]
            classes = sorted({s.label for s in samples})
            sets[part] = LabelledImages(
                samples, classes, self.test.transform, self.test.pixel_ranges
            )
        return sets


def load_splits(
    name: str,
    data_root: str | None,
    val_fraction: float,
    seed: int,
    turned_classes: bool = False,
    skip_verify: bool = False,
    test_fraction: float | None = None,
) -> RetrievalSplits:
    """Find a data set, split it, and leave out what cannot be used.

    Args:
        name: A key of `READERS`.
        data_root: The folder to look in; by default what `PML_PNP_DATA` names.
        val_fraction: Share of the training classes, or images, that is held out; with 0 none is.
        seed: Decides which ones are held out, and which classes are tested on.
        turned_classes: Make further training classes, see `with_turned_classes`.
        skip_verify: Do not decode every image first.
        test_fraction: Share of the classes to test on, `TEST_FRACTION` by default, if the data set
            has no split of its own; with 0 every class of any data set is trained on.

    Raises:
        UserError: If the data set is missing, broken, has a split of its own although a share is
            given, or is too small once cleaned.
    """
    skipped: list[Skipped] = []
    train, own_test = READERS[name](data_root, skipped)
    if skipped:
        say(f"skipped {len(skipped)} files and folders:", *summary(skipped))
    train, test, split_kind, closed_set = _divided(name, train, own_test, test_fraction, seed)
    bad, ranges = _looked_at([*train, *test], verify=not skip_verify)
    if bad:
        say(f"skipped {len(bad)} of {len(train) + len(test)} images:", *_first(bad.values()))
        skipped += [Skipped(image, error) for image, error in bad.items()]
        train, test = ([s for s in split if s.name not in bad] for split in (train, test))
    train = _without_single_image_classes(train, "training", skipped)
    if closed_set:
        test = _without_unknown_classes(test, train, skipped)
    if all(s.query and s.gallery for s in test):
        test = _without_single_image_classes(test, "test", skipped)
    else:  # a gallery may hold classes without a query, and a query need only one other image
        gallery = Counter(s.label for s in test if s.gallery)
        if not any(s.query and gallery[s.label] > s.gallery for s in test):
            raise UserError(f"{name}: no query has another image of its class in the gallery")
        queries = sum(s.query for s in test)
        split_kind += f"; {queries} queries, {gallery.total()} images in the gallery"
    for split, samples in (("training", train), ("test", test)):
        if len({s.label for s in samples}) < 2 and not (split == "test" and test_fraction == 0):
            raise UserError(
                f"{name}: too little {split} data remains: expected at least 2 classes of at "
                f"least 2 readable images, got {len(samples)} usable images"
                + ("" if test_fraction == 0 else WITHOUT_TEST)
            )
    every_class = closed_set or test_fraction == 0
    few = len({s.label for s in train}) < CLASSES_FOR_DISJOINT_VALIDATION and not every_class
    if turned_classes and few:  # then there are enough to hold out whole ones
        train = with_turned_classes(train)
    train, val, kind = _hold_out(train, val_fraction, seed, every_class)
    if turned_classes and not few:
        train = with_turned_classes(train)
    # Training classes get the lowest numbers: a loss with one proxy per class counts on that.
    seen = sorted({s.label for s in train})
    seen += sorted({s.label for s in val}.difference(seen))
    unseen = sorted({s.label for s in test})
    return RetrievalSplits(
        LabelledImages(train, seen, pixel_ranges=ranges),
        LabelledImages(val, seen, pixel_ranges=ranges),
        LabelledImages(test, unseen, pixel_ranges=ranges),
        kind,
        split_kind,
        closed_set,
        skipped,
        ranges,
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
        config["test_fraction"],
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


def _divided(
    name: str,
    train: list[Sample],
    test: list[Sample] | None,
    fraction: float | None,
    seed: int,
) -> tuple[list[Sample], list[Sample], str, bool]:
    """Training samples, test samples, what decides, and whether the test classes are trained on."""
    if fraction == 0:
        return train + (test or []), [], "no test, every class is trained on", False
    if test is None:
        fraction = TEST_FRACTION if fraction is None else fraction
        train, test = _drawn_classes(name, train, fraction, seed)
        return train, test, f"open set, {fraction:g} of the classes drawn by --seed {seed}", False
    if fraction is not None:
        raise UserError(
            f"--test-fraction: {name} has a split of its own here; expected 0, to train on every "
            f"class, or nothing, got {fraction:g}"
        )
    trained = {s.label for s in train}
    tested = {s.label for s in test}
    known, unknown = sorted(tested & trained), sorted(tested - trained)
    if known and unknown:
        raise UserError(
            f"{name}: expected test classes that are all trained on, or none of them, got "
            f"{len(known)} that are, such as {known[0]}, and {len(unknown)} that are not, such as "
            f"{unknown[0]}"
        )
    if known:
        return train, test, "closed set, the classes of the test are trained on", True
    return train, test, "open set, the data set's own split into classes", False


def _drawn_classes(
    name: str, samples: list[Sample], fraction: float, seed: int
) -> tuple[list[Sample], list[Sample]]:
    labels = sorted({s.label for s in samples})
    if len(labels) < 4:
        raise UserError(
            f"{name}: expected at least 4 class folders with images, 2 to train on and 2 to test "
            f"on, got {len(labels)}{WITHOUT_TEST}"
        )
    count = min(max(2, round(fraction * len(labels))), len(labels) - 2)
    # The validation draws from another stream.
    order = np.random.default_rng((seed, 1)).permutation(len(labels))
    tested = {labels[i] for i in order[:count]}
    return (
        [s for s in samples if s.label not in tested],
        [s for s in samples if s.label in tested],
    )


def _looked_at(samples: Sequence[Sample], verify: bool) -> tuple[dict[str, str], Ranges]:
    """Read every image once, now, so that none can stop the training later.

    Args:
        samples: Whose images.
        verify: Decode all of them, not only those whose 32-bit pixels may be of any depth.

    Returns:
        The errors by the names of the images, and what is black and white in those of 32 bits.
    """
    large: list[str] = []

    def look(sample: Sample) -> tuple[str | None, tuple[str, float, float] | None]:
        try:
            if verify:
                image = sample.open()
                if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                    large.append(f"{sample.name}, {image.width} x {image.height}")
            return None, sample.extremes()
        except UserError as error:
            return (str(error) if verify else None), None

    def look_at_all() -> tuple[dict[str, str], Ranges]:
        files = [s for s in samples if not isinstance(s.source, np.ndarray)]
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            seen = pool.map(look, files)
            if verify and files:
                seen = tqdm.tqdm(seen, total=len(files), desc="checking images")
            errors, found = zip(*seen, strict=True) if files else ((), ())
        named = {s.name: e for s, e in zip(files, errors, strict=True) if e}
        return named, _ranges_of(x for x in found if x)

    errors, ranges = on_rank_zero(look_at_all)
    if large:
        say(
            f"{len(large)} images are so large that reading them takes long:",
            *_first(sorted(large)),
        )
    for kind, (black, white) in ranges.items():
        say(f"pixels of 32 bits, {KINDS[kind]}: {black:g} is taken for black, {white:g} for white")
    return errors, ranges


def _ranges_of(many: Iterable[tuple[str, float, float]]) -> dict[str, tuple[float, float]]:
    """One range of each kind for all images with these `extremes`, so that they stay comparable."""
    kinds: dict[str, list[float]] = {}
    for kind, low, high in many:
        kinds.setdefault(kind, []).extend((low, high))
    return {kind: range_of(kind, min(x), max(x)) for kind, x in sorted(kinds.items())}


def _without_single_image_classes(
    samples: list[Sample], split: str, skipped: list[Skipped]
) -> list[Sample]:
    counts = Counter(s.label for s in samples)
    single = sorted(label for label, count in counts.items() if count == 1)
    if single:
        say(f"skipped {len(single)} {split} classes with only one image:", *_first(single))
        skipped += [Skipped(x, f"a {split} class with only one image") for x in single]
    return [s for s in samples if counts[s.label] > 1]


def _without_unknown_classes(
    test: list[Sample], train: list[Sample], skipped: list[Skipped]
) -> list[Sample]:
    trained = {s.label for s in train}
    unknown = sorted({s.label for s in test} - trained)
    if unknown:
        say(f"skipped {len(unknown)} test classes that are not trained on:", *_first(unknown))
        skipped += [Skipped(x, "a test class of a closed set without training") for x in unknown]
    return [s for s in test if s.label in trained]


def _first(lines: Sequence[str]) -> list[str]:
    lines = list(lines)
    more = len(lines) - NAMED_AT_MOST
    return [f"  {x}" for x in lines[:NAMED_AT_MOST]] + ([f"  and {more} more"] if more > 0 else [])


def _hold_out(
    samples: list[Sample], fraction: float, seed: int, every_class: bool
) -> tuple[list[Sample], list[Sample], str]:
    """Split off validation data: whole classes if there are many, else images of each class.

    Whole classes measure what the test measures, retrieval of unseen classes. With few classes
    that would leave too little to train on, and where every class is to be trained on there are
    none to spare.
    """
    if fraction == 0:
        return samples, [], "none, the last epoch is kept"
    generator = np.random.default_rng(seed)
    members: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        members.setdefault(sample.label, []).append(i)
    labels = sorted(members)
    if len(labels) >= CLASSES_FOR_DISJOINT_VALIDATION and not every_class:
        kind = "held-out classes"
        count = min(max(2, round(fraction * len(labels))), len(labels) - 2)
        chosen = [members[labels[i]] for i in generator.permutation(len(labels))[:count]]
    else:
        kind = "held-out images of the training classes"
        chosen = [_some_images(generator.permutation(members[x]), fraction) for x in labels]
    held_out = {int(i) for indices in chosen for i in indices}
    if not held_out:
        or_many = "" if every_class else f" or {CLASSES_FOR_DISJOINT_VALIDATION} classes"
        raise UserError(
            "too little training data for validation: expected a class of at least 4 images"
            + or_many
            + "; --val-fraction 0 trains on all of it and keeps the last epoch"
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
            parts = _read_parts(folder, names, skipped)
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


def _read_grocery(name: str, stem: str, data_root: str | None, skipped: list[Skipped]) -> Split:
    """The grocery store photographs, in `stem.zip` or unpacked with labels.csv.

    Fine classes with an even number train, odd ones test.
    """
    for folder in _places(name, data_root, stem):
        left_out: list[Skipped] = []
        images: dict[str, Path | bytes]
        if (folder / "labels.csv").is_file():
            place, table = folder, (folder / "labels.csv").read_text()
            (found,) = read_trees([folder], 0, left_out)
            images = {x.path.relative_to(folder).as_posix(): x.path for x in found}
        elif (folder / f"{stem}.zip").is_file():
            place = folder / f"{stem}.zip"
            table = _text_in_zip(place, "labels.csv")
            images = {str(x.path): x.content for x in read_zip(place, 0, left_out)}
        else:
            continue
        try:
            rows = list(csv.DictReader(io.StringIO(table)))
        except csv.Error as error:
            raise UserError(f"cannot read labels.csv in {place}: {error}") from error
        if not rows or not {"path", "fine"} <= rows[0].keys():
            raise UserError(f"{name}: expected labels.csv with columns path and fine in {folder}")
        samples = _listed(rows, images, place, left_out, skipped)
        return (
            [s for s in samples if int(s.label) % 2 == 0],
            [s for s in samples if int(s.label) % 2 == 1],
        )
    raise _missing(name, data_root, f"{stem}.zip, or its contents with labels.csv")


def _listed(
    rows: Sequence[dict[str, str]],
    images: Mapping[str, Path | bytes],
    place: Path,
    left_out: Sequence[Skipped],
    skipped: list[Skipped],
) -> list[Sample]:
    """Samples of the rows of labels.csv; what has no row, no image or two rows is skipped."""
    named = {str(place / row["path"]) for row in rows}
    skipped += [x for x in left_out if x.name in named or not x.reason.startswith(NO_FORMAT)]
    explained = {x.name for x in left_out}
    samples: dict[str, Sample] = {}
    for row in rows:
        path, name = row["path"], str(place / row["path"])
        if path in samples:
            skipped.append(Skipped(name, SAME_AS.format("an earlier row of labels.csv")))
        elif path in images:
            samples[path] = Sample(path, row["fine"].zfill(3), images[path])
        elif name not in explained:
            skipped.append(Skipped(name, "listed in labels.csv, but no image to be found"))
    skipped += [Skipped(str(place / x), "not in labels.csv") for x in images if x not in samples]
    return list(samples.values())


def _read_folder(data_root: str | None, skipped: list[Skipped]) -> Split:
    """An ImageFolder tree, one folder per class, or two in `train/` and `test/`."""
    (root,) = _places("folder", data_root)
    if (root / "train").is_dir() and (root / "test").is_dir():
        train, test = _read_trees([root / "train", root / "test"], 1, skipped)
        others = sorted(x for x in root.iterdir() if x.name not in ("train", "test"))
        skipped += [Skipped(str(x), "beside train and test, which alone are read") for x in others]
        return train, test
    (samples,) = _read_trees([root], 1, skipped)
    return samples, None


def _read_csv(data_root: str | None, skipped: list[Skipped]) -> Split:
    """A table of images, in the format of open-metric-learning; its validation is the test."""
    file = Path(data_root or os.environ.get(DATA_ROOT_VARIABLE) or "")
    if not file.is_file():
        raise UserError(f"csv needs --data-root, a table of images; there is no file {file}")
    splits: dict[str, dict[str, Sample]] = {"train": {}, "test": {}}
    try:
        with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
            rows = csv.DictReader(lines)
            if missing := {"path", "label", "split"} - set(rows.fieldnames or ()):
                raise UserError(f"{file}: expected a column {min(missing)} in line 1")
            for row in rows:
                split, sample = _row_of_csv(file, rows.line_num, row)
                if not sample.source.is_file():
                    skipped.append(Skipped(sample.name, f"listed in {file.name}, but no file"))
                elif any(sample.name in x for x in splits.values()):
                    skipped.append(Skipped(sample.name, SAME_AS.format("an earlier row")))
                else:
                    splits[split][sample.name] = sample
    except (OSError, csv.Error) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    train, test = (list(x.values()) for x in splits.values())
    say(*warnings_of_labels(s.label for s in (*train, *test)))
    queries = [s for s in test if s.query]
    within = sum(s.gallery for s in queries)
    if within not in (0, len(queries)):
        raise UserError(
            f"{file}: expected queries that are all in the gallery or none of them, got "
            f"{within} of {len(queries)} in it"
        )
    return train, test or None


def _row_of_csv(file: Path, line: int, row: dict[str, str | None]) -> tuple[str, Sample]:
    def refused(expected: str, columns: Sequence[str]) -> UserError:
        got = ", ".join(f"{x}={row.get(x) or ''}" for x in columns)
        return UserError(f"{file}, line {line}: expected {expected}, got {got}")

    def value(column: str, meanings: Mapping[str, Any]) -> Any:
        text = (row.get(column) or "").strip().lower()
        if text not in meanings:
            raise refused(f"one of {', '.join(filter(None, meanings))}", [column])
        return meanings[text]

    split = value("split", {"train": "train", "validation": "test", "test": "test"})
    roles = {}
    if split == "test":
        yes_or_no = {"true": True, "1": True, "false": False, "0": False, "": True}
        roles = {x: value(f"is_{x}", yes_or_no) for x in ("query", "gallery")}
    label = (row["label"] or "").strip()
    if not row["path"] or not label:
        raise refused("a path and a label", ["path", "label"])
    path = Path(plain_path(file.parent / row["path"]))
    corners = ("x_1", "y_1", "x_2", "y_2")
    if all((row.get(x) or "").strip().lower() in ("", "none", "nan") for x in corners):
        return split, Sample(str(path), label, path, **roles)
    try:
        left, top, right, bottom = box = tuple(float(row[x]) for x in corners)
    except (KeyError, TypeError, ValueError) as error:
        raise refused("four numbers or none", corners) from error
    if not (left < right and top < bottom):
        raise refused("x_1 < x_2 and y_1 < y_2", corners)
    name = f"{path} [{left:g} {top:g} {right:g} {bottom:g}]"
    return split, Sample(name, label, path, box=box, **roles)


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


def _reader_of_benchmark(name: str) -> Callable[[str | None, list[Skipped]], Split]:
    """A reader for a data set that comes with split files."""

    def read(data_root: str | None, skipped: list[Skipped]) -> Split:
        places = _places(name, data_root, *BENCHMARK_SETS[name].folders)
        train, test = (
            [Sample(str(x.path), x.label, x.path, parts=x.parts) for x in images]
            for images in benchmark_sets.read(name, places)
        )
        return train, test

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
    "grocery": partial(_read_grocery, "grocery", "grocery64"),
    "grocery160": partial(_read_grocery, "grocery160", "grocery160"),
    "folder": _read_folder,
    "csv": _read_csv,
    **{name: _reader_of_pml(name) for name in PML_DATASETS},
    **{name: _reader_of_benchmark(name) for name in BENCHMARK_SETS},
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


def _read_parts(folder: Path, names: Sequence[str], skipped: list[Skipped]) -> list[list[Sample]]:
    """Samples of `folder/name/alphabet/character/image`, or of the same in `name.zip`.

    An empty list stands for a part that is not there.
    """
    if all((folder / name).is_dir() for name in names):  # together, so that no file counts twice
        return _read_trees([folder / name for name in names], 2, skipped)
    parts = []
    for name in names:
        if (folder / name).is_dir():
            parts += _read_trees([folder / name], 2, skipped)
        elif (folder / f"{name}.zip").is_file():
            found = read_zip(folder / f"{name}.zip", 2, skipped, top=name)
            parts += _samples([found], 2)
        else:
            parts.append([])
    return parts


def _read_trees(roots: Sequence[Path], levels: int, skipped: list[Skipped]) -> list[list[Sample]]:
    """Samples of the images below each root; the first `levels` folder names are the class."""
    return _samples(read_trees(roots, levels, skipped), levels)


def _samples(trees: Sequence[Sequence[Found]], levels: int) -> list[list[Sample]]:
    say(*warnings_of(trees, levels))
    return [
        [Sample(str(x.path), x.label, x.path if x.content is None else x.content) for x in tree]
        for tree in trees
    ]


def _text_in_zip(path: Path, name: str) -> str:
    with opened_zip(path) as archive:
        return archive.read(name).decode() if name in archive.namelist() else ""
