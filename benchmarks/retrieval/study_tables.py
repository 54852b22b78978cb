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
import csv
import io
import json
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import advice
import numpy as np
import torch
from pytorch_metric_learning.distances import DotProductSimilarity
from scipy import stats
from study_plot import TITLES, plot

from pml_pnp import losses

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "retrieval_study"
DOCS = ROOT / "docs"
PAGES = [DOCS / "retrieval.md", *sorted((DOCS / "retrieval").glob("*.md"))]
SIGNAL = "signal"  # the rows of another kind
PICTURE = RESULTS / "losses.svg"
TEMPERATURES = RESULTS / "temperatures.svg"
END = "<!-- end -->"
METRICS = {"map_at_r": "MAP@R", "precision_at_1": "precision@1", "r_precision": "R-precision"}
OURS = "PNP"  # the names of this package's losses start so
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
Row = dict[str, str]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    made = parts()
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        new = page(text, made)
        if not args.check:
            path.write_text(new, encoding="utf-8")
        elif new != text:
            sys.exit(f"{path.relative_to(ROOT)} is not what the rows say")
    if not args.check:
        picture()
        advice.plot(advice.read(), TEMPERATURES)


def parts(folder: Path = RESULTS) -> dict[str, str]:
    """Every generated part of the pages, by the name in its markers."""
    files = _read_all(folder)
    signals = folder / f"{SIGNAL}.csv"
    made = {"signal": signal(read(signals) if signals.exists() else [])}
    for name, rows in files.items():
        made |= {f"{name} {part}": make(rows) for part, make in PARTS.items()}
    made |= {f"all {stage}": summary(files, stage) for stage in (UNTUNED, TUNED, SPLITS)}
    return made | {
        "sums": sums(files),
        "anneal of the batch": anneal_of_the_batch(files),
        "positives before": positives_before(files),
        "gradients": gradients(),
        **of_grid(),
    }


def of_grid() -> dict[str, str]:
    """The parts that are made of the rows of the grid."""
    grid = advice.read()
    tables = {f"{x} grid": advice.settings_table(grid, x) for x in grid.dataset.unique()}
    tables["by validation"] = advice.by_validation_table(grid)
    tables["equal temperatures"] = advice.equal_temperatures_table(advice.complete(grid))
    longer = advice.read(RESULTS / "longer")
    tables |= {f"{x} longer": advice.settings_table(longer, x) for x in longer.dataset.unique()}
    return {"left out": advice.left_out_table(grid), **tables}


def page(text: str, made: dict[str, str]) -> str:
    """The text with every part made anew that it has markers for."""
    for name, part in made.items():
        text = _with(text, name, part)
    return text


def picture(folder: Path = RESULTS, path: Path = PICTURE) -> None:
    """Draw the means of the untuned and of the tuned runs, of the losses that ran everywhere."""
    files = _read_all(folder)
    files.pop(TRANSFORMER, None)
    order = [*_behind(files, UNTUNED)]
    if not order:
        return
    values = {
        name: {
            stage: {
                loss: (100 * np.mean([*x.values()]), 100 * (half_width([*x.values()]) or 0))
                for loss, x in by_loss(_of_stage(rows, stage), "map_at_r").items()
                if loss in order
            }
            for stage in (UNTUNED, TUNED)
        }
        for name, rows in files.items()
    }
    plot(values, order, OURS, path)


def _read_all(folder: Path) -> dict[str, list[Row]]:
    """The rows of all data sets, in the order of the page."""
    names = {path.stem for path in folder.glob("*.csv")} - {SIGNAL}
    order = [*(n for n in TITLES if n in names), *sorted(names - TITLES.keys())]
    return {name: read(folder / f"{name}.csv") for name in order}


def _with(text: str, name: str, made: str) -> str:
    begin = f"<!-- {name}, of study_tables.py -->"
    before, found, rest = text.partition(begin)
    if not found:
        return text
    _, _, after = rest.partition(END)
    return f"{before}{begin}\n{made}\n{END}{after}"


def read(path: Path) -> list[Row]:
    """All whole lines of a file."""
    text = path.read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))


# --- a number and how sure it is ----------------------------------------------------------------


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of a mean, by Student's t; None for one value."""
    if len(values) < 2:
        return None
    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def paired(ours: dict[str, float], theirs: dict[str, float]) -> tuple[float, float, float] | None:
    """Mean difference over the common seeds, half of its 95 % interval, and p; None below two."""
    common = sorted(ours.keys() & theirs.keys())
    if len(common) < 2:
        return None
    difference = [ours[s] - theirs[s] for s in common]
    if np.ptp(difference) == 0:
        return difference[0], 0.0, 1.0 if difference[0] == 0 else 0.0
    p = stats.ttest_rel([ours[s] for s in common], [theirs[s] for s in common]).pvalue
    return float(np.mean(difference)), half_width(difference), float(p)


def _cell(values: Iterable[float]) -> str:
    values = list(values)
    half = half_width(values)
    return f"{100 * np.mean(values):.2f}" + ("" if half is None else f" ± {100 * half:.2f}")


# --- the tables ---------------------------------------------------------------------------------


def by_loss(rows: Iterable[Row], metric: str) -> dict[str, dict[str, float]]:
    """{loss: {seed: value}}."""
    values: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        values[row["loss"]][row["seed"]] = float(row[metric])
    return values


def final(stage: str) -> Callable[[list[Row]], str]:
    """Makes the table of the runs at the defaults, or of the tuned ones."""

    def make(rows: list[Row]) -> str:
        of_stage = _of_stage(rows, stage)
        if not of_stage:
            return "No runs yet."
        values = {m: by_loss(of_stage, m) for m in METRICS}
        main = values["map_at_r"]
        order = sorted(main, key=lambda x: -np.mean([*main[x].values()]))
        best = next((x for x in order if not x.startswith(OURS)), None)
        lines = [
            f"{conditions(of_stage)}{_untrained(rows) if stage != SPLITS else ''}:",
            "",
            "| loss | "
            + " | ".join(METRICS.values())
            + f" | seeds | MAP@R minus that of {best} | p |"
            + (" setting |" if stage == TUNED else ""),
            "|---" * (len(METRICS) + 4 + (stage == TUNED)) + "|",
        ]
        parameters = {r["loss"]: r["parameters"] for r in of_stage}
        for loss in order:
            name = f"**{loss}**" if loss.startswith(OURS) else loss
            cells = [name, *(_cell(values[m][loss].values()) for m in METRICS)]
            cells += [str(len(main[loss])), *_against(main[loss], main.get(best, {}), loss == best)]
            if stage == TUNED:
                cells.append(_setting(parameters[loss]))
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    return make


def _untrained(rows: list[Row]) -> str:
    found = [r for r in rows if r["stage"] == "untrained"]
    if not found:
        return ""
    values = ", ".join(f"{name} {_cell([float(found[0][m])])}" for m, name in METRICS.items())
    return f"; without training {values}"


def _against(ours: dict[str, float], best: dict[str, float], is_best: bool) -> tuple[str, str]:
    test = None if is_best else paired(ours, best)
    if test is None:
        return "", ""
    difference, half, p = test
    return f"{100 * difference:+.2f} ± {100 * half:.2f}", f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _setting(parameters: str) -> str:
    return ", ".join(
        f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
        for k, v in json.loads(parameters).items()
    )


def conditions(rows: list[Row]) -> str:
    """Versions, machines and commands of some rows."""
    last = rows[-1]
    stages = f" --stages {SPLITS}" if last["stage"] == SPLITS else ""
    return f"{last['steps']} steps of {last['batch_size']}, {_where(rows, stages)}"


def _where(rows: list[Row], flags: str) -> str:
    """Machines, versions, dates and commands, with more flags."""
    dates = sorted({r["date"] for r in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    machines = dict.fromkeys(f"{r['machine']}, torch {r['torch']}" for r in rows)
    commands = dict.fromkeys(f"`{_command(r)}{flags}`" for r in rows)
    return (
        f"on {', and on '.join(machines)}, PML {rows[-1]['pytorch-metric-learning']}, {when}, "
        f"{', '.join(commands)}"
    )


def _of_stage(rows: Iterable[Row], stage: str) -> list[Row]:
    return [r for r in rows if r["stage"] == stage]


def _behind(files: dict[str, list[Row]], stage: str) -> dict[str, dict[str, float]]:
    """{loss: {data set: mean MAP@R minus that of the best peer}}, in percent, the best loss first.

    Of the losses that have run with all seeds on all data sets.
    """
    behind: dict[str, dict[str, float]] = defaultdict(dict)
    for name, rows in files.items():
        values = by_loss(_of_stage(rows, stage), "map_at_r")
        most = max(map(len, values.values()), default=0)
        means = {
            loss: 100 * float(np.mean([*x.values()]))
            for loss, x in values.items()
            if len(x) == most
        }
        best = max((m for loss, m in means.items() if not loss.startswith(OURS)), default=None)
        for loss, mean in means.items():
            if best is not None:
                behind[loss][name] = mean - best
    whole = {loss: x for loss, x in behind.items() if len(x) == len(files)}
    return dict(sorted(whole.items(), key=lambda x: -np.mean([*x[1].values()])))


def summary(files: dict[str, list[Row]], stage: str) -> str:
    """How far each loss is from the best peer of each data set."""
    files = {n: x for n, x in files.items() if stage == UNTUNED or n != TRANSFORMER}
    behind = _behind(files, stage)
    if not behind:
        return "No runs yet."
    lines = [
        "| loss | " + " | ".join(TITLES.get(n, n) for n in files) + " | mean | least |",
        "|---" * (len(files) + 3) + "|",
    ]
    for loss, of_sets in behind.items():
        values = [of_sets[n] for n in files]
        name = f"**{loss}**" if loss.startswith(OURS) else loss
        cells = [f"{v:+.2f}" for v in (*values, np.mean(values), min(values))]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def sums(files: dict[str, list[Row]]) -> str:
    """What a ranking loss beside another changes, paired by seed, over all data sets."""
    lines = [
        "| losses | minus | | " + " | ".join(TITLES.get(n, n) for n in files) + " |",
        "|---" * (len(files) + 3) + "|",
    ]
    for stage in (UNTUNED, TUNED):
        for both, alone in SUMS:
            cells = [both, alone, stage]
            for rows in files.values():
                values = by_loss(_of_stage(rows, stage), "map_at_r")
                difference, p = _against(values[both], values[alone], False)
                cells.append(f"{difference} (p {p if p[:1] == '<' else f'= {p}'})" if p else "")
            if any(cells[3:]):
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) if lines[2:] else "No runs yet."


def trials(rows: list[Row]) -> str:
    """How many trials each loss has had, and the best of them on the validation classes."""
    of_stage = _of_stage(rows, "tune")
    if not of_stage:
        return "No trials yet."
    found: dict[str, list[float]] = defaultdict(list)
    for row in sorted(of_stage, key=lambda r: int(r["setting"])):
        found[row["loss"]].append(float(row["map_at_r"]))
    lines = [
        "| loss | trials | MAP@R of the default | of the best trial |",
        "|---|---|---|---|",
    ]
    for loss, values in sorted(found.items(), key=lambda x: -max(x[1])):
        name = f"**{loss}**" if loss.startswith(OURS) else loss
        lines.append(
            f"| {name} | {len(values)} | {100 * values[0]:.2f} | {100 * max(values):.2f} |"
        )
    return "\n".join(lines)


def temperature(rows: list[Row]) -> str:
    """The table of temperatures: a line for each loss, a column for each temperature."""
    of_stage = _of_stage(rows, "temperature")
    if not of_stage:
        return "No runs yet."
    cells: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in of_stage:
        prefix, _, setting = row["setting"].rpartition(", ")
        loss, auto, _ = row["loss"].partition(" auto")
        name = f"{loss} {prefix}".strip() + (", of the batch" if auto else "")
        column = f"{setting} σ" if auto else setting
        cells[name][column].append(float(row["map_at_r"]))
    columns = list(dict.fromkeys(c for x in cells.values() for c in x))
    columns.sort(key=lambda c: ("σ" in c, float(c.split()[0])))
    lines = [
        [name, *(_cell(values[c]) if c in values else "" for c in columns)]
        for name, values in cells.items()
    ]
    return _table_of_probe(of_stage, ["loss", *columns], lines)


def batch(rows: list[Row]) -> str:
    """The table of batches, and what more classes or more examples of each are worth, paired."""
    of_stage = _of_stage(rows, "batch")
    if not of_stage:
        return "No runs yet."
    found: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in of_stage:
        found[row["loss"]][row["setting"]][row["seed"]] = float(row["map_at_r"])
    columns = list(dict.fromkeys(c for x in found.values() for c in x))
    contrasts = [(x, y) for x, y in BATCH_CONTRASTS if {x, y} <= set(columns)]
    heads = ["loss", *columns]
    for x, y in contrasts:
        heads += [f"{x} minus {y}", "p"]
    lines = []
    for loss, values in found.items():
        cells = [_cell(values[c].values()) if c in values else "" for c in columns]
        for x, y in contrasts:
            cells += _against(values[x], values[y], False)
        lines.append([loss, *cells])
    return _table_of_probe(of_stage, heads, lines)


def coarse(rows: list[Row]) -> str:
    """The table of training with coarse labels, a line for each loss."""
    of_stage = _of_stage(rows, "coarse")
    if not of_stage:
        return "No runs yet."
    values = {metric: defaultdict(dict) for metric in METRICS}
    for row in of_stage:
        name = row["loss"] + (f", {row['setting']}" if row["setting"] else "")
        for metric in METRICS:
            values[metric][name][row["seed"]] = float(row[metric])
    main = values["map_at_r"]
    base = next((x for x in main if x.startswith(BLURRING)), "")
    lines = []
    for name in sorted(main, key=lambda x: -np.mean([*main[x].values()])):
        cells = [_cell(values[m][name].values()) for m in METRICS]
        cells += _against(main[name], main.get(base, {}), name == base)
        lines.append([name, *cells])
    heads = ["loss", *METRICS.values(), f"MAP@R minus that of {base}", "p"]
    return _table_of_probe(of_stage, heads, lines)


def settings(rows: list[Row]) -> str:
    """The table of single settings, a line for each, against PNP-Ds as the others have it."""
    of_stage = _of_stage(rows, "settings")
    if not of_stage:
        return "No runs yet."
    found: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for row in of_stage:
        found[row["loss"], row["setting"]][row["seed"]] = float(row["map_at_r"])
    base = found.get(("PNP-Ds", "include_self True"), {})
    lines = [
        [loss, setting, _cell(values.values()), *_against(values, base, values is base)]
        for (loss, setting), values in found.items()
    ]
    heads = ["loss", "setting", "MAP@R", "minus that of PNP-Ds, include_self True", "p"]
    return _table_of_probe(of_stage, heads, lines)


def anneal_of_the_batch(files: dict[str, list[Row]]) -> str:
    """A temperature taken from the batch minus the best fixed one, over all data sets."""
    lines = [
        "| data set | loss | best fixed temperature | MAP@R | "
        + " | ".join(f"{share} σ minus it | p" for share in AUTO_SHARES)
        + " |",
        "|---" * (4 + 2 * len(AUTO_SHARES)) + "|",
    ]
    for name, rows in files.items():
        of_stage = _of_stage(rows, "temperature")
        for loss in ("PNP-Ds", "PNP-Dq"):
            fixed: dict[str, dict[str, float]] = defaultdict(dict)
            auto: dict[str, dict[str, float]] = defaultdict(dict)
            for row in of_stage:
                value = float(row["map_at_r"])
                if row["loss"] == loss and "," not in row["setting"]:
                    fixed[row["setting"]][row["seed"]] = value
                elif row["loss"].startswith(f"{loss} auto"):
                    auto[row["setting"]][row["seed"]] = value
            if not fixed or not auto:
                continue
            best = max(fixed, key=lambda x: np.mean([*fixed[x].values()]))
            cells = [name, loss, best, _cell(fixed[best].values())]
            for share in AUTO_SHARES:
                cells += _against(auto[str(share)], fixed[best], False)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def positives_before(files: dict[str, list[Row]]) -> str:
    """PNP minus SmoothAP, which counts the positives before a positive as well, at one temperature.

    Both at their defaults, which have the same temperature, trained on all training classes.
    """
    lines = [
        "| data set | SmoothAP | "
        + " | ".join(f"{loss} minus it | p" for loss in ("PNP-O", "PNP-Ds", "PNP-Dq"))
        + " |",
        "|---" * 8 + "|",
    ]
    for name, rows in files.items():
        values = by_loss(_of_stage(rows, UNTUNED), "map_at_r")
        if "SmoothAP" not in values:
            continue
        cells = [name, _cell(values["SmoothAP"].values())]
        for loss in ("PNP-O", "PNP-Ds", "PNP-Dq"):
            cells += _against(values[loss], values["SmoothAP"], False)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gradients() -> str:
    """The gradient that a positive gets with 2 R negatives at its similarity, as PNPLoss gives it.

    Each of them counts 1/2. In units of the gradient of variant O.
    """
    numbers = (2, 4, 8, 20, 60, 200)  # of negatives
    lines = [
        "| variant | " + " | ".join(f"R = {number // 2}" for number in numbers) + " |",
        "|---" * (len(numbers) + 1) + "|",
    ]
    of_o = [_gradient_of_positive({"variant": "O"}, number) for number in numbers]
    for params in GRADIENTS_OF:
        values = (
            _gradient_of_positive(params, number) / o
            for number, o in zip(numbers, of_o, strict=True)
        )
        name = ", ".join(str(v) if k == "variant" else f"{k} {v}" for k, v in params.items())
        lines.append(f"| {name} | " + " | ".join(f"{v:.3g}" for v in values) + " |")
    return "\n".join(lines)


def _gradient_of_positive(params: Row, negatives: int) -> float:
    loss_func = losses.PNPLoss(
        **params, include_self=False, distance=DotProductSimilarity(normalize_embeddings=False)
    )
    query = torch.ones(1, 1, dtype=torch.float64)
    references = torch.full((1 + negatives, 1), 0.5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0] + [1] * negatives)
    loss = loss_func(query, labels[:1], ref_emb=references, ref_labels=labels)
    return -torch.autograd.grad(loss, references)[0][0].item()


def _table_of_probe(rows: list[Row], heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table under the conditions of the rows that it is made of."""
    return "\n".join(
        [
            f"{conditions_of_probe(rows)}:",
            "",
            "| " + " | ".join(heads) + " |",
            "|---" * len(heads) + "|",
            *("| " + " | ".join(cells) + " |" for cells in lines),
        ]
    )


def conditions_of_probe(rows: list[Row]) -> str:
    """The same of a probe, with the number of its seeds."""
    seeds = Counter((r["loss"], r["setting"]) for r in rows).values()
    number = f"{min(seeds)} to {max(seeds)}" if min(seeds) < max(seeds) else f"{max(seeds)}"
    last = rows[-1]
    flags = f" --stages {last['stage']} --probe-seeds {max(seeds)}"
    return (
        f"MAP@R in percent on {last['measured_on']}, {number} seeds, {last['steps']} steps, "
        f"{_where(rows, flags)}"
    )


def _command(row: Row) -> str:
    """The command of a row, without how much of the study it was told to run."""
    kept, keep = [], True
    for word in shlex.split(row["command"]):
        if word.startswith("--"):
            keep = word in ("--dataset", "--device")
        if keep:
            kept.append(word)
    return shlex.join(kept)


def signal(rows: list[Row]) -> str:
    """Saturated sigmoids and gradient over the temperature, at the first and the last step."""
    names = ("saturated", "gradient_norm", "std_of_negatives")
    cells: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for row in rows:
        for name in names:
            key = (row["dataset"], row["loss"], row["setting"], row["step"], name)
            cells[key].append(float(row[name]))
    lines = [
        "| data set | loss | temperature | saturated, first | last | gradient, first | last "
        "| σ, first | last |",
        "|---" * 9 + "|",
    ]
    for dataset, loss, setting in dict.fromkeys(key[:3] for key in cells):
        values = [
            float(np.mean(cells[dataset, loss, setting, step, name]))
            for name in names
            for step in ("first", "last")
        ]
        share = " σ" if " auto" in loss else ""
        lines.append(
            f"| {dataset} | {loss.partition(' auto')[0]} | {setting}{share} | "
            f"{values[0]:.0%} | {values[1]:.0%} | "
            + " | ".join(f"{v:.2g}" for v in values[2:])
            + " |"
        )
    return "\n".join(lines)


PARTS: dict[str, Callable[[list[Row]], str]] = {
    UNTUNED: final(UNTUNED),
    TUNED: final(TUNED),
    SPLITS: final(SPLITS),
    "trials": trials,
    "temperature": temperature,
    "batch": batch,
    "settings": settings,
    "coarse": coarse,
}


if __name__ == "__main__":
    main()
