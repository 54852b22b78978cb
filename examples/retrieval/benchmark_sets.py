"""Data sets of the literature, in the layout in which they come, by their official split files."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .errors import UserError


@dataclasses.dataclass(frozen=True)
class Listed:
    """An image that a split file lists, its class, and the test sets that it belongs to."""

    path: Path
    label: str
    parts: tuple[str, ...] = ()


# Training images and test images.
Lists = tuple[list[Listed], list[Listed]]


def read(name: str, places: Sequence[Path]) -> Lists:
    """Training and test images of a data set.

    Args:
        name: A key of `BENCHMARK_SETS`.
        places: Folders to look in; the first that holds one of the split files is taken.

    Raises:
        UserError: If a split file or an image is missing, or a line is not as expected.
    """
    benchmark = BENCHMARK_SETS[name]
    folder = next((x for x in places if any((x / f).exists() for f in benchmark.files)), None)
    if folder is None:
        raise UserError(
            f"{name} not found in {places[0]}: no {benchmark.files[0]} in it"
            + "".join(f", nor in its folder {x}" for x in benchmark.folders)
            + f"; expected {benchmark.layout}"
        )
    missing = [x for x in benchmark.files if not (folder / x).is_file()]
    if missing:
        raise UserError(
            f"{name} in {folder} lacks {', '.join(missing)}; expected {benchmark.layout}"
        )
    train, test = benchmark.read(folder)
    for images in (train, test):
        absent = [x.path for x in images if not x.path.is_file()]
        if absent:
            raise UserError(
                f"{name}: {len(absent)} of {len(images)} images that a split file lists are "
                f"missing, the first is {absent[0]}; expected {benchmark.layout}"
            )
    return train, test


def _products(folder: Path) -> Lists:
    """Stanford Online Products: `image_id class_id super_class_id path` below a header line."""

    def images(file: Path) -> list[Listed]:
        rows = _rows(file, 4, "image_id class_id super_class_id path")
        if next(rows, None) != ["image_id", "class_id", "super_class_id", "path"]:
            raise UserError(
                f"{file}: expected the header image_id class_id super_class_id path in line 1"
            )
        return [Listed(folder / path, number.zfill(5)) for _, number, _, path in rows]

    return images(folder / "Ebay_train.txt"), images(folder / "Ebay_test.txt")


def _inaturalist(folder: Path) -> Lists:
    """The split of iNaturalist 2018: a path in each line, whose last two folders are the class."""

    def images(file: Path) -> list[Listed]:
        paths = [path for (path,) in _rows(file, 1, "train_val2018/KIND/SPECIES/IMAGE.jpg")]
        return [Listed(folder / x, "/".join(x.split("/")[-3:-1])) for x in paths]

    splits = folder / "Inat_dataset_splits"
    return (
        images(splits / "Inaturalist_train_set1.txt"),
        images(splits / "Inaturalist_test_set1.txt"),
    )


# Test set -> number of its vehicles, which its list is named after.
VEHICLE_TESTS = {"small": 800, "medium": 1600, "large": 2400}


def _vehicles(folder: Path) -> Lists:
    """PKU VehicleID: `image vehicle` in each line; three lists to test on, which may overlap."""
    lists = folder / "train_test_split"

    def rows(file: str) -> Iterator[list[str]]:
        return _rows(lists / file, 2, "IMAGE VEHICLE")

    def listed(image: str, vehicle: str, *parts: str) -> Listed:
        return Listed(folder / "image" / f"{image.zfill(7)}.jpg", vehicle.zfill(5), parts)

    parts: dict[tuple[str, ...], list[str]] = {}
    for part, vehicles in VEHICLE_TESTS.items():
        for row in rows(f"test_list_{vehicles}.txt"):
            parts.setdefault(tuple(row), []).append(part)
    return (
        [listed(*row) for row in rows("train_list.txt")],
        [listed(*row, *names) for row, names in parts.items()],
    )


def _rows(file: Path, columns: int, expected: str) -> Iterator[list[str]]:
    """The words of each line that is not empty; the last column may hold spaces."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    for number, line in enumerate(lines, 1):
        row = line.split(maxsplit=columns - 1)
        if len(row) == columns:
            yield [x.strip() for x in row]
        elif row:
            raise UserError(f"{file}: expected {expected} in line {number}, got {line[:80]!r}")


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A data set: how it is read, the split files, names of its folder, and the layout in words."""

    read: Callable[[Path], Lists]
    files: tuple[str, ...]
    folders: tuple[str, ...]
    layout: str


BENCHMARK_SETS = {
    "StanfordOnlineProducts": Benchmark(
        _products,
        ("Ebay_train.txt", "Ebay_test.txt"),
        (
            "Stanford_Online_Products",
            "StanfordOnlineProducts",
            "StanfordOnlineProducts/Stanford_Online_Products",
        ),
        "Stanford_Online_Products.zip, unpacked: Ebay_train.txt, Ebay_test.txt and twelve folders "
        "of images such as bicycle_final",
    ),
    "INaturalist2018": Benchmark(
        _inaturalist,
        (
            "Inat_dataset_splits/Inaturalist_train_set1.txt",
            "Inat_dataset_splits/Inaturalist_test_set1.txt",
        ),
        ("Inaturalist", "INaturalist2018"),
        "train_val2018.tar.gz, unpacked, as the folder train_val2018, and beside it the folder "
        "Inat_dataset_splits of the Smooth-AP repository (Andrew-Brown1/Smooth_AP)",
    ),
    "VehicleID": Benchmark(
        _vehicles,
        (
            "train_test_split/train_list.txt",
            *(f"train_test_split/test_list_{x}.txt" for x in VEHICLE_TESTS.values()),
        ),
        ("VehicleID_V1.0", "VehicleID"),
        "PKU VehicleID, unpacked: the folders train_test_split and image",
    ),
}
