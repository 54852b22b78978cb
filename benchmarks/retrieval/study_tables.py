"""Make the tables and pictures of docs/retrieval.md and docs/retrieval/ of the rows of the study.

    python benchmarks/retrieval/study_tables.py            # write them
    python benchmarks/retrieval/study_tables.py --check    # only whether the pages have the tables

The rows are in benchmarks/results/retrieval_study, and so is the picture.

A cell of a metric is its mean over the seeds, in percent, and half of the 95 % interval by
Student's t. The last columns compare with the best peer (the loss of another paper with the highest
mean in the table), over the seeds that both have: the mean difference, its 95 % interval and p by a
paired t test.
"""

import argparse
import itertools
import json
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path

import advice
import numpy as np
import pandas as pd
import torch
from advice import signed, with_ours_bold
from pages import fill, markdown, read, write
from pytorch_metric_learning.distances import DotProductSimilarity
from scipy import stats
from study_plot import TITLES, plot
from study_rows import KEY, RESULTS

from pml_pnp import losses

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [DOCS / "retrieval.md", *sorted((DOCS / "retrieval").glob("*.md"))]
SIGNAL = "signal.csv"  # rows of another kind
PICTURE = RESULTS / "losses.svg"
TEMPERATURES = RESULTS / "temperatures.svg"
SCRIPT = "study_tables.py"
METRICS = {"map_at_r": "MAP@R", "precision_at_1": "precision@1", "r_precision": "R-precision"}
UNTUNED, TUNED, SPLITS = "untuned", "tuned", "splits"
TRANSFORMER = "clinc150_transformer"  # of which few losses are tuned
# A loss that is a sum, and the part of it that it is compared with.
SUMS = (
    ("PNP-Ds + MultiSimilarity", "MultiSimilarity"),
    ("PNP-Ds + ProxyAnchor", "ProxyAnchor"),
    ("PNP-Ds + Contrastive", "Contrastive"),
    ("SupAP + Contrastive", "Contrastive"),
)
AUTO_SHARES = (0.125, 0.25, 0.375, 0.5, 1.0)
BATCH_CONTRASTS = (
    ("28 x 4", "7 x 4"),
    ("56 x 4", "28 x 4"),
    ("100 x 4", "28 x 4"),
    ("14 x 16", "14 x 4"),
    ("28 x 14", "28 x 4"),
    ("75 x 27", "75 x 4"),
)
BLURRING = "PNP-Iu"  # what the losses that keep the fine classes apart are compared with
GRADIENTS_OF = (
    {"variant": "O"},
    {"variant": "Iu"},
    {"variant": "Ib"},
    {"variant": "Ds"},
    {"variant": "Dq"},
    {"variant": "Dq", "alpha": 4},
)
NO_RUNS = "No runs yet."
# A setting is text, also where all of them are numbers or there is none.
TEXT = {"dtype": {"setting": str}, "keep_default_na": False}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    made = parts()
    write({x: fill(x.read_text(encoding="utf-8"), made, SCRIPT) for x in PAGES}, args.check)
    if not args.check:
        picture()
        advice.plot(advice.read(), TEMPERATURES)


def read_all(folder: Path = RESULTS) -> pd.DataFrame:
    """The rows of all data sets, in the order of the page; of runs with the same key the last."""
    order = {name: i for i, name in enumerate(TITLES)}
    paths = [path for path in folder.glob("*.csv") if path.name != SIGNAL]
    paths.sort(key=lambda path: (order.get(path.stem, len(order)), path.stem))
    rows = read(paths, **TEXT)
    return rows.drop_duplicates(["dataset", *KEY], keep="last")


def parts(folder: Path = RESULTS) -> dict[str, str]:
    """Every generated part of the pages, by the name in its markers."""
    rows = read_all(folder)
    made = {
        f"{name} {part}": make(own)
        for name, own in rows.groupby("dataset")
        for part, make in PARTS.items()
    }
    return made | {
        **{f"all {stage}": summary(rows, stage) for stage in (UNTUNED, TUNED, SPLITS)},
        "sums": sums(rows),
        "anneal of the batch": anneal_of_the_batch(rows),
        "positives before": positives_before(rows),
        "signal": signal(read(folder.glob(SIGNAL), **TEXT)),
        "gradients": gradients(),
        **of_grid(),
    }


def of_grid() -> dict[str, str]:
    """The parts that are made of the rows of the grid."""
    grid = advice.read()
    tables = {f"{x} grid": advice.settings_table(grid, x) for x in grid.dataset.unique()}
    leading, complete = advice.everywhere(grid), advice.complete(grid)
    tables["left out"] = advice.left_out_table(leading)
    tables["left out of all losses"] = advice.left_out_table(complete)
    tables["by validation"] = advice.by_validation_table(leading)
    tables["equal temperatures"] = advice.equal_temperatures_table(complete)
    if any((RESULTS / "longer").glob("*.csv")):
        longer = advice.read(RESULTS / "longer")
        tables |= {f"{x} longer": advice.settings_table(longer, x) for x in longer.dataset.unique()}
    return tables


def picture(folder: Path = RESULTS, path: Path = PICTURE) -> None:
    """Draw the means of the untuned and of the tuned runs, of the losses that ran everywhere."""
    rows = read_all(folder)
    rows = rows[rows.dataset != TRANSFORMER]
    order = [*behind(rows, UNTUNED).index]
    if not order:
        return
    runs = rows[rows.loss.isin(order)].groupby(["dataset", "stage", "loss"], sort=False)
    means = 100 * runs.map_at_r.agg(mean="mean", half=half_width).fillna(0)
    plot(means.reset_index(), (UNTUNED, TUNED), order, path)


# --- a number and how sure it is ----------------------------------------------------------------


def half_width(values: pd.Series) -> float:
    """Half of the 95 % interval of a mean, by Student's t; NaN for one value."""
    return stats.t.ppf(0.975, len(values) - 1) * values.sem()


def paired(ours: pd.Series, theirs: pd.Series) -> tuple[float, float, float] | None:
    """Mean difference over the common seeds, half of its 95 % interval, and p; None below two."""
    difference = (ours - theirs).dropna()
    if len(difference) < 2:
        return None
    if np.ptp(difference) == 0:
        return difference.iloc[0], 0.0, float(difference.iloc[0] == 0)
    return difference.mean(), half_width(difference), stats.ttest_1samp(difference, 0).pvalue


def cell(values: pd.Series) -> str:
    """Mean and half of its interval, in percent."""
    values = values.dropna()
    half = f" ± {100 * half_width(values):.2f}" if len(values) > 1 else ""
    return f"{100 * values.mean():.2f}{half}"


def minus(ours: pd.Series | None, theirs: pd.Series | None) -> tuple[str, str]:
    """Mean difference in percent with half of its interval, and p; empty where there is none."""
    test = None if ours is None or theirs is None else paired(ours, theirs)
    if test is None:
        return "", ""
    difference, half, p = test
    return f"{100 * difference:+.2f} ± {100 * half:.2f}", f"{p:.3f}" if p >= 0.001 else "< 0.001"


# --- the tables ---------------------------------------------------------------------------------


def by_seed(
    rows: pd.DataFrame, column: str | list[str] = "loss", metric: str = "map_at_r"
) -> pd.DataFrame:
    """A metric, with a line for each seed and a column for each loss, or what `column` has."""
    order = rows[column].drop_duplicates()
    order = order if isinstance(column, str) else pd.MultiIndex.from_frame(order)
    return rows.pivot(index="seed", columns=column, values=metric).reindex(columns=order)


def compared(rows: pd.DataFrame, column: str, base: str | None) -> pd.DataFrame:
    """A line for each loss, best first: metrics, and MAP@R minus that of `base`."""
    main = by_seed(rows, column)
    table = pd.DataFrame({x: by_seed(rows, column, m).apply(cell) for m, x in METRICS.items()})
    against = {x: minus(main[x], main.get(base)) for x in main if x != base}
    heads = [f"MAP@R minus that of {base}", "p"]
    table = table.join(pd.DataFrame.from_dict(against, "index", columns=heads))
    return table.loc[main.mean().sort_values(ascending=False, kind="stable").index]


def final(stage: str, rows: pd.DataFrame) -> str:
    """The table of the runs at the defaults, or of the tuned ones."""
    of_stage, untrained = rows[rows.stage == stage], rows[rows.stage == "untrained"]
    if of_stage.empty:
        return NO_RUNS
    means = of_stage.groupby("loss", sort=False).map_at_r.mean()
    peers = means[~means.index.str.startswith(advice.OURS)]
    table = compared(of_stage, "loss", None if peers.empty else peers.idxmax())
    of_loss = of_stage.groupby("loss")
    table.insert(len(METRICS), "seeds", of_loss.size().astype(str))
    if stage == TUNED:
        table["setting"] = of_loss.parameters.last().map(_setting)
    without = ""
    if stage != SPLITS and len(untrained):
        values = ", ".join(f"{x} {cell(untrained[m][:1])}" for m, x in METRICS.items())
        without = f"; without training {values}"
    return f"{conditions(of_stage)}{without}:\n\n{markdown(with_ours_bold(table), 'loss')}"


def _setting(parameters: str) -> str:
    return ", ".join(
        f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
        for k, v in json.loads(parameters).items()
    )


def conditions(rows: pd.DataFrame) -> str:
    """Versions, machines and commands of some rows."""
    last = rows.iloc[-1]
    stages = f" --stages {SPLITS}" if last.stage == SPLITS else ""
    return f"{last.steps} steps of {last.batch_size}, {_where(rows, stages)}"


def conditions_of_probe(rows: pd.DataFrame) -> str:
    """The same of a probe, with the number of its seeds."""
    seeds, last = rows.groupby(["loss", "setting"]).size(), rows.iloc[-1]
    number = " to ".join(str(x) for x in sorted({seeds.min(), seeds.max()}))
    flags = f" --stages {last.stage} --probe-seeds {seeds.max()}"
    return (
        f"MAP@R in percent on {last.measured_on}, {number} seeds, {last.steps} steps, "
        f"{_where(rows, flags)}"
    )


def _where(rows: pd.DataFrame, flags: str) -> str:
    """Machines, versions, dates and commands, with more flags."""
    when = " to ".join(sorted({rows.date.min(), rows.date.max()}))
    machines = (rows.machine + ", torch " + rows.torch).unique()
    commands = dict.fromkeys(f"`{_command(x)}{flags}`" for x in rows.command.unique())
    return (
        f"on {', and on '.join(machines)}, PML {rows['pytorch-metric-learning'].iloc[-1]}, {when}, "
        f"{', '.join(commands)}"
    )


def _command(command: str) -> str:
    """A command without how much of the study it was told to run."""
    kept, keep = [], True
    for word in shlex.split(command):
        if word.startswith("--"):
            keep = word in ("--dataset", "--device")
        if keep:
            kept.append(word)
    return shlex.join(kept)


def behind(rows: pd.DataFrame, stage: str) -> pd.DataFrame:
    """Mean MAP@R minus that of the best peer, in percent, by loss and data set, best first.

    Of the losses that have run with all seeds on all data sets.
    """
    found = rows[rows.stage == stage].groupby(["dataset", "loss"]).map_at_r.agg(["mean", "size"])
    most = found["size"].groupby("dataset").transform("max")
    means = 100 * found["mean"][found["size"] == most].unstack("dataset")
    best = means[~means.index.str.startswith(advice.OURS)].max()
    table = (means - best).reindex(columns=rows.dataset.unique()).dropna()
    return table.loc[table.mean(axis=1).sort_values(ascending=False).index]


def summary(rows: pd.DataFrame, stage: str) -> str:
    """How far each loss is from the best peer of each data set."""
    table = behind(rows if stage == UNTUNED else rows[rows.dataset != TRANSFORMER], stage)
    if table.empty:
        return NO_RUNS
    table = table.assign(mean=table.mean(axis=1), least=table.min(axis=1)).rename(columns=TITLES)
    return markdown(with_ours_bold(table.map(signed)), "loss")


def sums(rows: pd.DataFrame) -> str:
    """What a ranking loss beside another changes, paired by seed, over all data sets."""
    lines = []
    for stage, (both, alone) in itertools.product((UNTUNED, TUNED), SUMS):
        line = {"losses": both, "minus": alone, "": stage}
        for name, own in rows.groupby("dataset", sort=False):
            values = by_seed(own[own.stage == stage])
            difference, p = minus(values.get(both), values.get(alone))
            equals = "" if p.startswith("<") else "= "
            line[TITLES.get(name, name)] = f"{difference} (p {equals}{p})" if p else ""
        if any([*line.values()][3:]):
            lines.append(line)
    return markdown(pd.DataFrame(lines).set_index("losses")) if lines else NO_RUNS


def trials(rows: pd.DataFrame) -> str:
    """How many trials each loss has had, and the best of them on the validation classes."""
    of_stage = rows[rows.stage == "tune"]
    if of_stage.empty:
        return "No trials yet."
    of_loss = of_stage.sort_values("setting", key=pd.to_numeric, kind="stable").groupby("loss")
    table = pd.DataFrame(
        {
            "trials": of_loss.size().astype(str),
            "MAP@R of the default": 100 * of_loss.map_at_r.first(),
            "of the best trial": 100 * of_loss.map_at_r.max(),
        }
    ).sort_values("of the best trial", ascending=False)
    return markdown(with_ours_bold(table), "loss")


def of_probe(stage: str, make: Callable[[pd.DataFrame], pd.DataFrame], rows: pd.DataFrame) -> str:
    """The table of a probe, under the conditions of the rows that it is made of."""
    of_stage = rows[rows.stage == stage]
    if of_stage.empty:
        return NO_RUNS
    return f"{conditions_of_probe(of_stage)}:\n\n{markdown(make(of_stage), 'loss')}"


def temperature(rows: pd.DataFrame) -> pd.DataFrame:
    """A line for each loss, a column for each temperature, of the batch (σ) or fixed."""
    auto = rows.loss.str.contains(" auto")
    prefix, _, setting = (part for _, part in rows.setting.str.rpartition(", ").items())
    names = (rows.loss.str.partition(" auto")[0] + " " + prefix).str.strip()
    names += auto.map({True: ", of the batch", False: ""})
    columns = setting + auto.map({True: " σ", False: ""})
    table = rows.map_at_r.groupby([names, columns.rename("temperature")]).agg(cell).unstack()
    order = sorted(table, key=lambda c: ("σ" in c, float(c.split()[0])))
    return table.loc[names.unique(), order]


def batch(rows: pd.DataFrame) -> pd.DataFrame:
    """Batches, and what more classes or more examples of each are worth, paired."""
    columns = rows.setting.unique()
    contrasts = [pair for pair in BATCH_CONTRASTS if {*pair} <= {*columns}]
    lines = {}
    for loss, own in rows.groupby("loss", sort=False):
        values = by_seed(own, "setting")
        lines[loss] = [cell(values[x]) if x in values else "" for x in columns]
        for x, y in contrasts:
            lines[loss] += minus(values.get(x), values.get(y))
    heads = [head for x, y in contrasts for head in (f"{x} minus {y}", "p")]
    return pd.DataFrame.from_dict(lines, "index", columns=[*columns, *heads])


def coarse(rows: pd.DataFrame) -> pd.DataFrame:
    """Training with coarse labels, a line for each loss."""
    names = rows.loss + np.where(rows.setting == "", "", ", " + rows.setting)
    base = next((x for x in names if x.startswith(BLURRING)), "")
    return compared(rows.assign(name=names), "name", base)


def settings(rows: pd.DataFrame) -> pd.DataFrame:
    """Single settings, a line for each, against PNP-Ds as the others have it."""
    base = ("PNP-Ds", "include_self True")
    values = by_seed(rows, ["loss", "setting"])
    against = {x: minus(values[x], values.get(base)) for x in values if x != base}
    lines = [[*x, cell(values[x]), *against.get(x, ("", ""))] for x in values]
    heads = ["loss", "setting", "MAP@R", "minus that of PNP-Ds, include_self True", "p"]
    return pd.DataFrame(lines, columns=heads).set_index("loss")


def anneal_of_the_batch(rows: pd.DataFrame) -> str:
    """A temperature taken from the batch minus the best fixed one, over all data sets."""
    lines = []
    for (name, own), loss in itertools.product(
        rows[rows.stage == "temperature"].groupby("dataset", sort=False), ("PNP-Ds", "PNP-Dq")
    ):
        fixed = by_seed(own[(own.loss == loss) & ~own.setting.str.contains(",")], "setting")
        auto = by_seed(own[own.loss.str.startswith(f"{loss} auto")], "setting")
        if fixed.empty or auto.empty:
            continue
        best = fixed.mean().idxmax()
        lines.append([name, loss, best, cell(fixed[best])])
        for share in AUTO_SHARES:
            lines[-1] += minus(auto.get(str(share)), fixed[best])
    heads = ["data set", "loss", "best fixed temperature", "MAP@R"]
    heads += [x for share in AUTO_SHARES for x in (f"{share} σ minus it", "p")]
    return markdown(pd.DataFrame(lines, columns=heads).set_index("data set"))


def positives_before(rows: pd.DataFrame) -> str:
    """PNP minus SmoothAP, which counts the positives before a positive as well, at one temperature.

    Both at their defaults, which have the same temperature, trained on all training classes.
    """
    compared_with_it = ("PNP-O", "PNP-Ds", "PNP-Dq")
    lines = []
    for name, own in rows[rows.stage == UNTUNED].groupby("dataset", sort=False):
        values = by_seed(own)
        if "SmoothAP" in values:
            lines.append([name, cell(values["SmoothAP"])])
            for loss in compared_with_it:
                lines[-1] += minus(values.get(loss), values["SmoothAP"])
    heads = [x for loss in compared_with_it for x in (f"{loss} minus it", "p")]
    table = pd.DataFrame(lines, columns=["data set", "SmoothAP", *heads])
    return markdown(table.set_index("data set"))


def gradients() -> str:
    """The gradient that a positive gets with 2 R negatives at its similarity, as PNPLoss gives it.

    Each of them counts 1/2. In units of the gradient of variant O.
    """
    numbers = (2, 4, 8, 20, 60, 200)  # of negatives
    lines = {
        ", ".join(str(v) if k == "variant" else f"{k} {v}" for k, v in params.items()): [
            _gradient_of_positive(params, number) for number in numbers
        ]
        for params in GRADIENTS_OF
    }
    heads = [f"R = {number // 2}" for number in numbers]
    table = pd.DataFrame.from_dict(lines, "index", columns=heads)
    return markdown((table / table.loc["O"]).map("{:.3g}".format), "variant")


def _gradient_of_positive(params: dict[str, object], negatives: int) -> float:
    loss_func = losses.PNPLoss(
        **params, include_self=False, distance=DotProductSimilarity(normalize_embeddings=False)
    )
    query = torch.ones(1, 1, dtype=torch.float64)
    references = torch.full((1 + negatives, 1), 0.5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0] + [1] * negatives)
    loss = loss_func(query, labels[:1], ref_emb=references, ref_labels=labels)
    return -torch.autograd.grad(loss, references)[0][0].item()


def signal(rows: pd.DataFrame) -> str:
    """Saturated sigmoids and gradient over the temperature, at the first and the last step."""
    if rows.empty:
        return NO_RUNS
    names = ["saturated", "gradient_norm", "std_of_negatives"]
    lines = []
    for (dataset, loss, setting), own in rows.groupby(["dataset", "loss", "setting"], sort=False):
        means = own.groupby("step")[names].mean().loc[["first", "last"]].values.T.ravel()
        lines.append(
            [
                *(dataset, loss.partition(" auto")[0], setting + " σ" * (" auto" in loss)),
                *map("{:.0%}".format, means[:2]),
                *map("{:.2g}".format, means[2:]),
            ]
        )
    heads = ["data set", "loss", "temperature", "saturated, first", "last"]
    heads += ["gradient, first", "last", "σ, first", "last"]
    return markdown(pd.DataFrame(lines, columns=heads).set_index("data set"))


PROBES = {"temperature": temperature, "batch": batch, "settings": settings, "coarse": coarse}
PARTS: dict[str, Callable[[pd.DataFrame], str]] = {
    **{stage: partial(final, stage) for stage in (UNTUNED, TUNED, SPLITS)},
    "trials": trials,
    **{stage: partial(of_probe, stage, make) for stage, make in PROBES.items()},
}


if __name__ == "__main__":
    main()
