"""A run's folder: one process at a time, and a disk that refuses."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from damage import Code, damaged, same
from helpers import change_json
from record_keeper.db_utils import DBManager
from retrieval import image_list, records, screen
from retrieval.disk import replace, writing
from retrieval.errors import UserError
from retrieval.records import Curves
from retrieval.run_folder import RunFolder, RunLock

SCRIPT = Path(__file__).parents[2] / "examples" / "train.py"
FULL = Path("/dev/full")
no_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


def contents(run):
    return {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}


def test_run_in_use_is_refused_until_it_is_killed(refused, quick, tmp_path, environment):
    """Its loader process lives on for a while, and must not keep the lock."""
    pytest.importorskip("fcntl")
    run = tmp_path / "run"
    arguments = ["--epochs", 1000, "--output-dir", tmp_path, "--name", "run", *quick]
    arguments += ["--workers", 1, "--resume-if-exists"]
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        try:
            while not process.stdout.readline().startswith("epoch 1 of"):
                assert process.poll() is None
            os.kill(process.pid, signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)  # it may be writing until then
            before = contents(run)
            for again in (["--resume", run], arguments):
                expected = f"train.py: error: {run} is in use by process {process.pid} on "
                assert refused(*again).startswith(expected)
            assert contents(run) == before
        finally:
            process.kill()
    with RunLock() as lock:
        lock.take(RunFolder(run))
    assert (run / "lock").read_text().startswith(f"process {os.getpid()} on ")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EIO])
def test_lock_that_fails_is_told(run, main, capsys, monkeypatch, number):
    fcntl = pytest.importorskip("fcntl")
    error = OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=error))
    assert main("--resume", run, "--epochs", 2) == (2 if number == errno.EIO else 0)
    out, err = capsys.readouterr()
    if number == errno.EIO:
        assert f"cannot lock {run}: {os.strerror(number)}" in err
    else:
        assert "cannot be locked on this system; take care" in out


@pytest.mark.parametrize("number", [20, pytest.param(100, marks=pytest.mark.kills)])
def test_for_a_damaged_checkpoint_the_one_before_is_used(run, refused, capsys, tmp_path, number):
    """Or the best epoch that the last one holds; never what is damaged, and no code is run."""
    files = {name: run / "checkpoints" / f"{name}.pt" for name in ("last", "previous", "best")}
    whole = {name: torch.load(path, weights_only=True) for name, path in files.items()}
    assert whole["previous"]["epoch"] == 0 and whole["last"]["epoch"] == 1
    torch.save({"epoch": Code(tmp_path / "run by a checkpoint")}, tmp_path / "code")
    load = {"last": RunFolder.load_checkpoint, "best": RunFolder.load_best}
    instead = {
        "last": (whole["previous"], "previous.pt is used, of epoch 0"),
        "best": (whole["last"]["best"], "what the last checkpoint holds of it is used"),
    }
    for name in load:
        content = files[name].read_bytes()
        for i, wrong in enumerate([(tmp_path / "code").read_bytes(), *damaged(content, number)]):
            files[name].write_bytes(wrong)
            found, out = load[name](RunFolder(run)), capsys.readouterr().out
            expected, told = instead[name] if out else (whole[name], "")
            assert same(found, expected) and told in out
            if out:
                assert f"warning: cannot read the checkpoint {files[name]}: it is damaged" in out
            assert out or i  # a few bits, such as those of a date, mean nothing
        files[name].write_bytes(content)
    assert not (tmp_path / "run by a checkpoint").exists()
    for name in ("last", "previous"):
        files[name].write_bytes(files[name].read_bytes()[:1000])
    error = refused("--resume", run, "--epochs", 2)
    assert "last.pt: it is damaged, or not of this program (BadZipFile); there is no" in error
    assert "previous.pt that can be read: start the run anew, under another --name" in error


def test_a_damaged_checkpoint_never_takes_the_place_of_the_one_before(run):
    last = run / "checkpoints" / "last.pt"
    for epoch in (1, 2):  # damaged once more each time
        last.write_bytes(last.read_bytes()[:-100])
        folder = RunFolder(run)
        state = folder.load_checkpoint()
        assert state["epoch"] == epoch - 1
        folder.save_checkpoint({**state, "epoch": epoch})
        folder.save_checkpoint({**state, "epoch": epoch + 1})
    last.unlink()  # a kill came between the renaming of the one and of the other
    assert RunFolder(run).load_checkpoint()["epoch"] == 2


@pytest.mark.parametrize("name", ["config.json", "metrics.json"])
def test_a_damaged_json_file_is_named_and_written_again(run, main, capsys, name, strict_json):
    path, folder = run / name, RunFolder(run)
    content, read = path.read_bytes(), folder.read_json(name)
    named = 0
    for wrong in damaged(content):
        path.write_bytes(wrong)
        try:
            assert folder.read_json(name) == read
        except UserError as error:
            named += 1
            assert str(path) in str(error) and "--resume writes it again" in str(error)
    assert named > 80
    path.write_bytes(content.replace(b'"epoch', b'"epodh', 1))
    assert main("--resume", run) == 2
    assert f"{path} is not as it was written: if it was changed on" in capsys.readouterr().err
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(x for x in lines if '"crc32"' not in x))  # as the message says
    assert any("epodh" in key for key in folder.read_json(name))
    path.unlink()
    assert main("--resume", run, "--epochs", 1, "--no-report") == 0
    assert strict_json(path).keys() == read.keys()
    if name == "metrics.json":
        again = folder.read_json(name)
        assert {**again, "seconds": 0} == {**read, "seconds": 0}


@pytest.mark.parametrize("content", ["[]", "3", '"text"'])
def test_json_that_is_no_mapping_is_named(run, refused, command, content):
    (run / "config.json").write_text(content)
    assert "config.json: it holds no settings or results" in refused("compare", run, by=command)


def test_a_run_goes_on_with_the_metrics_that_it_has_recorded(run, refused):
    change_json(run / "config.json", recall_at=[7])
    error = refused("--resume", run, "--epochs", 2)
    assert "has not recorded Recall@7, so its --recall-at" in error


def test_a_damaged_list_of_images_is_never_taken_for_the_images(run):
    folder, path = RunFolder(run), run / image_list.FILE
    images = image_list.ImageList.__new__(image_list.ImageList)
    images.root, images.entries = "images", image_list.read(folder)
    refused = 0
    for wrong in damaged(path.read_bytes()):
        path.write_bytes(wrong)
        try:
            images.check(folder, accept_changed_files=False)
            assert image_list.read(folder) == images.entries
        except UserError:
            refused += 1
    assert refused > 80
    for wrong in ("path,bytes\n0/00.png,1\n", "", "path,class,split,bytes,crc32\n"):
        path.write_text(wrong)
        with pytest.raises(UserError, match=f"cannot read {path}: expected path,class,split,bytes"):
            images.check(folder, accept_changed_files=False)


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, seen = tmp_path / "file", []
    monkeypatch.setattr(os, "fsync", lambda fd: seen.append((path.exists(), os.fstat(fd).st_size)))
    replace(path, lambda beside: beside.write_text("text"))
    assert seen == [(False, 4)] and path.read_text() == "text"


# Files to which nothing can be written. Those that are replaced are written beside it before.
REFUSED = ["checkpoints/last.pt", "checkpoints/best.pt", "config.json", "metrics.json"]
REFUSED += ["classes.csv", "skipped.csv", "logs/loss_histories.csv", "log.txt", "tensorboard"]


@no_full
@pytest.mark.parametrize("name", REFUSED)
def test_full_disk_ends_in_one_line(run, main, refused, monkeypatch, name):
    monkeypatch.setattr(RunFolder, "remove_incomplete", lambda self: None)

    def fill(*args, original=screen.log_to if name == "log.txt" else records.replay):
        original(*args)
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(FULL)

    def fill_curves(self, folder, original=Curves.__init__):
        original(self, folder)
        os.dup2(os.open(FULL, os.O_WRONLY), self.file.fileno())

    def save_best(self, state, original=RunFolder.save_best):
        original(self, {**state, "best": {**state["best"], "epoch": state["epoch"]}})

    monkeypatch.setattr(RunFolder, "save_best", save_best)  # of every epoch
    if name == "log.txt":
        monkeypatch.setattr(screen, "log_to", fill)
    elif name == "tensorboard":
        monkeypatch.setattr(Curves, "__init__", fill_curves)
    elif name.startswith("logs"):
        monkeypatch.setattr(records, "replay", fill)
    else:
        (run / f"{name}.tmp").symlink_to(FULL)
    last = (run / "checkpoints" / "last.pt").read_bytes()
    error = refused("--resume", run, "--epochs", 2)
    (file,) = (run / name).iterdir() if name == "tensorboard" else [run / name]
    assert error == f"train.py: error: cannot write {file}: No space left on device\n"
    assert not list(run.rglob("*.tmp"))
    if name != "metrics.json" and "best" not in name:
        assert (run / "checkpoints" / "last.pt").read_bytes() == last
    if name == "checkpoints/last.pt":  # the one that counts can be continued from
        monkeypatch.undo()
        assert main("--resume", run, "--epochs", 2) == 0


@no_full
def test_output_to_a_full_disk_is_told_and_ends_nothing(one_epoch, python, tmp_path):
    table = tmp_path / "table.csv"
    arguments = [SCRIPT.parent / "retrieval", "compare", one_epoch, "--csv", table]
    with FULL.open("w") as full:
        pipes = {"capture_output": False, "stdout": full, "stderr": subprocess.PIPE}
        process = python(*arguments, **pipes)
    assert process.stderr == f"cannot write the output: {os.strerror(errno.ENOSPC)}\n"
    assert process.returncode == 1
    assert table.is_file()


def test_database_that_cannot_be_written_is_named_in_one_line(run, refused, monkeypatch):
    def open_to_read(self, original=DBManager.open):
        original(self)
        self.cursor.execute("PRAGMA query_only = ON")

    monkeypatch.setattr(DBManager, "open", open_to_read)
    error = refused("--resume", run, "--epochs", 2)
    database, reason = run / "logs" / "logs.db", "attempt to write a readonly database"
    assert error == f"train.py: error: cannot write {database}: {reason}\n"


def test_folder_that_cannot_be_made_is_named(refused, quick, tmp_path):
    (tmp_path / "file").touch()
    error = refused(*quick, "--output-dir", tmp_path / "file", "--epochs", 1)
    assert f"cannot make the run folder {tmp_path / 'file'}" in error
    with pytest.raises(RuntimeError, match="of another kind"), writing(tmp_path):
        raise RuntimeError("of another kind")
