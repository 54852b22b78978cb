"""The report of a run: its parts and numbers, and what a browser makes of it."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from retrieval import commands, ranking, report_parts
from retrieval import report as module
from retrieval.configuration import DATASET_DEFAULTS, configured
from retrieval.data import LabelledImages, RetrievalSplits, Sample, load_splits
from retrieval.embeddings import to_plane
from retrieval.errors import UserError
from retrieval.metrics import RetrievalAccuracy
from retrieval.network import load_best, untrained
from retrieval.ranking import rank_all
from retrieval.records import read
from retrieval.report import _settings, contents, render
from retrieval.report_parts import LEGEND_CLASSES, MARKERS
from retrieval.run_folder import RunFolder
from retrieval.thumbnails import to_image
from retrieval.trunks import SmallTransform

from pml_pnp import PNPLoss

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")

SECTIONS = [
    *("result", "sheets", "map", "negatives", "classes", "confusions", "alike"),
    *("curves", "augmented", "settings"),
]
CURVES = [
    "Training loss",
    "Validation MAP@R",
    "Learning rate of the trunk",
    "negatives_before_positive, in a batch",
]
HOSTILE_CLASS = "<script>alert(1)<!--"
HOSTILE_FILE = "\"><img src=x\nonerror='alert(1)'>.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FRAME = {"right": 0x2E9E4F, "wrong": 0xD64541}
MEGABYTES = 10**6


class Parser(HTMLParser):
    """Builds a tree of a page's elements."""

    void = ("meta", "img", "br", "path", "use")

    def __init__(self):
        super().__init__()
        self.builder = ET.TreeBuilder()

    def handle_starttag(self, tag, attributes):
        self.builder.start(tag, {k: v or "" for k, v in attributes})
        if tag in self.void:
            self.builder.end(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        if tag not in self.void:
            self.builder.end(tag)

    def handle_data(self, data):
        self.builder.data(data)


def parsed(path):
    parser = Parser()
    parser.builder.start("page", {})
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close()
    parser.builder.end("page")
    return parser.builder.close()


def text_of(element):
    return " ".join("".join(element.itertext()).split())


def section(page, name):
    (found,) = page.iterfind(f".//section[@id='{name}']")
    return found


def cells(row):
    return [text_of(x) for x in row if x.tag in ("th", "td")]


@pytest.fixture(scope="module")
def report():
    """Call the command `report` in this process; returns the exit code."""
    return lambda *arguments: commands.run("report", [str(x) for x in arguments], "report")


@pytest.fixture(scope="module")
def images(quick, once):
    """The images of `quick`, one test class and one of its files with names that break HTML."""

    def write(root):
        shutil.copytree(quick[quick.index("--data-root") + 1], root, dirs_exist_ok=True)
        (root / "9").rename(root / HOSTILE_CLASS)
        (root / HOSTILE_CLASS / "00.png").rename(root / HOSTILE_CLASS / HOSTILE_FILE)

    return once("hostile images", write)


@pytest.fixture(scope="module")
def arguments(quick, images):
    """`quick` with these images and with a report; the last of two flags counts."""
    return [*quick, "--data-root", images, "--report"]


@pytest.fixture(scope="module")
def finished(main, arguments, once):
    def train(folder):
        assert main(*arguments, "--epochs", 2, "--output-dir", folder, "--name", "run") == 0

    return once("run with a report", train) / "run"


@pytest.fixture(scope="module")
def page(finished):
    return parsed(finished / "report.html")


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the run, which a test may change."""
    return shutil.copytree(finished, tmp_path / "copied")


def splits_of(run):
    from retrieval.data import splits_of

    return splits_of(json.loads((run / "config.json").read_text()))


def networks_of(run):
    config = json.loads((run / "config.json").read_text())
    return {"untrained": untrained(config), "trained": load_best(str(run))}


# --- the page -------------------------------------------------------------------------------


def test_training_ends_with_a_page_that_has_all_parts(page):
    assert [x.get("id") for x in page.iter("section")] == SECTIONS
    links = {x.get("href") for x in page.find(".//nav").iter("a")}
    assert links == {f"#{name}" for name in SECTIONS}
    assert [text_of(x) for x in section(page, "curves").iter("figcaption")] == CURVES


def test_every_picture_says_what_it_shows(page):
    pictures = list(page.iter("img"))
    assert len(pictures) > 300
    assert all(x.get("alt").strip() for x in pictures)
    drawings = [x for x in page.iter("svg") if x.get("aria-hidden") != "true"]
    assert len(drawings) == 2 and all(x.get("aria-label") for x in drawings)


def test_page_needs_nothing_from_elsewhere(page, finished):
    for element in page.iter():
        for attribute in ("src", "href", "srcset", "data", "poster", "action"):
            value = element.get(attribute, "#")
            assert value.startswith(("data:", "#")), (element.tag, attribute, value)
    text = re.sub(
        r"data:[a-z/+]+;base64,[A-Za-z0-9+/=]+", "DATA", (finished / "report.html").read_text()
    )
    assert set(re.findall(r"url\(([^)]*)\)", text)) == {"DATA"}
    assert "://" not in text and "@import" not in text and "<link" not in text
    (policy,) = (x.get("content") for x in page.iter("meta") if x.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_names_are_escaped(page):
    assert len(list(page.iter("script"))) == 2
    assert not [x for x in page.iter() if "onerror" in x.attrib]
    captions = json.loads(page.find(".//script[@id='captions']").text)
    assert f"{HOSTILE_CLASS} · {HOSTILE_FILE}" in captions
    classes = [cells(x)[0] for x in section(page, "classes").find(".//tbody")]
    assert HOSTILE_CLASS in classes
    assert HOSTILE_CLASS in [text_of(x) for x in section(page, "map").iter("li")]


def test_result_is_that_of_the_run(page, finished, strict_json):
    metrics = strict_json(finished / "metrics.json")
    rows = {x.get("data-metric"): cells(x) for x in section(page, "result").iter("tr")}
    assert rows.pop(None)[1:] == ["untrained", "trained", "change"]
    assert rows.keys() == metrics["trained"].keys()
    for key, (_, *numbers) in rows.items():
        before, after = metrics["untrained"][key], metrics["trained"][key]
        assert numbers == [f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}"]


def test_classes_average_to_the_result(page, finished, strict_json):
    rows = [cells(x) for x in section(page, "classes").find(".//tbody")]
    metrics = strict_json(finished / "metrics.json")
    sizes = [int(x[1]) for x in rows]
    assert sizes == [24] * 5
    for column, network, key in (
        (2, "untrained", "mean_average_precision_at_r"),
        (3, "trained", "mean_average_precision_at_r"),
        (5, "untrained", "precision_at_1"),
        (6, "trained", "precision_at_1"),
    ):
        mean = np.average([float(x[column]) for x in rows], weights=sizes)
        assert mean == pytest.approx(metrics[network][key], abs=2e-4)
    trained = [float(x[3]) for x in rows]
    assert trained == sorted(trained)


def test_settings_are_those_of_the_run(page, finished, strict_json):
    config = strict_json(finished / "config.json")
    rows = dict(cells(x) for x in section(page, "settings").find(".//tbody"))
    for key in ("dataset", "loss", "lr", "ema_decay", "samples_per_class", "image_size"):
        assert rows["--" + key.replace("_", "-")] == str(config[key])
    assert rows["torch"] == config["versions"]["torch"]
    bold = {
        cells(x)[0]
        for x in section(page, "settings").find(".//tbody")
        if "given" in x[1].get("class")
    }
    assert bold == {
        *("--dataset", "--data-root", "--image-size", "--workers", "--ema-decay", "--batch-size"),
        *("--samples-per-class", "--epochs"),
    }


def test_settings_that_were_not_typed_are_not_bold():
    for dataset in DATASET_DEFAULTS:
        for other in ({}, {"loss": "CircleLoss"}, {"pretrained": True}, {"trunk": "resnet18"}):
            config = {**configured({"dataset": dataset, **other}), "threads": 3}
            bold = {name for name, _, changed in _settings(config) if changed}
            assert bold <= {"--dataset", *(f"--{key}" for key in other)}


def brute_force(run):
    """For each network and query: the others from the nearest on, and AP@R."""
    samples = splits_of(run).test.samples
    found = {}
    for network, (model, transform) in networks_of(run).items():
        with torch.no_grad():
            rows = [model(transform(x.open()).unsqueeze(0))[0].double().numpy() for x in samples]
        unit = [x / np.sqrt((x * x).sum()) for x in rows]
        for q, query in enumerate(samples):
            others = sorted(
                (i for i in range(len(samples)) if i != q), key=lambda i: -unit[q] @ unit[i]
            )
            right = [samples[i].label == query.label for i in others]
            r = sum(right)
            precision = sum(sum(right[: k + 1]) / (k + 1) for k in range(r) if right[k]) / r
            titles = [f"{samples[i].label} · {Path(samples[i].name).name}" for i in others[:10]]
            title = f"{query.label} · {Path(query.name).name}"
            found[network, title] = (titles, right[:10], precision)
    return found


def test_sheets_show_what_a_brute_force_ranking_finds(page, finished):
    expected = brute_force(finished)
    by_precision = {t: p for (network, t), (_, _, p) in expected.items() if network == "trained"}
    sheets = [x for x in section(page, "sheets").iter("div") if x.get("class") == "sheet"]
    assert [x.get("data-kind") for x in sheets] == ["worst"] * 5 + ["typical"] * 5 + ["best"] * 5
    shown = []
    for sheet in sheets:
        query = sheet.find("./figure/img").get("title")
        shown.append(by_precision[query])
        rows = sheet.findall(".//ol")
        assert [x.get("data-network") for x in rows] == ["trained", "untrained"]
        names = [text_of(x) for x in sheet.iter("div") if x.get("class") == "row-name"]
        for row, name in zip(rows, names, strict=True):
            titles, right, precision = expected[row.get("data-network"), query]
            pictures = list(row.iter("img"))
            assert [x.get("title") for x in pictures] == titles
            verdicts = ["right" if x else "wrong" for x in right]
            assert [x.get("class").split()[1] for x in pictures] == verdicts
            assert [x.get("alt").split(":")[0] for x in pictures] == verdicts
            assert float(name.split()[-1]) == pytest.approx(precision, abs=6e-5)
    ordered = sorted(by_precision.values())
    assert shown[:5] == pytest.approx(ordered[:5], abs=1e-6)
    assert shown[5:10] == pytest.approx(ordered[57:62], abs=1e-6)  # the middle of 120
    assert shown[10:] == pytest.approx(ordered[:-6:-1], abs=1e-6)


def test_thumbnails_are_the_images_that_are_named(page, finished):
    samples = {f"{x.label} · {Path(x.name).name}": x for x in splits_of(finished).test.samples}
    for picture in section(page, "sheets").iter("img"):
        thumbnail = decoded(picture.get("src"))
        original = samples[picture.get("title")].open().resize(thumbnail.size, Image.NEAREST)
        assert np.array_equal(thumbnail, original)
    style = "".join(section(page, "map").find("style").itertext())
    sprite = decoded(re.search(r"url\(([^)]*)\)", style)[1])
    captions = json.loads(page.find(".//script[@id='captions']").text)
    columns = sprite.width // 48
    for i in (0, 1, columns, len(captions) - 1):
        left, top = 48 * (i % columns), 48 * (i // columns)
        cell = sprite.crop((left, top, left + 48, top + 48)).convert("L")
        assert np.array_equal(cell, samples[captions[i]].open().resize((48, 48), Image.NEAREST))


def decoded(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2])))


def test_map_has_every_test_image_in_both_networks(page):
    drawings = section(page, "map").findall(".//svg[@data-network]")
    assert [x.get("data-network") for x in drawings] == ["untrained", "trained"]
    for drawing in drawings:
        points = list(drawing.iter("use"))
        assert sorted(int(x.get("data-i")) for x in points) == list(range(120))
        assert all(0 <= float(x.get("x")) <= 520 and 0 <= float(x.get("y")) <= 420 for x in points)
        assert len({x.get("fill") for x in drawing.iter("g")}) == 5
        shapes = [{x.get("href") for x in group.iter("use")} for group in drawing.iter("g")]
        assert [len(x) for x in shapes] == [1] * 5 and len(set.union(*shapes)) == 5
    legend = section(page, "map").find(".//ul[@class='legend']")
    assert {x.get("href") for x in legend.iter("use")} == set.union(*shapes)
    assert {f"#{x.get('id')}" for x in page.iter("path")} >= set.union(*shapes)


def test_every_box_that_scrolls_can_be_reached_by_keyboard(page):
    boxes = [x for x in page.iter() if {"scroll", "rows"} & set((x.get("class") or "").split())]
    assert len(boxes) == 8 + 15  # tables and pictures, and the images of a query
    for x in boxes:
        assert (x.get("tabindex"), x.get("role")) == ("0", "region") and x.get("aria-label")


def test_markers_are_as_many_as_a_legend_has_classes():
    assert len(set(MARKERS)) == LEGEND_CLASSES


# --- runs of all kinds ----------------------------------------------------------------------

OPTIONS = {
    "memory": ["--memory-size", 64],
    "proxies": ["--loss", "ProxyAnchorLoss", "--ema-decay", 0],
    "chunks": ["--grad-cache", 5, "--embedding-size", 1],
}


@pytest.mark.parametrize("option", OPTIONS)
def test_report_of_runs_with_other_losses(main, arguments, tmp_path, strict_json, option):
    run = tmp_path / "run"
    options = [*arguments, *OPTIONS[option], "--epochs", 1]
    assert main(*options, "--output-dir", tmp_path, "--name", "run") == 0
    page = parsed(run / "report.html")
    assert [x.get("id") for x in page.iter("section")] == SECTIONS
    curves = CURVES[:3] if option == "proxies" else CURVES
    assert [text_of(x) for x in section(page, "curves").iter("figcaption")] == curves
    assert ("Not recorded: negatives" in text_of(section(page, "curves"))) is (option == "proxies")
    assert_metrics_are_reproduced(run, strict_json)


def assert_metrics_are_reproduced(run, strict_json):
    from retrieval.embeddings import embed

    metrics = strict_json(run / "metrics.json")
    images = splits_of(run).test
    for name, (network, images.transform) in networks_of(run).items():
        embeddings = embed(network, images, 128)
        accuracy = RetrievalAccuracy(device=torch.device("cpu"))
        found = accuracy.get_accuracy(embeddings, torch.from_numpy(images.labels))
        assert found == pytest.approx(metrics[name], abs=1e-6)


def test_untrained_and_trained_network_give_the_metrics_of_the_run(finished, strict_json):
    assert_metrics_are_reproduced(finished, strict_json)


@pytest.mark.parametrize("perfect", [False, True])
def test_two_test_classes(main, arguments, images, tmp_path, perfect):
    root = tmp_path / "images"
    for split, name in (("train", "0"), ("train", "1"), ("test", "2"), ("test", "3")):
        shutil.copytree(images / name, root / split / name)
    if perfect:  # each test class one image, again and again
        for name in "23":
            for path in (root / "test" / name).glob("*.png"):
                Image.new("L", (8, 8), 50 * int(name)).save(path)
    options = [*arguments, "--data-root", root, "--batch-size", 4, "--epochs", 1]
    assert main(*options, "--output-dir", tmp_path, "--name", "run") == 0
    page = parsed(tmp_path / "run" / "report.html")
    assert [x.get("id") for x in page.iter("section")] == SECTIONS
    rows = [cells(x)[:2] for x in section(page, "confusions").iter("tr")][1:]
    assert sorted(rows) == ([] if perfect else [["2", "3"], ["3", "2"]])
    assert ("None: for every query" in text_of(section(page, "confusions"))) is perfect


def test_run_without_metrics_says_so_and_shows_what_was_learned(copied, report, page):
    (copied / "metrics.json").unlink()
    assert report(copied) == 0
    unfinished = parsed(copied / "report.html")
    assert "The run has not ended" in text_of(section(unfinished, "notes"))
    tables = [[cells(x) for x in section(p, "result").iter("tr")] for p in (unfinished, page)]
    assert tables[0] == tables[1]
    assert "Weights of epoch" not in text_of(section(unfinished, "result"))


def test_run_that_was_killed_in_its_first_epoch(copied, report):
    (copied / "metrics.json").unlink()
    (copied / "checkpoints" / "best.pt").unlink()
    shutil.rmtree(copied / "logs")
    assert report(copied) == 0
    page = parsed(copied / "report.html")
    notes = text_of(section(page, "notes"))
    assert "Nothing is shown of the trained network" in notes and "best.pt" in notes
    missing = text_of(section(page, "curves"))
    assert all(x in missing for x in CURVES)
    assert {x.get("data-network") for x in page.iter("ol")} == {"untrained"}
    assert [cells(x) for x in section(page, "result").iter("tr")][0][1:] == ["untrained"]


def test_neither_network_leaves_settings_and_curves(copied, report, monkeypatch):
    def fail(config):
        raise UserError("no weights")

    (copied / "checkpoints" / "best.pt").unlink()
    monkeypatch.setattr(module, "untrained", fail)
    assert report(copied) == 0
    page = parsed(copied / "report.html")
    assert [x.get("id") for x in page.iter("section")] == ["notes", *SECTIONS[7:]]
    assert {x.get("href") for x in page.iter("a")} == {f"#{x}" for x in SECTIONS[7:]}


@pytest.mark.parametrize("size", [(960, 8), (8, 960), (1, 2000)])
def test_thumbnail_of_a_long_strip(size):
    from retrieval.thumbnails import from_data_uri, sprite, thumbnail

    sample = Sample("strip", "0", np.zeros(size[::-1], dtype=np.uint8))
    small = from_data_uri(thumbnail(sample, 48))
    assert max(small.size) == 48 and min(small.size) == 1
    assert sprite([sample], 48).columns == 1


def test_metrics_of_other_images_are_noted(copied, report, strict_json):
    metrics = strict_json(copied / "metrics.json")
    metrics["untrained"]["mean_average_precision_at_r"] += 0.1
    (copied / "metrics.json").write_text(json.dumps(metrics))
    assert report(copied) == 0
    (note,) = section(parsed(copied / "report.html"), "notes").iter("li")
    assert "The untrained network ranks the images found now with a MAP@R of" in text_of(note)


@pytest.mark.parametrize("change", [0.1, -0.1])
def test_worse_retrieval_and_a_rising_validation_are_said(copied, report, strict_json, change):
    metrics = strict_json(copied / "metrics.json")
    key = "mean_average_precision_at_r"
    metrics["trained"][key] = metrics["untrained"][key] + change
    metrics["best_epoch"] = 2 if change > 0 else 1
    (copied / "metrics.json").write_text(json.dumps(metrics))
    assert report(copied) == 0
    result = text_of(section(parsed(copied / "report.html"), "result"))
    assert ("Training made the retrieval of unseen classes worse" in result) is (change < 0)
    assert ("still rising in the last epoch" in result) is (change > 0)


def test_sheet_shows_queries_in_frames(copied, report, tmp_path, capsys):
    file = tmp_path / "new" / "sheet.png"
    assert report(copied, "--sheet", file) == 0
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
    for color in FRAME.values():
        channels = [color >> shift & 255 for shift in (16, 8, 0)]
        assert (abs(pixels - channels).max(axis=2) <= 2).sum() > 100
    assert report(copied, "--sheet", file) == 2
    assert f"--sheet: {file} exists; name a new file" in capsys.readouterr().err
    assert report(copied, "--sheet", tmp_path / "sheet.jpeg") == 2
    assert "expected a name that ends in .png or .pdf" in capsys.readouterr().err


def test_sheet_of_a_run_without_networks_is_refused(copied, report, tmp_path, capsys, monkeypatch):
    def fail(config):
        raise UserError("no weights")

    (copied / "checkpoints" / "best.pt").unlink()
    monkeypatch.setattr(module, "untrained", fail)
    assert report(copied, "--sheet", tmp_path / "sheet.png") == 2
    assert "--sheet: there are no queries to show; Nothing is shown" in capsys.readouterr().err
    assert not (tmp_path / "sheet.png").exists()


def test_images_that_moved_are_found_with_data_root(
    copied, report, images, tmp_path, capsys, strict_json
):
    config = strict_json(copied / "config.json")
    config["data_root"] = str(tmp_path / "gone")
    (copied / "config.json").write_text(json.dumps(config))
    before = (copied / "report.html").read_bytes()
    assert report(copied) == 2
    assert (
        "name the folder of the run's images, of a csv the table, with --data-root"
        in capsys.readouterr().err
    )
    assert (copied / "report.html").read_bytes() == before
    (copied / "report.html").unlink()
    assert report(copied, "--data-root", images) == 0
    assert (copied / "report.html").is_file()


def test_other_images_are_refused(copied, report, images, tmp_path, capsys):
    root = shutil.copytree(images, tmp_path / "other")
    (root / HOSTILE_CLASS / "01.png").unlink()
    assert report(copied, "--data-root", root) == 2
    err = capsys.readouterr().err
    assert "are not those of the run" in err and "--data-root" in err


def test_folder_without_a_run_is_refused(report, tmp_path, capsys):
    assert report(tmp_path) == 2
    assert "report: error: no run in" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert report(tmp_path) == 2
    assert "config.json is not of this program" in capsys.readouterr().err


def test_failure_of_the_report_does_not_lose_the_run(
    main, arguments, tmp_path, strict_json, capsys, monkeypatch
):
    def fail(content):
        raise OSError("disk full")

    monkeypatch.setattr(module, "render", fail)
    run = tmp_path / "run"
    assert main(*arguments, "--epochs", 1, "--output-dir", tmp_path, "--name", "run") == 0
    assert strict_json(run / "metrics.json")["epochs_trained"] == 1
    out = capsys.readouterr().out
    assert "warning: the report could not be made: OSError: disk full" in out
    assert f"python examples/retrieval report {run}" in out
    assert not list(run.glob("report*"))


@pytest.mark.parametrize("left", ["none", "an older one", "the latest"])
def test_a_report_that_a_kill_prevented_is_made(copied, main, capsys, left):
    page, metrics = copied / "report.html", copied / "metrics.json"
    if left == "none":
        page.unlink()
    elif left == "an older one":  # of an epoch before the run went on
        page.write_text("old")
        os.utime(page, ns=(0, metrics.stat().st_mtime_ns - 1))
    before = page.read_bytes() if page.exists() else None
    assert main("--resume", copied, "--no-report") == 0
    assert (page.read_bytes() if page.exists() else None) == before
    assert main("--resume", copied) == 0
    out = capsys.readouterr().out
    assert "is finished; nothing to train" in out
    assert (f"report: {page}" in out) is (left != "the latest")
    assert page.stat().st_mtime_ns >= metrics.stat().st_mtime_ns
    assert section(parsed(page), "result") is not None


def test_missing_package_is_named_before_training(main, arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(*arguments, "--output-dir", tmp_path) == 2
    assert "pip install jinja2" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
    assert main(*arguments, "--no-report", "--epochs", 1, "--output-dir", tmp_path) == 0


def test_page_of_five_thousand_images_stays_below_ten_megabytes(copied):
    """Of noise, which no format makes smaller, in many classes."""
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (5000, 96, 96, 3), dtype=np.uint8)
    samples = [Sample(f"{i}.jpg", f"class {i % 500:03d}", x) for i, x in enumerate(noise)]
    images = LabelledImages(samples, sorted({x.label for x in samples}))
    embeddings = {
        name: torch.nn.functional.normalize(torch.from_numpy(generator.normal(size=(5000, 8))))
        for name in ("untrained", "trained")
    }
    run = RunFolder(copied)
    splits = RetrievalSplits(images, images, images, "held-out classes", "by hand", False, [], {})
    content = contents(run, run.read_json("config.json"), splits, embeddings, [])
    run.write_text("report.html", render(content))
    assert (copied / "report.html").stat().st_size < 10 * MEGABYTES
    page = parsed(copied / "report.html")
    assert "2000 of the 5000 test images, drawn at random" in text_of(section(page, "map"))
    assert "of 500 classes the 100 at either end" in text_of(section(page, "classes"))
    assert len(list(section(page, "classes").find(".//tbody"))) == 200


def test_of_many_images_a_part_are_queries(copied, report, monkeypatch):
    """The metrics stay those of all; a query finds what it finds where all are queries."""
    monkeypatch.setattr(report_parts, "PAIRS_AT_MOST", 120 * 7)
    before = parsed(copied / "report.html")
    pages = []
    for _ in range(2):
        assert report(copied) == 0
        pages.append((copied / "report.html").read_bytes())
    assert pages[0] == pages[1]
    page = parsed(copied / "report.html")
    assert "ranked for 7 of the 120 test images, drawn" in text_of(section(page, "notes"))
    assert "network ranks the images found now" not in text_of(section(page, "notes"))
    tables = [[cells(x) for x in section(x, "result").iter("tr")] for x in (page, before)]
    assert tables[0] == tables[1]
    sheets = [x for x in section(page, "sheets").iter("div") if x.get("class") == "sheet"]
    assert [x.get("data-kind") for x in sheets] == ["worst"] * 2 + ["typical"] * 2 + ["best"] * 2
    expected = brute_force(copied)
    for sheet in sheets:
        query = sheet.find("./figure/img").get("title")
        for row in sheet.findall(".//ol"):
            titles, _, _ = expected[row.get("data-network"), query]
            assert [x.get("title") for x in row.iter("img")] == titles


def test_parts_of_few_queries_are_means_over_these():
    from retrieval.report_parts import TestResults

    pixels = np.zeros((8, 8), dtype=np.uint8)
    samples = [Sample(f"{i}.png", f"class {i % 9}", pixels) for i in range(90)]
    images = LabelledImages(samples, sorted({x.label for x in samples}))
    embeddings = {"trained": torch.nn.functional.normalize(torch.randn(90, 4))}
    whole = TestResults(images, embeddings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retrieval.report_parts.PAIRS_AT_MOST", 90 * 12)
        part = TestResults(images, embeddings)
    assert not whole.is_part and part.is_part
    queries = part.queries.tolist()
    assert len(queries) == 12 and queries == sorted(set(queries))
    precision = whole.rankings["trained"].average_precision
    found = {x.picture.label: x for x in part.classes()}
    asked = {samples[q].label for q in queries}
    assert found.keys() == asked and part.num_classes == len(asked) < 9
    for label, row in found.items():
        own = [float(precision[q]) for q in queries if samples[q].label == label]
        assert row.map_at_r["trained"] == pytest.approx(np.mean(own))
        assert row.images == 10
    pairs = part.rankings["trained"].confused
    assert {f"class {x}" for x, _ in pairs} <= asked
    for label in asked:
        shares = sum(part._share("trained", x) for x in pairs if f"class {x[0]}" == label)
        own = [q for q in queries if samples[q].label == label]
        wrong = [samples[i].label != label for q in own for i in nearest(embeddings["trained"], q)]
        assert shares == pytest.approx(np.mean(wrong))


def nearest(embeddings, query):
    """The numbers of the nine images that are nearest to one."""
    similarities = (embeddings @ embeddings[query]).tolist()
    others = (i for i in range(len(similarities)) if i != query)
    return sorted(others, key=lambda i: -similarities[i])[:9]


@pytest.mark.parametrize(
    ("name", "folder"), [("omniglot", "omniglot-small"), ("grocery", "grocery64")]
)
def test_report_of_real_images(run_of_real_images, name, folder):
    report = run_of_real_images(name, folder) / "report.html"
    page = parsed(report)
    assert [x.get("id") for x in page.iter("section")] == SECTIONS
    assert report.stat().st_size < 10 * MEGABYTES


# --- in a browser ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    """Open a page in headless Chromium; returns its standard output and error."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"none of the browsers {', '.join(BROWSERS)} is installed")

    def run(page, *arguments):
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += ["--enable-logging=stderr", "--virtual-time-budget=2000", *arguments]
        return subprocess.run(
            [*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
        )

    return run


def with_script(page, script):
    text = page.read_text(encoding="utf-8")
    changed = page.with_name("changed.html")
    changed.write_text(text.replace("</body>", f"<script>{script}</script></body>"))
    return changed


def test_browser_shows_the_frames(browser, finished, page, tmp_path):
    shot = tmp_path / "shot.png"
    result = browser(finished / "report.html", f"--screenshot={shot}", "--window-size=1200,6200")
    assert "CONSOLE" not in result.stderr
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(np.int64) @ (2**16, 2**8, 1)
    assert pixels.shape == (6200, 1200)
    colors, counts = np.unique(pixels, return_counts=True)
    assert len(colors) > 100 and counts.max() < 0.8 * pixels.size
    area = {kind: int((pixels == color).sum()) for kind, color in FRAME.items()}
    frames = {
        kind: sum(kind in x.get("class").split() for x in section(page, "sheets").iter("img"))
        for kind in FRAME
    }
    assert sum(frames.values()) == 300 and min(frames.values()) > 10
    per_frame = {kind: area[kind] / frames[kind] for kind in FRAME}
    # Four sides of 4 pixels along images of 88 pixels, corners rounded; text has the colours too.
    assert all(1000 < x < 1600 for x in per_frame.values()), per_frame


@pytest.mark.parametrize(
    "script", ["undefined_name;", "document.body.append(Object.assign(new Image, {src: 'a.png'}))"]
)
def test_browser_would_report_errors_and_what_is_loaded(browser, copied, script):
    changed = with_script(copied / "report.html", script)
    assert "CONSOLE" in browser(changed, "--dump-dom").stderr


def test_pointing_at_a_point_shows_its_image(browser, copied, page):
    point = "document.querySelector('.maps svg use[data-i=\"100\"]')"
    over = f"{point}.dispatchEvent(new PointerEvent('pointerover', {{bubbles: true}}));"
    captions = json.loads(page.find(".//script[@id='captions']").text)
    seen = {}
    for name, script in (("before", ""), ("after", over)):
        result = browser(with_script(copied / "report.html", script), "--dump-dom")
        (copied / "dom.html").write_text(result.stdout, encoding="utf-8")
        (seen[name],) = parsed(copied / "dom.html").iterfind(".//div[@id='tip']")
        assert "CONSOLE" not in result.stderr
    assert "hidden" in seen["before"].attrib and "hidden" not in seen["after"].attrib
    assert text_of(seen["after"]) == " ".join(captions[100].split())
    columns = 11  # 120 thumbnails
    position = f"{-96 * (100 % columns)}px {-96 * (100 // columns)}px"
    assert f"background-position: {position}" in seen["after"].find("div").get("style")


def test_arrow_keys_go_from_image_to_image(browser, copied, page):
    """To the right, until there is none."""
    captions = json.loads(page.find(".//script[@id='captions']").text)
    script = """
        const svg = document.querySelector('.maps svg'), seen = [];
        const press = (key) => {
          svg.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));
          const at = svg.querySelector('.at');
          return at && [+at.dataset.i, +at.getAttribute('x'), tip.children[1].textContent];
        };
        for (let i = 0; i < 9; i++) seen.push(press('ArrowRight'));
        document.body.dataset.seen = JSON.stringify(seen);
        document.body.dataset.left = JSON.stringify(press('ArrowLeft'));
        document.body.dataset.hidden = [tip.hidden, press('Escape'), tip.hidden].join();
    """
    result = browser(with_script(copied / "report.html", script), "--dump-dom")
    assert "CONSOLE" not in result.stderr
    (copied / "dom.html").write_text(result.stdout, encoding="utf-8")
    body = parsed(copied / "dom.html").find(".//body")
    seen = json.loads(body.get("data-seen"))
    numbers, places, texts = zip(*seen, strict=True)
    assert list(places) == sorted(places) and len(set(numbers)) > 2
    assert list(texts) == [captions[i] for i in numbers]
    assert json.loads(body.get("data-left"))[1] < places[-1]
    assert body.get("data-hidden") == "false,,true"


def test_on_paper_nothing_is_cut_off(browser, copied):
    """At the width of a page, no box is wider than it, in the rules for print."""
    script = """
        const page = 718;  // A4 less Chromium's margins, in pixels of CSS
        document.body.style.width = `${page}px`;
        document.body.dataset.wide = [...document.querySelectorAll('table, img, svg, ol')]
            .filter((x) => x.getBoundingClientRect().right > page + 1)
            .map((x) => x.closest('section')?.id).join();
    """
    text = (copied / "report.html").read_text(encoding="utf-8")
    (copied / "report.html").write_text(text.replace("@media print", "@media all"))
    changed = with_script(copied / "report.html", script)
    result = browser(changed, "--dump-dom", "--window-size=718,1000")
    (copied / "dom.html").write_text(result.stdout, encoding="utf-8")
    assert parsed(copied / "dom.html").find(".//body").get("data-wide") == ""


def test_on_a_narrow_screen_boxes_scroll_and_not_the_page(browser, copied):
    """The histogram stays large enough to be read, and names have room for words."""
    script = """
        const widths = [innerWidth, document.documentElement.scrollWidth];
        for (const what of ['#negatives img', '#classes td.name']) {
          widths.push(Math.round(document.querySelector(what).getBoundingClientRect().width));
        }
        document.body.dataset.widths = widths.join();
    """
    changed = with_script(copied / "report.html", script)
    result = browser(changed, "--dump-dom", "--window-size=400,800")
    (copied / "dom.html").write_text(result.stdout, encoding="utf-8")
    widths = parsed(copied / "dom.html").find(".//body").get("data-widths")
    window, content, histogram, name = map(int, widths.split(","))
    assert content <= window <= 500
    assert histogram >= 600 and name >= 110


# --- the parts ------------------------------------------------------------------------------


def test_images_that_stand_in_training_and_test_are_named(copied, report, images, tmp_path):
    """A copy of two images among the test images, one of them a little darker."""
    data = shutil.copytree(images, tmp_path / "data")
    splits = load_splits("folder", str(data), 0.2, 0)
    for target, source, factor in zip(
        splits.test.samples, splits.seen.samples, (1, 0.97), strict=False
    ):
        source.open().point(lambda x, factor=factor: x * factor).save(target.name)
    assert report(copied, "--data-root", data) == 0
    rows = [cells(x) for x in section(parsed(copied / "report.html"), "alike").iter("tr")][1:]
    shown = [f"{x.label} · {Path(x.name).name}" for x in splits.seen.samples[:2]]
    assert len(rows) == 12 and {x[1] for x in rows[:2]} == set(shown)
    assert rows[0][1:] == [shown[0], "1.0000"]
    similarities = [float(x[2]) for x in rows]
    assert similarities == sorted(similarities, reverse=True) and similarities[-1] < 0.9999


def test_of_many_training_images_a_part_is_compared(copied, report, monkeypatch):
    embedded = {}

    def embed(network, images, *args, description, **options):
        embedded[description] = [x.name for x in images.samples]
        return original(network, images, *args, description=description, **options)

    original = module.embed
    monkeypatch.setattr(module, "embed", embed)
    monkeypatch.setattr(module, "SEEN_AT_MOST", 7)
    drawn = []
    for _ in range(2):
        assert report(copied) == 0
        drawn.append(embedded["training images, to compare with"])
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 7
    text = " ".join(section(parsed(copied / "report.html"), "alike").itertext())
    assert re.search(r"Of the \d+ images that were trained and validated on, 7 are compared", text)


@pytest.mark.parametrize("size", [(960, 10), (10, 970), (5000, 1), (1, 1), (48, 48)])
def test_thumbnail_of_an_image_of_any_proportions(size):
    from retrieval.thumbnails import contact_sheet, from_data_uri, sprite, thumbnail

    sample = Sample("x", "y", np.full(size[::-1], 99, np.uint8))
    small = from_data_uri(thumbnail(sample, 48))
    assert max(small.size) == 48 and min(small.size) >= 1
    assert abs(np.asarray(small).astype(int) - 99).max() < 3
    assert from_data_uri(sprite([sample], 48).uri).size == (48, 48)
    assert from_data_uri(contact_sheet([[sample.open()]], 48)).size == (48, 48)


@pytest.mark.parametrize("block", [1, 100, 2**20])
def test_ranking_is_that_of_loops_and_of_pml(monkeypatch, block):
    monkeypatch.setattr(ranking, "PAIRS_AT_A_TIME", block)
    embeddings = torch.nn.functional.normalize(torch.randn(40, 5))
    labels = torch.arange(40) % 3
    found = ranking.rank_all(embeddings, labels, 10)
    before, confused = torch.zeros(40, dtype=torch.int64), {}
    for q in range(40):
        others = [i for i in range(40) if i != q]
        others.sort(key=lambda i: -float(embeddings[q] @ embeddings[i]))
        assert found.nearest[q].tolist() == others[:10]
        right = [bool(labels[i] == labels[q]) for i in others]
        assert bool(found.right_first[q]) is right[0]
        r = sum(right)
        precision = sum(sum(right[: k + 1]) / (k + 1) for k in range(r) if right[k]) / r
        assert float(found.average_precision[q]) == pytest.approx(precision, abs=1e-6)
        for k, is_right in enumerate(right):
            if is_right:
                before[right[:k].count(False)] += 1
            elif k < r:
                pair = int(labels[q]), int(labels[others[k]])
                confused[pair] = confused.get(pair, 0) + 1
    assert torch.equal(found.negatives_before, before)
    assert found.confused == confused
    mean = sum(k * int(n) for k, n in enumerate(before)) / int(before.sum())
    assert found.mean_negatives_before == pytest.approx(mean)
    calculator = RetrievalAccuracy(device=torch.device("cpu"))
    metrics = calculator.get_accuracy(embeddings, labels)
    assert metrics["mean_average_precision_at_r"] == pytest.approx(
        float(found.average_precision.mean()), abs=1e-6
    )


def test_fewer_images_than_neighbours_are_all_kept():
    embeddings = torch.nn.functional.normalize(torch.randn(4, 3))
    assert rank_all(embeddings, torch.tensor([0, 0, 1, 1]), 10).nearest.shape == (4, 3)


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_embed_keeps_order_and_mode(with_labels, batch_size):
    from retrieval.embeddings import embed

    images = torch.randn(7, 3, 2)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(6), torch.nn.Dropout())
    dataset = [(x, 0) for x in images] if with_labels else list(images)
    expected = images.flatten(1) / (1 + 1e-5) ** 0.5
    plain = embed(network, dataset, batch_size, normalize=False)
    torch.testing.assert_close(plain, expected)
    assert plain.dtype is torch.float32 and not plain.requires_grad
    unit = embed(network, dataset, batch_size)
    torch.testing.assert_close(unit, expected / expected.norm(dim=1, keepdim=True))


def test_embed_refuses_what_is_not_finite():
    from retrieval.embeddings import embed

    with pytest.raises(UserError, match="the embeddings are not finite"):
        embed(torch.nn.Identity(), [torch.tensor([1.0, float("nan")])], 1)


@pytest.mark.parametrize("shape", [(30, 8), (3, 8), (30, 1), (2, 1)])
def test_plane_of_any_embeddings(shape):
    plane, method = to_plane(torch.randn(shape))
    assert plane.shape == (shape[0], 2) and np.isfinite(plane).all()
    assert method in ("PCA", "UMAP")


def test_records_are_read_across_headers_and_cut_lines(tmp_path):
    assert read(tmp_path / "logs", "*", "loss") == []
    (tmp_path / "a.csv").write_text("~iteration~,other\n0,1\n")
    (tmp_path / "b.csv").write_text(
        "~iteration~,loss\n0,0.5\n1,0.25\n~iteration~,new,loss\n2,9,0.125\n3,9\n"
    )
    assert read(tmp_path, "*", "loss") == [(0, 0.5), (1, 0.25), (2, 0.125)]
    assert read(tmp_path, "a*", "loss") == []


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_training_image_is_shown_as_it_was(mode):
    shape = (8, 8) if mode == "L" else (8, 8, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    tensor = SmallTransform(8, mode)(Image.fromarray(pixels))
    assert np.array_equal(to_image(tensor, (0.5,), (0.5,)), pixels)


def test_negatives_are_counted_where_they_are_recorded(main, quick, tmp_path, monkeypatch):
    """And only there, since counting takes longer than the loss of a large batch."""
    forward, counted = PNPLoss.compute_loss, []

    def watched(self, *arguments):
        result = forward(self, *arguments)
        counted.append(self.negatives_before_positive if self.collect_stats else None)
        return result

    monkeypatch.setattr(PNPLoss, "compute_loss", watched)
    assert main(*quick, "--epochs", 2, "--output-dir", tmp_path, "--name", "run") == 0
    calls = counted[-22:]  # 11 iterations an epoch, after those that try the loss out
    recorded = read(tmp_path / "run" / "logs", "metric_loss", "negatives_before_positive")
    assert [step for step, _ in recorded] == [i for i, x in enumerate(calls) if x is not None]
    assert len(recorded) == 12
    assert [x for _, x in recorded] == [x for x in calls if x is not None]
    assert any(x > 0 for _, x in recorded)
