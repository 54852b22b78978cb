"""No file counts twice, and nothing is left out without a reason."""

import os
import shutil
import stat
import warnings
import zipfile

import pytest
from benchmark_trees import class_names, png, reasons, write, write_classes
from helpers import csv_rows
from retrieval import image_tree
from retrieval.data import READERS, load_splits
from retrieval.errors import UserError


def load(root, dataset="folder"):
    return load_splits(dataset, str(root), val_fraction=0.2, seed=0)


def images_of(splits):
    return sum(x["images"] for x in splits.summary().values())


@pytest.fixture
def four(tmp_path):
    """A folder with four classes of five images."""
    write_classes(tmp_path / "four", "abcd")
    return tmp_path / "four"


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_the_same_file_counts_once(four, link):
    link(four / "d" / "0.png", four / "a" / "copy.png")
    splits = load(four)
    assert images_of(splits) == 20
    assert any("the same as" in x.reason for x in splits.skipped)


@pytest.mark.parametrize(
    ("dataset", "first", "second"),
    [("folder", "train", "test"), ("omniglot", "images_background/A", "images_evaluation/B")],
)
def test_linked_class_is_not_in_both_splits(tmp_path, dataset, first, second):
    train, test = tmp_path / first, tmp_path / second
    write_classes(train, "ab")
    write_classes(test, "cd")
    (test / "z").symlink_to(train / "a", target_is_directory=True)
    (train / "y").symlink_to(test / "c", target_is_directory=True)
    splits = load(tmp_path, dataset)
    assert {x[-1] for x in class_names(splits.train)} == {"a", "b"}
    assert {x[-1] for x in class_names(splits.test)} == {"c", "d"}
    assert {x.name for x in splits.skipped} == {str(test / "z"), str(train / "y")}


def test_what_is_not_used_is_listed_with_its_reason(four):
    """What systems and the program keep beside the classes, links, and what is no image."""
    used = ["a/x.jfif", "a/x.jp2", "a/more/5.png"]
    images = {
        "a/x.heic": "not a format that Pillow opens (.heic)",
        "stray.png": "an image outside the class folders",
    }
    folders = {
        **dict.fromkeys([".ipynb_checkpoints", "@eaDir", "#recycle", "$RECYCLE.BIN"], HIDDEN),
        **dict.fromkeys(["$Recycle.Bin", "System Volume Information", "a/@eaDir"], HIDDEN),
        **dict.fromkeys(["runs", "one run", "a/mine"], "a folder of this program's runs"),
    }
    for name in (*used, *images, *(f"{x}/0.png" for x in folders)):
        write(four / name, png())
    for name in ("runs/mine", "one run", "a/mine"):
        write(four / name / "config.json", "{}")
        write(four / name / "log.txt", "")
    write(four / "c" / "config.json", "{}")  # of something else
    (four / "empty").mkdir()
    os.mkfifo(four / "b" / "x.jpg")
    os.mkfifo(four.parent / "pipe.jpg")
    links = {"a/gone.png": "nowhere", "a/me": ".", "a/up": "..", "b/pipe.jpg": "../pipe.jpg"}
    for name, target in links.items():
        (four / name).symlink_to(four / target)
    splits = load(four)
    assert images_of(splits) == 20 + len(used)
    listed = reasons(splits.skipped)
    assert all("a link back to" in listed.pop(str(four / x)) for x in ("a/me", "a/up"))
    others = {
        "empty": "a class folder without an image that can be used",
        "c/config.json": "not a format that Pillow opens (.json)",
        "a/gone.png": "a link that leads nowhere",
        **dict.fromkeys(["b/x.jpg", "b/pipe.jpg"], "a pipe, socket or device"),
    }
    assert listed == {str(four / k): v for k, v in {**images, **folders, **others}.items()}


HIDDEN = "a hidden folder"


def test_names_that_are_no_utf_8_are_written_as_escapes(trained, four, capsys):
    name = os.fsdecode(b"caf\xe9")
    (four / "a").rename(four / name)
    (four / name / f"{name}.png").write_bytes(b"no image")
    run = trained("--data-root", four, "--batch-size", 4, "--report", name=name)
    out = capsys.readouterr().out
    assert "cannot read the image" in out and r"caf\udce9.png" in out
    for file in ("classes.csv", "skipped.csv", "log.txt", "report.html"):
        assert r"caf\udce9" in (run / file).read_text(encoding="utf-8"), file


# Below the root of an Omniglot part: what a folder and a zip treat alike.
IMAGES = [f"{x}/c{i}/{j}.png" for x in ("Greek", "Korean") for i in range(2) for j in range(2)]
LEFT_OUT = {
    "Greek/.DS_Store": "a hidden file",
    "Greek/c0/._0.png": "a hidden file",
    "Greek/c0/notes.txt": "not a format that Pillow opens (.txt)",
    "Greek/c9/x.svg": "not a format that Pillow opens (.svg)",
    "Greek/stray.png": "an image outside the class folders",
    "Greek/c0/.thumbs/0.png": "a hidden folder",
    "__MACOSX/Greek/c0/0.png": "a hidden folder",
}
SKIPPED = {
    **{k: v for k, v in LEFT_OUT.items() if "hidden folder" not in v},
    "Greek/c0/.thumbs": "a hidden folder",
    "__MACOSX": "a hidden folder",
    "Greek/c9": "a class folder without an image that can be used",
    "Greek/empty": "a class folder without an image that can be used",
}


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
def test_folders_and_zips_follow_the_same_rules(tmp_path, capsys, zipped):
    used = [*IMAGES, "greek/c0/0.png", "Korean/c0/deep/2.png"]
    roots = [tmp_path / name for name in ("images_background", "images_evaluation")]
    for root in roots:
        for x in (*used, *LEFT_OUT):
            write(root / x, png())
        (root / "Greek" / "empty").mkdir()
        if zipped:
            shutil.make_archive(root, "zip", tmp_path, root.name)
            shutil.rmtree(root)
    if zipped:
        roots = [tmp_path / f"{root.name}.zip" / root.name for root in roots]
    skipped = []
    train, test = READERS["omniglot"](str(tmp_path), skipped)
    assert not test  # all alphabets are trained on
    assert sorted(s.name.rpartition("images_background/")[2] for s in train) == sorted(used)
    labels = {f"{x}/c{i}" for x in ("Greek", "Korean") for i in range(2)}
    assert {s.label for s in train} == {*labels, "greek/c0"}
    expected = {str(root / k): v for root in roots for k, v in SKIPPED.items()}
    assert reasons(skipped) == expected and len(skipped) == len(expected)
    out = capsys.readouterr().out
    assert "Unicode form alone: 'Greek/c0' and 'greek/c0'" in out
    assert "images lie in folders inside a class folder" in out


def test_class_names_that_look_alike_are_named():
    for alike in (["caf\u00e9", "cafe\u0301"], ["cat", "cat "], ["\ufb01sh", "Fish"]):
        (line,) = image_tree.warnings_of_labels([*alike, "dog", "dog"])
        assert line.endswith(" alone: " + " and ".join(map(repr, sorted(alike))))
    assert not image_tree.warnings_of_labels(["caf\u00e9", "cafe", "a b", "ab"])


def test_members_of_a_zip_that_are_used_and_others(tmp_path):
    """Of one name the last counts; no other folder is used than that of the zip's name."""
    link = zipfile.ZipInfo("a/x/link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    members = [("a/x/0.png", b"first"), ("a/x/0.png", b"last"), ("./a/x/1.png", b"")]
    members += [(link, b"0.png"), ("../a/x/2.png", b""), ("b/x/0.png", b""), ("README", b"")]
    path, skipped = tmp_path / "a.zip", []
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.filterwarnings("ignore", "Duplicate name")
        for member in members:
            archive.writestr(*member)
    found = image_tree.read_zip(path, 1, skipped, top="a")
    used = [(str(x.path), x.label, x.content) for x in found]
    assert used == [("a/x/0.png", "x", b"last"), ("a/x/1.png", "x", b"")]
    assert [(x.name.removeprefix(f"{path}/"), x.reason) for x in skipped] == [
        ("a/x/0.png", "the same as another: a later one of this name"),
        ("a/x/link.png", "a link in a zip"),
        ("..", HIDDEN),
        ("b/x/0.png", "an image outside the class folders"),
        ("README", "not a format that Pillow opens (no suffix)"),
    ]
    # Without such a folder the zip itself is the root.
    found = image_tree.read_zip(path, 1, [], top="c")
    assert [x.label for x in found] == ["a", "a", "b"]


def test_zip_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "grocery64.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/0.png", bytes(10**6))
    assert len(image_tree.read_zip(path, 1, [])) == 1
    monkeypatch.setattr(image_tree, "ALWAYS_HELD", 10**5)
    for read in (lambda: image_tree.read_zip(path, 1, []), lambda: load(tmp_path, "grocery")):
        with pytest.raises(UserError, match="zip: unpacked it would have 1,000,000 bytes, more"):
            read()


def test_run_folder_lists_classes_and_what_was_skipped(one_epoch, digits):
    rows, splits = csv_rows(one_epoch / "classes.csv"), load(digits)
    drawn = dict.fromkeys(("train", "test"), "open set, 0.5 of the classes drawn by --seed 0")
    drawn["val"] = "held-out images of the training classes, drawn by --val-fraction and --seed"
    assert {(r["split"], r["class"], r["decided by"]) for r in rows} == {
        (x, name, drawn[x]) for x in drawn for name in class_names(getattr(splits, x))
    }
    assert sum(int(r["images"]) for r in rows) == 240
    assert (one_epoch / "skipped.csv").read_text().split() == ["name,reason"]
