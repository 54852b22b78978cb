"""`search` and `export` of a trained run, as a user calls them."""

import contextlib
import csv
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def images(quick):
    return quick[quick.index("--data-root") + 1]


@pytest.fixture
def folder(images, tmp_path):
    """A copy of some images that a test may change."""
    copy = tmp_path / "images"
    for label in ("7", "8"):
        shutil.copytree(images / label, copy / label)
    return copy


@pytest.fixture
def command():
    from retrieval import commands

    return lambda *arguments: commands.main([str(x) for x in arguments])


def embedded(run, paths):
    from retrieval.network import load_best

    network, transform = load_best(str(run))
    with torch.no_grad():
        batch = torch.stack([transform(Image.open(path)) for path in paths])
        return torch.nn.functional.normalize(network(batch)).numpy()


def rows(path):
    with path.open(newline="") as file:
        return [
            (x["query"], int(x["rank"]), x["image"], float(x["cosine similarity"]))
            for x in csv.DictReader(file)
        ]


def test_nearest_images_are_those_of_brute_force(command, run, folder, images, tmp_path):
    query = images / "9" / "00.png"
    table = tmp_path / "found.csv"
    assert command("search", run, query, "--index", folder, "-k", 5, "--csv", table) == 0
    paths = sorted(folder.rglob("*.png"))
    similarities = embedded(run, paths) @ embedded(run, [query])[0]
    best = similarities.argsort()[::-1][:5]
    found = rows(table)
    assert [x[1] for x in found] == [1, 2, 3, 4, 5]
    assert {x[0] for x in found} == {str(query)}
    assert [x[3] for x in found] == pytest.approx(similarities[best].tolist(), abs=1e-5)
    assert {x[2] for x in found} <= set(map(str, paths))


def test_a_query_of_the_folder_does_not_find_itself(command, run, folder, tmp_path):
    table = tmp_path / "found.csv"
    assert command("search", run, folder, "--index", folder, "-k", 3, "--csv", table) == 0
    found = rows(table)
    assert len(found) == 3 * 48
    assert all(query != image for query, _, image, _ in found)


def test_only_what_is_new_or_changed_is_embedded_again(command, run, folder, capsys):
    def search():
        assert command("search", run, folder / "7" / "00.png", "--index", folder) == 0
        return capsys.readouterr().out

    assert "48 images" in (first := search()) and "48 embedded now, 0 removed" in first
    assert "48 images" in (again := search()) and "0 embedded now, 0 removed" in again
    shutil.copy(folder / "8" / "01.png", folder / "7" / "24.png")
    (folder / "8" / "02.png").unlink()
    Image.new("L", (8, 8), 99).save(folder / "8" / "03.png")
    assert "48 images" in (third := search()) and "2 embedded now, 2 removed" in third
    nearest = [x.split() for x in first.splitlines() if x.strip().startswith("1 ")]
    assert nearest and float(nearest[0][1]) <= 1.0001


def test_index_of_other_weights_is_another(command, run, folder, tmp_path, capsys):
    from retrieval.run_folder import RunFolder

    other = tmp_path / "other"
    shutil.copytree(run, other)
    query = folder / "7" / "00.png"
    assert command("search", other, query, "--index", folder) == 0
    best = RunFolder.existing(str(other)).load_checkpoint("best.pt")
    best["models"]["embedder"]["weight"].neg_()
    torch.save(best, other / "checkpoints" / "best.pt")
    assert command("search", other, query, "--index", folder) == 0
    assert capsys.readouterr().out.count("48 embedded now") == 2


def test_files_that_are_no_images_are_named(command, run, folder, capsys):
    (folder / "notes.txt").write_text("no image")
    (folder / "7" / "broken.png").write_bytes(b"no image either")
    assert command("search", run, folder / "7" / "00.png", "--index", folder) == 0
    out = capsys.readouterr().out
    assert "skipped 2 files" in out
    assert "48 images" in out


def test_sheet_shows_queries_and_neighbors(command, run, folder, tmp_path):
    sheet, queries = tmp_path / "found.png", tmp_path / "queries"
    queries.mkdir()
    for name in ("00.png", "01.png", "02.png"):
        shutil.copy(folder / "7" / name, queries)
    assert command("search", run, queries, "--index", folder, "-k", 4, "--sheet", sheet) == 0
    with Image.open(sheet) as image:
        width, height = image.size
    assert width == pytest.approx(5 * 120, abs=2)
    assert height == pytest.approx(3 * 150, abs=2)


MISTAKES = {
    "no run": (["{none}", "{query}", "--index", "{folder}"], "search: error: no run in"),
    "no query": (["{run}", "{none}", "--index", "{folder}"], "expected an image or a folder"),
    "no folder": (["{run}", "{query}", "--index", "{none}"], "--index: expected a folder"),
    "no images": (["{run}", "{query}", "--index", "{empty}"], "no image that can be read below"),
    "taken": (
        ["{run}", "{query}", "--index", "{folder}", "--csv", "{query}"],
        "exists; name a new",
    ),
    "broken query": (["{run}", "{broken}", "--index", "{folder}"], "no image that can be read in"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_of_a_search(command, run, folder, tmp_path, capsys, mistake):
    empty, broken = tmp_path / "empty", tmp_path / "broken.png"
    empty.mkdir()
    broken.write_text("no image")
    arguments, message = MISTAKES[mistake]
    places = {"run": run, "query": folder / "7" / "00.png", "folder": folder, "empty": empty}
    places |= {"none": tmp_path / "none", "broken": broken}
    before = (folder / "7" / "00.png").read_bytes()
    assert command("search", *(x.format(**places) for x in arguments)) == 2
    assert message in capsys.readouterr().err
    assert (folder / "7" / "00.png").read_bytes() == before


def test_export_is_used_without_this_repository(command, run, folder, tmp_path):
    output = tmp_path / "exported"
    assert command("export", run, "--images", folder, "--output", output) == 0
    stored = np.load(output / "embeddings.npz")
    assert sorted(stored["labels"].tolist()) == ["7"] * 24 + ["8"] * 24
    names = stored["names"].tolist()
    assert names == sorted(map(str, folder.rglob("*.png")))
    assert stored["embeddings"] == pytest.approx(embedded(run, names), abs=1e-5)
    shutil.copy(names[0], output / "query.jpg")
    code = (output / "README.md").read_text().split("```python\n")[1].split("```")[0]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    printed = subprocess.run(
        [sys.executable, "-c", code],
        cwd=output,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout.splitlines()
    assert len(printed) == 10
    assert printed[0] == f"1.0000 {names[0]} 7"


def test_export_embeds_the_test_images_and_overwrites_nothing(
    command, run, strict_json, tmp_path, capsys
):
    assert command("export", run) == 0
    stored = np.load(run / "export" / "embeddings.npz")
    config = strict_json(run / "config.json")
    assert len(stored["names"]) == config["data"]["test"]["images"]
    assert command("export", run) == 2
    assert "export exists; name a new folder by --output" in capsys.readouterr().err


def test_export_of_images_that_are_gone(command, run, tmp_path, capsys):
    assert command("export", run, "--data-root", tmp_path / "none") == 2
    assert "none" in capsys.readouterr().err
    assert not (run / "export").exists()


def test_exported_network_takes_batches_of_any_size(command, run, images, tmp_path):
    assert command("export", run, "--images", images, "--output", tmp_path / "exported") == 0
    model = torch.export.load(tmp_path / "exported" / "model.pt2").module()
    for batch in (1, 3):
        assert model(torch.zeros(batch, 3, 8, 8)).shape == (batch, 128)


def test_commands_are_listed(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        command("--help")
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "search" in out and "export" in out


# --- what is written ------------------------------------------------------------------------


def found_beside(tmp_path):
    return sorted(str(x.relative_to(tmp_path)) for x in tmp_path.rglob("*"))


@pytest.fixture
def limited():
    """Run with a limit of the size of files, at which the system refuses as with a full disk."""
    resource = pytest.importorskip("resource")

    @contextlib.contextmanager
    def limit(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@pytest.mark.parametrize("name", ["found.csv", "found.png", "found.pdf", "made/here/found.csv"])
def test_search_of_which_the_disk_takes_only_a_part(
    command, run, folder, limited, tmp_path, capsys, name
):
    search = ["search", run, folder / "7" / "00.png", "--index", folder]
    assert command(*search) == 0
    (tmp_path / "found.csv.tmp").write_text("of the user")
    before = found_beside(tmp_path)
    output = tmp_path / name
    capsys.readouterr()
    with limited(1000):
        flag = "--csv" if name.endswith("csv") else "--sheet"
        assert command(*search, flag, output) == 2
    err = capsys.readouterr().err
    assert err == f"retrieval search: error: cannot write {output}: {os.strerror(errno.EFBIG)}\n"
    assert found_beside(tmp_path) == before
    assert command(*search, flag, output) == 0
    assert output.stat().st_size > 1000
    assert (tmp_path / "found.csv.tmp").read_text() == "of the user"


@pytest.mark.parametrize("file", ["model.pt2", "embeddings.npz", "transform.json", "README.md"])
def test_export_of_which_the_disk_takes_only_a_part(
    command, run, tmp_path, capsys, monkeypatch, file
):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    mkdir = Path.mkdir

    def fill(self, *args, **kwargs):
        mkdir(self, *args, **kwargs)
        if self.name == "exported":
            (self / file).symlink_to(full)

    monkeypatch.setattr(Path, "mkdir", fill)
    before = found_beside(tmp_path)
    output = tmp_path / "made" / "exported"
    assert command("export", run, "--output", output) == 2
    err = capsys.readouterr().err
    assert err == f"retrieval export: error: cannot write {output}: {os.strerror(errno.ENOSPC)}\n"
    assert found_beside(tmp_path) == before


def assert_refused(command, name, run, path, root, capsys):
    """A command that may not write so large a file says so, and leaves all below root as it was."""
    before = found_beside(root)
    assert command(name, run) == 2
    err = capsys.readouterr().err
    reason = os.strerror(errno.EFBIG)
    assert err == f"retrieval {name}: error: cannot write {path}: {reason}\n"
    assert found_beside(root) == before


def test_export_that_the_system_refuses_leaves_the_process_alive(
    command, run, limited, tmp_path, capsys
):
    """The writer of torch ends the process where it may not write."""
    with limited(1000):
        assert_refused(command, "export", run, run / "export", tmp_path, capsys)


def test_report_of_which_the_disk_takes_only_a_part(command, run, limited, tmp_path, capsys):
    (run / "report.html").write_text("old")
    with limited(1000):
        assert_refused(command, "report", run, run / "report.html", tmp_path, capsys)
    assert (run / "report.html").read_text() == "old"


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("there", ["file", "folder"])
def test_what_came_to_the_place_meanwhile_is_kept(tmp_path, kind, there):
    from retrieval.disk import new
    from retrieval.errors import UserError

    path = tmp_path / "output"
    with pytest.raises(UserError, match=f"cannot write {path}: "), new(path) as part:
        (part if kind == "file" else make(part) / "file").write_text("of the program")
        (path if there == "file" else make(path) / "file").write_text("of the user")
    kept = ["output"] if there == "file" else ["output", "output/file"]
    assert found_beside(tmp_path) == kept
    assert (tmp_path / kept[-1]).read_text() == "of the user"


def make(folder):
    folder.mkdir()
    return folder


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_new_can_be_read_by_whom_the_user_lets(tmp_path, kind):
    from retrieval.disk import new

    plain, path = make(tmp_path / "plain") / "file", tmp_path / "output"
    plain.write_text("plain")
    with new(path) as part:
        part.write_text("new") if kind == "file" else part.mkdir()
    like = plain if kind == "file" else plain.parent
    assert path.stat().st_mode == like.stat().st_mode


def test_sheet_of_an_unknown_kind_is_refused(command, run, folder, tmp_path, capsys):
    search = ["search", run, folder / "7", "--index", folder]
    assert command(*search, "--sheet", tmp_path / "found.txt") == 2
    assert "expected a name that ends in .png or .pdf" in capsys.readouterr().err


# --- a reader that goes away ----------------------------------------------------------------


def test_reader_that_leaves_ends_the_command_quietly(run, folder, environment, tmp_path):
    """As `| head -1` does; everything is written all the same."""
    table, sheet = tmp_path / "found.csv", tmp_path / "found.png"
    query = folder / "7" / "00.png"
    arguments = ["search", run, query, "--index", folder, "--csv", table, "--sheet", sheet]
    process = subprocess.Popen(
        [sys.executable, EXAMPLES / "retrieval", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().startswith("index: 48 images")
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=300) == 141
    assert error == ""
    assert len(rows(table)) == 10
    with Image.open(sheet) as image:
        image.verify()
