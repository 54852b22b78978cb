"""Make the figures of README.md and docs/, and the plots, of the committed rows.

    python benchmarks/report.py                  # all of benchmarks/results, into the pages
    python benchmarks/report.py --check          # only whether the pages say what the rows say

Time and memory are of the rows that benchmarks/measure.py wrote, in benchmarks/results; retrieval
is of those of examples/powerful_benchmarker/benchmark.py, in benchmarks/results/retrieval; large
batches are of those of benchmarks/grad_cache.py, in benchmarks/results/grad_cache; many processes
are of those of benchmarks/ranks.py, in benchmarks/results/ranks, and of what it calculates.
docs/performance.md is made as a whole, other pages between a marker and the next `pages.END`.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from pages import fill, markdown, pyplot, read, write

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "powerful_benchmarker"))
import results_table  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PERFORMANCE = ROOT / "docs" / "performance.md"
OURS, LEAN, FLOOR, BUILT_IN = "PNPLoss", "PNPLoss, lean", "floor", "PNPLoss of PML"
EAGER, TRITON = "ops/eager.py", "ops/triton.py"
COMPILED = "the same sums by torch.compile"
PRODUCT, AT_ONCE = "PNPLoss, in squares", "PNPLoss, not in squares"
TWO_PRODUCTS = "PNPLoss, two products"
RATIOS, SINGLE = "sigmoids as ratios", "sigmoids one by one"
TRUNK = "ResNet-50 and PNPLoss"
FASTEST = "fastest other loss of PML"
RESEARCH = ("SmoothAP", "SupAP", "RecallAtK")  # of benchmarks/peers.py
NAMES = {
    OURS: "**PNPLoss**",
    LEAN: "**PNPLoss**, `chunk_size=2048`",
    BUILT_IN: "PML's PNPLoss",
    FLOOR: "normalize and multiply alone",
    **{name: f"{name} (`benchmarks/peers.py`)" for name in RESEARCH},
}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    rows = read(sorted(RESULTS.glob("*.csv")))
    made = {
        "rows": summary(rows),
        "retrieval": _of_files("retrieval", retrieval),
        "grad_cache": _of_files("grad_cache", grad_cache),
        "ranks": _of_files("ranks", ranks),
        "calculated": many_ranks(),
        "recipe": recipe(),
    }
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    for name in made:
        if not any(f"<!-- {name}, of benchmarks/report.py -->" in x for x in texts.values()):
            sys.exit(f"no page holds <!-- {name}, of benchmarks/report.py -->")
    texts = {page: fill(text, made, "benchmarks/report.py") for page, text in texts.items()}
    write({**texts, PERFORMANCE: performance(rows)}, args.check)
    if not args.check:
        for device, of_device in rows.groupby("device"):
            plot(of_device, RESULTS / f"{device}.svg")


def _of_files(folder: str, make: Callable[[pd.DataFrame], str]) -> str:
    """What is made of each file of a folder of benchmarks/results."""
    return "\n\n".join(make(read([path])) for path in sorted((RESULTS / folder).glob("*.csv")))


def retrieval(rows: pd.DataFrame) -> str:
    """What losses reach in powerful-benchmarker."""
    first = rows.iloc[0]
    return (
        f"{first.dataset} (torch {first.torch}, PML {first['pytorch-metric-learning']}, "
        f"{first.date}, `{first.command}`):\n\n{results_table.table(rows)}"
    )


def grad_cache(rows: pd.DataFrame) -> str:
    """Memory and time of GradCache against the whole batch."""
    first, table = rows.iloc[0], pd.DataFrame()
    measured = rows.pivot(index="N", columns="provider", values=["peak_bytes", "median_ms"])
    providers = rows.provider.unique()
    for provider in providers:
        peaks, times = measured.peak_bytes[provider] / 2**20, measured.median_ms[provider] / 1e3
        table[f"{provider}, MiB"] = peaks.map("{:,.0f}".format)
        table[f"{provider}, s"] = times.map("{:.3g}".format)
    table["time, ratio"] = measured.median_ms[providers[-1]] / measured.median_ms[providers[0]]
    return (
        f"Forward and backward of the example's small trunk on {first.image_size} x "
        f"{first.image_size} images and PNPLoss, float32 ({first.hardware}, "
        f"{first.threads} threads, torch {first.torch}, {first.date}, `{first.command}`); "
        "memory is the peak beyond model and images:\n\n"
        + markdown(table.rename("{:,}".format), "images")
    )


def ranks(rows: pd.DataFrame) -> str:
    """Time and bytes of a step of each mode of DistributedLossWrapper."""
    first = rows.iloc[0]
    table = pd.DataFrame(
        {
            "processes": rows.ranks,
            "`efficient`": rows.efficient.map("`{}`".format),
            "ms": rows.median_ms.map("{:,.0f}".format),
            "gathered, MB": (rows.gathered_bytes / 1e6).map("{:.1f}".format),
            "reduced, MB": (rows.reduced_bytes / 1e6).map("{:.1f}".format),
        }
    )
    return (
        f"PNPLoss on {first.N:,} rows of all processes together, d = {first.d}, "
        f"{first['dtype']} ({first.hardware}, gloo, torch {first.torch}, {first.date}, "
        f"`{first.command}`):\n\n{markdown(table.set_index('processes'))}"
    )


class Calculated(NamedTuple):
    """What a step with efficient="exact" takes a rank, for cosine similarity in float32."""

    references: int
    gathered: int  # bytes from the other ranks in forward, and as many of gradient in backward
    flops: int  # of the three products
    sigmoids: int
    kept: int  # bytes: gathered embeddings, their directions and the gradient
    matrices: int  # bytes of similarities and gradient, where `distance` is not a product
    differences: int  # bytes of queries minus references, which SNRDistance holds


def calculated(ranks: int, rows: int, size: int, per_class: int = 4) -> Calculated:
    """The cost of a step with `rows` queries on each rank, embeddings of length `size`."""
    references = ranks * rows
    return Calculated(
        references=references,
        gathered=(ranks - 1) * rows * size * 4,
        flops=3 * 2 * rows * references * size,
        sigmoids=rows * per_class * references,
        kept=3 * references * size * 4,
        matrices=2 * rows * references * 4,
        differences=rows * references * size * 4,
    )


def many_ranks() -> str:
    """What a step takes a GPU by calculation, and from where on it needs a chunk_size."""
    lines = []
    for number, rows in itertools.product((8, 64, 1024), (64, 384)):
        cost = calculated(number, rows, 512)
        lines.append(
            {
                "GPUs": f"{number:,}",
                "queries of each": f"{rows:,}",
                "references": f"{cost.references:,}",
                "MB": f"{cost.gathered / 1e6:,.3g}",
                "ms at 450 GB/s": f"{2e3 * cost.gathered / 450e9:.2g}",
                "ms at 50 GB/s": f"{2e3 * cost.gathered / 50e9:.2g}",
                "GFLOP": f"{cost.flops / 1e9:,.3g}",
                "ms": f"{1e3 * cost.flops / 50e12:.2g}",
                "kept, MB": f"{cost.kept / 1e6:,.4g}",
                "two matrices, MiB": f"{cost.matrices / 2**20:,.4g}",
                "SNRDistance, GiB": f"{cost.differences / 2**30:,.3g}",
            }
        )
    one = calculated(1, 384, 512)
    matrices, differences = (
        384 * 2**32 // each for each in (one.matrices, one.matrices + one.differences)
    )
    return markdown(pd.DataFrame(lines).set_index("GPUs")) + (
        "\n\nWith 384 queries and 4 GiB for these matrices, a `chunk_size` is needed from "
        f"{matrices:,} references\non with `LpDistance` or a distance of your own, and from "
        f"{differences:,} references on with `SNRDistance`."
    )


def recipe() -> str:
    """What a global batch of 16,384 takes each of 8 GPUs beside the model, by calculation."""
    rows, size, pixels = 2048, 512, 3 * 224 * 224
    cost = calculated(8, rows, size)
    sizes = {
        f"{rows:,} images, 3 x 224 x 224, float32": rows * pixels * 4,
        f"embeddings of its images, d = {size}": rows * size * 4,
        "gathered embeddings, directions, gradient": cost.kept,
        f"{rows:,} x {cost.references:,} similarities, overwritten by their gradient": (
            cost.matrices / 2
        ),
    }
    mebibytes = {name: f"{size / 2**20:,.0f}" for name, size in sizes.items()}
    table = pd.Series({**mebibytes, "activations": "of one chunk, 64 images"}).to_frame("MiB")
    return (
        f"{markdown(table, 'on each GPU')}\n\n"
        f"Gathered in forward and scattered in backward: {cost.gathered / 1e6:.0f} MB each. "
        f"Products: {cost.flops / 1e9:.0f} GFLOP."
    )


def times(rows: pd.DataFrame, *parts: str, dtype: str = "float32") -> pd.DataFrame:
    """Medians in ms of some parts: a line for each N, a column for each provider, as they come."""
    chosen = _of(rows, *parts, dtype=dtype)
    table = chosen.pivot_table(index="N", columns="provider", values="median_ms", aggfunc="last")
    return table.reindex(columns=chosen.provider.unique())


def _of(rows: pd.DataFrame, *parts: str, dtype: str = "float32") -> pd.DataFrame:
    return rows[rows.part.isin(parts) & (rows["dtype"] == dtype)]


def exponent(values: pd.Series) -> float:
    """Slope of log(value) over log(N), by least squares."""
    return np.polyfit(np.log(values.index), np.log(values), 1)[0]


def summary(rows: pd.DataFrame) -> str:
    """What the README says about time: four rows and the plot, a sentence for other devices."""
    (device, of_device), *others = rows.groupby("device")
    first, measured = of_device.iloc[0], _losses(of_device)
    chosen = measured.reindex(columns=[OURS, FASTEST, BUILT_IN, FLOOR])
    parts = [
        "Milliseconds of forward and backward over the batch size N, from embeddings of length "
        f"512, 4 per class ({first.hardware}, {_threads(first)}, {first.date}):",
        _table(chosen.assign(**{FASTEST: _fastest(measured)})),
        f"![Time and memory over the batch size](benchmarks/results/{device}.svg)",
    ]
    for _, of_device in others:
        measured = _losses(of_device)
        pair = pd.DataFrame({OURS: measured[OURS], FASTEST: _fastest(measured)})
        pair = pair.reindex([384, 4096]).dropna()
        ours, theirs = (" and ".join(pair[x].map(_short)) for x in pair)
        parts.append(
            f"On an {of_device.hardware.iloc[0]} PNPLoss takes {ours} ms at N = "
            f"{' and '.join(map('{:,}'.format, pair.index))}, PML's fastest other loss {theirs}."
        )
    return "\n\n".join(parts)


def performance(rows: pd.DataFrame) -> str:
    """The whole of docs/performance.md."""
    devices = [_of_device(of_device, device) for device, of_device in rows.groupby("device")]
    return "\n\n".join([INTRODUCTION, *devices, MEASURING, ""])


INTRODUCTION = """\
<!-- This page is made by benchmarks/report.py. -->
# Time and memory

A step is forward and backward of the loss, from embeddings to their gradient. The floor is the part
of a step that every loss on a similarity matrix needs: normalize the embeddings, multiply them, and
propagate a given gradient of the similarities back to the embeddings by autograd. For a batch that
is multiplied with itself, autograd computes two products in backward. `PNPLoss` computes one, and
can therefore be faster than the floor.

`PNPLoss` computes the sigmoids of a block of queries once, sums them to ranks, and computes the
gradient from them while they are still in the cache. On a CPU the sigmoid of a difference is
computed as a ratio, g<sub>p</sub> / (g<sub>p</sub> + g<sub>n</sub>) with g = exp(-s / `anneal`), if
all g of a block fit into the dtype. This takes M exponentials for each query instead of one for
each pair of a positive and a reference. [loss.md](loss.md#chunks-and-memory) says which matrices
each case needs."""

MEASURING = """\
## Measure it yourself

```bash
pip install -c constraints.txt -e ".[benchmarks]"
python benchmarks/measure.py  # writes rows to a new file in benchmarks/results
python benchmarks/report.py   # makes this page, the README's table and the plot of all rows there
```

Losses are measured in turn, several times around, in one process; the tables show medians. Memory
is the peak beyond the inputs, each number from a process of its own. An empty cell was not
measured. `SmoothAP`, `SupAP` and `RecallAtK` are losses of other papers, written in
`benchmarks/peers.py` and tested against loops that look like the formulas; their docstrings name
the papers."""


def _of_device(rows: pd.DataFrame, device: str) -> str:
    sections = {
        "Losses": [
            "Milliseconds of a step, from embeddings of length 512, with 4 examples per class, in "
            "float32. N is the batch size.",
            _table(_losses(rows)),
            _list(_ratios(rows)),
            f"![Time and memory over the batch size](../benchmarks/results/{device}.svg)",
        ],
        "Memory": _memory(rows),
        "Inside of the loss": [_list(_inside(rows))],
    }
    first, commands = rows.iloc[0], ", ".join(f"`{x}`" for x in rows.command.unique())
    parts = [
        f"## {'CPU' if device == 'cpu' else 'GPU'}",
        f"{first.hardware}, {_threads(first)}, torch {first.torch}, "
        f"PML {first.pytorch_metric_learning}, {first.date}, {commands}.",
    ]
    for title, paragraphs in sections.items():
        if any(paragraphs):
            parts += [f"### {title}", *filter(None, paragraphs)]
    return "\n\n".join(parts)


def _threads(row: pd.Series) -> str:
    return f"{row.threads} thread{'' if row.threads == 1 else 's'}"


def _list(sentences: list[str]) -> str:
    return "\n".join(f"- {x}" for x in sentences)


def _losses(rows: pd.DataFrame) -> pd.DataFrame:
    return times(rows, "small", "large", "largest")


def _fastest(measured: pd.DataFrame) -> pd.Series:
    """Least time at each N of PML's losses other than PNPLoss."""
    return measured.drop(columns=NAMES, errors="ignore").min(axis=1)


def _table(measured: pd.DataFrame) -> str:
    first, last = (OURS, LEAN), (BUILT_IN, *RESEARCH, FLOOR)
    others = sorted(set(measured) - {*first, *last})
    order = [x for x in (*first, *others, *last) if x in measured]
    table = measured[order].map(_short).rename("{:,}".format).rename(columns=NAMES)
    return markdown(table.T, "N")


def _short(ms: float) -> str:
    return "" if pd.isna(ms) else f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def _ratios(rows: pd.DataFrame) -> list[str]:
    """What the times of losses are to each other, in words; nothing that the rows do not hold."""
    measured = _losses(rows)
    known = measured.reindex(columns=[OURS, FLOOR, BUILT_IN])
    research = measured[[x for x in RESEARCH if x in measured]]
    units = "takes, in units of PNPLoss"
    ratios = {
        "PNPLoss takes, in units of the floor": known[OURS] / known[FLOOR],
        f"The fastest other loss of PML {units}": _fastest(measured) / known[OURS],
        f"PML's own PNPLoss {units}": known[BUILT_IN] / known[OURS],
        f"The fastest of {', '.join(research)} {units}": research.min(axis=1) / known[OURS],
    }
    said = [
        f"{text}: {', '.join(f'{r:.2f} at N = {n:,}' for n, r in ratio.dropna().items())}."
        for text, ratio in ratios.items()
        if ratio.notna().any()
    ]
    for part in ("many positives", "queue"):
        floor = times(rows, part)
        for row in _of(rows, part).query("provider == @OURS").itertuples():
            where = (
                f"With {row.per_class} examples per class at N = {row.N:,}"
                if part == "many positives"
                else f"With a CrossBatchMemory of {row.M:,} and N = {row.N:,}"
            )
            said.append(
                f"{where} a step takes {_short(row.median_ms)} ms, "
                f"{row.median_ms / floor[FLOOR][row.N]:.2f} times the floor."
            )
    growth = times(rows, "growth").reindex(columns=[OURS, LEAN])
    if growth[OURS].count() > 1:
        said.append(f"The time of PNPLoss grows with {_growth(growth[OURS].dropna())}.")
    for n, line in growth.dropna().tail(1).iterrows():
        said.append(
            f"With `chunk_size=2048` a step takes {line[LEAN] / line[OURS]:.2f} times as long as "
            f"without at N = {n:,}."
        )
    halves = times(rows, "small", "large", "largest", dtype="bfloat16")
    for n, line in halves.reindex(columns=[OURS, FLOOR]).dropna().tail(1).iterrows():
        said.append(
            "Embeddings in bfloat16 are multiplied in float32: a step takes "
            f"{_short(line[OURS])} ms at N = {n:,}, the floor in bfloat16 {_short(line[FLOOR])} ms."
        )
    for n, line in times(rows, "trunk").reindex(columns=[OURS, TRUNK]).dropna().iterrows():
        said.append(
            f"Of a training step of a ResNet-50 (N = {n:,}, 224 x 224 pixels, bfloat16) PNPLoss is "
            f"{100 * line[OURS] / line[TRUNK]:.2f} %."
        )
    return said


def _growth(values: pd.Series) -> str:
    first, last = values.index.min(), values.index.max()
    return f"N to the power of {exponent(values):.2f} from N = {first:,} to N = {last:,}"


def _memory(rows: pd.DataFrame) -> list[str]:
    """Peak memory over N, without and with a chunk_size, a table and a sentence each."""
    parts = []
    for part in ("memory", "memory, lean"):
        found = _of(rows, part).drop_duplicates("N", keep="last")
        if found.empty:
            continue
        first, peaks = found.iloc[0], found.set_index("N").peak_bytes
        lean = pd.notna(first.chunk_size)
        chunk = f"`chunk_size={first.chunk_size:.0f}`" if lean else "no `chunk_size`"
        table = pd.DataFrame(
            {
                "MiB": (peaks / 2**20).map("{:,.0f}".format),
                "in N x N matrices": (peaks / (4 * peaks.index**2)).map("{:.2f}".format),
            }
        )
        parts += [
            f"Peak memory of a step of PNPLoss beyond the inputs, with {chunk} and embeddings of "
            f"length {first.d}:",
            markdown(table.rename("{:,}".format).T, "N"),
        ]
        if len(peaks) > 1 and peaks.min() > 0:
            parts.append(f"It grows with {_growth(peaks)}.")
    return parts


def _inside(rows: pd.DataFrame) -> list[str]:
    """What the parts of the loss take, and what they would take if they were written otherwise."""

    def measured(part: str, *providers: str) -> Iterator[tuple]:
        """(N, ms of each provider) where all were measured."""
        for n, line in times(rows, part).reindex(columns=list(providers)).dropna().iterrows():
            yield n, *line.map(_short)

    def at(part: str, n: int) -> str:
        row = _of(rows, part).query("N == @n").iloc[0]
        return f"at N = {n:,} with {row.per_class} per class"

    said = []
    work = "Losses and gradient of given similarities take"
    triton = dict(measured("kernel", TRITON))
    for n, ms, other in measured("kernel", EAGER, COMPILED):
        plain = f"{triton[n]} ms in Triton, {ms} ms in plain PyTorch" if n in triton else f"{ms} ms"
        said.append(
            f"{work} {plain} {at('kernel', n)}; the same sums by `torch.compile` take {other} ms."
        )
    for n, ms, other in measured("sigmoids", RATIOS, SINGLE):
        said.append(
            f"{work} {ms} ms {at('sigmoids', n)} with sigmoids as ratios of exponentials, "
            f"{other} ms with a sigmoid of each difference."
        )
    for n, line in times(rows, "blocks").iterrows():
        sizes = [f"{_short(ms)} in {p.rpartition(' of ')[2]}" for p, ms in line.dropna().items()]
        said.append(
            f"{work}, in milliseconds by size of the blocks of sigmoids, {at('blocks', n)}: "
            f"{', '.join(sizes)}."
        )
    for n, ms, at_once, other in measured("products", PRODUCT, AT_ONCE, TWO_PRODUCTS):
        said.append(
            f"A step takes {ms} ms at N = {n:,} where the gradient G of the similarities is "
            "multiplied as (G + G^T) z in squares that stay in the cache, "
            f"{at_once} ms where it is multiplied so at once, and {other} ms where it is "
            "multiplied twice, as G z + G^T z."
        )
    return said


def plot(rows: pd.DataFrame, path: Path) -> None:
    """Time and memory over N, both axes logarithmic."""
    plt = pyplot()
    measured = times(rows, "small", "large", "largest", "growth")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for provider in sorted(measured, key=lambda p: p not in (OURS, LEAN, FLOOR)):
        ours = provider in (OURS, LEAN)
        style = {"linewidth": 2.4 if ours else 1.1, "alpha": 1.0 if ours else 0.7, "marker": "."}
        if provider == FLOOR:
            style |= {"color": "black", "linestyle": ":"}
        left.plot(measured[provider].dropna(), label=provider, **style)
    left.set(xscale="log", yscale="log", xlabel="batch size N", ylabel="ms, forward and backward")
    left.legend(fontsize=7)
    for part, label in (("memory", OURS), ("memory, lean", f"{LEAN} (d = 128)")):
        peaks = _of(rows, part).set_index("N").peak_bytes.sort_index() / 2**20
        if len(peaks):
            right.plot(peaks, label=label, marker=".", linewidth=2.4)
    sizes = np.sort(_of(rows, "memory", "memory, lean").N.unique())
    if len(sizes):
        one = 4 * sizes**2 / 2**20
        right.plot(sizes, one, color="black", linestyle=":", label="one N x N matrix")
        right.legend(fontsize=7)
    right.set(xscale="log", yscale="log", xlabel="batch size N", ylabel="MiB beyond the inputs")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
