"""Make report.html in a run's folder: one page, which opens from disk, of what was learned.

    python examples/retrieval report runs/digits-PNPLoss-Ds-1
    python examples/retrieval report runs/folder-PNPLoss-Ds-1 --data-root IMAGES

`train` makes it at its end. The trained network is that of the best epoch so far; the untrained
one is made again from the seed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import configuration, sheet
from .arguments import parser_for_run
from .data import LabelledImages, RetrievalSplits
from .embeddings import embed
from .errors import UserError, require
from .figures import Diagram, curve
from .metrics import (
    BATCH_SIZE,
    NEARLY_SAME,
    PRIMARY_METRIC,
    RetrievalAccuracy,
    are_nearly_same,
    metric_names,
)
from .network import build, load_best, untrained
from .processes import find_device, say
from .progress import still_rising
from .records import read
from .report_parts import FRAMES, MARKERS, TestResults, augmented, drawn, most_alike
from .run_folder import RunFolder

FILE = "report.html"
TEMPLATE = "report.html.jinja"
NEEDS = {"jinja2": "jinja2", "matplotlib": "matplotlib", "sklearn": "scikit-learn"}
# MAP@R that is further away than rounding brings it is of other images or another network.
ROUNDING = 0.005
# Of the images that were trained and validated on, how many are compared with those of the test.
SEEN_AT_MOST = 10_000


def parser(prog: str) -> argparse.ArgumentParser:
    """The command line."""
    flags = parser_for_run(prog, __doc__, "--data-root", "--device")
    flags.add_argument(
        "--sheet",
        metavar="FILE",
        help="show the worst, a typical and the best query in a new picture as well, PNG or PDF",
    )
    return flags


def run(args: argparse.Namespace) -> int:
    """Make the report of an earlier run; returns the exit code."""
    require(NEEDS)
    if args.sheet:
        sheet.check(args.sheet)
    folder = RunFolder.existing(args.run)
    config = configuration.of_run(folder)
    device = find_device(args.device)
    splits = configuration.splits_of_run(folder, config, args.data_root)
    say(f"written to {make(folder, config, splits, device, args.sheet)}")
    return 0


def make(
    folder: RunFolder,
    config: dict[str, Any],
    splits: RetrievalSplits,
    device: torch.device,
    sheet_file: str | None = None,
) -> Path:
    """Write the report of a run, in place of an earlier one; returns its path.

    Args:
        folder: The run.
        config: Its configuration.
        splits: Its images.
        device: Where to embed and to rank.
        sheet_file: A new picture of some queries, if wished.

    Raises:
        UserError: If images or checkpoint cannot be read, or a picture is wished and there is no
            test image.
    """
    notes: list[str] = []
    embeddings: dict[str, torch.Tensor] = {}
    seen = None
    networks = (
        ("untrained", lambda: untrained(config)),
        ("trained", lambda: load_best(str(folder.path))),
    )
    if not len(splits.test):
        networks = ()
        notes.append("There are no test images: the run trained on all classes, for use.")
    for name, load in networks:
        try:
            network, splits.test.transform = load()
        except UserError as error:
            notes.append(f"Nothing is shown of the {name} network: {error}.")
            continue
        embeddings[name] = embed(
            network,
            splits.test,
            BATCH_SIZE,
            device,
            workers=config["workers"],
            description=f"{name} network",
        )
        if name == "trained":
            images = _part_of_seen(splits)
            seen = (
                images,
                embed(
                    network,
                    images,
                    BATCH_SIZE,
                    device,
                    workers=config["workers"],
                    description="training images, to compare with",
                ),
            )
    content = contents(folder, config, splits, embeddings, notes, device, seen)
    folder.write_text(FILE, render(content))
    if sheet_file:
        if content["tested"] is None:
            raise UserError(f"--sheet: there are no queries to show; {' '.join(notes)}")
        sheet.write(sheet_file, content["tested"].picture())
    return folder.path / FILE


def render(content: dict[str, Any]) -> str:
    """The page; whatever stands in `content` is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(content)


def contents(
    folder: RunFolder,
    config: dict[str, Any],
    splits: RetrievalSplits,
    embeddings: dict[str, torch.Tensor],
    notes: Sequence[str],
    device: torch.device | str = "cpu",
    seen: tuple[LabelledImages, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """What the page shows, by the names that its template uses.

    Args:
        folder: The run.
        config: Its configuration.
        splits: Its images; the test images are those that were embedded.
        embeddings: Of the test images, of length 1, by the `untrained` and the `trained` network,
            as far as there are such.
        notes: What is missing so far.
        device: Where to rank.
        seen: `_part_of_seen` and its embeddings by the trained network, if there is one.
    """
    tested = TestResults(splits.test, embeddings, device) if embeddings else None
    saved = folder.read_metrics(config)
    metrics = {
        name: saved[name] if saved else _metrics(x, splits.test, config)
        for name, x in embeddings.items()
    }
    curves, missing_curves = _curves(folder, config)
    constant = [name for name, x in embeddings.items() if are_nearly_same(x)]
    return {
        "run": folder.path.resolve().name,
        "config": config,
        "saved": saved,
        "still_rising": still_rising(saved) if saved else [],
        "splits": splits.summary(),
        "val_kind": splits.val_kind,
        "closed_set": splits.closed_set,
        "notes": [*notes, *_notes(saved, metrics, tested, constant)],
        "metric_names": metric_names(config["recall_at"]),
        "primary": PRIMARY_METRIC,
        "metrics": metrics,
        "curves": curves,
        "missing_curves": missing_curves,
        "augmented": augmented(splits.train.samples, build({**config, "pretrained": False})),
        "settings": _settings(config),
        "tested": tested,
        "alike": []
        if seen is None
        else most_alike(
            seen[0].samples, seen[1], splits.test.samples, embeddings["trained"], device
        ),
        "compared": (0 if seen is None else len(seen[0]), len(splits.seen)),
        "frames": FRAMES,
        "markers": MARKERS,
    }


def _part_of_seen(splits: RetrievalSplits) -> LabelledImages:
    """What was trained and validated on, or a random part of it, always the same."""
    seen = splits.seen
    samples = [seen.samples[i] for i in drawn(len(seen), SEEN_AT_MOST)]
    classes = sorted({x.label for x in samples})
    return LabelledImages(samples, classes, seen.transform, seen.pixel_ranges)


# --- numbers --------------------------------------------------------------------------------


def _metrics(
    embeddings: torch.Tensor, images: LabelledImages, config: dict[str, Any]
) -> dict[str, float]:
    calculator = RetrievalAccuracy(config["recall_at"], images.roles, device=torch.device("cpu"))
    return calculator.get_accuracy(embeddings, torch.from_numpy(images.labels))


def _notes(
    saved: dict[str, Any] | None,
    metrics: dict[str, dict[str, float]],
    tested: TestResults | None,
    constant: Sequence[str],
) -> list[str]:
    notes = [f"Of the {name} network, {NEARLY_SAME}." for name in constant]
    if tested and tested.is_part:
        notes.append(
            f"The images are ranked for {len(tested.queries)} of the {len(tested.samples)} test "
            "images, drawn at random. Their means differ from the result, which is of all."
        )
    if saved is None:
        notes.append("The run has not ended. The metrics were calculated for this page.")
    if saved is None or tested is None or tested.is_part:
        return notes
    return notes + [
        f"The {name} network ranks the images found now with a MAP@R of {now:.4f}, and the run "
        f"recorded {then:.4f}: images, or versions of libraries, have changed since."
        for name, ranking in tested.rankings.items()
        if name not in constant
        and abs(
            (now := float(ranking.average_precision.mean()))
            - (then := metrics[name][PRIMARY_METRIC])
        )
        > ROUNDING
    ]


def _curves(folder: RunFolder, config: dict[str, Any]) -> tuple[list[Diagram], list[str]]:
    """Diagrams of what the run recorded, over its epochs, and names of what it did not."""
    iterations = max(1, config["data"]["train"]["images"] // config["batch_size"])
    curves, missing = [], []
    for title, files, column in (
        ("Training loss", "loss_histories", "total_loss"),
        ("Validation MAP@R", "accuracies_*_VAL_*", f"{PRIMARY_METRIC}_level0"),
        ("Learning rate of the trunk", "learning_rates", "trunk"),
        ("negatives_before_positive, in a batch", "*", "negatives_before_positive"),
    ):
        records = read(folder.logs, files, column)
        if files == "learning_rates" and not records:  # they do not change
            steps = read(folder.logs, "loss_histories", "total_loss")
            records = [(step, config["lr"]) for step, _ in steps]
        if not records:
            missing.append(title)
            continue
        # Accuracies are recorded once per epoch, the rest by iterations counted from 0.
        by_epoch = column.endswith("_level0")
        epochs = [step if by_epoch else (step + 1) / iterations for step, _ in records]
        curves.append(curve(title, epochs, [value for _, value in records]))
    return curves, missing


def _settings(config: dict[str, Any]) -> list[tuple[str, Any, bool]]:
    """Flag, value, and whether it is another than the default for such a run."""
    chosen = {k: config[k] for k in ("dataset", "trunk", "pretrained", "loss", "beside")}
    of_dataset = configuration.configured({"dataset": config["dataset"]})
    defaults = {
        **configuration.configured(chosen),
        **{k: of_dataset[k] for k in chosen},
        "dataset": configuration.DEFAULTS["dataset"],
        "threads": config["threads"],  # of the machine
    }
    rows = [
        ("--" + key.replace("_", "-"), config[key], config[key] != defaults[key])
        for key in configuration.DEFAULTS
    ]
    extra = [("processes", config["world_size"], False)]
    extra += [(package, version, False) for package, version in config["versions"].items()]
    return rows + extra
