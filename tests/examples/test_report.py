"""The report of a run: its parts and numbers, and what a browser makes of it."""

import json
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import average_precision_at_r, change_json, change_weights
from PIL import Image
from retrieval import ranking, report_parts
from retrieval import report as module
from retrieval.configuration import DATASET_DEFAULTS, configured
from retrieval.data import LabelledImages, RetrievalSplits, Sample, load_splits, splits_of
from retrieval.embeddings import to_plane
from retrieval.errors import UserError
from retrieval.network import load_best, untrained
from retrieval.records import read
from retrieval.report import _part_of_seen, _settings, contents, render
from retrieval.report_parts import LEGEND_CLASSES, MARKERS
from retrieval.run_folder import RunFolder
from retrieval.thumbnails import contact_sheet, from_data_uri, sprite, thumbnail, to_image
from retrieval.trunks import SmallTransform

from pml_pnp import PNPLoss

SECTIONS = ["result", "sheets", "map", "negatives", "classes", "confusions", "alike"]
SECTIONS += ["curves", "augmented", "settings"]
CURVES = ["Training loss", "Validation MAP@R", "Learning rate of the trunk"]
CURVES += ["negatives_before_positive, in a batch"]
HOSTILE_CLASS = "<script>alert(1)<!--"
HOSTILE_FILE = "\"><img src=x\nonerror='alert(1)'>.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FRAME = {"right": (46, 158, 79), "wrong": (214, 69, 65)}
MEGABYTES = 10**6
DATA = Path(os.environ.get("PML_PNP_DATA", "no data"))


class Parser(HTMLParser):
    """Builds a tree of a page's elements."""

    void = ("meta", "img", "br", "path", "use")

    def __init__(self):
        super().__init__()
        self.builder = ET.TreeBuilder()
        self.handle_data = self.builder.data

    def handle_starttag(self, tag, attributes):
        self.builder.start(tag, {k: v or "" for k, v in attributes})
        if tag in self.void:
            self.builder.end(tag)

    def handle_endtag(self, tag):
        if tag not in self.void:
            self.builder.end(tag)


def parsed(path):
    parser = Parser()
    parser.feed(f"<page>{path.read_text(encoding='utf-8')}</page>")
    return parser.builder.close()


def text_of(element):
    return " ".join("".join(element.itertext()).split())


def section(page, name):
    (found,) = page.iterfind(f".//section[@id='{name}']")
    return found


def text_in(page, name):
    return text_of(section(page, name))


def cells(row):
    return [text_of(x) for x in row if x.tag in ("th", "td")]


@pytest.fixture(scope="module")
def images(digits, once):
    """The digits, with one test class and one of its files named so as to break HTML."""

    def write(root):
        shutil.copytree(digits, root, dirs_exist_ok=True)
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


@pytest.fixture
def report(command):
    return lambda *arguments: command("report", *arguments)


@pytest.fixture
def remade(report, copied):
    """Make the report of the copy anew; returns its page."""

    def make(*arguments):
        assert report(copied, *arguments) == 0
        return parsed(copied / "report.html")

    return make


def sections(page):
    return [x.get("id") for x in page.iter("section")]


def table(page, name):
    return [cells(x) for x in section(page, name).iter("tr")]


def body(page, name):
    return list(section(page, name).find(".//tbody"))


def captions_of(page):
    return json.loads(page.find(".//script[@id='captions']").text)


def test_page_has_all_parts_named_and_reached_by_keyboard(page):
    assert sections(page) == SECTIONS
    links = {x.get("href") for x in page.find(".//nav").iter("a")}
    assert links == {f"#{name}" for name in SECTIONS}
    assert [text_of(x) for x in section(page, "curves").iter("figcaption")] == CURVES
    pictures = list(page.iter("img"))
    assert len(pictures) > 300
    assert all(x.get("alt").strip() for x in pictures)
    drawings = [x for x in page.iter("svg") if x.get("aria-hidden") != "true"]
    assert len(drawings) == 2 and all(x.get("aria-label") for x in drawings)
    boxes = [x for x in page.iter() if {"scroll", "rows"} & set((x.get("class") or "").split())]
    assert len(boxes) == 8 + 15  # tables and pictures, and the images of a query
    for x in boxes:
        assert (x.get("tabindex"), x.get("role")) == ("0", "region") and x.get("aria-label")


def test_page_needs_nothing_from_elsewhere_and_escapes_names(page, finished):
    for element in page.iter():
        assert "onerror" not in element.attrib
        for attribute in ("src", "href", "srcset", "data", "poster", "action"):
            value = element.get(attribute, "#")
            assert value.startswith(("data:", "#")), (element.tag, attribute, value)
    text = (finished / "report.html").read_text()
    text = re.sub(r"data:[a-z/+]+;base64,[A-Za-z0-9+/=]+", "DATA", text)
    assert set(re.findall(r"url\(([^)]*)\)", text)) == {"DATA"}
    assert "://" not in text and "@import" not in text and "<link" not in text
    (policy,) = (x.get("content") for x in page.iter("meta") if x.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert len(list(page.iter("script"))) == 2
    assert f"{HOSTILE_CLASS} · {HOSTILE_FILE}" in captions_of(page)
    assert HOSTILE_CLASS in [cells(x)[0] for x in body(page, "classes")]
    assert HOSTILE_CLASS in [text_of(x) for x in section(page, "map").iter("li")]


def test_numbers_are_those_of_the_run_of_which_classes_are_a_mean(page, finished, strict_json):
    metrics = strict_json(finished / "metrics.json")
    rows = {x.get("data-metric"): cells(x) for x in section(page, "result").iter("tr")}
    assert rows.pop(None)[1:] == ["untrained", "trained", "change"]
    assert rows.keys() == metrics["trained"].keys()
    for key, (_, *numbers) in rows.items():
        before, after = metrics["untrained"][key], metrics["trained"][key]
        assert numbers == [f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}"]
    classes = [cells(x) for x in body(page, "classes")]
    assert [x[1] for x in classes] == ["24"] * 5
    for first, key in ((2, "mean_average_precision_at_r"), (5, "precision_at_1")):
        for column, network in enumerate(("untrained", "trained"), first):
            mean = np.mean([float(x[column]) for x in classes])
            assert mean == pytest.approx(metrics[network][key], abs=2e-4)
    trained = [float(x[3]) for x in classes]
    assert trained == sorted(trained)


def test_settings_are_those_of_the_run_and_bold_if_typed(page, finished, strict_json):
    config = strict_json(finished / "config.json")
    rows = body(page, "settings")
    values = dict(map(cells, rows))
    for key in ("dataset", "loss", "lr", "ema_decay", "samples_per_class", "image_size"):
        assert values["--" + key.replace("_", "-")] == str(config[key])
    assert values["torch"] == config["versions"]["torch"]
    assert {cells(x)[0] for x in rows if "given" in x[1].get("class")} == {
        *("--dataset", "--data-root", "--image-size", "--workers", "--ema-decay", "--batch-size"),
        *("--samples-per-class", "--epochs"),
    }
    for dataset in DATASET_DEFAULTS:
        for other in ({}, {"loss": "CircleLoss"}, {"pretrained": True}, {"trunk": "resnet18"}):
            config = {**configured({"dataset": dataset, **other}), "threads": 3}
            bold = {name for name, _, changed in _settings(config) if changed}
            assert bold <= {"--dataset", *(f"--{key}" for key in other)}


def samples_of(run):
    """The test images of a run by their titles in the report."""
    samples = splits_of(json.loads((run / "config.json").read_text())).test.samples
    return {f"{x.label} · {Path(x.name).name}": x for x in samples}


def brute_force(run):
    """For each network and query: the others from the nearest on, which are right, and AP@R."""
    samples, found = samples_of(run), {}
    config = json.loads((run / "config.json").read_text())
    networks = {"untrained": untrained(config), "trained": load_best(str(run))}
    for network, (model, transform) in networks.items():
        with torch.no_grad():
            unit = {
                title: torch.nn.functional.normalize(model(transform(x.open())[None]).double())[0]
                for title, x in samples.items()
            }
        for query, own in unit.items():
            others = sorted(unit.keys() - {query}, key=lambda x: -float(own @ unit[x]))
            right = [samples[x].label == samples[query].label for x in others]
            found[network, query] = others, right, average_precision_at_r(right)
    return found


def test_sheets_show_what_a_brute_force_ranking_finds(page, finished, strict_json):
    expected, samples = brute_force(finished), samples_of(finished)
    by_precision = {t: p for (network, t), (_, _, p) in expected.items() if network == "trained"}
    metrics = strict_json(finished / "metrics.json")["trained"]
    mean = np.mean([*by_precision.values()])
    assert metrics["mean_average_precision_at_r"] == pytest.approx(mean, abs=1e-5)
    for network in ("trained", "untrained"):
        rights = [right for (name, _), (_, right, _) in expected.items() if name == network]
        before = [right[:k].count(False) for right in rights for k, x in enumerate(right) if x]
        assert f"{np.mean(before):.1f} by the {network} network" in text_in(page, "negatives")
    assert kinds_of(page) == ["worst"] * 5 + ["typical"] * 5 + ["best"] * 5
    shown = []
    for sheet in sheets_of(page):
        query = sheet.find("./figure/img").get("title")
        shown.append(by_precision[query])
        rows = sheet.findall(".//ol")
        assert [x.get("data-network") for x in rows] == ["trained", "untrained"]
        names = [text_of(x) for x in sheet.iter("div") if x.get("class") == "row-name"]
        for row, name in zip(rows, names, strict=True):
            titles, right, precision = expected[row.get("data-network"), query]
            pictures = list(row.iter("img"))
            assert [x.get("title") for x in pictures] == titles[:10]
            verdicts = ["right" if x else "wrong" for x in right[:10]]
            assert [x.get("class").split()[1] for x in pictures] == verdicts
            assert [x.get("alt").split(":")[0] for x in pictures] == verdicts
            assert float(name.split()[-1]) == pytest.approx(precision, abs=6e-5)
        for picture in sheet.iter("img"):
            small = from_data_uri(picture.get("src"))
            original = samples[picture.get("title")].open().resize(small.size, Image.NEAREST)
            assert np.array_equal(small, original)
    ordered = sorted(by_precision.values())
    middle = ordered[57:62]  # of 120
    assert shown == pytest.approx([*ordered[:5], *middle, *ordered[:-6:-1]], abs=1e-6)


def test_map_has_every_test_image_in_both_networks(page, finished):
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
    assert len(set(MARKERS)) == LEGEND_CLASSES
    style = "".join(section(page, "map").find("style").itertext())
    images = from_data_uri(re.search(r"url\(([^)]*)\)", style)[1])
    samples, captions = samples_of(finished), captions_of(page)
    columns = images.width // 48
    for i in (0, 1, columns, len(captions) - 1):
        left, top = 48 * (i % columns), 48 * (i // columns)
        cell = images.crop((left, top, left + 48, top + 48)).convert("L")
        assert np.array_equal(cell, samples[captions[i]].open().resize((48, 48), Image.NEAREST))


def sheets_of(page):
    return [x for x in section(page, "sheets").iter("div") if x.get("class") == "sheet"]


def kinds_of(page):
    return [x.get("data-kind") for x in sheets_of(page)]


OTHER_LOSSES = {"--loss ProxyAnchorLoss --ema-decay 0": CURVES[:3]}  # and the curves of each
OTHER_LOSSES |= {"--memory-size 64 --grad-cache 5 --embedding-size 1": CURVES}


@pytest.mark.parametrize("option", OTHER_LOSSES)
def test_report_of_runs_with_other_losses(trained, arguments, option):
    page = parsed(trained(*arguments, *option.split()) / "report.html")
    assert sections(page) == SECTIONS
    curves = [text_of(x) for x in section(page, "curves").iter("figcaption")]
    assert curves == OTHER_LOSSES[option]
    assert ("Not recorded: negatives" in text_in(page, "curves")) is (curves != CURVES)


@pytest.mark.parametrize("perfect", [False, True])
def test_two_test_classes(trained, digits, tmp_path, perfect):
    root = tmp_path / "images"
    for split, name in (("train", "0"), ("train", "1"), ("test", "2"), ("test", "3")):
        shutil.copytree(digits / name, root / split / name)
    if perfect:  # each test class one image, again and again
        for path in (root / "test").glob("*/*.png"):
            Image.new("L", (8, 8), 50 * int(path.parent.name)).save(path)
    page = parsed(trained("--data-root", root, "--batch-size", 4, "--report") / "report.html")
    assert sections(page) == SECTIONS
    rows = [x[:2] for x in table(page, "confusions")[1:]]
    assert sorted(rows) == ([] if perfect else [["2", "3"], ["3", "2"]])
    assert ("None: for every query" in text_in(page, "confusions")) is perfect


def test_what_a_run_lacks_is_said(copied, report, remade, refused, page, tmp_path, monkeypatch):
    best = json.loads((copied / "metrics.json").read_text())["best_epoch"]
    (copied / "metrics.json").unlink()
    unfinished = remade()
    assert "The run has not ended" in text_in(unfinished, "notes")
    assert table(unfinished, "result") == table(page, "result")
    assert "Weights of epoch" not in text_in(unfinished, "result")
    ended = {"stopped_early": False, "epochs_trained": 1, "best_epoch": 1}
    (copied / "metrics.json").write_text(json.dumps(ended))
    change_json(copied / "config.json", epochs=99)
    going_on = remade()  # a run that had ended and is to train for more epochs
    assert "The run has not ended" in text_in(going_on, "notes")
    assert table(going_on, "result") == table(page, "result")
    change_json(copied / "config.json", epochs=2)
    (copied / "metrics.json").unlink()

    shutil.rmtree(copied / "logs")
    checkpoints = (copied / "checkpoints").rename(copied / "later")
    page = remade()  # of a run that was killed in its first epoch
    assert "Nothing is shown of the trained network" in text_in(page, "notes")
    assert "no checkpoints/best.pt yet" in text_in(page, "notes")
    assert all(x in text_in(page, "curves") for x in CURVES)
    assert {x.get("data-network") for x in page.iter("ol")} == {"untrained"}
    assert table(page, "result")[0][1:] == ["untrained"]

    monkeypatch.setattr(module, "untrained", mock.Mock(side_effect=UserError("no weights")))
    (checkpoints.rename(copied / "checkpoints") / "best.pt").unlink()
    page = remade()
    missing = f"best.pt, of epoch {best}, is missing; train --resume {copied} writes it again"
    assert missing in text_in(page, "notes")
    assert sections(page) == ["notes", *SECTIONS[7:]]
    assert {x.get("href") for x in page.iter("a")} == {f"#{x}" for x in SECTIONS[7:]}
    error = refused(copied, "--sheet", tmp_path / "sheet.png", by=report)
    assert "--sheet: there are no queries to show; Nothing is shown" in error
    assert not (tmp_path / "sheet.png").exists()


def test_what_metrics_give_rise_to_is_told(copied, remade, page, strict_json):
    metrics = strict_json(copied / "metrics.json")
    for network, value in (("untrained", 0.9), ("trained", 0.8)):
        metrics[network]["mean_average_precision_at_r"] = value
    (copied / "metrics.json").write_text(json.dumps({**metrics, "best_epoch": 2}))
    text = text_of(remade())
    assert "The untrained network ranks the images found now with a MAP@R of" in text
    assert "Training made the retrieval of unseen classes worse" in text
    assert "still rising in the last epoch" in text
    assert "images found now" not in text_of(page)
    change_weights(copied, lambda weight: weight.mul_(1e-8))
    text = text_of(remade())
    assert "Of the trained network, the embeddings of all images are nearly the same" in text
    assert "The trained network ranks the images found now" not in text


def test_sheet_shows_queries_in_frames(copied, report, refused, tmp_path):
    file = tmp_path / "new" / "sheet.png"
    assert report(copied, "--sheet", file) == 0
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
    for color in FRAME.values():
        assert (abs(pixels - color).max(axis=2) <= 2).sum() > 100
    error = refused(copied, "--sheet", file, by=report)
    assert f"--sheet: {file} exists; name a new file" in error


def test_images_that_moved_are_found_with_data_root_and_no_others(
    copied, report, remade, refused, images, tmp_path
):
    other = shutil.copytree(images, tmp_path / "other")
    (other / HOSTILE_CLASS / "01.png").unlink()
    error = refused(copied, "--data-root", other, by=report)
    assert "are not those of the run" in error and "--data-root" in error
    change_json(copied / "config.json", data_root=str(tmp_path / "gone"))
    before = (copied / "report.html").read_bytes()
    message = "name the folder of the run's images, of a csv the table, with --data-root"
    assert message in refused(copied, by=report)
    assert (copied / "report.html").read_bytes() == before
    (copied / "report.html").unlink()
    assert sections(remade("--data-root", images)) == SECTIONS


def test_failure_of_the_report_does_not_lose_the_run(trained, strict_json, capsys, monkeypatch):
    monkeypatch.setattr(module, "render", mock.Mock(side_effect=OSError("disk full")))
    run = trained("--report")
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
    assert "2000 of the 5000 test images, drawn at random" in text_in(page, "map")
    assert "of 500 classes the 100 at either end" in text_in(page, "classes")
    assert len(body(page, "classes")) == 200


def test_of_many_images_a_part_are_queries(finished, copied, remade, monkeypatch):
    """The metrics stay those of all; a query finds what it finds where all are queries."""
    monkeypatch.setattr(report_parts, "PAIRS_AT_MOST", 120 * 6)
    monkeypatch.setattr(ranking, "PAIRS_AT_A_TIME", 120 * 4)
    page, first = remade(), (copied / "report.html").read_bytes()
    remade()
    assert (copied / "report.html").read_bytes() == first
    assert "ranked for 6 of the 120 test images, drawn" in text_in(page, "notes")
    assert "network ranks the images found now" not in text_in(page, "notes")
    assert table(page, "result") == table(parsed(finished / "report.html"), "result")
    assert kinds_of(page) == ["worst"] * 2 + ["typical"] * 2 + ["best"] * 2
    expected, samples, of_class = brute_force(copied), samples_of(copied), {}
    for sheet in sheets_of(page):
        query = sheet.find("./figure/img").get("title")
        of_class.setdefault(samples[query].label, []).append(expected["trained", query])
        for row in sheet.findall(".//ol"):
            titles, _, _ = expected[row.get("data-network"), query]
            assert [x.get("title") for x in row.iter("img")] == titles[:10]
    labels, sizes, _, trained, *_ = zip(*map(cells, body(page, "classes")), strict=True)
    assert {*sizes} == {"24"}
    means = {label: np.mean([x for _, _, x in own]) for label, own in of_class.items()}
    assert dict(zip(labels, map(float, trained), strict=True)) == pytest.approx(means, abs=6e-5)
    for label, other, _, share in map(cells, body(page, "confusions")):
        places = [samples[x].label for titles, _, _ in of_class[label] for x in titles[:23]]
        expected_share = 100 * places.count(other) / len(places)
        assert float(share.removesuffix(" %")) == pytest.approx(expected_share, abs=0.06)


@pytest.mark.parametrize(
    ("name", "folder"), [("omniglot", "omniglot-small"), ("grocery", "grocery64")]
)
def test_real_images_are_learned_and_reported(main, tmp_path, strict_json, name, folder):
    if not (DATA / folder).is_dir():
        pytest.skip(f"the environment variable PML_PNP_DATA names no folder with {folder}")
    settings = ["--dataset", name, "--data-root", DATA, "--epochs", 1, "--image-size", 16]
    batch = ["--samples-per-class", 4, "--batch-size", 128]
    assert main(*settings, *batch, "--output-dir", tmp_path, "--name", "run") == 0
    metrics = strict_json(tmp_path / "run" / "metrics.json")
    before, after = (metrics[x]["mean_average_precision_at_r"] for x in ("untrained", "trained"))
    assert after > before
    report = tmp_path / "run" / "report.html"
    assert sections(parsed(report)) == SECTIONS
    assert report.stat().st_size < 10 * MEGABYTES


@pytest.fixture
def shown(copied):
    """The body of the page that headless Chromium makes of the report and a script."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"none of the browsers {', '.join(BROWSERS)} is installed")
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom"]
    options = {"capture_output": True, "text": True, "timeout": 120, "check": True}

    def body(script, *flags, error=False):
        text = (copied / "report.html").read_text(encoding="utf-8")
        page = copied / "changed.html"
        page.write_text(text.replace("</body>", f"<script>{script}</script></body>"))
        result = subprocess.run([*command, *flags, page.as_uri()], **options)
        assert ("CONSOLE" in result.stderr) is error
        page.write_text(result.stdout, encoding="utf-8")
        return parsed(page).find(".//body")

    return body


def test_browser_shows_frames_without_an_error_which_it_would_report(shown):
    """And would report what is loaded from elsewhere."""
    frames = shown("""
        const styles = ['right', 'wrong'].map(
            (x) => getComputedStyle(document.querySelector(`.neighbours img.${x}`)));
        document.body.dataset.frames = styles.map(
            (x) => `${x.borderTopWidth} ${x.borderTopStyle} ${x.borderTopColor}`).join('; ');
    """).get("data-frames")
    assert frames == "; ".join(f"4px solid rgb{color}" for color in FRAME.values())
    shown("undefined_name;", error=True)
    shown("document.body.append(Object.assign(new Image, {src: 'a.png'}));", error=True)


def test_pointer_and_arrow_keys_show_an_image(shown, page):
    """The keys go to the right, until there is none."""
    before = shown("")
    after = shown("""
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
        document.querySelector('.maps svg use[data-i="100"]')
            .dispatchEvent(new PointerEvent('pointerover', {bubbles: true}));
    """)
    captions = captions_of(page)
    numbers, places, texts = zip(*json.loads(after.get("data-seen")), strict=True)
    assert list(places) == sorted(places) and len(set(numbers)) > 2
    assert list(texts) == [captions[i] for i in numbers]
    assert json.loads(after.get("data-left"))[1] < places[-1]
    assert after.get("data-hidden") == "false,,true"
    before, after = (x.find(".//div[@id='tip']") for x in (before, after))
    assert "hidden" in before.attrib and "hidden" not in after.attrib
    assert text_of(after) == " ".join(captions[100].split())
    columns = 11  # 120 thumbnails
    position = f"{-96 * (100 % columns)}px {-96 * (100 // columns)}px"
    assert f"background-position: {position}" in after.find("div").get("style")


def test_on_paper_nothing_is_cut_off_and_on_a_narrow_screen_boxes_scroll(shown, copied):
    """The histogram stays large enough to be read, and names have room for words."""
    narrow = """
        const widths = [innerWidth, document.documentElement.scrollWidth];
        for (const what of ['#negatives img', '#classes td.name']) {
          widths.push(Math.round(document.querySelector(what).getBoundingClientRect().width));
        }
        document.body.dataset.widths = widths.join();
    """
    widths = shown(narrow, "--window-size=400,800").get("data-widths")
    window, content, histogram, name = map(int, widths.split(","))
    assert content <= window <= 500
    assert histogram >= 600 and name >= 110
    text = (copied / "report.html").read_text(encoding="utf-8")
    (copied / "report.html").write_text(text.replace("@media print", "@media all"))
    paper = """
        const page = 718;  // A4 less Chromium's margins, in pixels of CSS
        document.body.style.width = `${page}px`;
        document.body.dataset.wide = [...document.querySelectorAll('table, img, svg, ol')]
            .filter((x) => x.getBoundingClientRect().right > page + 1)
            .map((x) => x.closest('section')?.id).join();
    """
    assert shown(paper, "--window-size=718,1000").get("data-wide") == ""


def test_images_that_stand_in_training_and_test_are_named(remade, images, tmp_path):
    """A copy of two images among the test images, one of them a little darker."""
    data = shutil.copytree(images, tmp_path / "data")
    splits = load_splits("folder", str(data), 0.2, 0)
    for target, source, factor in zip(
        splits.test.samples, splits.seen.samples, (1, 0.97), strict=False
    ):
        source.open().point(lambda x, factor=factor: x * factor).save(target.name)
    rows = table(remade("--data-root", data), "alike")[1:]
    shown = [f"{x.label} · {Path(x.name).name}" for x in splits.seen.samples[:2]]
    assert len(rows) == 12 and {x[1] for x in rows[:2]} == set(shown)
    assert rows[0][1:] == [shown[0], "1.0000"]
    similarities = [float(x[2]) for x in rows]
    assert similarities == sorted(similarities, reverse=True) and similarities[-1] < 0.9999


def test_of_many_training_images_a_part_is_compared(remade, digits, monkeypatch):
    monkeypatch.setattr(module, "SEEN_AT_MOST", 7)
    splits = load_splits("folder", str(digits), 0.2, 0)
    first, again = ([x.name for x in _part_of_seen(splits).samples] for _ in range(2))
    assert first == again and len(set(first)) == 7
    said = r"Of the \d+ images that were trained and validated on, 7 are compared"
    assert re.search(said, text_in(remade(), "alike"))


@pytest.mark.parametrize("size", [(960, 10), (10, 970), (5000, 1), (1, 2000), (1, 1), (48, 48)])
def test_thumbnail_of_an_image_of_any_proportions(size):
    sample = Sample("x", "y", np.full(size[::-1], 99, np.uint8))
    small = from_data_uri(thumbnail(sample, 48))
    assert max(small.size) == 48
    assert min(small.size) == max(1, round(48 * min(size) / max(size)))
    assert abs(np.asarray(small).astype(int) - 99).max() < 3
    one = sprite([sample], 48)
    assert one.columns == 1 and from_data_uri(one.uri).size == (48, 48)
    assert from_data_uri(contact_sheet([[sample.open()]], 48)).size == (48, 48)


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


@pytest.mark.parametrize("cut", ["~iteration~,loss\n0,0.5\n1,2e", "~iteration~,loss\n0,0.5\nx,1\n"])
def test_a_curve_that_holds_no_number_is_named_with_its_line(cut, copied, report, capsys):
    path = copied / "logs" / "loss_histories.csv"
    path.write_text(cut.replace("loss", "total_loss"))
    assert report(copied) == 2
    err = capsys.readouterr().err
    assert f"{path}, line 3: expected numbers for ~iteration~ and total_loss, got" in err
    assert "train --resume" in err and err.count("\n") == 1


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_training_image_is_shown_as_it_was(mode):
    shape = (8, 8) if mode == "L" else (8, 8, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    tensor = SmallTransform(8, mode)(Image.fromarray(pixels))
    assert np.array_equal(to_image(tensor, (0.5,), (0.5,)), pixels)


def test_negatives_are_counted_only_where_they_are_recorded(trained, monkeypatch):
    """Since counting takes longer than the loss of a large batch."""
    forward, counts = PNPLoss.compute_loss, []

    def watched(self, *arguments):
        result = forward(self, *arguments)
        counts.append(self.negatives_before_positive if self.collect_stats else None)
        return result

    monkeypatch.setattr(PNPLoss, "compute_loss", watched)
    recorded = read(trained("--epochs", 2) / "logs", "metric_loss", "negatives_before_positive")
    counts = counts[-22:]  # 11 iterations an epoch, after those that try the loss out
    assert recorded == [(i, x) for i, x in enumerate(counts) if x is not None]
    assert len(recorded) == 12 and any(x > 0 for _, x in recorded)
