"""A table over several runs: what differs in their settings, and what came of it.

    python examples/retrieval compare runs/*
    python examples/retrieval compare runs/* --csv runs.csv

Runs that differ in the seed alone stand together, below their settings, and are followed by their
mean and standard deviation. The data file has a line for each run, with every metric in full
precision.
"""

import argparse
import csv
import json
import statistics
import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from . import image_list
from .arguments import Parser
from .configuration import DEFAULTS, EARLIER, RESUMABLE
from .disk import replace, write_csv
from .errors import UserError
from .metrics import PRIMARY_METRIC, RECALL_AT, metric_names
from .processes import say
from .progress import duration
from .run_folder import CONFIG, RunFolder

SHOWN = {PRIMARY_METRIC: "MAP@R", "precision_at_1": "P@1", "r_precision": "R-precision"}
PARTS = ("untrained", "trained")
# What may change when a run continues is not compared, except for what results depend on.
NO_SETTINGS = {*RESUMABLE, "seed"} - {"epochs", "data_root", "grad_cache"}
IN_OTHER_COLUMNS = {"loss", "loss_args", "beside"}
WIDTH = 100  # of the lines of settings
FIRST_COLUMNS = ["run", "loss", "loss_args"]  # of the data file
LAST_COLUMN = "training_seconds"


class Run:
    """The settings and results of one run folder."""

    def __init__(self, path: str):
        folder = RunFolder.existing(path)
        self.path = str(folder.path)
        config = {**EARLIER, **folder.read_config()}
        missing = sorted({"dataset", "loss", "loss_args", "seed", "data"} - config.keys())
        if missing:
            raise UserError(f"{path}/{CONFIG} is not of this program: no {missing[0]}")
        self.loss = " + ".join(filter(None, (config["loss"], config["beside"])))
        self.loss_args = config["loss_args"]
        self.seed = config["seed"]
        images = image_list.read(folder)
        self.test_set = (config["dataset"], config["data"].get("test"))
        self.tested = {key: x for key, x in images.items() if x.split.startswith("test")}
        self.settings = {k: v for k, v in config.items() if k in DEFAULTS and k not in NO_SETTINGS}
        # Of all splits: which classes are tested on may follow from the seed.
        self.settings["images"] = image_list.fingerprint(images)
        self.settings["processes"] = config.get("world_size")
        for package, version in config.get("versions", {}).items():
            self.settings[f"version of {package}"] = version
        self.recall_at = config.get("recall_at", RECALL_AT)
        self.metrics = folder.read_metrics(config)

    def value(self, part: str, metric: str) -> float | None:
        """A metric of the test; None if there is no test, or the run has not come that far."""
        return self.metrics and self.metrics.get(part, {}).get(metric)

    def is_tested_as(self, other: "Run") -> bool:
        """Whether the test images are the same, as far as is known."""
        if self.tested and other.tested and not image_list.are_same(self.tested, other.tested):
            return False
        return self.test_set == other.test_set

    @property
    def seconds(self) -> float | None:
        """Time of the training, with the evaluations that belong to it."""
        return self.metrics and self.metrics["seconds"]["training"]


def parser(prog: str) -> argparse.ArgumentParser:
    """The command line."""
    flags = Parser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    flags.add_argument(
        "--csv",
        metavar="FILE",
        help="write the table there as data, too; no file is replaced but such a table",
    )
    return flags


def run(args: argparse.Namespace) -> int:
    """Print the table; returns the exit code."""
    if args.csv and Path(args.csv).exists() and not _is_of_this_command(Path(args.csv)):
        raise UserError(f"--csv: {args.csv} exists and is no table of compare; name a new file")
    runs = [Run(path) for path in args.runs]
    differing = differing_settings(runs)
    say(*as_text(_header(), _groups(runs, differing)), *_notes(runs))
    if args.csv:
        replace(Path(args.csv), lambda path: write_csv(path, data_rows(runs, differing)))
        say("", f"written to {args.csv}")
    return 0


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Names of the settings that are not the same in all runs."""
    names = dict.fromkeys(name for x in runs for name in x.settings)
    return [name for name in names if any(_get(x, name) != _get(runs[0], name) for x in runs)]


def alike_but_for_seed(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs in groups, in the order of their first ones."""
    groups: dict[str, list[Run]] = {}
    for x in runs:
        groups.setdefault(json.dumps(x.settings, sort_keys=True), []).append(x)
    return list(groups.values())


def data_rows(runs: Sequence[Run], differing: Sequence[str]) -> list[list[Any]]:
    """Header and a row for each run."""
    settings = [name for name in differing if name not in IN_OTHER_COLUMNS]
    measured = metric_names(k for x in runs for k in x.recall_at)
    columns = [(part, metric) for part in PARTS for metric in measured]
    rows = [
        [*FIRST_COLUMNS, *settings, "seed", "best_epoch", "epochs_trained"]
        + [f"{part}_{metric}" for part, metric in columns]
        + [LAST_COLUMN]
    ]
    for x in runs:
        metrics = x.metrics or {}
        rows.append(
            [x.path, x.loss, json.dumps(x.loss_args)]
            + [_get(x, name) for name in settings]
            + [x.seed, metrics.get("best_epoch"), metrics.get("epochs_trained")]
            + [x.value(part, metric) for part, metric in columns]
            + [x.seconds]
        )
    return rows


def _is_of_this_command(path: Path) -> bool:
    """Whether it is a data file, by its header."""
    if not path.is_file():
        return False
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file), [])
    except (OSError, ValueError, csv.Error):
        return False
    return header[:3] == FIRST_COLUMNS and header[-1] == LAST_COLUMN


def as_text(
    header: Sequence[Sequence[str]], groups: Sequence[tuple[str, Sequence[Sequence[str]]]]
) -> list[str]:
    """Lines: numbers in columns, below the settings of their group."""
    rows = [*header, *(row for _, rows in groups for row in rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def aligned(row: Sequence[str]) -> str:
        cells = [x.rjust(width) for x, width in zip(row, widths, strict=True)]
        return "  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip()

    lines = [aligned(row) for row in header]
    for settings, rows in groups:
        lines += ["", *textwrap.wrap(settings, WIDTH, subsequent_indent="  ")]
        lines += [aligned(row) for row in rows]
    return lines


def _header() -> list[list[str]]:
    above, below = ["", "", "best"], ["run", "seed", "epoch"]
    for name in SHOWN.values():
        above += [name, ""]
        below += list(PARTS)
    return [[*above, ""], [*below, "time"]]


def _groups(runs: Sequence[Run], differing: Sequence[str]) -> list[tuple[str, list[list[str]]]]:
    """The settings of runs that differ in the seed alone, and their rows."""
    groups = []
    for group in alike_but_for_seed(runs):
        rows = [_row(x) for x in group]
        one_of_each_seed = {x.seed: x for x in reversed(group) if x.metrics}.values()
        if len(one_of_each_seed) > 1:
            rows += _summary(one_of_each_seed)
        groups.append((_settings(group[0], differing), rows))
    return groups


def _settings(x: Run, differing: Sequence[str]) -> str:
    loss = " ".join([x.loss, *(f"{k}={v}" for k, v in x.loss_args.items())])
    others = [f"{k}={_get(x, k)}" for k in differing if k not in IN_OTHER_COLUMNS]
    return ", ".join([loss, *others])


def _row(x: Run) -> list[str]:
    return [
        f"  {x.path}",
        str(x.seed),
        str(x.metrics["best_epoch"]) if x.metrics else "-",
        *(_number(x.value(part, metric)) for metric in SHOWN for part in PARTS),
        duration(x.seconds) if x.metrics else "-",
    ]


def _summary(group: Collection[Run]) -> list[list[str]]:
    """Mean and standard deviation of a group."""
    rows = []
    for name, function in (("mean", statistics.mean), ("standard deviation", statistics.stdev)):
        row = [f"    {name} of {len(group)} seeds", "", ""]
        for metric in SHOWN:
            for part in PARTS:
                values = [x.value(part, metric) for x in group]
                row.append(_number(None if None in values else function(values)))
        rows.append([*row, duration(function([x.seconds for x in group]))])
    return rows


def _notes(runs: Sequence[Run]) -> list[str]:
    notes = [f"{x.path} is not finished" for x in runs if not x.metrics]
    if not all(x.is_tested_as(runs[0]) for x in runs):
        notes.append("the runs have different test sets, so their metrics do not compare")
    return ["", *notes] if notes else []


def _get(x: Run, name: str) -> Any:
    return x.settings.get(name)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
