"""Data sets are found in every layout, cleaned by name, and split without shared classes."""

import os
import re
import runpy
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from benchmark_trees import class_names, png, reasons, write, write_classes
from helpers import average_precision_at_r
from PIL import Image
from retrieval.data import load_splits
from retrieval.errors import UserError
from retrieval.image_list import ImageList
from retrieval.network import load_best


def load(name, root=None, **kwargs):
    root = None if root is None else str(root)
    return load_splits(name, root, **{"val_fraction": 0.2, "seed": 0, **kwargs})


def store(files, folder, archive=None):
    """Write files below a folder, or into a zip of that name in it."""
    if archive is None:
        for name, content in files.items():
            write(folder / name, content)
    else:
        folder.mkdir(exist_ok=True)
        with zipfile.ZipFile(folder / archive, "w") as file:
            for name, content in files.items():
                file.writestr(name, content)


def numbered(count):
    return [f"c{i:02d}" for i in range(count)]


def test_digits_train_on_0_to_4_with_or_without_turned_classes_and_test_on_5_to_9():
    plain, turned = load("digits"), load("digits", turned_classes=True)
    assert class_names(plain.train) == class_names(plain.val) == set("01234")
    assert class_names(plain.test) == set("56789")
    assert len(plain.train) + len(plain.val) + len(plain.test) == 1797
    assert plain.val_kind == "held-out images of the training classes"
    labels = class_names(turned.train) | class_names(turned.val)
    assert len(labels) == 8 * 5
    assert turned.val_kind == "held-out classes"
    assert [s.name for s in turned.test.samples] == [s.name for s in plain.test.samples]
    views = [s.open().tobytes() for s in turned.train.samples if s.name == "digit 2"]
    assert len(set(views)) == len(views) > 1


def test_few_classes_hold_out_a_share_of_each_by_the_seed():
    first, again, other = (load("digits", val_fraction=0.5, seed=x) for x in (1, 1, 2))
    names = [{s.name for s in x.val.samples} for x in (first, again, other)]
    assert names[0] == names[1] != names[2]
    assert not names[0] & {s.name for s in first.train.samples}
    for label in "01234":
        train, val = (sum(s.label == label for s in x.samples) for x in (first.train, first.val))
        assert abs(train - val) <= 1


def test_many_classes_hold_out_whole_ones_also_if_folders_are_links(tmp_path):
    write_classes(tmp_path / "elsewhere", numbered(50), 2)
    (tmp_path / "links").mkdir()
    for folder in (tmp_path / "elsewhere").iterdir():
        (tmp_path / "links" / folder.name).symlink_to(folder, target_is_directory=True)
    splits = load("folder", tmp_path / "links")
    parts = {name: (x["images"], x["classes"]) for name, x in splits.summary().items()}
    assert parts == {"train": (40, 20), "val": (10, 5), "test": (50, 25)}
    names = [class_names(x) for x in (splits.train, splits.val, splits.test)]
    assert len(set.union(*names)) == 50
    # One proxy per training class suffices.
    assert set(splits.train.labels) == set(range(20))
    assert not set(splits.train.labels) & set(splits.val.labels)
    turned = load("folder", tmp_path / "links", turned_classes=True)
    assert class_names(turned.val) == names[1]
    assert turned.train.num_classes == 8 * 20


def test_classes_of_a_folder_are_drawn_by_the_seed(tmp_path):
    write_classes(tmp_path, numbered(10))
    drawn = {}
    for seed in (0, 1, 2, 3, 2):
        splits = load("folder", tmp_path, seed=seed)
        tested = class_names(splits.test)
        assert drawn.setdefault(seed, tested) == tested
        trained_on = class_names(splits.train) | class_names(splits.val)
        assert len(tested) == 5 and sorted([*tested, *trained_on]) == numbered(10)
        assert splits.split_kind == f"open set, 0.5 of the classes drawn by --seed {seed}"
        assert not splits.closed_set
    assert len(set(map(frozenset, drawn.values()))) > 1
    assert set(numbered(10)[5:]) not in drawn.values()
    for fraction, tested in ((0.01, 2), (0.3, 3), (0.5, 5), (0.7, 7), (0.99, 8)):
        splits = load("folder", tmp_path, test_fraction=fraction)
        assert (splits.train.num_classes, splits.test.num_classes) == (10 - tested, tested)


@pytest.fixture
def halves(tmp_path):
    """Write classes to train and to test on, each in its folder."""

    def write(train, test, test_images=5):
        write_classes(tmp_path / "train", train)
        write_classes(tmp_path / "test", test, test_images)
        return tmp_path

    return write


@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize("name", ["digits", "folder", "open set"])
def test_without_a_test_every_class_is_trained_on(tmp_path, halves, name, turned):
    """Of a data set with and without a split of its own."""
    dataset, root, names = "folder", tmp_path, numbered(24)
    if name == "digits":
        dataset, root, names = name, None, list("0123456789")
    elif name == "folder":
        write_classes(tmp_path, names)
    else:
        halves(names[::2], names[1::2])
    splits = load(dataset, root, test_fraction=0, turned_classes=turned)
    assert len(splits.test) == 0
    assert class_names(splits.val) == set(names) <= class_names(splits.train)
    assert splits.train.num_classes == len(names) * (8 if turned else 1)
    assert splits.val_kind == "held-out images of the training classes"
    assert splits.split_kind == "no test, every class is trained on"
    assert not {s.name for s in splits.train.samples} & {s.name for s in splits.val.samples}
    assert {row[1] for row in splits.class_rows()} == {"train", "val"}
    every = load(dataset, root, test_fraction=0, turned_classes=turned, val_fraction=0)
    assert len(every.train) == len(splits.train) + len(splits.val) * (8 if turned else 1)
    assert len(every.val) == len(every.test) == 0


def test_train_and_test_with_other_classes_are_an_open_set(halves):
    root = halves("xy", "ab")
    splits = load("folder", root)
    assert (class_names(splits.train), class_names(splits.test)) == ({"x", "y"}, {"a", "b"})
    assert splits.split_kind.startswith("open set") and not splits.closed_set
    for name, place in (("folder", root), ("digits", None)):
        with pytest.raises(UserError, match=f"{name} has a split of its own here; .* got 0.5"):
            load(name, place, test_fraction=0.5)


@pytest.mark.parametrize("classes", [3, 30])
def test_train_and_test_with_the_same_classes_are_a_closed_set(halves, capsys, classes):
    """Also with many classes, of which validation otherwise takes whole ones."""
    names = set(numbered(classes))
    root = halves(names, names, 2)
    splits = load("folder", root)
    assert class_names(splits.train) == class_names(splits.val) == class_names(splits.test) == names
    assert splits.split_kind.startswith("closed set") and splits.closed_set
    assert all(s.name.startswith(str(root / "test")) for s in splits.test.samples)
    assert len(splits.test) == 2 * classes
    for path in (root / "train" / "c01").iterdir():
        path.write_bytes(b"")
    splits = load("folder", root)
    assert class_names(splits.test) == names - {"c01"}
    assert "skipped 1 test classes that are not trained on:\n  c01" in capsys.readouterr().out
    reason = reasons(splits.skipped)["c01"]
    assert reason == "a test class of a closed set without training"


def test_test_classes_that_are_known_in_part_are_refused(halves):
    root = halves("xy", "yz")
    message = "folder: expected test classes that are all trained on, or none of them, .* y.* z"
    with pytest.raises(UserError, match=message):
        load("folder", root)
    assert class_names(load("folder", root, test_fraction=0).train) == {"x", "y", "z"}


def test_what_cannot_be_used_is_skipped_by_name(halves, capsys, monkeypatch):
    """Among it an image that would fill the memory, and classes of a single image."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    root = halves("abc", "def")
    broken = [root / x for x in ("train/a/0.png", "train/b/1.jpg", "test/e/0.gif", "test/f/5.png")]
    contents = (png()[:60], b"not an image", b"", png(size=(50, 50)))
    for path, content in zip(broken, contents, strict=True):
        write(path, content)
    write(root / "test" / "e" / "notes.txt", "not an image, and not meant to be one")
    write(root / "test" / "only" / "one.png", png())
    splits = load("folder", root)
    out = capsys.readouterr().out
    assert "skipped 4 of 34 images" in out
    assert all(f"cannot read the image {path}" in out for path in broken)
    assert "skipped 1 test classes with only one image:\n  only" in out
    assert len(splits.train) + len(splits.val) == 14
    assert class_names(splits.test) == {"d", "e", "f"}
    for i in range(6):
        write(root / "train" / "a" / f"bad{i}.png", b"")
    load("folder", root)
    out = capsys.readouterr().out  # many are counted, and a few named
    assert "skipped 10 of 40 images" in out and "and 5 more" in out
    assert out.count("cannot read") == 5


def test_very_large_images_are_named_once(tmp_path, capsys, monkeypatch, recwarn):
    """And not warned of by Pillow, which does not name them."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    write_classes(tmp_path, "abcd")
    name = tmp_path / "b" / "1.png"
    write(name, png(size=(40, 30)))
    again = runpy.run_module("retrieval.data")  # since pytest undid what importing it filters
    splits = again["load_splits"]("folder", str(tmp_path), 0.2, 0)
    for part in (splits.train, splits.val, splits.test):
        for sample in part.samples:
            sample.open()
    out = capsys.readouterr().out
    assert "1 images are so large that reading them takes long:\n" in out
    assert out.count(str(tmp_path)) == 1 and f"  {name}, 40 x 30\n" in out
    assert not [x for x in recwarn if issubclass(x.category, Image.DecompressionBombWarning)]


ENDLESS = f"path,label,fine,split\n{'x' * 200_000},a,0,train\n"


DAMAGED = [("csv", "labels.csv", ENDLESS, "field larger than field")]
DAMAGED += [("grocery", "labels.csv", ENDLESS, "field larger than field")]
DAMAGED += [("omniglot", "images_background_small1.zip", b"PK but no zip", "")]


@pytest.mark.parametrize(("dataset", "file", "content", "reason"), DAMAGED)
def test_a_damaged_file_is_named(tmp_path, dataset, file, content, reason):
    write(tmp_path / file, content)
    with pytest.raises(UserError, match=f"cannot read .*{file}.*: {reason}"):
        load(dataset, tmp_path / file if dataset == "csv" else tmp_path)


TOO_FEW_TO_TEST = "; --test-fraction 0 trains on every class, without"
# Classes, images of each, and what is refused of them.
TOO_FEW = [
    ("abcd", 1, {}, "folder: too little training data remains"),
    ("abcd", 1, {}, TOO_FEW_TO_TEST),
    ("abcd", 1, {"test_fraction": 0.0}, "got 0 usable images$"),
    ("abcd", 3, {}, "too little training .*; --val-fraction 0 trains on all"),
    ("ab", 9, {}, TOO_FEW_TO_TEST),
    ("abc", 9, {}, TOO_FEW_TO_TEST),
]


@pytest.mark.parametrize(("classes", "images", "settings", "message"), TOO_FEW)
def test_too_few_images_are_refused_with_the_way_out(tmp_path, classes, images, settings, message):
    write_classes(tmp_path, classes, images)
    with pytest.raises(UserError, match=message):
        load("folder", tmp_path, **settings)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_without_verification_is_named_when_met(main, capsys, tmp_path, workers):
    write_classes(tmp_path / "data", "abcd")
    write(tmp_path / "data" / "c" / "0.png", png()[:60])
    arguments = ["--dataset", "folder", "--data-root", tmp_path / "data", "--skip-verify"]
    arguments += ["--output-dir", tmp_path / "runs", "--epochs", 1, "--image-size", 8]
    assert main(*arguments, "--workers", workers) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith(f"train.py: error: cannot read the image {tmp_path / 'data/c/0.png'}")


OMNIGLOT = {
    "zips": ("omniglot-small", "images_background_small1", "images_background_small2", True),
    "folders": ("", "images_background_small1", "images_background_small2", False),
    "torchvision": ("omniglot-py", "images_background", "images_evaluation", False),
}


@pytest.mark.parametrize("layout", OMNIGLOT)
def test_omniglot_layouts(tmp_path, monkeypatch, layout):
    folder, first, second, zipped = OMNIGLOT[layout]
    for part, alphabets in ((first, ["Greek", "Korean"]), (second, ["Greek", "Tagalog"])):
        characters = [f"{part}/{x}/character{c:02d}" for x in alphabets for c in range(3)]
        files = {f"{x}/{i:04d}.png": png(i, mode="1") for x in characters for i in range(4)}
        store(files, tmp_path / folder, f"{part}.zip" if zipped else None)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setenv("PML_PNP_DATA", str(tmp_path))
    splits = load("omniglot")
    assert class_names(splits.train) == {
        f"{a}/character{c:02d}" for a in ("Greek", "Korean") for c in range(3)
    }
    # Greek stands in both parts.
    assert class_names(splits.test) == {f"Tagalog/character{c:02d}" for c in range(3)}
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "archive"),
    [("grocery", "grocery64.zip"), ("grocery160", "grocery160.zip"), ("grocery", None)],
)
def test_grocery_counts_no_file_twice_and_lists_what_it_leaves_out(tmp_path, capsys, name, archive):
    paths = [f"train/{c}/{i}.jpg" for c in range(4) for i in range(4)]
    rows = [*paths, paths[0], "train/1/.hidden.jpg", "train/1/x.svg"]
    files = {x: png(i) for i, x in enumerate([*rows, "train/2/unlisted.jpg"])}
    table = "".join(f"{x},{x[6]},0\n" for x in [*rows, "train/0/missing.jpg"])
    files |= {"labels.csv": "path,fine,coarse\n" + table, "classes.csv": "", "LICENSE": ""}
    store(files, tmp_path, archive)
    splits = load(name, tmp_path)
    assert class_names(splits.train) == {"000", "002"}
    assert class_names(splits.test) == {"001", "003"}
    assert sum(x["images"] for x in splits.summary().values()) == 16
    place = tmp_path / archive if archive else tmp_path
    listed = reasons(splits.skipped)
    missing = listed.pop(str(place / "train/0/missing.jpg"))
    assert f"1 x {missing}" in capsys.readouterr().out
    assert listed == {
        str(place / paths[0]): "the same as another: an earlier row of labels.csv",
        str(place / "train/1/.hidden.jpg"): "a hidden file",
        str(place / "train/1/x.svg"): "not a format that Pillow opens (.svg)",
        str(place / "train/2/unlisted.jpg"): "not in labels.csv",
    }


def test_what_lies_beside_train_and_test_is_named(tmp_path):
    for name in ("train/a", "train/b", "test/c", "test/d", "val/e"):
        for i in range(4):
            store({f"{name}/{i}.png": png(i + 10 * ord(name[-1]))}, tmp_path)
    (tmp_path / "README").touch()
    beside = [str(tmp_path / x) for x in ("README", "val")]
    expected = dict.fromkeys(beside, "beside train and test, which alone are read")
    assert reasons(load("folder", tmp_path).skipped) == expected


def write_cub(root):
    paths = [f"{c:03d}.bird/{i}.jpg" for c in (1, 2, 150, 151) for i in range(4)]
    base = root / "CUB_200_2011"
    write(base / "images.txt", "".join(f"{i} {p}\n" for i, p in enumerate(paths, 1)))
    labels = [f"{i} {int(p[:3])}\n" for i, p in enumerate(paths, 1)]
    write(base / "image_class_labels.txt", "".join(labels))
    for path in paths:
        write(base / "images" / path, png())


def write_cars(root):
    write(root / "names.csv", "".join(f"car {i}\n" for i in range(1, 197)))
    for split in ("train", "test"):
        rows = []
        for c in (1, 2, 150, 151):
            for i in range(2):
                write(root / "car_data/car_data" / split / f"car {c}" / f"{i}.jpg", png())
                rows.append(f"{i}.jpg,0,0,9,9,{c}\n")
        write(root / f"anno_{split}.csv", "".join(rows))


@pytest.mark.parametrize(("name", "write"), [("CUB", write_cub), ("Cars196", write_cars)])
def test_pml_data_sets_are_found_or_said_how_to_get(tmp_path, name, write):
    with pytest.raises(UserError, match=rf"{name} could not be read .*datasets.{name}\(root="):
        load(name, tmp_path)
    write(tmp_path / name)
    for root in (tmp_path, tmp_path / name):
        splits = load(name, root)
        assert [x["images"] for x in splits.summary().values()] == [4, 4, 8]
        assert [x["classes"] for x in splits.summary().values()] == [2, 2, 2]
        assert not class_names(splits.train) & class_names(splits.test)
    for path in tmp_path.rglob("*.jpg"):  # which the index names
        path.unlink()
    with pytest.raises(UserError, match="too little training data remains"):
        load(name, tmp_path)


COLUMNS = ["label", "path", "split", "is_query", "is_gallery", "x_1", "x_2", "y_1", "y_2"]


def write_table(root, rows, columns=COLUMNS):
    """A table with a column of row numbers."""
    root.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows, columns=columns).to_csv(root / "table.csv")
    return root / "table.csv"


def table_rows(root, classes="abcd", count=5):
    """Half of the classes to train on, all images of the others queries and in the gallery."""
    write_classes(root, classes, count)
    return [
        {"label": c, "path": f"{c}/{i}.png", "split": split, "is_query": yes, "is_gallery": yes}
        for c in classes
        for i in range(count)
        for split, yes in [
            ("train", "") if c < classes[len(classes) // 2] else ("validation", True)
        ]
    ]


def test_table_says_which_image_is_of_which_class_and_split(tmp_path):
    rows = table_rows(tmp_path)
    splits = load("csv", write_table(tmp_path, rows))
    assert class_names(splits.train) == class_names(splits.val) == {"a", "b"}
    assert class_names(splits.test) == {"c", "d"} and len(splits.test) == 10
    assert splits.test.roles is None and not splits.skipped
    assert {s.name for s in splits.test.samples} == set(map(str, tmp_path.glob("[cd]/*")))
    rows = [{**x, "split": "train"} for x in rows]  # without a test
    splits = load("csv", write_table(tmp_path, rows, ["path", "label", "split"]))
    assert splits.split_kind == "open set, 0.5 of the classes drawn by --seed 0"


def test_labels_of_a_table_are_stripped_and_named_where_they_are_alike(tmp_path, capsys):
    rows = table_rows(tmp_path)
    for row, label in ((rows[0], " a"), (rows[10], "c "), (rows[11], "C"), (rows[12], "C")):
        row["label"] = label
    splits = load("csv", write_table(tmp_path, rows))
    assert class_names(splits.train) == {"a", "b"}
    assert class_names(splits.test) == {"C", "c", "d"}
    assert "Unicode form alone: 'C' and 'c'\n" in capsys.readouterr().out


def test_a_table_in_a_linked_folder_names_the_files_that_the_system_finds(tmp_path):
    rows = table_rows(tmp_path / "real" / "images")
    write_classes(tmp_path / "images", "abcd", 4)  # others
    write_classes(tmp_path / "real" / "folder", "c")
    for row in rows:
        row["path"] = row["path"] if row["label"] == "c" else f"../images/{row['path']}"
    write_table(tmp_path / "real" / "folder", rows)
    link = tmp_path / "link"
    link.symlink_to("real/folder")
    root = str(link / "table.csv")
    splits = load("csv", root)
    images = Path(os.path.realpath(tmp_path / "real" / "images"))
    expected = {images / label / f"{i}.png" for label in "abd" for i in range(5)}
    expected |= {link / "c" / f"{i}.png" for i in range(5)}  # as before, where nothing is wrong
    found = [s.source for x in (splits.train, splits.val, splits.test) for s in x.samples]
    assert set(found) == expected and not splits.skipped
    listed = ImageList(splits, {"data_root": root, "skip_verify": True}).entries
    assert {path for path, label in listed if label == "c"} == {f"c/{i}.png" for i in range(5)}


def test_boxes_are_cut_out_of_the_upright_image_and_what_is_outside_left_out(tmp_path):
    rows = table_rows(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = Image.open(tmp_path / "c" / "0.png").copy()
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "c" / "0.png", exif=exif)
    rows[10] |= {"x_1": 2, "x_2": 8.0, "y_1": 1, "y_2": 99}
    twice = {**rows[10], "x_1": 0}
    outside = {**rows[11], "x_1": 50, "x_2": 60, "y_1": 0, "y_2": 5}
    (tmp_path / "d" / "4.png").unlink()
    os.mkfifo(tmp_path / "d" / "4.png")
    splits = load(
        "csv", write_table(tmp_path, [*rows, twice, outside, {**rows[12], "path": "a/../c/2.png"}])
    )
    places = {s.name: s for s in splits.test.samples}
    (found,) = (s for name, s in places.items() if name.endswith("c/0.png [2 1 8 99]"))
    assert (np.asarray(found.open()) == np.asarray(upright)[1:10, 2:8]).all()
    assert f"{tmp_path}/c/0.png [0 1 8 99]" in places and len(places) == 10
    listed = reasons(splits.skipped)
    assert "is outside of its 12 x 10 pixels" in listed[f"{tmp_path}/c/1.png [50 0 60 5]"]
    assert listed[f"{tmp_path}/c/2.png"] == "the same as another: an earlier row"
    assert listed[f"{tmp_path}/d/4.png"] == "listed in table.csv, but no file"
    (tmp_path / "c" / "0.png").unlink()
    assert found.extremes() is None  # by its suffix, without a look at the file


@pytest.mark.parametrize("holds_queries", [False, True])
def test_queries_of_a_table_find_what_is_in_its_gallery(
    trained, command, tmp_path, strict_json, holds_queries
):
    """By the definition of the metrics; with a class in the gallery that has no query."""
    rows = table_rows(tmp_path / "data", "abcdef", 6)
    for i, row in enumerate(rows[18:]):
        query = row["label"] != "f" and i % 3 == 0
        row |= {"is_query": query, "is_gallery": holds_queries or not query}
    rows = rows[:-5]  # one image of the class without a query
    file = write_table(tmp_path / "data", rows)
    run = trained("--dataset", "csv", "--data-root", file, "--batch-size", 4, "--report")
    tested = [x for x in rows if x["split"] == "validation"]
    queries = [i for i, x in enumerate(tested) if x["is_query"]]
    gallery = [i for i, x in enumerate(tested) if x["is_gallery"]]
    embeddings = load_best(run).embed([file.parent / x["path"] for x in tested])
    precisions = []
    for q in queries:
        others = [i for i in gallery if i != q]
        others.sort(key=lambda i: -float(embeddings[q] @ embeddings[i]))
        right = [tested[i]["label"] == tested[q]["label"] for i in others]
        precisions.append(average_precision_at_r(right))
    metrics = strict_json(run / "metrics.json")
    found = metrics["trained"]["mean_average_precision_at_r"]
    assert found == pytest.approx(np.mean(precisions), abs=1e-6)
    said = f"; {len(queries)} queries, {len(gallery)} images in the gallery"
    assert metrics["split"].endswith(said)
    page = (run / "report.html").read_text()
    assert "network ranks the images found now" not in page  # with another result
    (run / "metrics.json").unlink()  # as if it had not ended
    assert command("report", run) == 0
    assert f"{found:.4f}" in (run / "report.html").read_text()


# What is wrong in the first row of the test or in all, and what the message says.
WRONG_ROWS = {
    "split": ({"split": "val"}, "line 12: expected one of train, validation, test, got split=val"),
    "role": ({"is_query": "maybe"}, "line 12: expected one of true, 1, false, 0, got is_query="),
    "no path": ({"path": ""}, "line 12: expected a path and a label, got path=, label=c"),
    "text": ({"x_1": "left"}, "line 12: expected four numbers or none, got x_1=left, y_1="),
    "no box": (dict.fromkeys(COLUMNS[5:], 3), "line 12: expected x_1 < x_2 and y_1 < y_2, got x_1"),
    "gallery": ({"is_gallery": False}, "all in the gallery or none of them, got 9 of 10 in it"),
    "all queries": ({"is_query": False}, "csv: no query has another image of its class in the"),
    "all gallery": ({"is_gallery": False}, "csv: no query has another image of its class in the"),
}


@pytest.mark.parametrize("mistake", WRONG_ROWS)
def test_row_of_a_table_that_is_not_as_expected_is_named(tmp_path, mistake):
    rows = table_rows(tmp_path)
    wrong, message = WRONG_ROWS[mistake]
    for row in rows[10:] if mistake.startswith("all") else rows[10:11]:
        row |= wrong
    with pytest.raises(UserError, match=re.escape(message)):
        load("csv", write_table(tmp_path, rows))


def test_table_that_is_missing_or_lacks_a_column(tmp_path):
    with pytest.raises(UserError, match="csv needs --data-root, a table of images; there is no"):
        load("csv", tmp_path / "none.csv")
    file = write_table(tmp_path, [], ["path", "label"])
    with pytest.raises(UserError, match="table.csv: expected a column split in line 1"):
        load("csv", file)
