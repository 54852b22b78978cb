"""Make the figures of README.md and docs/, and the plots, of the committed rows.

    python benchmarks/report.py                  # all of benchmarks/results, into the pages
    python benchmarks/report.py --check          # only whether the pages say what the rows say

Time and memory are of the rows that benchmarks/measure.py wrote, in benchmarks/results; retrieval
is of those of examples/powerful_benchmarker/benchmark.py, in benchmarks/results/retrieval; large
batches are of those of benchmarks/grad_cache.py, in benchmarks/results/grad_cache; many processes
are of those of benchmarks/ranks.py, in benchmarks/results/ranks, and of what it calculates.
What stands between a marker and the next `pages.END` is made; the rest of a page is by hand.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from pages import markdown, publish, pyplot, read, where

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "powerful_benchmarker"))
import results_table  # noqa: E402

SCRIPT = "benchmarks/report.py"
RESULTS = ROOT / "benchmarks" / "results"
OURS, LEAN, FLOOR, BUILT_IN = "PNPLoss", "PNPLoss, lean", "floor", "PNPLoss of PML"
TRUNK = "ResNet-50 and PNPLoss"
FASTEST = "fastest other loss of PML"
RESEARCH = ["SmoothAP", "SupAP", "RecallAtK"]  # of benchmarks/peers.py
NAMES = {
    OURS: "**PNPLoss**",
    LEAN: "**PNPLoss**, `chunk_size=2048`",
    BUILT_IN: "PML's PNPLoss",
    **{name: f"{name} (`benchmarks/peers.py`)" for name in RESEARCH},
    FLOOR: "normalize and multiply alone",
    TRUNK: "training step of a ResNet-50 with PNPLoss, 224 x 224 pixels, bfloat16",
}
ALL_LOSSES = ("small", "large", "largest")  # the parts that measure all of them
# Where PNPLoss is measured beside something else: the case, its parts, dtype, and both providers.
CASES = (
    ("{per_class} examples per class", ["many positives"], "float32", OURS, FLOOR),
    ("`CrossBatchMemory` of {M:,}", ["queue"], "float32", OURS, FLOOR),
    ("`chunk_size={chunk_size:.0f}`", ["growth"], "float32", LEAN, OURS),
    ("embeddings in bfloat16", ALL_LOSSES, "bfloat16", OURS, FLOOR),
    ("in training", ["trunk"], "float32", OURS, TRUNK),
)


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
        **parts(rows),
        "retrieval": _of_files("retrieval", retrieval),
        "grad_cache": _of_files("grad_cache", grad_cache),
        "ranks": _of_files("ranks", ranks),
        "calculated": many_ranks(),
        "recipe": recipe(),
    }
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    texts = "".join(page.read_text(encoding="utf-8") for page in pages)
    for name in made:
        if f"<!-- {name}, of {SCRIPT} -->" not in texts:
            sys.exit(f"no page holds <!-- {name}, of {SCRIPT} -->")
    publish(pages, made, SCRIPT, args.check)
    if not args.check:
        for device, of_device in rows.groupby("device"):
            plot(of_device, RESULTS / f"{device}.svg")


def _of_files(folder: str, make: Callable[[pd.DataFrame], str]) -> str:
    """What is made of each file of a folder of benchmarks/results."""
    return "\n\n".join(make(read([path])) for path in sorted((RESULTS / folder).glob("*.csv")))


# --- what other benchmarks measured --------------------------------------------------------------


def retrieval(rows: pd.DataFrame) -> str:
    """What losses reach in powerful-benchmarker."""
    return f"{rows.dataset[0]} ({where(rows)}):\n\n{results_table.table(rows)}"


def grad_cache(rows: pd.DataFrame) -> str:
    """Memory and time of GradCache against the whole batch."""
    measured = rows.pivot(index="N", columns="provider", values=["peak_bytes", "median_ms"])
    whole, cached = rows.provider.unique()
    table = pd.DataFrame()
    for provider in (whole, cached):
        mebibytes = measured.peak_bytes[provider] / 2**20
        table[f"{provider}, MiB"] = mebibytes.map("{:,.0f}".format)
        table[f"{provider}, s"] = (measured.median_ms[provider] / 1e3).map("{:.3g}".format)
    table["time, ratio"] = measured.median_ms[cached] / measured.median_ms[whole]
    size = rows.image_size[0]
    return (
        f"Forward and backward of the example's small trunk on {size} x {size} images and PNPLoss, "
        f"float32 ({_where(rows)}); memory is the peak beyond model and images:\n\n"
        + markdown(table.rename("{:,}".format), "images")
    )


def ranks(rows: pd.DataFrame) -> str:
    """Time and bytes of a step of each mode of DistributedLossWrapper."""
    table = pd.DataFrame(
        {
            "processes": rows.ranks,
            "`efficient`": rows.efficient.map("`{}`".format),
            "ms": rows.median_ms.map("{:,.0f}".format),
            "gathered, MB": (rows.gathered_bytes / 1e6).map("{:.1f}".format),
            "reduced, MB": (rows.reduced_bytes / 1e6).map("{:.1f}".format),
        }
    )
    first = rows.iloc[0]
    return (
        f"PNPLoss on {first.N:,} rows of all processes together, d = {first.d}, {first['dtype']}, "
        f"gloo ({_where(rows)}):\n\n{markdown(table.set_index('processes'))}"
    )


def _where(rows: pd.DataFrame) -> str:
    threads = rows.threads.map("{} threads".format).replace("1 threads", "1 thread")
    return where(rows.assign(hardware=rows.hardware + ", " + threads))


# --- what is calculated --------------------------------------------------------------------------


def calculated(ranks, rows, size: int) -> SimpleNamespace:
    """What a step with efficient="exact" takes a rank, for cosine similarity in float32.

    Args:
        ranks: how many, a number or a column of them.
        rows: queries on each rank, a number or a column of them.
        size: length of the embeddings.
    """
    references = ranks * rows
    return SimpleNamespace(
        references=references,
        # Bytes from the other ranks in forward, and as many of gradient in backward.
        gathered=(ranks - 1) * rows * size * 4,
        # Of the three products.
        flops=3 * 2 * rows * references * size,
        # Bytes: gathered embeddings, their directions and the gradient.
        kept=3 * references * size * 4,
        # Bytes of similarities and gradient, where `distance` is not a product.
        matrices=2 * rows * references * 4,
        # Bytes of queries minus references, which SNRDistance holds.
        differences=rows * references * size * 4,
    )


def many_ranks() -> str:
    """What a step takes a GPU by calculation, and from where on it needs a chunk_size."""
    numbers = pd.DataFrame(itertools.product((8, 64, 1024), (64, 384)), columns=["ranks", "rows"])
    cost = calculated(numbers.ranks, numbers.rows, 512)
    columns = {
        "GPUs": ("{:,}", numbers.ranks),
        "queries of each": ("{:,}", numbers.rows),
        "references": ("{:,}", cost.references),
        "MB": ("{:,.3g}", cost.gathered / 1e6),
        "ms at 450 GB/s": ("{:.2g}", 2e3 * cost.gathered / 450e9),
        "ms at 50 GB/s": ("{:.2g}", 2e3 * cost.gathered / 50e9),
        "GFLOP": ("{:,.3g}", cost.flops / 1e9),
        "ms": ("{:.2g}", 1e3 * cost.flops / 50e12),
        "kept, MB": ("{:,.4g}", cost.kept / 1e6),
        "two matrices, MiB": ("{:,.4g}", cost.matrices / 2**20),
        "SNRDistance, GiB": ("{:,.3g}", cost.differences / 2**30),
    }
    table = pd.DataFrame({head: x.map(form.format) for head, (form, x) in columns.items()})
    one = calculated(1, 384, 512)
    matrices, differences = (
        384 * 2**32 // each for each in (one.matrices, one.matrices + one.differences)
    )
    return (
        f"{markdown(table.set_index('GPUs'))}\n\n"
        "With 384 queries and 4 GiB for these matrices, a `chunk_size` is needed from "
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
    table = (pd.Series(sizes) / 2**20).map("{:,.0f}".format).to_frame("MiB")
    table.loc["activations"] = "of one chunk, 64 images"
    return (
        f"{markdown(table, 'on each GPU')}\n\n"
        f"Gathered in forward and scattered in backward: {cost.gathered / 1e6:.0f} MB each. "
        f"Products: {cost.flops / 1e9:.0f} GFLOP."
    )


# --- time and memory -----------------------------------------------------------------------------


def summary(rows: pd.DataFrame) -> str:
    """What the README says about time: four rows and the plot, a sentence for other devices."""
    (device, of_device), *others = rows.groupby("device")
    first, measured = of_device.iloc[0], times(of_device, *ALL_LOSSES)
    made = [
        "Milliseconds of forward and backward over the batch size N, from embeddings of length "
        f"512, 4 per class ({first.hardware}, {first.threads} threads, {first.date}):",
        over_n(_with_fastest(measured).reindex(columns=[OURS, FASTEST, BUILT_IN, FLOOR])),
        f"![Time and memory over the batch size](benchmarks/results/{device}.svg)",
    ]
    for _, of_device in others:
        measured = _with_fastest(times(of_device, *ALL_LOSSES))
        pair = measured[[OURS, FASTEST]].reindex([384, 4096]).dropna()
        ours, theirs = (" and ".join(pair[x].map(_short)) for x in pair)
        made.append(
            f"On an {of_device.hardware.iloc[0]} PNPLoss takes {ours} ms at N = "
            f"{' and '.join(map('{:,}'.format, pair.index))}, PML's fastest other loss {theirs}."
        )
    return "\n\n".join(made)


def parts(rows: pd.DataFrame) -> dict[str, str]:
    """The parts of docs/performance.md, of each device that has rows for them."""
    made = {}
    for device, own in rows.groupby("device"):
        made |= {
            f"{device}": f"{_where(own)}.",
            f"{device} losses": losses(own),
            f"{device} cases": cases(own),
            f"{device} memory": memory(own, "memory"),
            f"{device} memory in chunks": memory(own, "memory, lean"),
            f"{device} kernel": inside(own, "kernel", "sigmoids", "blocks"),
            f"{device} products": inside(own, "products"),
        }
    return {name: part for name, part in made.items() if part}


def times(rows: pd.DataFrame, *parts: str, dtype: str = "float32") -> pd.DataFrame:
    """Medians in ms of some parts: a line for each N, a column for each provider, as they come."""
    chosen = rows[rows.part.isin(parts) & (rows["dtype"] == dtype)]
    table = chosen.pivot_table(index="N", columns="provider", values="median_ms", aggfunc="last")
    return table.reindex(columns=chosen.provider.unique())


def over_n(table: pd.DataFrame) -> str:
    """A table with a column for each N."""
    return markdown(table.map(_short).rename("{:,}".format).T.rename(NAMES), "N")


def losses(rows: pd.DataFrame) -> str:
    """Times of all losses, and what they are to each other."""
    measured = times(rows, *ALL_LOSSES)
    place = {name: i for i, name in enumerate(NAMES)}
    others = place[LEAN] + 0.5  # PML's other losses, by name, come after this package's
    order = sorted(measured, key=lambda name: (place.get(name, others), name))
    known = _with_fastest(measured).reindex(columns=[*NAMES, FASTEST])
    ours, research = known[OURS], known[RESEARCH].min(axis=1)
    ratios = pd.DataFrame(
        {
            "PNPLoss / floor": ours / known[FLOOR],
            f"{FASTEST} / PNPLoss": known[FASTEST] / ours,
            "PML's PNPLoss / PNPLoss": known[BUILT_IN] / ours,
            f"fastest of {', '.join(RESEARCH)} / PNPLoss": research / ours,
        }
    )
    return f"{over_n(measured[order])}\n\n{over_n(ratios)}"


def _with_fastest(measured: pd.DataFrame) -> pd.DataFrame:
    """With the least time at each N of PML's losses other than PNPLoss."""
    return measured.assign(**{FASTEST: measured.drop(columns=NAMES, errors="ignore").min(axis=1)})


def _short(number: float) -> str:
    return "" if pd.isna(number) else f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def cases(rows: pd.DataFrame) -> str:
    """PNPLoss beside something else, at the largest N of both; how its time grows with N."""
    lines = []
    for case, own_parts, dtype, provider, other in CASES:
        both = times(rows, *own_parts, dtype=dtype).reindex(columns=[provider, other])
        for n, (ms, of_other) in both.dropna().tail(1).iterrows():
            own = rows[rows.part.isin(own_parts) & (rows.provider == provider) & (rows.N == n)]
            row = own[own["dtype"] == dtype].iloc[-1]
            named = case.format(**row), f"{n:,}", _short(ms), NAMES[other]
            lines.append([*named, _short(of_other), _short(ms / of_other)])
    heads = ["case", "N", "PNPLoss, ms", "beside", "ms", "ratio"]
    made = [markdown(pd.DataFrame(lines, columns=heads).set_index("case"))] if lines else []
    growth = times(rows, "growth").reindex(columns=[OURS])[OURS].dropna()
    return "\n\n".join([*made, *grows("The time of PNPLoss", growth)])


def grows(what: str, values: pd.Series) -> list[str]:
    """A sentence on how values grow with N, by least squares; none if there is one value alone."""
    if len(values) < 2 or values.min() <= 0:
        return []
    slope = np.polyfit(np.log(values.index), np.log(values), 1)[0]
    first, last = values.index.min(), values.index.max()
    return [f"{what} grows with N to the power of {slope:.2f} from N = {first:,} to N = {last:,}."]


def memory(rows: pd.DataFrame, part: str) -> str:
    """Peak memory over N."""
    found = rows[rows.part == part].drop_duplicates("N", keep="last")
    if found.empty:
        return ""
    first, peaks = found.iloc[0], found.set_index("N").peak_bytes
    chunk = f"`chunk_size={first.chunk_size:.0f}`" if first.chunk_size > 0 else "no `chunk_size`"
    said = (
        f"Peak memory of a step of PNPLoss beyond the inputs, with {chunk} and embeddings of "
        f"length {first.d}:"
    )
    table = pd.DataFrame(
        {
            "MiB": (peaks / 2**20).map("{:,.0f}".format),
            "in N x N matrices": (peaks / (4 * peaks.index**2)).map("{:.2f}".format),
        }
    )
    return "\n\n".join([said, markdown(table.rename("{:,}".format).T, "N"), *grows("It", peaks)])


def inside(rows: pd.DataFrame, *parts: str) -> str:
    """What parts of the loss take, and what they would take if they were written otherwise."""
    chosen = rows[rows.part.isin(parts)]
    if chosen.empty:
        return ""
    table = chosen.pivot_table(
        index="provider", columns=["N", "per_class"], values="median_ms", aggfunc="last"
    )
    table.columns = [f"N = {n:,}, {per_class} per class" for n, per_class in table]
    return markdown(table.map(_short).loc[chosen.provider.unique()].rename(NAMES), "ms")


def plot(rows: pd.DataFrame, path: Path) -> None:
    """Time and memory over N, both axes logarithmic."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    measured = times(rows, *ALL_LOSSES, "growth")
    bold, thin = {"linewidth": 2.4, "alpha": 1.0}, {"linewidth": 1.1, "alpha": 0.7}
    dotted = {"color": "black", "linestyle": ":"}
    styles = {OURS: bold, LEAN: bold, FLOOR: thin | dotted}
    for name in sorted(measured, key=lambda name: name not in styles):
        left.plot(measured[name].dropna(), label=name, marker=".", **styles.get(name, thin))
    for part, label in (("memory", OURS), ("memory, lean", f"{LEAN} (d = 128)")):
        peaks = rows[rows.part == part].set_index("N").peak_bytes.sort_index() / 2**20
        right.plot(peaks, label=label, marker=".", linewidth=2.4)
    sizes = np.sort(rows[rows.part.str.startswith("memory")].N.unique())
    right.plot(sizes, 4 * sizes**2 / 2**20, **dotted, label="one N x N matrix")
    for axis, unit in ((left, "ms, forward and backward"), (right, "MiB beyond the inputs")):
        axis.set(xscale="log", yscale="log", xlabel="batch size N", ylabel=unit)
        axis.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
