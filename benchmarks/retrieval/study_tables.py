"""Make the tables and pictures of docs/retrieval.md and docs/retrieval/ of the rows of the study.

    python benchmarks/retrieval/study_tables.py            # write them
    python benchmarks/retrieval/study_tables.py --check    # only whether the pages have the tables

The rows are in benchmarks/results/retrieval_study, and so are the pictures.

A cell of a metric is its mean over the seeds, in percent, and half of the 95 % interval by
Student's t. The last columns compare with the best peer (the loss of another paper with the highest
mean in the table), over the seeds that both have: the mean difference, its 95 % interval and p by a
paired t test.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import advice
import numpy as np
import pandas as pd
import torch
from advice import OURS, signed, with_ours_bold
from pages import markdown, publish, pyplot, read, where
from scipy import stats
from study_rows import KEY, RESULTS

from pml_pnp.functional import pnp_loss
from pml_pnp.variants import VARIANTS

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [DOCS / "retrieval.md", *sorted((DOCS / "retrieval").glob("*.md"))]
SCRIPT = "study_tables.py"
SIGNAL = "signal.csv"  # rows of another kind
PICTURE = RESULTS / "losses.svg"
TEMPERATURES = RESULTS / "temperatures.svg"
METRICS = {"map_at_r": "MAP@R", "precision_at_1": "precision@1", "r_precision": "R-precision"}
NO_RUNS = "No runs yet."
UNTUNED, TUNED, LONGER, SPLITS = "untuned", "tuned", "longer", "splits"
WIDER = "wider"  # folder of runs tuned over a wider range of learning rates
TRANSFORMER = "clinc150_transformer"  # of which few losses are tuned
TITLES = {
    "clinc150": "CLINC150",
    TRANSFORMER: "CLINC150, transformer",
    "omniglot": "Omniglot small",
    "grocery": "Grocery 64",
    "grocery_lite0": "Grocery 160, features",
}
# A loss that is a sum, and the part of it that it is compared with.
SUMS = (
    ("PNP-Ds + MultiSimilarity", "MultiSimilarity"),
    ("PNP-Ds + ProxyAnchor", "ProxyAnchor"),
    ("PNP-Ds + Contrastive", "Contrastive"),
    ("SupAP + Contrastive", "Contrastive"),
)
AUTO_SHARES = ("0.125", "0.25", "0.375", "0.5", "1.0")
BATCH_CONTRASTS = (
    ("28 x 4", "7 x 4"),
    ("56 x 4", "28 x 4"),
    ("100 x 4", "28 x 4"),
    ("14 x 16", "14 x 4"),
    ("28 x 14", "28 x 4"),
    ("75 x 27", "75 x 4"),
)
ALPHA_4 = {"variant": "Dq", "alpha": 4}  # as the authors' README has it
STEPS = ("first", "last")  # of a run, at which the signal is measured
# A setting is text, also where all of them are numbers or there is none.
TEXT = {"dtype": {"setting": str}, "keep_default_na": False}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    publish(PAGES, parts(), SCRIPT, args.check)
    if not args.check:
        picture()
        advice.plot(advice.read(), TEMPERATURES)


def read_all(folder: Path = RESULTS) -> pd.DataFrame:
    """The rows of all data sets, in the order of the page; of runs with the same key the last."""
    order = {name: i for i, name in enumerate(TITLES)}
    paths = [path for path in folder.glob("*.csv") if path.name != SIGNAL]
    paths.sort(key=lambda path: (order.get(path.stem, len(order)), path.stem))
    return read(paths, **TEXT).drop_duplicates(["dataset", *KEY], keep="last")


def parts(folder: Path = RESULTS) -> dict[str, str]:
    """Every generated part of the pages, by the name in its markers."""
    rows, grid = read_all(folder), advice.read()
    made = {
        f"{name} {part}": make(own)
        for name, own in rows.groupby("dataset")
        for part, make in PARTS.items()
    }
    for kind, of_kind in (("grid", advice.FOLDER), ("longer", folder / "longer")):
        if any(of_kind.glob("*.csv")):
            for name, own in advice.read(of_kind).groupby("dataset"):
                made[f"{name} {kind}"] = advice.settings_table(own)
    if any((folder / WIDER).glob("*.csv")):
        for name, own in read_all(folder / WIDER).groupby("dataset"):
            made |= {f"{name} {WIDER} {stage}": final(stage, own) for stage in (TUNED, LONGER)}
    leading, complete = advice.everywhere(grid), advice.complete(grid)
    return made | {
        **{f"all {stage}": summary(rows, stage) for stage in (UNTUNED, TUNED, SPLITS)},
        "sums": sums(rows),
        "anneal of the batch": anneal_of_the_batch(rows),
        "positives before": positives_before(rows),
        "signal": signal(read(folder.glob(SIGNAL), **TEXT)),
        "gradients": gradients(),
        "left out": advice.left_out_table(leading, by_length=False),
        "left out by length": advice.left_out_table(leading),
        "left out without one": advice.without_one_table(leading),
        "left out of all losses": advice.left_out_table(complete),
        "trained along": advice.trained_table(grid),
        "by validation": advice.by_validation_table(leading),
        "equal temperatures": advice.equal_temperatures_table(leading),
    }


# --- a number and how sure it is ----------------------------------------------------------------


def half_width(values: pd.Series) -> float:
    """Half of the 95 % interval of a mean, by Student's t; NaN for one value."""
    return stats.t.ppf(0.975, len(values) - 1) * values.sem()


def cell(values: pd.Series) -> str:
    """Mean and half of its interval, in percent."""
    values = values.dropna()
    return f"{100 * values.mean():.2f}" + f" ± {100 * half_width(values):.2f}" * (len(values) > 1)


def minus(values: pd.DataFrame, one: str, other: str) -> tuple[str, str]:
    """Mean difference of two columns in percent with half of its 95 % interval, and p.

    Over the seeds that both have; empty if these are less than two.
    """
    if one == other or not {one, other} <= {*values}:
        return "", ""
    difference = 100 * (values[one] - values[other]).dropna()
    if len(difference) < 2:
        return "", ""
    mean, half = difference.mean(), half_width(difference)
    if np.ptp(difference) == 0:  # where a t test has no p
        p = float(mean == 0)
    else:
        p = stats.ttest_1samp(difference, 0).pvalue
    return f"{mean:+.2f} ± {half:.2f}", f"{p:.3f}" if p >= 0.001 else "< 0.001"


# --- the tables ---------------------------------------------------------------------------------


def by_seed(rows: pd.DataFrame, column: str = "loss", metric: str = "map_at_r") -> pd.DataFrame:
    """A metric, with a line for each seed and a column for each loss, or what `column` has."""
    table = rows.pivot(index="seed", columns=column, values=metric)
    return table.reindex(columns=rows[column].unique())


def contrasts(rows: pd.DataFrame, index: str, column: str, pairs: dict) -> pd.DataFrame:
    """Differences of MAP@R, paired by seed, and their p.

    Args:
        rows: of runs.
        index: the column of them that has a line for each of its values.
        column: of what is compared.
        pairs: {head of the table: the two values of `column` to compare}.
    """
    lines = {
        line: [x for pair in pairs.values() for x in minus(by_seed(own, column), *pair)]
        for line, own in rows.groupby(index)
    }
    heads = [x for head in pairs for x in (head, "p")]
    return pd.DataFrame.from_dict(lines, "index", columns=heads)


def compared(rows: pd.DataFrame, base: str | None) -> pd.DataFrame:
    """A line for each loss, best first: metrics, and MAP@R minus that of `base`."""
    values = by_seed(rows)
    table = pd.DataFrame({x: by_seed(rows, metric=m).agg(cell) for m, x in METRICS.items()})
    if base in values:
        heads = [f"MAP@R minus that of {base}", "p"]
        table[heads] = [minus(values, loss, base) for loss in values]
    return table.loc[values.mean().sort_values(ascending=False, kind="stable").index]


def final(stage: str, rows: pd.DataFrame) -> str:
    """The table of the runs at the defaults, or of the tuned ones."""
    of_stage, untrained = rows[rows.stage == stage], rows[rows.stage == "untrained"]
    if of_stage.empty:
        return NO_RUNS
    peers = by_seed(of_stage).mean().filter(regex=f"^(?!{OURS})")
    table = compared(of_stage, None if peers.empty else peers.idxmax())
    of_loss = of_stage.groupby("loss")
    table.insert(len(METRICS), "seeds", of_loss.size())
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
    """Steps, machines, versions and commands of the runs of a final table."""
    last = rows.iloc[-1]
    flags = f" --stages {SPLITS}" if last.stage == SPLITS else ""
    return f"{last.steps} steps of {last.batch_size}, on {_where(rows, flags)}"


def conditions_of_probe(rows: pd.DataFrame) -> str:
    """The same of a probe, with the number of its seeds."""
    seeds, last = rows.groupby(["loss", "setting"]).size(), rows.iloc[-1]
    number = " to ".join(str(x) for x in sorted({seeds.min(), seeds.max()}))
    number += " seed" if seeds.max() == 1 else " seeds"
    return (
        f"MAP@R in percent on {last.measured_on}, {number}, {last.steps} steps, "
        f"on {_where(rows, f' --stages {last.stage} --probe-seeds {seeds.max()}')}"
    )


def _where(rows: pd.DataFrame, flags: str) -> str:
    """Where rows are from, by commands without how much of the study they were told to run."""
    script = rows.command.str.partition(" --")[0]
    kept = rows.command.str.findall(r" --(?:dataset|device) \S+").str.join("")
    return where(rows.assign(command=script + kept + flags), "machine")


def behind(rows: pd.DataFrame, stage: str) -> pd.DataFrame:
    """Mean MAP@R minus that of the best peer, in percent, by loss and data set, best first.

    Of the losses that have run with all seeds on all data sets.
    """
    rows = rows[rows.stage == stage]
    found = rows.groupby(["dataset", "loss"]).map_at_r.agg(["mean", "size"])
    most = found["size"].groupby("dataset").transform("max")
    means = 100 * found["mean"][found["size"] == most].unstack("dataset")
    best = means.filter(regex=f"^(?!{OURS})", axis="index").max()
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
    lines = {}
    for stage, (both, alone) in itertools.product((UNTUNED, TUNED), SUMS):
        for name, own in rows[rows.stage == stage].groupby("dataset", sort=False):
            difference, p = minus(by_seed(own), both, alone)
            if p:
                said = f"{difference} (p {p})" if p.startswith("<") else f"{difference} (p = {p})"
                lines.setdefault((both, alone, stage), {})[TITLES.get(name, name)] = said
    if not lines:
        return NO_RUNS
    table = pd.DataFrame.from_dict(lines, "index").rename_axis(["losses", "minus", ""])
    names = [TITLES.get(x, x) for x in rows.dataset.unique()]
    return markdown(table[[x for x in names if x in table]])


def trials(rows: pd.DataFrame) -> str:
    """How many trials each loss has had, and the best of them on the validation classes."""
    of_stage = rows[rows.stage == "tune"]
    if of_stage.empty:
        return NO_RUNS
    of_loss = of_stage.sort_values("setting", key=pd.to_numeric, kind="stable").groupby("loss")
    table = pd.DataFrame(
        {
            "trials": of_loss.size(),
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
    settings = [*rows.setting.unique()]
    pairs = {f"{x} minus {y}": (x, y) for x, y in BATCH_CONTRASTS if {x, y} <= {*settings}}
    table = rows.pivot_table("map_at_r", "loss", "setting", aggfunc=cell, sort=False)[settings]
    return table.join(contrasts(rows, "loss", "setting", pairs))


def settings(rows: pd.DataFrame) -> pd.DataFrame:
    """Single settings, a line for each as they come, against PNP-Ds as the others have it."""
    named = _with_setting(rows)
    return compared(named, "PNP-Ds, include_self True").loc[named.loss.unique()]


def coarse(rows: pd.DataFrame) -> pd.DataFrame:
    """Training with coarse labels, against the loss that blurs the fine ones by the paper."""
    return compared(_with_setting(rows), "PNP-Iu, anneal 0.05")


def _with_setting(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with the setting in the name of the loss."""
    return rows.assign(loss=(rows.loss + ", " + rows.setting).str.removesuffix(", "))


def anneal_of_the_batch(rows: pd.DataFrame) -> str:
    """A temperature taken from the batch minus the best fixed one, over all data sets."""
    lines = []
    of_stage = rows[rows.stage == "temperature"].groupby("dataset", sort=False)
    for (name, own), loss in itertools.product(of_stage, ("PNP-Ds", "PNP-Dq")):
        fixed = by_seed(own[(own.loss == loss) & ~own.setting.str.contains(",")], "setting")
        auto = by_seed(own[own.loss.str.startswith(f"{loss} auto")], "setting")
        if not fixed.empty and not auto.empty:
            best = fixed.mean().idxmax()
            values = auto.assign(best=fixed[best])
            differences = [x for share in AUTO_SHARES for x in minus(values, share, "best")]
            lines.append([name, loss, best, cell(fixed[best]), *differences])
    heads = ["data set", "loss", "best fixed temperature", "MAP@R"]
    heads += [x for share in AUTO_SHARES for x in (f"{share} σ minus it", "p")]
    return markdown(pd.DataFrame(lines, columns=heads).set_index("data set"))


def positives_before(rows: pd.DataFrame) -> str:
    """PNP minus SmoothAP, which counts the positives before a positive as well, at one temperature.

    Both at their defaults, which have the same temperature, trained on all training classes.
    """
    own = rows[rows.stage == UNTUNED]
    table = own[own.loss == "SmoothAP"].groupby("dataset", sort=False).map_at_r.agg(SmoothAP=cell)
    pairs = {f"{loss} minus it": (loss, "SmoothAP") for loss in ("PNP-O", "PNP-Ds", "PNP-Dq")}
    return markdown(table.join(contrasts(own, "dataset", "loss", pairs)), "data set")


def gradients() -> str:
    """The gradient that a positive gets with 2 R negatives at its similarity, as the loss gives it.

    Each of them counts 1/2. In units of the gradient of variant O.
    """
    table = pd.DataFrame()
    of_paper = {name: {"variant": name} for name, row in VARIANTS.items() if row.equation}
    settings = {**of_paper, "Dq, alpha 4": ALPHA_4}
    for r, (name, setting) in itertools.product((1, 2, 4, 10, 30, 100), settings.items()):
        similarity = torch.zeros(1, 1 + 2 * r, dtype=torch.float64, requires_grad=True)
        is_positive = torch.arange(1 + 2 * r)[None] == 0
        masks = {"positive_mask": is_positive, "negative_mask": ~is_positive}
        loss, _ = pnp_loss(similarity, **masks, include_self=False, **setting)
        table.loc[name, f"R = {r}"] = torch.autograd.grad(loss, similarity)[0][0, 0].item()
    return markdown((table / table.loc["O"]).map("{:.3g}".format), "variant")


def signal(rows: pd.DataFrame) -> str:
    """Saturated sigmoids and gradient over the temperature, at the first and the last step."""
    if rows.empty:
        return NO_RUNS
    forms = {"saturated": "{:.0%}", "gradient_norm": "{:.2g}", "std_of_negatives": "{:.2g}"}
    auto = rows.loss.str.contains(" auto").map({True: " σ", False: ""})
    rows = rows.assign(loss=rows.loss.str.partition(" auto")[0], setting=rows.setting + auto)
    runs = rows.groupby(["dataset", "loss", "setting", "step"], sort=False)[[*forms]]
    means = runs.mean().apply(lambda column: column.map(forms[column.name].format))
    table = pd.DataFrame(
        {(name, step): means[name].xs(step, level="step") for name in forms for step in STEPS}
    )
    table.columns = ["saturated, first", "last", "gradient, first", "last", "σ, first", "last"]
    return markdown(table.rename_axis(["data set", "loss", "temperature"]))


PROBES = {"temperature": temperature, "batch": batch, "settings": settings, "coarse": coarse}
PARTS: dict[str, Callable[[pd.DataFrame], str]] = {
    **{stage: partial(final, stage) for stage in (UNTUNED, TUNED, SPLITS)},
    "trials": trials,
    **{stage: partial(of_probe, stage, make) for stage, make in PROBES.items()},
}


# --- the picture --------------------------------------------------------------------------------


def picture(folder: Path = RESULTS, path: Path = PICTURE) -> None:
    """Draw what each loss that ran everywhere reaches on each data set, untuned and tuned."""
    rows = read_all(folder)
    rows = rows[(rows.dataset != TRANSFORMER) & rows.stage.isin((UNTUNED, TUNED))]
    order = [*behind(rows, UNTUNED).index]
    if not order:
        return
    plt = pyplot()
    names = rows.dataset.unique()
    size = 3.2 * len(names) + 1.5, 0.23 * len(order) + 1
    figure, axes = plt.subplots(1, len(names), figsize=size, sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for stage, filled in ((UNTUNED, False), (TUNED, True)):
            values = 100 * by_seed(rows[(rows.dataset == name) & (rows.stage == stage)])
            for place, loss in enumerate(order):
                if loss in values:
                    color = "#c1272d" if loss.startswith(OURS) else "#33588f"
                    axis.errorbar(
                        values[loss].mean(),
                        place,
                        xerr=np.nan_to_num(half_width(values[loss].dropna())),
                        fmt="o",
                        markersize=4,
                        color=color,
                        markerfacecolor=color if filled else "white",
                        linewidth=1,
                    )
            style = "full" if filled else "none"  # in the legend alone
            axis.plot([], [], "o", color="black", fillstyle=style, label=stage)
        axis.set(title=TITLES.get(name, name), xlabel="MAP@R, %")
        axis.grid(alpha=0.3)
    first = axes[0, 0]
    first.set_yticks(range(len(order)), order)
    first.set_ylim(len(order) - 0.5, -0.5)
    first.legend(loc="upper left")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
