"""Make a table and a plot of powerful-benchmarker's logs.

    python results_table.py experiments/digits

Reads the SQLite logs of every experiment in the folder, of each fold and of the ensemble, takes the
test accuracies of the last model that was evaluated, which is the best in validation, and shows
mean and standard deviation over folds and repeats: experiments LOSS-0, LOSS-1, ... are repeats of
one. The rows go to results.csv in the folder, the plot to results.svg.
"""

import argparse
import contextlib
import datetime
import json
import platform
import re
import shlex
import sqlite3
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from pages import markdown, pyplot  # noqa: E402

MAIN = "mean_average_precision_at_r"
METRICS = {MAIN: "MAP@R, %", "precision_at_1": "P@1, %", "r_precision": "RP, %"}
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
    print(table(save(folder)))


def save(folder: Path) -> pd.DataFrame:
    """Write rows and plot of all experiments in a folder to it, and return the rows."""
    rows = []
    for path in sorted(p.parent for p in folder.glob("*/configs")):
        loss, seed = re.fullmatch(r"(.+?)(?:-(\d+))?", path.name).groups()
        rows += rows_of(path, loss, seed or "")
    if not any(row["models"] == FOLDS for row in rows):
        raise SystemExit(f"no experiment with test accuracies in {folder}")
    frame = pd.DataFrame(rows, columns=COLUMNS)
    frame.to_csv(folder / "results.csv", index=False, lineterminator="\n")
    plot(frame, folder / "results.svg")
    return frame


def rows_of(experiment: Path, loss: str, seed) -> Iterable[Row]:
    """Test accuracies of an experiment: a row for each fold, trained and not, and the ensemble."""
    finished = experiment / "finished.json"
    how = json.loads(finished.read_text(encoding="utf-8")) if finished.exists() else {}
    for path in sorted(experiment.glob("*/saved_csvs/logs.db")):
        if path.parts[-3] == "meta_logs":
            all_tested = _tested(path, "ConcatenateEmbeddings").query("trained_status == 'trained'")
            found = {ENSEMBLE: all_tested}
        else:
            all_tested = _tested(path, "accuracies")
            epochs = all_tested.epoch.astype(int)
            found = {UNTRAINED: all_tested[epochs == 0], FOLDS: all_tested[epochs > 0]}
        for kind, tested in found.items():
            for last in tested.tail(1).to_dict("records"):
                values = {m: float(last[f"{m}_level0"]) for m in METRICS}
                row = {"loss": loss, "seed": seed, "models": kind, "epoch": last["epoch"]}
                yield {**row, **values, **how}


def _tested(path: Path, prefix: str) -> pd.DataFrame:
    """Test accuracies as they were logged, from the table whose name begins so."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        names = pd.read_sql("SELECT name FROM sqlite_master WHERE type = 'table'", connection).name
        names = names[names.str.startswith(prefix) & names.str.endswith("_TEST")]
        tables = [pd.read_sql(f"SELECT * FROM {name}", connection) for name in names[:1]]
    return tables[0] if tables else pd.DataFrame(columns=["epoch", "trained_status"])


def about(dataset: str) -> dict[str, str]:
    """Where, when and how results come to be."""
    return {
        "dataset": dataset,
        **{name: metadata.version(name) for name in PACKAGES},
        "hardware": platform.processor() or platform.machine(),
        "date": str(datetime.date.today()),
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def table(rows: pd.DataFrame) -> str:
    """Markdown: each loss with mean and deviation, best first; one line of those not trained.

    If some losses have fewer tested models than others, a column says how many each mean is of.
    """
    of_loss = rows.groupby(["models", "loss"], sort=False)[list(METRICS)]
    means, cells = of_loss.mean()[MAIN], of_loss.agg(_cell).rename(columns=METRICS)
    best_first = means.sort_values(ascending=False, kind="stable").index
    made = cells.reindex(best_first)
    single = made.loc[FOLDS]
    if ENSEMBLE in means:
        single = single.assign(**{"MAP@R of the ensemble, %": made.loc[ENSEMBLE][METRICS[MAIN]]})
    numbers = of_loss.size().loc[FOLDS]
    if numbers.nunique() > 1:
        single = single.assign(models=numbers.map(f"{{}} of {numbers.max()}".format))
    if UNTRAINED in means:
        single = pd.concat([single, made.loc[UNTRAINED][:1].set_axis([UNTRAINED])])
    return markdown(single, "loss")


def _cell(values: pd.Series) -> str:
    return f"{100 * values.mean():.1f}" + f" ± {100 * values.std():.1f}" * (len(values) > 1)


def plot(rows: pd.DataFrame, path: Path) -> None:
    """MAP@R of each loss, with its deviation."""
    plt = pyplot()
    values = rows[rows.models == FOLDS].groupby("loss", sort=False)[MAIN]
    single = values.agg(["mean", "std"]).fillna(0).sort_values("mean", kind="stable")
    figure, axes = plt.subplots(figsize=(7, 0.4 * len(single) + 1), layout="constrained")
    axes.barh(single.index, single["mean"], xerr=single["std"], capsize=3)
    axes.set(xlabel="MAP@R on unseen classes, mean and standard deviation")
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
