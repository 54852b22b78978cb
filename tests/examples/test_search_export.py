"""`search` and `export` of a trained run, as a user calls them."""

import contextlib
import csv
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
from PIL import Image
from retrieval import commands
from retrieval.disk import new
from retrieval.errors import UserError
from retrieval.network import load_best
from retrieval.run_folder import RunFolder

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
    return lambda *arguments: commands.main([str(x) for x in arguments])


def embedded(run, paths):
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
    other = tmp_path / "other"
    shutil.copytree(run, other)
    query = folder / "7" / "00.png"
    assert command("search", other, query, "--index", folder) == 0
    best = RunFolder.existing(str(other)).load_best()
    best["models"]["embedder"]["weight"].neg_()
    torch.save(best, other / "checkpoints" / "best.pt")
    assert command("search", other, query, "--index", folder) == 0
    assert capsys.readouterr().out.count("48 embedded now") == 2


def test_a_damaged_index_is_made_anew_and_runs_no_code(command, run, folder, tmp_path, capsys):
    assert command("search", run, folder / "7" / "00.png", "--index", folder) == 0
    found = capsys.readouterr().out.splitlines()[1:]
    (index,) = (run / "index").iterdir()
    content = bytearray(index.read_bytes())
    content[200] ^= 1
    pickled = np.array([Code(tmp_path / "run by an index")])
    for damage in (lambda: index.write_bytes(content), lambda: np.savez(index, name=pickled)):
        damage()
        assert command("search", run, folder / "7" / "00.png", "--index", folder) == 0
        warning, _, *again = capsys.readouterr().out.splitlines()
        assert warning.startswith(f"warning: {index} is damaged (") and again == found
    assert not (tmp_path / "run by an index").exists()


def test_names_of_files_do_not_steer_the_terminal(command, run, folder, capsys):
    (folder / "7" / "00.png").rename(folder / "7" / "\x1b[2Ja\nb.png")
    assert command("search", run, folder / "7" / "01.png", "--index", folder, "-k", 48) == 0
    out = capsys.readouterr().out
    assert "\\x1b[2Ja\\nb.png" in out and "\x1b" not in out


def test_files_that_are_no_images_are_named_every_time(command, run, folder, capsys):
    (folder / "notes.txt").write_text("no image")
    (folder / "7" / "broken.png").write_bytes(b"no image either")
    os.mkfifo(folder / "7" / "pipe.png")
    for embedded_now in (48, 0, 1):
        assert command("search", run, folder / "7" / "00.png", "--index", folder) == 0
        out = capsys.readouterr().out
        assert "skipped 3 files" in out and "1 x a pipe, socket or device" in out
        assert f"48 images below {folder}, {embedded_now} embedded now" in out
        if embedded_now == 0:
            shutil.copy(folder / "7" / "00.png", folder / "7" / "01.png")


def test_a_run_that_cannot_be_written_is_searched(command, run, folder, tmp_path, capsys):
    (run / "index").write_text("in the way of a folder")
    table = tmp_path / "found.csv"
    assert command("search", run, folder, "--index", folder, "--csv", table) == 0
    out = capsys.readouterr().out
    assert f"48 embedded now, 0 removed; not kept: cannot write {run / 'index'}" in out
    assert len(rows(table)) == 480


def test_sheet_shows_and_names_queries_and_neighbors(command, run, folder, tmp_path, monkeypatch):
    sheet, queries = tmp_path / "found.png", tmp_path / "queries"
    queries.mkdir()
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda ax, x, **_: drawn.append(x))
    for name in ("00.png", "01.png", "02.png"):
        shutil.copy(folder / "7" / name, queries)
    assert command("search", run, queries, "--index", folder, "-k", 4, "--sheet", sheet) == 0
    with Image.open(sheet) as image:
        width, height = image.size
    assert width == pytest.approx(5 * 120, abs=2)
    assert height == pytest.approx(3 * 168, abs=2)
    assert drawn[::5] == [f"query\nqueries/0{i}.png" for i in range(3)]
    assert all(re.fullmatch(r"[01]\.\d{3}\n[78]/\d\d\.png", x) for x in drawn if "query" not in x)


def test_sheet_shows_any_name(command, run, folder, tmp_path):
    for name in (
        "a $price\\ $.png",
        "ひらがな.png",
        os.fsdecode(b"\xe9t\xe9.png"),
        "n" * 80 + ".png",
    ):
        shutil.copy(folder / "7" / "00.png", folder / name)
    shutil.rmtree(folder / "7")
    shutil.rmtree(folder / "8")
    sheet, table = tmp_path / "found.png", tmp_path / "found.csv"
    assert command("search", run, folder, "--index", folder, "--sheet", sheet, "--csv", table) == 0
    assert str(folder / "\\udce9t\\udce9.png") in {x[0] for x in rows(table)}
    with Image.open(sheet) as image:
        image.verify()


def test_folders_that_are_no_utf_8_are_searched_and_written(command, run, folder, tmp_path):
    name = os.fsdecode(b"\xe9t\xe9")
    folder = folder.rename(tmp_path / name)
    run = run.rename(tmp_path / f"run {name}")
    for _ in range(2):  # by a new index and by a kept one
        assert command("search", run, folder / "7" / "00.png", "--index", folder) == 0
    assert command("export", run, "--images", folder) == 0
    with np.load(run / "export" / "embeddings.npz") as stored:
        assert str(folder / "7" / "00.png") in stored["names"]


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


def turned(image, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return image, {"exif": exif}


def photograph():
    """Colours in which no side, corner or channel is like another."""
    rows, columns = np.mgrid[0:30, 0:40]
    colours = np.stack([6 * columns, 8 * rows, 3 * rows + 4 * columns % 90], axis=2)
    return Image.fromarray(colours.clip(0, 255).astype(np.uint8))


def half_transparent():
    image = photograph().convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 20, 30))
    return image


GREY = photograph().convert("L")
WIDE = np.asarray(GREY).astype(np.uint16)
# Image, and how it is saved.
KINDS = {
    "colour.jpg": (photograph(), {}),
    **{f"turned {i}.jpg": turned(photograph(), i) for i in (3, 6, 8)},
    "turned.png": turned(photograph(), 6),
    "text as EXIF.jpg": (photograph(), {"exif": b'Exif\0\0{"prompt": "fruit"}', "dpi": (72, 72)}),
    "transparent.png": (half_transparent(), {}),
    "transparent palette.png": (photograph().quantize(8), {"transparency": 0}),
    "transparent.webp": (half_transparent(), {"lossless": True}),
    "grey.png": (GREY, {}),
    "grey with alpha.png": (half_transparent().convert("LA"), {}),
    "black and white.png": (GREY.convert("1"), {}),
    "16 bits.png": (Image.fromarray(WIDE * 257), {}),
    "16 bits.tif": (Image.fromarray(WIDE * 100), {}),
    "floats.tif": (Image.fromarray(WIDE.astype(np.float32) / 255), {}),
    "floats of another range.tif": (Image.fromarray(WIDE.astype(np.float32)), {}),
    "cmyk.jpg": (photograph().convert("CMYK"), {}),
    "animated.gif": (photograph(), {"save_all": True, "append_images": [GREY]}),
    "long.png": (photograph().resize((400, 3)), {}),
}
EMBED_ALL = """
found = {name: embed(name).tolist() for name in stored["names"].tolist()}
print(json.dumps(found))
"""


def without_this_repository(code, folder, tmp_path):
    """What code prints that runs in a folder, where of this repository nothing is found."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout.splitlines()


def code_of(exported):
    return [
        x.split("```")[0] for x in (exported / "README.md").read_text().split("```python\n")[1:]
    ]


@pytest.mark.parametrize("network", ["run", "run_of_timm"])
def test_code_of_an_export_reaches_the_embedding_of_every_kind_of_image(
    command, request, network, tmp_path, capsys
):
    run = request.getfixturevalue(network)
    output, kinds = tmp_path / "exported", tmp_path / "kinds"
    kinds.mkdir()
    for name, (image, options) in KINDS.items():
        image.save(kinds / name, **options)
    assert command("export", run, "--images", kinds, "--output", output) == 0
    stored = np.load(output / "embeddings.npz")
    names = stored["names"].tolist()
    assert names == sorted(str(kinds / name) for name in KINDS)
    assert set(stored["labels"].tolist()) == {"kinds"}
    shutil.copy(kinds / "colour.jpg", output / "query.jpg")
    *printed, found = without_this_repository(code_of(output)[0] + EMBED_ALL, output, tmp_path)
    assert len(printed) == 10
    assert "1.0000" in printed[0] and str(kinds / "colour.jpg") in "".join(printed[:3])
    found = np.array([json.loads(found)[name] for name in names])
    assert found == pytest.approx(stored["embeddings"], abs=1e-4)
    assert embedded(run, names) == pytest.approx(stored["embeddings"], abs=1e-4)
    assert np.ptp(stored["embeddings"], axis=0).max() > 0.1  # they are not all alike


def test_network_for_onnxruntime_makes_the_same_embeddings(command, run, folder, tmp_path):
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    output = tmp_path / "exported"
    assert command("export", run, "--images", folder, "--output", output, "--onnx") == 0
    shutil.copy(folder / "7" / "00.png", output / "query.jpg")
    _, code = code_of(output)
    code += """
import sys
assert "torch" not in sys.modules
print(json.dumps(embeddings.tolist()))
"""
    (found,) = without_this_repository(code, output, tmp_path)
    assert json.loads(found) == [
        pytest.approx(embedded(run, [folder / "7" / "00.png"])[0], abs=1e-4)
    ]


def test_onnx_without_its_packages_is_refused_before_any_work(
    command, run, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert command("export", run, "--output", tmp_path / "exported", "--onnx") == 2
    assert "pip install onnxscript" in capsys.readouterr().err


def test_three_lines_embed_files(run, folder, environment):
    """Those of the documentation."""
    page = (EXAMPLES.parent / "docs" / "training_example.md").read_text()
    code = page.partition("## Use the trained model")[2].split("```python\n")[1].split("```")[0]
    place = "../runs/folder-PNPLoss-Ds-1"
    paths = [folder / "7" / "00.png", folder / "8" / "01.png"]
    assert place in code
    code = code.replace(place, str(run)) + "print(embeddings.tolist())"
    for path, name in zip(paths, ("a.jpg", "b.jpg"), strict=True):
        assert name in code
        code = code.replace(name, str(path))
    printed = subprocess.run(
        [sys.executable, "-c", code],
        cwd=EXAMPLES,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout
    assert json.loads(printed.splitlines()[-1]) == pytest.approx(embedded(run, paths), abs=1e-5)


def test_embedding_an_image_that_cannot_be_read_is_an_error_with_its_name(run, folder):
    (folder / "broken.png").write_text("no image")
    with pytest.raises(UserError, match="cannot read the image .*broken.png"):
        load_best(run).embed([folder / "7" / "00.png", folder / "broken.png"])
    with pytest.raises(TypeError, match="expected a list of paths, got '7.png'"):
        load_best(run).embed("7.png")


def test_export_embeds_the_test_images_and_overwrites_nothing(
    command, run, strict_json, tmp_path, capsys
):
    assert command("export", run) == 0
    stored = np.load(run / "export" / "embeddings.npz")
    config = strict_json(run / "config.json")
    assert len(stored["names"]) == config["data"]["test"]["images"]
    assert command("export", run) == 2
    assert "export exists; name a new folder by --output" in capsys.readouterr().err


def test_export_says_that_embeddings_are_of_boxes(main, command, quick, images, tmp_path):
    paths = [f"{images}/{label}/0{i}.png,{label}" for label in range(4) for i in range(8)]
    table = tmp_path / "table.csv"
    rows = [f"{x},{'train' if i < 16 else 'test'},0,0,8,4" for i, x in enumerate(paths)]
    table.write_text("\n".join(["path,label,split,x_1,y_1,x_2,y_2", *rows]))
    arguments = [*quick, "--dataset", "csv", "--data-root", table, "--output-dir", tmp_path]
    assert main(*arguments, "--batch-size", 4, "--name", "parts", "--epochs", 1) == 0
    run = tmp_path / "parts"
    assert command("export", run) == 0
    with np.load(run / "export" / "embeddings.npz") as stored:
        assert all(x.endswith(".png [0 0 8 4]") for x in stored["names"])
    text = (run / "export" / "README.md").read_text()
    assert "`embed(path)` takes\nthe whole image" in text
    assert command("export", run, "--images", images, "--output", tmp_path / "whole") == 0
    assert "box" not in (tmp_path / "whole" / "README.md").read_text()


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


@pytest.mark.parametrize(
    "file", ["model.pt2", "embeddings.npz", "transform.json", "prepare.py", "README.md"]
)
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
