"""A killed run continues to the same end."""

import csv
import json
import math
import re
import shutil
import sqlite3

import pytest
import torch
from helpers import change_json, csv_rows
from PIL import Image
from retrieval import train as train_module
from retrieval.run_folder import RunFolder
from retrieval.training import Training

EPOCHS = 3
# Everything that has a state of its own: loss parameters, augmentation and a memory.
SETTINGS = {
    "default": "",
    "memory": "--memory-size 96 --ema-decay 0",
    "proxies": "--loss ProxyAnchorLoss --loss-lr 0.01 --freeze-batchnorm --lr-milestones 1 2 "
    "--lr-gamma 0.5",
    "chunks": "--grad-cache 16",
    "schedule": "--lr-cosine --warmup-epochs 1",
    "beside": "--beside ProxyAnchorLoss --memory-size 96",
}


@pytest.fixture(scope="module")
def whole(main, quick, once):
    """An uninterrupted run of a setting, and what a kill after its second epoch leaves behind."""

    def get(setting):
        def train(folder):
            def save_and_copy(run, state, save=RunFolder.save_checkpoint):
                save(run, state)
                if state["epoch"] == 2:
                    shutil.copytree(folder / "whole", folder / "killed")

            arguments = ["--output-dir", folder, "--name", "whole", "--epochs", EPOCHS]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(RunFolder, "save_checkpoint", save_and_copy)
                assert main(*arguments, *quick, *SETTINGS[setting].split()) == 0

        folder = once(f"whole run, {setting}", train)
        return folder / "whole", folder / "killed"

    return get


def results(run, strict_json):
    """What must not depend on an interruption."""
    metrics = strict_json(run / "metrics.json")
    del metrics["seconds"]
    tables, texts = {}, {}
    connection = sqlite3.connect(run / "logs" / "logs.db")
    for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'"):
        if name != "sqlite_sequence":
            rows = connection.execute(f"SELECT * FROM [{name}] ORDER BY 2")
            tables[name] = [row[1:] for row in rows]
    connection.close()
    for path in (run / "logs").glob("*.csv"):
        with path.open() as file:
            texts[path.name] = [row for row in csv.reader(file) if row[0] != "~iteration~"]
    return metrics, tables, texts


@pytest.fixture
def ends_alike(curves, strict_json):
    """Whether a run has the results, curves and best weights of another."""

    def assert_alike(run, other):
        assert results(run, strict_json) == results(other, strict_json)
        assert curves(run) == curves(other)
        assert best(run) == best(other)
        assert not list(run.rglob("*.tmp"))

    return assert_alike


def best(run):
    return (run / "checkpoints" / "best.pt").read_bytes()


def test_warmup_cosine_and_milestones_reach_every_optimizer(whole, curves):
    def warmup_and_cosine(i):
        return (i + 1) / 11 if i < 11 else (1 + math.cos(math.pi * (i - 11) / 22)) / 2

    run = whole("schedule")[0]
    for name in ("trunk", "embedder"):
        found = dict(curves(run)[f"learning_rates/{name}"])  # of 11 steps an epoch
        assert len(found) == 18
        assert found == pytest.approx({i: 0.001 * warmup_and_cosine(i) for i in found})
    assert all(abs(rate) < 1e-12 for rate in last_rates(run).values())
    found = dict(curves(whole("proxies")[0])["learning_rates/trunk"])
    assert found == pytest.approx({i: 0.001 * 0.5 ** (i // 11) for i in found})
    names = ("trunk_optimizer", "embedder_optimizer", "metric_loss_optimizer")
    expected = dict(zip(names, (0.00025, 0.00025, 0.0025), strict=True))
    assert last_rates(whole("proxies")[0]) == pytest.approx(expected)


def test_a_longer_cosine_begins_where_the_run_continues(whole, main, curves, tmp_path):
    run = shutil.copytree(whole("schedule")[0], tmp_path / "run")
    assert main("--resume", run, "--epochs", 5, "--no-report") == 0
    found = dict(curves(run)["learning_rates/trunk"])
    expected = 0.001 * (1 + math.cos(math.pi * 22 / 44)) / 2
    assert found[33] == pytest.approx(expected)  # the first of 11 steps of the fourth epoch


def last_rates(run):
    optimizers = torch.load(run / "checkpoints" / "last.pt")["shared"]["optimizers"]
    return {k: v["param_groups"][0]["lr"] for k, v in optimizers.items()}


def test_the_same_command_line_starts_continues_and_ends_a_run(
    trained, refused, quick, tmp_path, capsys, strict_json
):
    trained("--resume-if-exists")
    run = trained("--resume-if-exists", "--epochs", 2)
    assert strict_json(run / "metrics.json")["epochs_trained"] == 2
    capsys.readouterr()
    trained("--resume-if-exists", "--epochs", 2)
    out = capsys.readouterr().out
    assert "is finished; nothing to train" in out and "MAP@R" in out
    command = [*quick, "--output-dir", tmp_path, "--name", "run", "--epochs", 2, "--lr", 0.5]
    error = refused(*command, "--resume-if-exists")
    assert "--resume-if-exists: the run has --lr 0.001, so it" in error


@pytest.mark.parametrize(
    ("left", "code"), [([], 0), (["lock", "log.txt", "config.json.tmp"], 0), (["photo.png"], 2)]
)
def test_folder_of_a_run_that_was_killed_before_its_settings_is_taken(
    main, refused, quick, tmp_path, left, code
):
    run = tmp_path / "run"
    run.mkdir()
    for name in left:
        (run / name).write_text("left\n")
    command = ["--output-dir", tmp_path, "--name", "run", *quick, "--epochs", 1]
    assert f"{run} exists and holds no run; take another --name" in refused(*command)
    assert main(*command, "--resume-if-exists") == code
    assert (run / "metrics.json").exists() is (code == 0)
    assert not (run / "config.json.tmp").exists()


def test_run_from_before_a_setting_existed_continues(whole, main, strict_json, tmp_path, capsys):
    run, killed = whole("default")
    old = shutil.copytree(killed, tmp_path / "old")
    config = strict_json(old / "config.json")
    for setting in ("threads", "beside", "beside_args"):
        del config[setting]
    now, config["versions"]["torch"] = config["versions"]["torch"], "2.4.0"
    (old / "config.json").write_text(json.dumps(config))
    for name in ("images.csv", "lock", "log.txt"):
        (old / name).unlink()
    assert main("--resume", old) == 0
    said = capsys.readouterr().out
    assert f"warning: the run began with torch 2.4.0, now {now}: results may differ" in said
    assert results(old, strict_json) == results(run, strict_json)


# What a checkpoint of another version has under other names or lacks, and what is said of it.
MISFITS = {"schedulers": "(no 'trunk_scheduler_by_iteration')", "records": "(no 'records')"}
MISFITS |= {"loss": "Missing key(s) in state_dict: "}


@pytest.mark.parametrize("state", MISFITS)
def test_a_checkpoint_of_another_version_is_refused(whole, refused, tmp_path, state):
    run = shutil.copytree(whole("proxies")[1], tmp_path / "run")
    last = run / "checkpoints" / "last.pt"
    checkpoint = torch.load(last, weights_only=True)
    if state == "records":
        del checkpoint["records"]
    else:
        content = checkpoint["shared"] if state == "schedulers" else checkpoint["own"][0]
        content[state] = {f"old_{name}": x for name, x in content[state].items()}
    torch.save(checkpoint, last)
    files = [last, run / "config.json"] if state == "records" else [last]
    before = [x.read_bytes() for x in files]
    error = refused("--resume", run, "--epochs", 99)
    assert "checkpoint last.pt does not fit" in error and MISFITS[state] in error
    assert [x.read_bytes() for x in files] == before


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_killed_run_ends_alike(whole, main, ends_alike, tmp_path, setting):
    """Killed at other moments: see test_train_kills.py."""
    run, killed = whole(setting)
    continued = shutil.copytree(killed, tmp_path / "whole")
    assert main("--resume", continued) == 0
    ends_alike(continued, run)
    log = (continued / "log.txt").read_text()
    assert log.count("--- ") == 2 and f"epoch {EPOCHS} of {EPOCHS}" in log


def test_best_checkpoint_that_a_kill_prevented_is_written(run, main, monkeypatch):
    """The kill came after last.pt, of an epoch that no later one surpasses."""
    before = best(run)
    (run / "checkpoints" / "best.pt").unlink()
    monkeypatch.setattr(Training, "train", lambda self: None)
    assert main("--resume", run, "--epochs", 2) == 0
    assert best(run) == before


def test_a_trained_run_without_its_checkpoint_is_not_begun_again(run, main, refused):
    """`last.pt` is large, and everything but continuing works without it."""
    before = best(run)
    for name in ("last.pt", "previous.pt"):
        (run / "checkpoints" / name).unlink(missing_ok=True)
    error = refused("--resume", run, "--epochs", 2)
    assert f"has trained, since there is {run / 'checkpoints' / 'best.pt'}, but last.pt" in error
    assert main("--resume", run) == 0  # says that it is finished
    assert best(run) == before


def test_only_more_epochs_may_be_asked_for(whole, run, main, refused, ends_alike):
    for arguments, message in {
        "--lr 0.5": "the run has --lr",
        "--loss-args variant=O": "the run has --loss-args",
        "--name other": "leave out --name",
    }.items():
        assert message in refused("--resume", run, *arguments.split())
    assert main("--resume", run, "--dataset", "folder", "--epochs", EPOCHS) == 0
    ends_alike(run, whole("default")[0])
    error = refused("--resume", run, "--epochs", 1)
    assert f"--epochs can only be raised from {EPOCHS}, got 1" in error
    change_json(run / "config.json", world_size=2)
    assert "started with 2 processes" in refused("--resume", run)


def test_resume_with_and_without_chunks(whole, main, trained, strict_json):
    """BatchNorm frozen, chunks change nothing but the memory."""
    run = trained(*SETTINGS["proxies"].split(), "--grad-cache", 16)
    assert main("--resume", run, "--epochs", 2, "--grad-cache", 0) == 0
    assert main("--resume", run, "--epochs", EPOCHS, "--grad-cache", 7) == 0
    ends = [strict_json(x / "metrics.json") for x in (run, whole("proxies")[0])]
    for part in ("trained", "validation"):
        assert ends[0][part] == pytest.approx(ends[1][part], rel=1e-3)


def write_over(root):
    shutil.copyfile(root / "1" / "00.png", root / "0" / "00.png")


def exchange_pixels(root):
    """Files of one size, as of many cameras and formats."""
    for name, level in (("0", 90), ("1", 200)):
        Image.new("L", (8, 8), level).save(root / name / "00.bmp")


# What happens to the images of a run -> what is said, and whether it can be accepted
OTHER_IMAGES = {
    "a class is renamed": (
        lambda root: (root / "0").rename(root / "zero"),
        r"\(gone: \d\d, such as 0/00.bmp; new: \d\d, such as zero/00.bmp; in another split: \d+, "
        r"such as \d/00.\w+ \((train|val|test) then, (train|val|test) now\)\); name the folder",
        False,
    ),
    "an image is written over": (write_over, "began: 1 of 242, such as 0/00.png", True),
    "pixels are exchanged": (exchange_pixels, "began: 2 of 242", True),
}


@pytest.fixture(scope="module")
def run_and_images(main, quick, digits, once):
    """A finished run, and the images that it has."""

    def train(folder):
        root = shutil.copytree(digits, folder / "images")
        for name, level in (("0", 200), ("1", 90)):
            Image.new("L", (8, 8), level).save(root / name / "00.bmp")
        arguments = [*quick, "--data-root", root, "--seed", 1]
        assert main(*arguments, "--output-dir", folder, "--name", "run", "--epochs", 1) == 0

    return once("run and images", train)


@pytest.fixture
def moved(run_and_images, tmp_path):
    """A copy of both, and the arguments that continue it."""
    folder = shutil.copytree(run_and_images, tmp_path / "moved")
    resume = ["--resume", folder / "run", "--data-root", folder / "images"]
    return folder / "run", folder / "images", [*resume, "--epochs", 2, "--no-report"]


@pytest.mark.parametrize("what", OTHER_IMAGES)
def test_a_run_does_not_go_on_with_other_images(moved, main, refused, capsys, what):
    change, expected, can_be_accepted = OTHER_IMAGES[what]
    run, images, resume = moved
    change(images)
    checkpoint = (run / "checkpoints" / "last.pt").read_bytes()
    assert re.search(expected, refused(*resume))
    assert (run / "checkpoints" / "last.pt").read_bytes() == checkpoint
    assert main(*resume, "--accept-changed-files") == (0 if can_be_accepted else 2)
    if can_be_accepted:
        out = capsys.readouterr().out
        assert out.startswith("warning: images that changed") and re.search(expected, out)
        assert main(*resume, "--epochs", 3) == 0  # it has these files now


def test_a_moved_run_goes_on_with_its_images(moved, main):
    run, _, resume = moved
    listed = (run / "images.csv").read_bytes()
    assert listed.startswith(b"path,class,split,bytes,crc32\r\n")
    assert re.search(rb"\n0/00.bmp,0,(train|val|test),1142,[0-9a-f]{8}\r\n", listed)
    assert main(*resume) == 0
    assert (run / "images.csv").read_bytes() == listed


def test_a_run_moved_with_a_table_goes_on(main, quick, digits, tmp_path, monkeypatch):
    """Paths are listed from the folder of the table; the boxes of one file are two images."""
    there = tmp_path / "there"
    shutil.copytree(digits, there / "images")
    lines = ["path,label,split,x_1,y_1,x_2,y_2"]
    for path in sorted((there / "images").glob("*/0?.png")):
        image = f"{path.relative_to(there).as_posix()},{path.parent.name},train"
        lines += [f"{image},0,0,8,4", f"{image},0,4,8,8"]
    (there / "labels.csv").write_text("\n".join(lines))
    arguments = [*quick, "--dataset", "csv", "--data-root", there / "labels.csv", "--epochs", 1]
    assert main(*arguments, "--output-dir", there, "--name", "run") == 0
    listed = (there / "run" / "images.csv").read_text()
    assert "\nimages/0/00.png [0 4 8 8],0" in listed
    here = there.rename(tmp_path / "here")
    monkeypatch.chdir(here / "images")
    resume = ["--resume", here / "run", "--data-root", here / "labels.csv", "--epochs", 2]
    assert main(*resume, "--no-report") == 0
    assert (here / "run" / "images.csv").read_text() == listed


def test_without_a_look_at_every_image_sizes_are_compared(moved, main, refused):
    run, images, resume = moved
    exchange_pixels(images)
    write_over(images)
    assert "began: 1 of 242" in refused(*resume, "--skip-verify")
    before = listed_images(run)
    assert main(*resume, "--skip-verify", "--accept-changed-files") == 0
    after = listed_images(run)
    changed = {x for x in before if after[x] != before[x]}
    assert changed == {"0/00.png"} and not after["0/00.png"]["crc32"]  # others keep theirs


def listed_images(run):
    return {row["path"]: row for row in csv_rows(run / "images.csv")}


def test_a_missing_image_is_said_first(refused, quick, digits, tmp_path, monkeypatch):
    root = shutil.copytree(digits, tmp_path / "images")
    splits_of = train_module.splits_of

    def lost_meanwhile(config):
        splits = splits_of(config)
        (root / "0" / "00.png").unlink()
        return splits

    monkeypatch.setattr(train_module, "splits_of", lost_meanwhile)
    arguments = [*quick, "--data-root", root, "--skip-verify", "--output-dir", tmp_path]
    error = refused(*arguments, "--name", "run")
    assert f"cannot read the image {root / '0/00.png'}: No such file" in error
    assert not (tmp_path / "run").exists()


def test_a_finished_run_whose_images_are_gone_is_finished(moved, trained, capsys):
    """The command line that started it says why there is no report, and succeeds."""
    run, images, _ = moved
    gone = images.with_name("gone")
    change_json(run / "config.json", data_root=str(gone))
    arguments = ["--data-root", gone, "--seed", 1, "--output-dir", run.parent, "--report"]
    trained(*arguments, "--resume-if-exists")
    said = capsys.readouterr().out
    assert "is finished" in said
    assert "warning: the report could not be made: folder: the data root is not a folder" in said
    assert not (run / "report.html").exists()


def test_what_was_damaged_is_no_part_of_the_end(whole, main, ends_alike, capsys, tmp_path):
    """The checkpoint, its settings and all records, with a journal that SQLite would apply."""
    run, killed = whole("default")
    continued = shutil.copytree(killed, tmp_path / "damaged")
    last = continued / "checkpoints" / "last.pt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1  # a bit of a weight
    last.write_bytes(content)
    for path in (continued / "logs").iterdir():
        path.write_bytes(path.read_bytes()[:-7].replace(b"0", b"1"))
    (continued / "logs" / "logs.db-journal").write_bytes(b"journal" * 999)
    (continued / "config.json").unlink()
    assert main("--resume", continued) == 0
    out = capsys.readouterr().out
    assert f"cannot read the checkpoint {last}: it is damaged" in out
    assert "previous.pt is used, of epoch 1" in out
    ends_alike(continued, run)
