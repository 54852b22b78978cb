"""No file counts twice, and nothing is left out without a reason."""

import csv
import io
import os
import shutil
import stat
import warnings
import zipfile

import pytest
from PIL import Image
from retrieval import image_tree
from retrieval.data import READERS, load_splits
from retrieval.errors import UserError
from retrieval.image_tree import read_zip


def load(root):
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


def test_what_systems_and_the_program_keep_beside_the_classes_is_left_out(tmp_path):
    write_classes(tmp_path, "abcd")
    plain = load(tmp_path).summary()
    kept = ["@eaDir", "#recycle", "$RECYCLE.BIN", "$Recycle.Bin", "System Volume Information"]
    for folder in [*kept, "a/@eaDir/0.png", "runs", "runs/mine/export", "one run"]:
        write(tmp_path / folder / "thumbnail.png")
    for run in ("runs/mine", "one run"):
        (tmp_path / run / "config.json").write_text("{}")
        (tmp_path / run / "log.txt").write_text("")
    (tmp_path / "c" / "config.json").write_text("{}")  # of something else
    splits = load(tmp_path)
    assert splits.summary() == plain
    expected = dict.fromkeys([*kept, "a/@eaDir"], "a hidden folder")
    expected |= dict.fromkeys(["runs", "one run"], "a folder of this program's runs")
    expected["c/config.json"] = "not a format that Pillow opens (.json)"
    assert reasons(splits) == {str(tmp_path / k): v for k, v in expected.items()}


def test_a_run_leaves_out_no_folder_beside_it(tmp_path):
    write_classes(tmp_path, ["a/more", "b", "c", "d"])
    plain = load(tmp_path).summary()
    write(tmp_path / "a" / "mine" / "thumbnail.png")
    for name in ("config.json", "log.txt"):
        (tmp_path / "a" / "mine" / name).write_text("{}")
    splits = load(tmp_path)
    assert splits.summary() == plain
    assert reasons(splits) == {str(tmp_path / "a" / "mine"): "a folder of this program's runs"}


@pytest.mark.parametrize("linked", [False, True], ids=["", "linked"])
def test_what_is_no_file_is_not_read(tmp_path, linked):
    write_classes(tmp_path / "data", "abcd")
    place = tmp_path / "data" / "a" / "x.jpg"
    pipe = tmp_path / "pipe.jpg" if linked else place
    os.mkfifo(pipe)
    if linked:
        place.symlink_to(pipe)
    assert reasons(load(tmp_path / "data")) == {str(place): "a pipe, socket or device"}


def test_names_that_are_no_utf_8_are_written_as_escapes(main, tmp_path, capsys):
    name = os.fsdecode(b"caf\xe9")
    write_classes(tmp_path / "data", ["b", "c", "d", name])
    (tmp_path / "data" / name / f"{name}.png").write_bytes(b"no image")
    arguments = ["--dataset", "folder", "--data-root", tmp_path / "data", "--image-size", 8]
    arguments += ["--output-dir", tmp_path, "--name", name, "--epochs", 1, "--workers", 0]
    assert main(*arguments, "--samples-per-class", 2, "--batch-size", 4) == 0
    out = capsys.readouterr().out
    assert "cannot read the image" in out and r"caf\udce9.png" in out
    for file in ("classes.csv", "skipped.csv", "log.txt", "report.html"):
        assert r"caf\udce9" in (tmp_path / name / file).read_text(encoding="utf-8"), file


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
    names = ["images_background", "images_evaluation"]
    for name in names:
        files = [*IMAGES, *LEFT_OUT, "greek/c0/0.png", "Korean/c0/deep/2.png"]
        for x in files:
            write(tmp_path / name / x)
        (tmp_path / name / "Greek" / "empty").mkdir()
    roots = {name: tmp_path / name for name in names}
    if zipped:
        for name in names:
            shutil.make_archive(tmp_path / name, "zip", tmp_path, name)
            shutil.rmtree(tmp_path / name)
            roots[name] = tmp_path / f"{name}.zip" / name
    skipped = []
    train, test = READERS["omniglot"](str(tmp_path), skipped)
    assert not test  # all alphabets are trained on
    assert sorted(s.name.rpartition("images_background/")[2] for s in train) == sorted(
        [*IMAGES, "greek/c0/0.png", "Korean/c0/deep/2.png"]
    )
    assert {s.label for s in train} == {
        *(f"{x}/c{i}" for x in ("Greek", "Korean") for i in range(2)),
        "greek/c0",
    }
    expected = {str(root / k): v for root in roots.values() for k, v in SKIPPED.items()}
    assert {x.name: x.reason for x in skipped} == expected
    assert len(skipped) == len(expected)
    out = capsys.readouterr().out
    assert "differ in case alone: Greek/c0 and greek/c0" in out
    assert "images lie in folders inside a class folder" in out


def zip_of(path, members):
    """A zip of images, in which a name may stand twice."""
    stream = io.BytesIO()
    Image.new("L", (8, 8)).save(stream, "PNG")
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.filterwarnings("ignore", "Duplicate name")
        for name, content in members:
            archive.writestr(name, stream.getvalue() if content is None else content)


def test_of_members_of_one_name_the_last_counts(tmp_path):
    zip_of(tmp_path / "a.zip", [("x/0.png", b"first"), ("x/0.png", b"last"), ("./x/1.png", None)])
    skipped = []
    found = read_zip(tmp_path / "a.zip", 1, skipped)
    assert [str(x.path) for x in found] == ["x/0.png", "x/1.png"]
    assert found[0].content == b"last"
    ((name, reason),) = [(x.name, x.reason) for x in skipped]
    assert name == str(tmp_path / "a.zip" / "x/0.png") and "the same as another" in reason


def test_zip_leads_nowhere_else(tmp_path):
    link = zipfile.ZipInfo("x/link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    zip_of(tmp_path / "a.zip", [(link, b"0.png"), ("../x/0.png", None), ("x/0.png", None)])
    skipped = []
    assert [x.label for x in read_zip(tmp_path / "a.zip", 1, skipped)] == ["x"]
    assert [x.reason for x in skipped] == ["a link in a zip", "a hidden folder"]


def test_zip_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "omniglot-small"
    folder.mkdir()
    for name in ("images_background_small1", "images_background_small2"):
        with zipfile.ZipFile(folder / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a/b/0.png", bytes(10**6))
    with zipfile.ZipFile(tmp_path / "grocery64.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("labels.csv", "path,fine\n" + " " * 10**6)
    assert len(image_tree.read_zip(folder / "images_background_small1.zip", 2, [])) == 1
    monkeypatch.setattr(image_tree, "ALWAYS_HELD", 10**5)
    for dataset in ("omniglot", "grocery"):
        with pytest.raises(UserError, match="zip: unpacked it would have 1,000,0[01]0 bytes, more"):
            load_splits(dataset, str(tmp_path), 0.2, 0)


def test_beside_the_folder_that_a_zip_is_named_for_is_outside(tmp_path):
    zip_of(tmp_path / "a.zip", [("a/x/0.png", None), ("b/x/0.png", None), ("README", b"")])
    skipped = []
    (found,) = read_zip(tmp_path / "a.zip", 1, skipped, top="a")
    assert (str(found.path), found.label) == ("a/x/0.png", "x")
    assert [x.reason for x in skipped] == [
        "an image outside the class folders",
        "not a format that Pillow opens (no suffix)",
    ]
    # Without such a folder the zip itself is the root.
    assert len(read_zip(tmp_path / "a.zip", 1, [], top="c")) == 2


def test_a_file_counts_once_in_both_parts_of_omniglot(tmp_path):
    for name, alphabet in (("images_background", "Greek"), ("images_evaluation", "Korean")):
        for i in range(2):
            write(tmp_path / name / alphabet / "c0" / f"{i}.png")
    link = tmp_path / "images_evaluation" / "Latin"
    link.symlink_to(tmp_path / "images_background" / "Greek", target_is_directory=True)
    skipped = []
    _, test = READERS["omniglot"](str(tmp_path), skipped)
    assert {s.label for s in test} == {"Korean/c0"}
    assert [x.name for x in skipped] == [str(link)]


def test_run_folder_lists_classes_and_what_was_skipped(main, tmp_path, quick):
    arguments = ["--epochs", 1, "--output-dir", tmp_path, "--name", "run"]
    assert main(*quick, *arguments) == 0
    with (tmp_path / "run" / "classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    splits = load(quick[quick.index("--data-root") + 1])
    for split, decided_by in (
        ("train", "open set, 0.5 of the classes drawn by --seed 0"),
        ("val", "held-out images of the training classes, drawn by --val-fraction and --seed"),
        ("test", "open set, 0.5 of the classes drawn by --seed 0"),
    ):
        listed = [r for r in rows if r["split"] == split]
        assert {r["class"] for r in listed} == class_names(getattr(splits, split))
        assert {r["decided by"] for r in listed} == {decided_by}
    assert sum(int(r["images"]) for r in rows) == 240
    assert (tmp_path / "run" / "skipped.csv").read_text().split() == ["name,reason"]
