"""No file counts twice, and nothing is left out without a reason."""

import csv
import os
import shutil
import stat
import warnings
import zipfile

import pytest
from benchmark_trees import class_names, png, write, write_classes
from retrieval import image_tree
from retrieval.data import READERS, load_splits
from retrieval.errors import UserError


def load(root):
    return load_splits("folder", str(root), val_fraction=0.2, seed=0)


def images_of(splits):
    return sum(x["images"] for x in splits.summary().values())


def reasons(splits):
    return {x.name: x.reason for x in splits.skipped}


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


def test_what_is_not_used_is_listed_with_its_reason(four):
    """What systems and the program keep beside the classes, links, and what is no image."""
    used = ["a/x.jfif", "a/x.jp2", "a/more/5.png"]
    images = {
        "a/x.heic": "not a format that Pillow opens (.heic)",
        "b/x.svg": "not a format that Pillow opens (.svg)",
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
    listed = reasons(splits)
    for name in ("a/me", "a/up"):
        assert "a link back to" in listed.pop(str(four / name))
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


def test_suspicious_trees_get_a_warning(tmp_path, capsys):
    write_classes(tmp_path, ["shoe", "Shoe", "x/y", "z"])
    load(tmp_path)
    out = capsys.readouterr().out
    assert "differ in case alone: Shoe and shoe" in out
    assert "5 images lie in folders inside a class folder" in out


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
    assert {x.name: x.reason for x in skipped} == expected
    assert len(skipped) == len(expected)
    out = capsys.readouterr().out
    assert "differ in case alone: Greek/c0 and greek/c0" in out
    assert "images lie in folders inside a class folder" in out


def read_zip_of(path, members, **options):
    """A zip of images, in which a name may stand twice: what is used of it, and what is not."""
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.filterwarnings("ignore", "Duplicate name")
        for name, content in members:
            archive.writestr(name, png() if content is None else content)
    skipped = []
    found = image_tree.read_zip(path, 1, skipped, **options)
    return found, {x.name: x.reason for x in skipped}


def test_of_members_of_one_name_the_last_counts(tmp_path):
    members = [("x/0.png", b"first"), ("x/0.png", b"last"), ("./x/1.png", None)]
    found, skipped = read_zip_of(tmp_path / "a.zip", members)
    assert [str(x.path) for x in found] == ["x/0.png", "x/1.png"]
    assert found[0].content == b"last"
    assert "the same as another" in skipped.pop(str(tmp_path / "a.zip" / "x/0.png"))
    assert not skipped


def test_zip_leads_nowhere_else(tmp_path):
    link = zipfile.ZipInfo("x/link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    members = [(link, b"0.png"), ("../x/0.png", None), ("x/0.png", None)]
    found, skipped = read_zip_of(tmp_path / "a.zip", members)
    assert [x.label for x in found] == ["x"]
    assert list(skipped.values()) == ["a link in a zip", HIDDEN]


def test_beside_the_folder_that_a_zip_is_named_for_is_outside(tmp_path):
    members = [("a/x/0.png", None), ("b/x/0.png", None), ("README", b"")]
    (found,), skipped = read_zip_of(tmp_path / "a.zip", members, top="a")
    assert (str(found.path), found.label) == ("a/x/0.png", "x")
    outside = ["an image outside the class folders", "not a format that Pillow opens (no suffix)"]
    assert list(skipped.values()) == outside
    # Without such a folder the zip itself is the root.
    assert len(image_tree.read_zip(tmp_path / "a.zip", 1, [], top="c")) == 2


def test_zip_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    zips = [f"omniglot-small/images_background_small{i}.zip" for i in (1, 2)]
    members = {"a/b/0.png": bytes(10**6), "labels.csv": "path,fine\n" + " " * 10**6}
    (tmp_path / "omniglot-small").mkdir()
    for name in (*zips, "grocery64.zip"):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            member = "labels.csv" if name == "grocery64.zip" else "a/b/0.png"
            archive.writestr(member, members[member])
    assert len(image_tree.read_zip(tmp_path / zips[0], 2, [])) == 1
    monkeypatch.setattr(image_tree, "ALWAYS_HELD", 10**5)
    for dataset in ("omniglot", "grocery"):
        with pytest.raises(UserError, match="zip: unpacked it would have 1,000,0[01]0 bytes, more"):
            load_splits(dataset, str(tmp_path), 0.2, 0)


def test_a_file_counts_once_in_both_parts_of_omniglot(tmp_path):
    write_classes(tmp_path / "images_background", ["Greek/c0"], 2)
    write_classes(tmp_path / "images_evaluation", ["Korean/c0"], 2)
    link = tmp_path / "images_evaluation" / "Latin"
    link.symlink_to(tmp_path / "images_background" / "Greek", target_is_directory=True)
    skipped = []
    _, test = READERS["omniglot"](str(tmp_path), skipped)
    assert {s.label for s in test} == {"Korean/c0"}
    assert [x.name for x in skipped] == [str(link)]


def test_run_folder_lists_classes_and_what_was_skipped(one_epoch, digits):
    with (one_epoch / "classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    splits = load(digits)
    for split, decided_by in (
        ("train", "open set, 0.5 of the classes drawn by --seed 0"),
        ("val", "held-out images of the training classes, drawn by --val-fraction and --seed"),
        ("test", "open set, 0.5 of the classes drawn by --seed 0"),
    ):
        listed = [r for r in rows if r["split"] == split]
        assert {r["class"] for r in listed} == class_names(getattr(splits, split))
        assert {r["decided by"] for r in listed} == {decided_by}
    assert sum(int(r["images"]) for r in rows) == 240
    assert (one_epoch / "skipped.csv").read_text().split() == ["name,reason"]
