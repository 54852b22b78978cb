"""What to choose, from the rows of the grid: chosen on other data, measured on the one left out.

A cell is a data set at a length of training. In each, a loss at a setting has the learning rate of
the grid that has the higher MAP@R on the validation classes, and counts by its MAP@R on the test
classes, averaged over the splits that all losses of the cell have.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from study_rows import RESULTS

FOLDER = RESULTS / "grid"
OURS = "PNP"
# Data sets of the same images or sentences are left out together.
DATA_OF = {
    "clinc150": "CLINC150",
    "clinc150_transformer": "CLINC150",
    "omniglot": "Omniglot small",
    "grocery": "Grocery",
    "grocery_lite0": "Grocery",
    "grocery_lite0_random": "Grocery",
    "grocery_last_blocks": "Grocery",
    "grocery_finetuned": "Grocery",
    "emoji_lite0": "Emoji",
}
# Where the trunk stands still and a linear layer alone is trained.
FROZEN = ("clinc150", "grocery_lite0", "grocery_lite0_random", "emoji_lite0")
CELL = ["dataset", "steps"]
CHOICE = ["loss", "setting"]


def read(folder: Path = FOLDER) -> pd.DataFrame:
    """All rows of the grid; `value` and `seen` are MAP@R in percent on test and validation."""
    frames = [pd.read_csv(path) for path in sorted(folder.glob("*.csv"))]
    rows = pd.concat(frames, ignore_index=True)
    rows["value"] = 100 * rows["test map_at_r"]
    rows["seen"] = 100 * rows["validation map_at_r"]
    return rows


def at_best_rate(rows: pd.DataFrame) -> pd.DataFrame:
    """One row for each cell, choice and seed: at the learning rate that is better on validation.

    The rate is that of the mean over the seeds, of the rates that have all seeds of the cell.
    """
    rate = rows.groupby([*CELL, *CHOICE, "learning_rate"], as_index=False).agg(
        seen=("seen", "mean"), seeds=("seed", "nunique")
    )
    most = rate.groupby(CELL)["seeds"].transform("max")
    best = (
        rate[rate.seeds == most].sort_values("seen").drop_duplicates([*CELL, *CHOICE], keep="last")
    )
    return rows.merge(best[[*CELL, *CHOICE, "learning_rate"]])


def means(rows: pd.DataFrame) -> pd.DataFrame:
    """MAP@R on test and validation of every cell and choice, over the seeds."""
    return at_best_rate(rows).groupby([*CELL, *CHOICE], as_index=False)[["value", "seen"]].mean()


def chosen_on(found: pd.DataFrame, losses: list[str]) -> tuple[str, int]:
    """The loss and setting with the highest mean, over the cells, of MAP@R minus the cell's best.

    Of the choices that have a run in every cell.
    """
    found = found[found.loss.isin(losses)].copy()
    found["behind"] = found.value - found.groupby(CELL)["value"].transform("max")
    mean = found.groupby(CHOICE)["behind"].agg(["mean", "size"])
    return mean[mean["size"] == mean["size"].max()]["mean"].idxmax()


def left_out(rows: pd.DataFrame, groups: dict[str, list[str]] | None = None) -> pd.DataFrame:
    """MAP@R of every cell with the setting that was chosen on the other data, for each loss.

    Args:
        rows: of the grid.
        groups: more lines, {name: losses to choose from}.

    Returns:
        A line for each cell and name: `value`, `choice` (loss and setting), `behind` (MAP@R minus
        that of the best of the losses of other papers, chosen in the same way).
    """
    found = means(rows)
    names = sorted(found.loss.unique())
    peers = [x for x in names if not x.startswith(OURS)]
    lines = []
    for data in sorted({DATA_OF[x] for x in found.dataset}):
        own = found.dataset.map(DATA_OF) == data
        for name, losses in {**{x: [x] for x in names}, **(groups or {})}.items():
            choice = chosen_on(found[~own], losses)
            here = found[own & (found.loss == choice[0]) & (found.setting == choice[1])]
            lines.append(here.assign(name=name, choice=[choice] * len(here)))
    made = pd.concat(lines, ignore_index=True)
    best = made[made.name.isin(peers)].groupby(CELL)["value"].max().rename("best_peer")
    made = made.merge(best, on=CELL)
    made["behind"] = made.value - made.best_peer
    return made


def spread(made: pd.DataFrame) -> pd.DataFrame:
    """`left_out` as a table: a line for each name, a column for each cell, mean and least."""
    table = made.pivot_table(index="name", columns=CELL, values="behind")
    table["mean"], table["least"] = table.mean(axis=1), table.min(axis=1)
    return table.sort_values("mean", ascending=False)


def half_width(values: pd.Series) -> float:
    """Half of the 95 % interval of a mean, by Student's t; NaN for one value."""
    from scipy import stats

    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1) * values.sem())


def best_temperatures(rows: pd.DataFrame) -> pd.DataFrame:
    """MAP@R of the variants by temperature: a line for each cell and variant."""
    found = means(rows[rows.loss.str.startswith(OURS)])
    temperature = np.array([0.003, 0.01, 0.03, 0.1, 0.3])
    found["temperature"] = temperature[found.setting]
    return found.pivot_table(index=[*CELL, "loss"], columns="temperature", values="value")
