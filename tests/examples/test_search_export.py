"""`search` and `export` of a trained run, as a user calls them."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import Code
from helpers import change_weights, csv_rows
from PIL import Image
from retrieval import index as index_module
from retrieval.disk import new
from retrieval.errors import UserError
from retrieval.network import load_best

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def folder(digits, tmp_path):
    """A copy of some images that a test may change."""
    copy = tmp_path / "images"
    for label in ("7", "8"):
        shutil.copytree(digits / label, copy / label)
    return copy


@pytest.fixture
def search(command, run, folder, capsys):
    """Search the folder for an image in it; returns what is printed."""

    def call(*arguments, query=None, run=run, code=0):
        capsys.readouterr()
        query = query or folder / "7" / "00.png"
        assert command("search", run, query, "--index", folder, *arguments) == code
        printed = capsys.readouterr()
        return printed.err if code else printed.out

    return call


def embedded(run, paths):
    network, transform = load_best(str(run))
    with torch.no_grad():
        batch = torch.stack([transform(Image.open(path)) for path in paths])
        return torch.nn.functional.normalize(network(batch)).numpy()


def test_nearest_images_are_those_of_brute_force(search, run, folder, digits, tmp_path):
    query, table = digits / "9" / "00.png", tmp_path / "found.csv"
    search("-k", 5, "--csv", table, query=query)
    paths = sorted(folder.rglob("*.png"))
    similarities = embedded(run, paths) @ embedded(run, [query])[0]
    best = similarities.argsort()[::-1][:5]
    found = csv_rows(table)
    assert [x["rank"] for x in found] == [*"12345"]
    assert {x["query"] for x in found} == {str(query)}
    shown = [float(x["cosine similarity"]) for x in found]
    assert shown == pytest.approx(similarities[best].tolist(), abs=1e-5)
    assert {x["image"] for x in found} <= set(map(str, paths))
    search("-k", 3, "--csv", tmp_path / "all.csv", query=folder)
    found = csv_rows(tmp_path / "all.csv")
    assert len(found) == 3 * 48
    assert all(x["query"] != x["image"] for x in found)


def test_a_query_that_is_a_link_into_the_index_does_not_find_itself(search, folder, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "class").symlink_to(folder / "7")
    (linked / "image.png").symlink_to(folder / "8" / "00.png")
    for index, queries in (("linked", linked), ("images", linked), ("linked", folder / "7")):
        options = ["--index", linked] if index == "linked" else []
        table = tmp_path / f"{index}-{queries.name}.csv"
        search(*options, "-k", 2, "--csv", table, query=queries)
        found = csv_rows(table)
        assert len(found) == 2 * (24 if queries == folder / "7" else 25)
        assert not any(Path(x["query"]).samefile(x["image"]) for x in found)


def test_only_what_is_new_or_changed_is_embedded_again(search, run, folder):
    first, again = search(), search()
    assert "48 images" in first and "48 embedded now, 0 removed" in first
    assert "48 images" in again and "0 embedded now, 0 removed" in again
    shutil.copy(folder / "8" / "01.png", folder / "7" / "24.png")
    (folder / "8" / "02.png").unlink()
    Image.new("L", (8, 8), 99).save(folder / "8" / "03.png")
    third = search()
    assert "48 images" in third and "2 embedded now, 2 removed" in third
    nearest = [x.split() for x in first.splitlines() if x.strip().startswith("1 ")]
    assert nearest and float(nearest[0][1]) <= 1.0001
    change_weights(run, torch.neg_)
    assert "48 embedded now" in search()  # of other weights


def test_a_network_that_tells_nothing_apart_is_named(search, run):
    assert "nearly the same" not in search()
    change_weights(run, lambda weight: weight.mul_(1e-8))
    assert "warning: the embeddings of all images are nearly the same, so" in search()


def test_weights_that_change_while_they_are_loaded_are_loaded_again(search, run, monkeypatch):
    def load_best_and_train_on(path):
        monkeypatch.setattr(index_module, "load_best", load_best)
        loaded = load_best(path)
        change_weights(run, torch.neg_)
        return loaded

    monkeypatch.setattr(index_module, "load_best", load_best_and_train_on)
    found = search().splitlines()[1:]
    shutil.rmtree(run / "index")
    assert search().splitlines()[1:] == found


@pytest.mark.parametrize("best", [{"epoch": 1}, {"models": {"trunk": {}, "embedder": {}}}])
def test_weights_of_another_network_are_named(command, run, refused, tmp_path, best):
    torch.save(best, run / "checkpoints" / "best.pt")
    error = refused("export", run, "--output", tmp_path / "out", by=command)
    assert f"best.pt does not fit the settings of its run, {run / 'config.json'} (" in error


def test_a_damaged_index_is_made_anew_and_runs_no_code(search, run, tmp_path):
    found = search().splitlines()[1:]
    (index,) = (run / "index").iterdir()
    content = bytearray(index.read_bytes())
    content[200] ^= 1
    pickled = np.array([Code(tmp_path / "run by an index")])
    for damage in (lambda: index.write_bytes(content), lambda: np.savez(index, name=pickled)):
        damage()
        warning, _, *again = search().splitlines()
        assert warning.startswith(f"warning: {index} is damaged (") and again == found
    assert not (tmp_path / "run by an index").exists()


def test_files_that_are_no_images_are_named_every_time(search, folder):
    (folder / "notes.txt").write_text("no image")
    (folder / "7" / "broken.png").write_bytes(b"no image either")
    os.mkfifo(folder / "7" / "pipe.png")
    for embedded_now in (48, 0, 1):
        out = search()
        assert f"skipped 3 files and folders below {folder}:" in out
        assert "1 x a pipe, socket or device" in out
        assert f"48 images below {folder}, {embedded_now} embedded now" in out
        if embedded_now == 0:
            shutil.copy(folder / "7" / "00.png", folder / "7" / "01.png")
    queries = folder.with_name("queries")
    shutil.copytree(folder / "8", queries)
    (queries / "notes.txt").touch()
    out = search(query=queries)
    assert f"skipped 1 files and folders below {queries}:\n  1 x not a format" in out


def test_a_run_that_cannot_be_written_is_searched(search, run, folder, tmp_path):
    (run / "index").write_text("in the way of a folder")
    out = search("--csv", tmp_path / "found.csv", query=folder)
    assert f"48 embedded now, 0 removed; not kept: cannot write {run / 'index'}" in out
    assert len(csv_rows(tmp_path / "found.csv")) == 480


def test_sheet_shows_and_names_queries_and_neighbors(search, folder, tmp_path, monkeypatch):
    sheet, queries = tmp_path / "found.png", tmp_path / "queries"
    queries.mkdir()
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda ax, x, **_: drawn.append(x))
    for name in ("00.png", "01.png", "02.png"):
        shutil.copy(folder / "7" / name, queries)
    search("-k", 4, "--sheet", sheet, query=queries)
    with Image.open(sheet) as image:
        assert image.size == pytest.approx((5 * 120, 3 * 168), abs=2)
    assert drawn[::5] == [f"query\nqueries/0{i}.png" for i in range(3)]
    assert all(re.fullmatch(r"[01]\.\d{3}\n[78]/\d\d\.png", x) for x in drawn if "query" not in x)


def test_any_name_is_searched_and_exported(command, search, run, folder, tmp_path):
    image = (folder / "7" / "00.png").read_bytes()
    shutil.rmtree(folder / "7")
    shutil.rmtree(folder / "8")
    name = os.fsdecode(b"\xe9t\xe9")
    for stem in ("a $price\\ $", "ひらがな", name, "n" * 80, "\x1b[2Ja\nb"):
        (folder / f"{stem}.png").write_bytes(image)
    sheet, table = tmp_path / "found.png", tmp_path / "found.csv"
    out = search("--sheet", sheet, "--csv", table, query=folder)
    assert "\\x1b[2Ja\\nb.png" in out and "\x1b" not in out  # nothing steers the terminal
    assert str(folder / "\\udce9t\\udce9.png") in {x["query"] for x in csv_rows(table)}
    with Image.open(sheet) as shown:
        shown.verify()
    folder, run = folder.rename(tmp_path / name), run.rename(tmp_path / f"run {name}")
    for _ in range(2):  # by a new index and by a kept one
        assert command("search", run, folder, "--index", folder) == 0
    assert command("export", run, "--images", folder) == 0
    with np.load(run / "export" / "embeddings.npz") as stored:
        assert str(folder / "ひらがな.png") in stored["names"]


QUERY = "images/7/00.png"
# What is searched for, by further arguments, and what the message says.
MISTAKES = [
    ("none", "", "expected an image or a folder"),
    ("broken.png", "", "no image that can be read in"),
    (QUERY, "--index none", "--index: expected a folder"),
    (QUERY, "--index empty", "no image that can be read below"),
    (QUERY, f"--csv {QUERY}", "exists; name a new"),
    (QUERY, "--sheet found.txt", "expected a name that ends in .png or .pdf"),
]


@pytest.mark.parametrize(("query", "arguments", "message"), MISTAKES)
def test_mistakes_of_a_search(search, tmp_path, monkeypatch, query, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_text("no image")
    before = (tmp_path / QUERY).read_bytes()
    assert message in search(*arguments.split(), query=query, code=2)
    assert (tmp_path / QUERY).read_bytes() == before


@pytest.fixture
def printed_by(python):
    """What code prints that runs in a folder, where nothing of this repository is found."""

    def run(code, folder):
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        process = python("-c", code, cwd=folder, env=environment)
        assert process.returncode == 0, process.stderr
        return process.stdout.splitlines()

    return run


def code_of(page):
    return [x.split("```")[0] for x in page.split("```python\n")[1:]]


@pytest.mark.parametrize("network", ["run", "run_of_timm"])
def test_code_of_an_export_reaches_the_same_embeddings(
    command, request, printed_by, network, folder, tmp_path
):
    """By its copy of prepare.py, whose own tests are in test_prepare.py."""
    run = request.getfixturevalue(network)
    output, images = tmp_path / "exported", folder / "7"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(images / "00.png").resize((40, 3)).save(images / "long.jpg", exif=exif)  # and turned
    Image.fromarray(np.arange(99, dtype=np.uint16).reshape(9, 11) * 600).save(images / "deep.png")
    assert command("export", run, "--images", images, "--output", output) == 0
    stored = np.load(output / "embeddings.npz")
    names = stored["names"].tolist()
    assert names == sorted(map(str, images.iterdir()))
    assert set(stored["labels"].tolist()) == {"7"}
    shutil.copy(images / "long.jpg", output / "query.jpg")
    code = code_of((output / "README.md").read_text())[0]
    code += "print(json.dumps([embed(name).tolist() for name in stored['names'].tolist()]))"
    *printed, found = printed_by(code, output)
    assert len(printed) == 10
    assert "1.0000" in printed[0] and str(images / "long.jpg") in printed[0]
    found = np.array(json.loads(found))
    assert found == pytest.approx(stored["embeddings"], abs=1e-4)
    assert embedded(run, names) == pytest.approx(stored["embeddings"], abs=1e-4)
    assert np.ptp(stored["embeddings"], axis=0).max() > 0.1  # they are not all alike
    model = torch.export.load(output / "model.pt2").module()
    size = config_of(run)["image_size"]
    for batch in (1, 3):
        assert model(torch.zeros(batch, 3, size, size)).shape == (batch, 128)


def config_of(run):
    return json.loads((run / "config.json").read_text())


def test_onnxruntime_makes_the_same_embeddings(command, run, folder, printed_by, tmp_path):
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    output, image = tmp_path / "exported", folder / "7" / "00.png"
    assert command("export", run, "--images", folder, "--output", output, "--onnx") == 0
    shutil.copy(image, output / "query.jpg")
    _, code = code_of((output / "README.md").read_text())
    code += 'import sys\nassert "torch" not in sys.modules\nprint(json.dumps(embeddings.tolist()))'
    (found,) = printed_by(code, output)
    assert json.loads(found) == [pytest.approx(embedded(run, [image])[0], abs=1e-4)]


def test_lines_of_the_documentation_embed_files(run, folder):
    page = (EXAMPLES.parent / "docs" / "training_example.md").read_text()
    code = code_of(page.partition("## Use the trained model")[2])[0]
    paths = [folder / "7" / "00.png", folder / "8" / "01.png"]
    names = ("../runs/folder-PNPLoss-Ds-1", "a.jpg", "b.jpg")
    for name, path in zip(names, (run, *paths), strict=True):
        assert name in code
        code = code.replace(name, str(path))
    names = {}
    exec(code, names)
    assert names["embeddings"].numpy() == pytest.approx(embedded(run, paths), abs=1e-5)


def test_embedding_an_image_that_cannot_be_read_is_an_error_with_its_name(run, folder):
    (folder / "broken.png").write_text("no image")
    with pytest.raises(UserError, match="cannot read the image .*broken.png"):
        load_best(run).embed([folder / "7" / "00.png", folder / "broken.png"])
    with pytest.raises(TypeError, match="expected a list of paths, got '7.png'"):
        load_best(run).embed("7.png")


def test_export_embeds_the_test_images(command, run, refused, tmp_path, monkeypatch):
    error = refused("export", run, "--data-root", tmp_path / "none", by=command)
    assert str(tmp_path / "none") in error
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        assert "pip install onnxscript" in refused("export", run, "--onnx", by=command)
    assert not (run / "export").exists()
    assert command("export", run) == 0
    with np.load(run / "export" / "embeddings.npz") as stored:
        assert len(stored["names"]) == config_of(run)["data"]["test"]["images"]
    error = refused("export", run, by=command)
    assert "export exists; name a new folder by --output" in error


def test_export_says_that_embeddings_are_of_boxes(trained, command, digits, tmp_path):
    paths = [f"{digits}/{label}/0{i}.png,{label}" for label in range(4) for i in range(8)]
    table = tmp_path / "table.csv"
    rows = [f"{x},{'train' if i < 16 else 'test'},0,0,8,4" for i, x in enumerate(paths)]
    table.write_text("\n".join(["path,label,split,x_1,y_1,x_2,y_2", *rows]))
    run = trained("--dataset", "csv", "--data-root", table, "--batch-size", 4)
    assert command("export", run) == 0
    with np.load(run / "export" / "embeddings.npz") as stored:
        assert all(x.endswith(".png [0 0 8 4]") for x in stored["names"])
    text = (run / "export" / "README.md").read_text()
    assert "`embed(path)` takes\nthe whole image" in text
    assert command("export", run, "--images", digits, "--output", tmp_path / "whole") == 0
    assert "box" not in (tmp_path / "whole" / "README.md").read_text()


def found_beside(tmp_path):
    return sorted(str(x.relative_to(tmp_path)) for x in tmp_path.rglob("*"))


@pytest.mark.parametrize("name", ["found.csv", "found.png", "found.pdf", "made/here/found.csv"])
def test_search_of_which_the_disk_takes_only_a_part(search, limited, tmp_path, name):
    search()
    (tmp_path / "found.csv.tmp").write_text("of the user")
    before = found_beside(tmp_path)
    output, flag = tmp_path / name, "--csv" if name.endswith("csv") else "--sheet"
    with limited(1000):
        error = search(flag, output, code=2)
    assert error == f"retrieval search: error: cannot write {output}: {os.strerror(errno.EFBIG)}\n"
    assert found_beside(tmp_path) == before
    search(flag, output)
    assert output.stat().st_size > 1000
    assert (tmp_path / "found.csv.tmp").read_text() == "of the user"


@pytest.mark.parametrize(("name", "file"), [("export", "export"), ("report", "report.html")])
def test_what_the_system_refuses_is_left(command, run, refused, limited, tmp_path, name, file):
    """The writer of torch, for one, ends the process where it may not write."""
    (run / "report.html").write_text("old")
    before = found_beside(tmp_path)
    with limited(1000):
        error = refused(name, run, by=command)
    reason = os.strerror(errno.EFBIG)
    assert error == f"retrieval {name}: error: cannot write {run / file}: {reason}\n"
    assert found_beside(tmp_path) == before
    assert (run / "report.html").read_text() == "old"


def make(path, kind, content):
    """A file, or a folder with one."""
    if kind == "folder":
        path.mkdir()
    (path / "file" if kind == "folder" else path).write_text(content)
    return path


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("there", ["file", "folder"])
def test_what_came_to_the_place_meanwhile_is_kept(tmp_path, kind, there):
    path = tmp_path / "output"
    with pytest.raises(UserError, match=f"cannot write {path}: "), new(path) as part:
        make(part, kind, "of the program")
        make(path, there, "of the user")
    kept = ["output"] if there == "file" else ["output", "output/file"]
    assert found_beside(tmp_path) == kept
    assert (tmp_path / kept[-1]).read_text() == "of the user"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_new_can_be_read_by_whom_the_user_lets(tmp_path, kind):
    with new(tmp_path / "output") as part:
        make(part, kind, "new")
    like = make(tmp_path / "plain", kind, "plain")
    assert (tmp_path / "output").stat().st_mode == like.stat().st_mode


def test_reader_that_leaves_ends_the_command_quietly(run, folder, environment, tmp_path):
    """As `| head -1` does; everything is written all the same."""
    table, sheet = tmp_path / "found.csv", tmp_path / "found.png"
    query = folder / "7" / "00.png"
    arguments = ["search", run, query, "--index", folder, "--csv", table, "--sheet", sheet]
    command = [sys.executable, EXAMPLES / "retrieval", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        assert process.stdout.readline().startswith("index: 48 images")
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=300) == 141
    assert len(csv_rows(table)) == 10
    with Image.open(sheet) as image:
        image.verify()
