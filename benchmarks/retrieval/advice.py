"""What to choose, from the rows of the grid: chosen on other data, measured on the one left out.

A cell is a data set at a length of training. In each, a loss at a setting has the learning rate of
the grid that has the higher MAP@R on the validation classes, and counts by its MAP@R on the test
classes, averaged over the splits that all losses of the cell have.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from study_rows import RESULTS

sys.path.insert(0, str(Path(__file__).parents[1]))
import pages  # noqa: E402

FOLDER = RESULTS / "grid"
SCRIPT = "python benchmarks/retrieval/grid.py"
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
# What is advised rests on these.
MAIN = (
    "clinc150",
    "clinc150_transformer",
    "emoji_lite0",
    "grocery",
    "grocery_lite0",
    "grocery_last_blocks",
    "omniglot",
)
# Pretrained networks that are trained along, with single settings: what is advised, and defaults.
TRAINED = ("clinc150_transformer", "grocery_finetuned", "grocery_last_blocks")
SINGLE = {
    "PNP-Ds + MultiSimilarity": "at 0.03",
    "PNP-Ds": "at 0.03",
    "PNP-O": "at 0.01",
    "NTXent": "at 0.07",
    "SmoothAP": "at 0.01",
    "SupAP": "at 0.01",
    "MultiSimilarity": "alpha 2, base 0.5, beta 50",
}
CELL = ["dataset", "steps"]
CHOICE = ["loss", "setting"]


def read(folder: Path = FOLDER) -> pd.DataFrame:
    """All rows of the grid; `value` and `seen` are MAP@R in percent on test and validation.

    Of a run that was made twice, the last.
    """
    rows = pages.read(sorted(folder.glob("*.csv")))
    run = [*CELL, *CHOICE, "learning_rate", "seed"]
    return prepared(rows.drop_duplicates(run, keep="last"))


def prepared(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with the columns that the tables are made of, besides their own."""
    parameters = rows.parameters.map(json.loads)
    return rows.assign(
        value=100 * rows["test map_at_r"],
        seen=100 * rows["validation map_at_r"],
        temperature=parameters.map(lambda p: p.get("anneal", p.get("temperature"))),
        label=parameters.map(_label),
    )


def _label(parameters: dict) -> str:
    """What tells a setting of a loss from the others."""
    if "anneal" in parameters:
        return f"at {parameters['anneal']:g}"
    own = {k: v for k, v in parameters.items() if k != "proxy_learning_rate"}
    if "temperature" in own:
        return f"at {own['temperature']:g}"
    return ", ".join(f"{k} {v:g}" for k, v in own.items())


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
        A line for each cell and name: `value`, `choice` (the setting), `behind` (MAP@R minus that
        of the best of the losses of other papers, chosen in the same way).
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
            label = choice if "label" not in rows else _label_of(rows, *choice)
            lines.append(here.assign(name=name, choice=[label] * len(here)))
    made = pd.concat(lines, ignore_index=True)
    return _with_behind(made, made.name.isin(peers))


def by_validation(rows: pd.DataFrame) -> pd.DataFrame:
    """What the settings of a loss cost in every training, against the one that is best on test.

    A training is a data set at a length and a learning rate. The setting that validation prefers is
    chosen anew for every split, as a user would.

    Args:
        rows: of the grid.

    Returns:
        A line for each training and loss, MAP@R minus that of the best setting: `chosen` for the
        settings that validation prefers, and a column for each setting, by its label.
    """
    training = [*CELL, "learning_rate", "loss"]
    chosen = preferred(rows, training).groupby(training).value.mean()
    each = rows.pivot_table(index=training, columns="label", values="value")
    return each.assign(chosen=chosen).sub(each.max(axis=1), axis=0).reset_index()


def preferred(rows: pd.DataFrame, among: list[str]) -> pd.DataFrame:
    """Of the rows that have these columns in common, for each seed the best on validation."""
    return rows.loc[rows.groupby([*among, "seed"]).seen.idxmax()]


def from_best_peer(rows: pd.DataFrame) -> pd.DataFrame:
    """MAP@R of every cell and loss at what validation prefers of its settings and rates.

    Minus that of the best loss of another paper, chosen in the same way: `behind`.
    """
    chosen = preferred(rows, [*CELL, "loss"])
    found = chosen.groupby([*CELL, "loss"], as_index=False).value.mean()
    return _with_behind(found, ~found.loss.str.startswith(OURS))


def _with_behind(found: pd.DataFrame, is_peer: pd.Series) -> pd.DataFrame:
    """With `behind`, MAP@R minus that of the best peer of the cell."""
    best = found[is_peer].groupby(CELL)["value"].max().rename("best_peer")
    found = found.merge(best, on=CELL)
    return found.assign(behind=found.value - found.best_peer)


def _label_of(rows: pd.DataFrame, loss: str, setting: int) -> str:
    return rows[(rows.loss == loss) & (rows.setting == setting)].label.iloc[0]


# --- the tables and the picture ---------------------------------------------------------------


def complete(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the data sets in which every loss has run at every setting, of whole splits."""
    choices = rows[[*CELL, *CHOICE]].drop_duplicates().groupby("dataset").size()
    return whole_splits(rows[rows.dataset.isin(choices.index[choices == choices.max()])])


def everywhere(rows: pd.DataFrame, datasets: tuple[str, ...] = MAIN) -> pd.DataFrame:
    """The rows of these data sets, of the losses that have run at every setting in all of them.

    Of the whole splits of each cell.
    """
    rows = rows[rows.dataset.isin(datasets)]
    choices = rows[[*CELL, *CHOICE]].drop_duplicates().groupby("loss").size()
    return whole_splits(rows[rows.loss.isin(choices.index[choices == choices.max()])])


def whole_splits(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the splits that have as many runs as any of the cell.

    With one that is run in part, means would compare losses on different splits.
    """
    runs = rows.groupby([*CELL, "seed"]).loss.transform("size")
    return rows[runs == runs.groupby([rows[x] for x in CELL]).transform("max")]


def left_out_table(rows: pd.DataFrame, by_length: bool = True) -> str:
    """MAP@R minus that of the best loss of another paper, all chosen on the other data.

    Args:
        rows: of the grid.
        by_length: a column for each length of training; or else one for each data set.
    """
    made = left_out(rows)
    each = made.dataset + ", " + made.steps.astype(str) + " steps" if by_length else made.dataset
    table = made.assign(column=each).pivot_table("behind", "name", "column")
    behind = made.groupby("name").behind
    table = table.assign(mean=behind.mean(), least=behind.min())
    table = table.sort_values("mean", ascending=False).map(signed)
    settings = made.groupby("name")["choice"].agg(lambda x: " or ".join(dict.fromkeys(x)))
    table["setting"] = settings
    return pages.markdown(with_ours_bold(table), "loss")


def without_one_table(rows: pd.DataFrame) -> str:
    """The means of `left_out_table`, with one data set neither chosen on nor measured."""
    of = {"all": rows} | {f"without {x}": rows[rows.dataset != x] for x in rows.dataset.unique()}
    table = pd.DataFrame({k: left_out(x).groupby("name").behind.mean() for k, x in of.items()})
    table = table.sort_values("all", ascending=False).map(signed)
    return pages.markdown(with_ours_bold(table), "loss")


def trained_table(rows: pd.DataFrame) -> str:
    """MAP@R of single settings where a pretrained network is trained along, each of one run."""
    rows = rows[rows.dataset.isin(TRAINED) & (rows.label == rows.loss.map(SINGLE))]
    index = ["dataset", "steps", "learning_rate", "seed"]
    table = rows.pivot_table("value", index, "loss")[[*SINGLE]]
    table.index = ["{}, {} steps at {:g}, split {}".format(*line) for line in table.index]
    table.columns = [f"{_bold(loss)}, {label}" for loss, label in SINGLE.items()]
    return pages.markdown(table, "training")


def equal_temperatures_table(rows: pd.DataFrame, other: str = "SmoothAP") -> str:
    """MAP@R of PNP-Dq minus that of another loss at the same temperature, over all trainings."""
    at = [*CELL, "learning_rate", "seed", "temperature"]
    values = rows[rows.temperature.notna()].pivot_table(index=at, columns="loss", values="value")
    values = values.dropna(subset=[other]).groupby([*CELL, "learning_rate", "temperature"]).mean()
    made = {}
    for loss in ("PNP-Dq", "PNP-Dq alpha 4"):
        minus = (values[loss] - values[other]).unstack("temperature")
        made[loss] = [
            f"{m:+.2f} ({low:+.2f} to {high:+.2f})"
            for m, low, high in zip(minus.mean(), minus.min(), minus.max(), strict=True)
        ]
    columns = [f"at {x:g}" for x in minus.columns]
    return pages.markdown(pd.DataFrame.from_dict(made, "index", columns=columns), f"minus {other}")


def by_validation_table(rows: pd.DataFrame) -> str:
    """What temperatures cost, fixed and chosen by validation; and the losses so chosen."""
    costs = by_validation(rows[rows.temperature.notna()])
    ours = rows[rows.loss.str.startswith(OURS)]
    labels = [f"at {x:g}" for x in sorted(ours.temperature.unique())]
    of_loss = costs.groupby("loss")
    behind = from_best_peer(rows).groupby("loss").behind
    table = pd.DataFrame(
        {
            "chosen by validation": of_loss.chosen.mean(),
            "the most that this costs": of_loss.chosen.min(),
            **{x: of_loss[x].mean() for x in labels},
            "from the best peer": behind.mean(),
            "least": behind.min(),
        }
    )
    table = table.sort_values("from the best peer", ascending=False).map(signed)
    return pages.markdown(with_ours_bold(table), "loss")


def signed(value: float) -> str:
    """A difference with its sign; NaN is an empty cell."""
    return "" if pd.isna(value) else f"{value:+.2f}"


def with_ours_bold(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the names of this package's losses in bold."""
    return table.set_axis(map(_bold, table.index))


def _bold(loss: str) -> str:
    return f"**{loss}**" if loss.startswith(OURS) else loss


def settings_table(rows: pd.DataFrame) -> str:
    """MAP@R of every setting on the test classes of a data set, by length and learning rate.

    On average over the splits, or in a column for each split where some settings lack one.
    """
    named = rows.assign(name=rows.loss.map(_bold) + ", " + rows.label)
    line, columns = ["loss", "setting", "name"], ["steps", "learning_rate"]
    head = "{} steps at {:g}"
    splits = named.groupby([*columns, *line]).seed.agg(frozenset)
    if splits.groupby(columns).nunique().max() > 1:
        columns, head = ["seed", *columns], f"split {{}}, {head}"
    table = named.pivot_table("value", line, columns)
    table.columns = [head.format(*column) for column in table]
    last, seeds = rows.iloc[-1], rows.seed.nunique()
    where = pages.where(rows.assign(command=f"{SCRIPT} --dataset {last.dataset}"), "machine")
    return (
        f"{seeds} split{'s' * (seeds > 1)} of the classes, batches of {last.batch}, {where}:\n\n"
        + pages.markdown(table.droplevel(["loss", "setting"]), "loss")
    )


def plot(rows: pd.DataFrame, path: Path, losses: tuple[str, ...] = ("PNP-Ds", "PNP-O")) -> None:
    """Draw MAP@R over the temperature: a column for each data set, a line for each training."""
    plt = pages.pyplot()
    rows = complete(rows)
    names = sorted(rows.dataset.unique())
    size = 3.4 * len(names), 3.2
    figure, axes = plt.subplots(1, len(names), figsize=size, squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        own = rows[rows.dataset == name]
        trainings = sorted(set(zip(own.steps, own.learning_rate, strict=True)))
        colors = plt.cm.viridis(np.linspace(0, 0.85, len(trainings)))
        for color, (steps, rate) in zip(colors, trainings, strict=True):
            for loss, style in zip(losses, ("o-", "s:"), strict=True):
                of = own[(own.steps == steps) & (own.learning_rate == rate) & (own.loss == loss)]
                means = of.groupby("temperature")["value"].mean()
                label = f"{loss.removeprefix('PNP-')}, {steps} steps at {rate:g}"
                axis.plot(means.index, means, style, color=color, label=label, markersize=3)
        axis.set(xscale="log", xlabel="temperature", title=name)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("MAP@R of unseen classes, %")
    axes[0, 0].legend(fontsize=6)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
