"""Make a table and a plot of powerful-benchmarker's logs.

    python results_table.py experiments/digits

Reads the SQLite logs of every experiment in the folder, of each fold and of the ensemble, takes the
test accuracies of the last model that was evaluated, which is the best in validation, and shows
mean and standard deviation over folds and repeats: experiments LOSS-0, LOSS-1, ... are repeats of
one. The rows go to results.csv in the folder, the plot to results.svg.
"""

import argparse
import contextlib
import csv
import datetime
import json
import platform
import re
import shlex
import sqlite3
import statistics
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

METRICS = ("mean_average_precision_at_r", "precision_at_1", "r_precision")
SHORT = {"mean_average_precision_at_r": "MAP@R", "precision_at_1": "P@1", "r_precision": "RP"}
PACKAGES = ("torch", "pytorch-metric-learning", "pml_pnp")
COLUMNS = ("dataset", "loss", "seed", "models", "epoch", *METRICS, *PACKAGES, "hardware", "date",
           "command")  # fmt: skip
FOLDS, ENSEMBLE, UNTRAINED = "fold", "ensemble", "untrained"
Row = dict[str, str | float]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="holds experiments")
    folder = parser.parse_args().folder
    rows = []
    for path in sorted(p.parent for p in folder.glob("*/configs")):
        loss, seed = re.fullmatch(r"(.+?)(?:-(\d+))?", path.name).groups()
        rows += rows_of(path, loss, seed or "")
    if not any(row["models"] == FOLDS for row in rows):
        raise SystemExit(f"no experiment with test accuracies in {folder}")
    print(save(folder, rows))


def save(folder: Path, rows: list[Row]) -> str:
    """Write rows and plot to a folder, and return the table."""
    write(folder / "results.csv", rows)
    plot(rows, folder / "results.svg")
    return table(rows)


def rows_of(experiment: Path, loss: str, seed) -> Iterable[Row]:
    """Test accuracies of an experiment: a row for each fold, trained and not, and the ensemble."""
    finished = experiment / "finished.json"
    how = json.loads(finished.read_text(encoding="utf-8")) if finished.exists() else {}
    for path in sorted(experiment.glob("*/saved_csvs/logs.db")):
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.row_factory = sqlite3.Row
            if path.parts[-3] == "meta_logs":
                trained = "trained_status = 'trained'"
                found = {ENSEMBLE: _last(connection, "ConcatenateEmbeddings", trained)}
            else:
                found = {
                    UNTRAINED: _last(connection, "accuracies", "CAST(epoch AS INTEGER) = 0"),
                    FOLDS: _last(connection, "accuracies", "CAST(epoch AS INTEGER) > 0"),
                }
        for kind, record in found.items():
            if record is not None:
                values = {m: record[f"{m}_level0"] for m in METRICS}
                row = {"loss": loss, "seed": seed, "models": kind, "epoch": record["epoch"]}
                yield {**row, **values, **how}


def _last(connection: sqlite3.Connection, prefix: str, where: str) -> sqlite3.Row | None:
    """The newest of such test accuracies, from the table whose name begins so."""
    names = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    for (name,) in names:
        if name.startswith(prefix) and name.endswith("_TEST"):
            query = f"SELECT * FROM {name} WHERE {where} ORDER BY rowid DESC LIMIT 1"
            return connection.execute(query).fetchone()
    return None


def about(dataset: str) -> dict[str, str]:
    """Where, when and how results come to be."""
    return {
        "dataset": dataset,
        **{name: metadata.version(name) for name in PACKAGES},
        "hardware": platform.processor() or platform.machine(),
        "date": str(datetime.date.today()),
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write rows to a CSV file."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[Row]:
    """Read the rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def summary(rows: list[Row], models: str, metric: str) -> dict[str, tuple[float, float, int]]:
    """{loss: (mean, standard deviation, number)}, best first."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if row["models"] == models:
            values.setdefault(str(row["loss"]), []).append(float(row[metric]))
    result = {
        loss: (statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0, len(v))
        for loss, v in values.items()
    }
    return dict(sorted(result.items(), key=lambda x: -x[1][0]))


def table(rows: list[Row]) -> str:
    """Markdown: each loss with mean and deviation, best first."""
    single = {m: summary(rows, FOLDS, m) for m in METRICS}
    ensemble = summary(rows, ENSEMBLE, METRICS[0])
    lines = [
        "| loss | "
        + " | ".join(f"{SHORT[m]}, %" for m in METRICS)
        + " | MAP@R of the ensemble, % |",
        "|---" * (len(METRICS) + 2) + "|",
    ]
    for loss in single[METRICS[0]]:
        cells = [_cell(single[m][loss]) for m in METRICS]
        cells.append(_cell(ensemble[loss]) if loss in ensemble else "")
        lines.append(f"| {loss} | " + " | ".join(cells) + " |")
    untrained = {m: summary(rows, UNTRAINED, m) for m in METRICS}
    if untrained[METRICS[0]]:
        first = next(iter(untrained[METRICS[0]]))
        cells = [_cell(untrained[m][first]) for m in METRICS]
        lines.append("| untrained | " + " | ".join(cells) + " | |")
    return "\n".join(lines)


def _cell(value: tuple[float, float, int]) -> str:
    mean, deviation, number = value
    return f"{100 * mean:.1f}" + f" ± {100 * deviation:.1f}" * (number > 1)


def plot(rows: list[Row], path: Path) -> None:
    """MAP@R of each loss, with its deviation."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    single = summary(rows, FOLDS, METRICS[0])
    figure, axes = plt.subplots(figsize=(7, 0.4 * len(single) + 1), layout="constrained")
    names = list(single)[::-1]
    means, deviations = zip(*(single[n][:2] for n in names), strict=True)
    axes.barh(names, means, xerr=deviations, capsize=3)
    axes.set(xlabel="MAP@R on unseen classes, mean and standard deviation")
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
