"""No file counts twice, and nothing is left out without a reason."""

import csv
import os

import pytest
from PIL import Image


def load(root):
    from retrieval.data import load_splits

    return load_splits("folder", str(root), val_fraction=0.2, seed=0)


def class_names(images):
    return {s.label for s in images.samples}


def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        Image.new("L", (8, 8)).save(file, "PNG")


def write_classes(root, classes):
    for name in classes:
        for i in range(5):
            write(root / name / f"{i}.png")


def reasons(splits):
    return {x.name: x.reason for x in splits.skipped}


def test_link_that_points_back_is_not_followed(tmp_path):
    write_classes(tmp_path, "abcd")
    plain = load(tmp_path).summary()
    for target in (".", ".."):
        (tmp_path / "a" / "me").unlink(missing_ok=True)
        (tmp_path / "a" / "me").symlink_to(tmp_path / target, target_is_directory=True)
        splits = load(tmp_path)
        assert splits.summary() == plain
        assert "a link back to" in reasons(splits)[str(tmp_path / "a" / "me")]


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_the_same_file_counts_once(tmp_path, link):
    write_classes(tmp_path, "abcd")
    link(tmp_path / "d" / "0.png", tmp_path / "a" / "copy.png")
    splits = load(tmp_path)
    assert sum(x["images"] for x in splits.summary().values()) == 20
    assert any("the same as" in x for x in reasons(splits).values())


def test_linked_class_is_not_in_both_splits(tmp_path):
    write_classes(tmp_path / "train", "ab")
    write_classes(tmp_path / "test", "cd")
    (tmp_path / "test" / "z").symlink_to(tmp_path / "train" / "a", target_is_directory=True)
    (tmp_path / "train" / "y").symlink_to(tmp_path / "test" / "c", target_is_directory=True)
    splits = load(tmp_path)
    assert class_names(splits.train) == {"a", "b"}
    assert class_names(splits.test) == {"c", "d"}
    assert {str(tmp_path / "test/z"), str(tmp_path / "train/y")} <= reasons(splits).keys()


def test_what_is_not_used_is_listed_with_its_reason(tmp_path):
    write_classes(tmp_path, ["a", "b", "c", "d", ".ipynb_checkpoints"])
    for name in ("a/x.heic", "b/x.svg", "stray.png"):
        write(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere")
    listed = reasons(load(tmp_path))
    for name, reason in {
        ".ipynb_checkpoints": "hidden folder",
        "a/x.heic": "not a format that Pillow opens (.heic)",
        "b/x.svg": "not a format that Pillow opens (.svg)",
        "stray.png": "outside the class folders",
        "empty": "without an image",
        "a/gone.png": "leads nowhere",
    }.items():
        assert reason in listed.pop(str(tmp_path / name))
    assert not listed


def test_suffixes_are_those_that_pillow_opens(tmp_path):
    write_classes(tmp_path, "abcd")
    write(tmp_path / "a" / "x.jfif")
    write(tmp_path / "a" / "x.jp2")
    assert sum(x["images"] for x in load(tmp_path).summary().values()) == 22


def test_suspicious_trees_get_a_warning(tmp_path, capsys):
    write_classes(tmp_path, ["shoe", "Shoe", "x/y", "z"])
    load(tmp_path)
    out = capsys.readouterr().out
    assert "differ in case alone: Shoe and shoe" in out
    assert "5 images lie in folders inside a class folder" in out


def test_run_folder_lists_classes_and_what_was_skipped(main, tmp_path, quick):
    arguments = ["--epochs", 1, "--output-dir", tmp_path, "--name", "run"]
    assert main(*quick, *arguments) == 0
    with (tmp_path / "run" / "classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(r["class"], r["split"]) for r in rows if r["split"] == "test"} == {
        (x, "test") for x in "56789"
    }
    assert sum(int(r["images"]) for r in rows) == 240
    assert (tmp_path / "run" / "skipped.csv").read_text().split() == ["name,reason"]
