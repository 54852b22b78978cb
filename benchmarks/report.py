"""Make the figures of README.md and docs/, and the plots, of the committed rows.

    python benchmarks/report.py                  # all of benchmarks/results, into the pages
    python benchmarks/report.py --check          # only whether the pages say what the rows say

Time and memory are of the rows that benchmarks/measure.py wrote, in benchmarks/results; retrieval
is of those of examples/powerful_benchmarker/benchmark.py, in benchmarks/results/retrieval; large
batches are of those of benchmarks/grad_cache.py, in benchmarks/results/grad_cache; many processes
are of those of benchmarks/ranks.py, in benchmarks/results/ranks, and of what it calculates.
docs/performance.md is made as a whole, other pages between a marker and the next END.
"""

import argparse
import csv
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PERFORMANCE = ROOT / "docs" / "performance.md"
RETRIEVAL = RESULTS / "retrieval"
GRAD_CACHE = RESULTS / "grad_cache"
RANKS = RESULTS / "ranks"
END = "<!-- end -->"
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
Row = dict[str, str]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    rows = read(sorted(RESULTS.glob("*.csv")))
    blocks = {
        "<!-- rows, of benchmarks/report.py -->": summary(rows),
        "<!-- retrieval, of benchmarks/report.py -->": retrieval(),
        "<!-- grad_cache, of benchmarks/report.py -->": grad_cache(),
        "<!-- ranks, of benchmarks/report.py -->": ranks(),
        "<!-- calculated, of benchmarks/report.py -->": many_ranks(),
        "<!-- recipe, of benchmarks/report.py -->": recipe(),
    }
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    texts[PERFORMANCE] = performance(rows)
    for begin, block in blocks.items():
        holders = [page for page, text in texts.items() if begin in text]
        if not holders:
            sys.exit(f"no page holds {begin}")
        for page in holders:
            texts[page] = _with(texts[page], begin, block)
    for page, text in texts.items():
        if not args.check:
            page.write_text(text, encoding="utf-8")
        elif not page.exists() or text != page.read_text(encoding="utf-8"):
            sys.exit(f"{page.relative_to(ROOT)} is not what benchmarks/report.py makes")
    if not args.check:
        for device in devices(rows):
            plot([r for r in rows if r["device"] == device], RESULTS / f"{device}.svg")


def _with(text: str, begin: str, made: str) -> str:
    """Put what was made between `begin` and END."""
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(END)
    return f"{before}{begin}\n{made}\n{END}{after}"


def retrieval() -> str:
    """What losses reach in powerful-benchmarker, a table for each data set."""
    sys.path.insert(0, str(ROOT / "examples" / "powerful_benchmarker"))
    import results_table

    parts = []
    for path in sorted(RETRIEVAL.glob("*.csv")):
        rows = results_table.read(path)
        first = rows[0]
        versions = f"torch {first['torch']}, PML {first['pytorch-metric-learning']}"
        parts.append(
            f"{first['dataset']} ({versions}, {first['date']}, `{first['command']}`):\n\n"
            f"{results_table.table(rows)}"
        )
    return "\n\n".join(parts)


def grad_cache() -> str:
    """Memory and time of GradCache against the whole batch, a table for each file of rows."""
    parts = []
    for path in sorted(GRAD_CACHE.glob("*.csv")):
        rows = read([path])
        first = rows[0]
        by_size: dict[str, list[Row]] = {}
        for row in rows:
            by_size.setdefault(row["N"], []).append(row)
        heads = [f"{r['provider']}, MiB | {r['provider']}, s" for r in by_size[first["N"]]]
        lines = [
            f"Forward and backward of the example's small trunk on {first['image_size']} x "
            f"{first['image_size']} images and PNPLoss, float32 ({first['hardware']}, "
            f"{first['threads']} threads, torch {first['torch']}, {first['date']}, "
            f"`{first['command']}`); memory is the peak beyond model and images:",
            "",
            f"| images | {' | '.join(heads)} | time, ratio |",
            "|---" * (2 * len(heads) + 2) + "|",
        ]
        for n, row in by_size.items():
            cells = [
                f"{int(r['peak_bytes']) / 2**20:,.0f} | {float(r['median_ms']) / 1e3:.3g}"
                for r in row
            ]
            ratio = float(row[-1]["median_ms"]) / float(row[0]["median_ms"])
            lines.append(f"| {int(n):,} | {' | '.join(cells)} | {ratio:.2f} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def ranks() -> str:
    """Time and bytes of a step of each mode of DistributedLossWrapper, a table for each file."""
    parts = []
    for path in sorted(RANKS.glob("*.csv")):
        rows = read([path])
        first = rows[0]
        lines = [
            f"PNPLoss on {int(first['N']):,} rows of all processes together, d = {first['d']}, "
            f"{first['dtype']} ({first['hardware']}, gloo, torch {first['torch']}, "
            f"{first['date']}, `{first['command']}`):",
            "",
            "| processes | `efficient` | ms | gathered, MB | reduced, MB |",
            "|---|---|---|---|---|",
        ]
        for row in rows:
            megabytes = (f"{int(row[x]) / 1e6:.1f}" for x in ("gathered_bytes", "reduced_bytes"))
            cells = row["ranks"], f"`{row['efficient']}`", f"{float(row['median_ms']):,.0f}"
            lines.append(f"| {' | '.join([*cells, *megabytes])} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


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
    lines = [
        "| GPUs | queries of each | references | MB | ms at 450 GB/s | ms at 50 GB/s | GFLOP | ms "
        "| kept, MB | two matrices, MiB | SNRDistance, GiB |",
        "|---" * 11 + "|",
    ]
    for number in (8, 64, 1024):
        for rows in (64, 384):
            cost = calculated(number, rows, 512)
            milliseconds = (f"{2e3 * cost.gathered / speed:.2g}" for speed in (450e9, 50e9))
            cells = [
                *(f"{number:,}", f"{rows:,}", f"{cost.references:,}"),
                *(f"{cost.gathered / 1e6:,.3g}", *milliseconds),
                *(f"{cost.flops / 1e9:,.3g}", f"{1e3 * cost.flops / 50e12:.2g}"),
                *(f"{cost.kept / 1e6:,.4g}", f"{cost.matrices / 2**20:,.4g}"),
                f"{cost.differences / 2**30:,.3g}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    one = calculated(1, 384, 512)
    matrices, differences = (
        384 * 2**32 // each for each in (one.matrices, one.matrices + one.differences)
    )
    return "\n".join(lines) + (
        "\n\nWith 384 queries and 4 GiB for these matrices, a `chunk_size` is needed from "
        f"{matrices:,} references\non with `LpDistance` or a distance of your own, and from "
        f"{differences:,} references on with `SNRDistance`."
    )


def recipe() -> str:
    """What a global batch of 16,384 takes each of 8 GPUs beside the model, by calculation."""
    rows, size, pixels = 2048, 512, 3 * 224 * 224
    cost = calculated(8, rows, size)
    lines = [
        "| on each GPU | MiB |",
        "|---|---|",
        f"| {rows:,} images, 3 x 224 x 224, float32 | {rows * pixels * 4 / 2**20:,.0f} |",
        f"| embeddings of its images, d = {size} | {rows * size * 4 / 2**20:,.0f} |",
        f"| gathered embeddings, directions, gradient | {cost.kept / 2**20:,.0f} |",
        f"| {rows:,} x {cost.references:,} similarities, overwritten by their gradient | "
        f"{cost.matrices / 2 / 2**20:,.0f} |",
        "| activations | of one chunk, 64 images |",
        "",
        f"Gathered in forward and scattered in backward: {cost.gathered / 1e6:.0f} MB each. "
        f"Products: {cost.flops / 1e9:.0f} GFLOP.",
    ]
    return "\n".join(lines)


def read(paths: Iterable[Path]) -> list[Row]:
    """All rows of some files."""
    rows = []
    for path in paths:
        with path.open(newline="") as file:
            rows += csv.DictReader(file)
    return rows


def devices(rows: list[Row]) -> list[str]:
    """The devices that there are rows of."""
    return sorted({r["device"] for r in rows})


def times(rows: list[Row], *parts: str, dtype: str = "float32") -> dict[str, dict[int, float]]:
    """{provider: {N: median in ms}} of some parts."""
    result: dict[str, dict[int, float]] = {}
    for row in rows:
        if _is(row, *parts, dtype=dtype):
            result.setdefault(row["provider"], {})[int(row["N"])] = float(row["median_ms"])
    return result


def _is(row: Row, *parts: str, dtype: str = "float32") -> bool:
    return row["part"] in parts and row["dtype"] == dtype


def exponent(values: dict[int, float]) -> float:
    """Slope of log(value) over log(N), by least squares."""
    x, y = [math.log(n) for n in values], [math.log(v) for v in values.values()]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return products / sum((a - mx) ** 2 for a in x)


def summary(rows: list[Row]) -> str:
    """What the README says about time: four rows and the plot, a sentence for other devices."""
    device, *others = devices(rows)
    of_device = [r for r in rows if r["device"] == device]
    first, measured = of_device[0], _losses(of_device)
    chosen = {
        OURS: measured[OURS],
        FASTEST: _fastest(measured),
        BUILT_IN: measured.get(BUILT_IN, {}),
        FLOOR: measured[FLOOR],
    }
    parts = [
        "Milliseconds of forward and backward over the batch size N, from embeddings of length "
        f"512, 4 per class ({first['hardware']}, {_threads(first)}, {first['date']}):",
        "\n".join(_table(chosen)),
        f"![Time and memory over the batch size](benchmarks/results/{device}.svg)",
    ]
    for other in others:
        of_device = [r for r in rows if r["device"] == other]
        measured = _losses(of_device)
        fastest = _fastest(measured)
        sizes = [n for n in (384, 4096) if n in fastest]
        ours, theirs = (
            " and ".join(_short(t[n]) for n in sizes) for t in (measured[OURS], fastest)
        )
        parts.append(
            f"On an {of_device[0]['hardware']} PNPLoss takes {ours} ms at N = "
            f"{' and '.join(f'{n:,}' for n in sizes)}, PML's fastest other loss {theirs}."
        )
    return "\n\n".join(parts)


def performance(rows: list[Row]) -> str:
    """The whole of docs/performance.md."""
    return "\n\n".join([INTRODUCTION, *(_of_device(rows, d) for d in devices(rows)), MEASURING, ""])


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


def _of_device(rows: list[Row], device: str) -> str:
    rows = [r for r in rows if r["device"] == device]
    sections = {
        "Losses": [
            "Milliseconds of a step, from embeddings of length 512, with 4 examples per class, in "
            "float32. N is the batch size.",
            "\n".join(_table(_losses(rows))),
            _list(_ratios(rows)),
            f"![Time and memory over the batch size](../benchmarks/results/{device}.svg)",
        ],
        "Memory": _memory(rows),
        "Inside of the loss": [_list(_inside(rows))],
    }
    parts = [f"## {'CPU' if device == 'cpu' else 'GPU'}", f"{_where(rows)}."]
    for title, paragraphs in sections.items():
        if any(paragraphs):
            parts += [f"### {title}", *filter(None, paragraphs)]
    return "\n\n".join(parts)


def _where(rows: list[Row]) -> str:
    """On which machine, with which versions, and by which commands."""
    first = rows[0]
    commands = ", ".join(f"`{c}`" for c in dict.fromkeys(r["command"] for r in rows))
    return (
        f"{first['hardware']}, {_threads(first)}, torch {first['torch']}, "
        f"PML {first['pytorch_metric_learning']}, {first['date']}, {commands}"
    )


def _threads(row: Row) -> str:
    return f"{row['threads']} thread{'' if row['threads'] == '1' else 's'}"


def _list(sentences: list[str]) -> str:
    return "\n".join(f"- {x}" for x in sentences)


def _losses(rows: list[Row]) -> dict[str, dict[int, float]]:
    return times(rows, "small", "large", "largest")


def _fastest(measured: dict[str, dict[int, float]]) -> dict[int, float]:
    """Least time at each N of PML's losses other than PNPLoss."""
    return _least({p: t for p, t in measured.items() if p not in NAMES})


def _least(measured: dict[str, dict[int, float]]) -> dict[int, float]:
    sizes = sorted({n for t in measured.values() for n in t})
    return {n: min(t[n] for t in measured.values() if n in t) for n in sizes}


def _table(measured: dict[str, dict[int, float]]) -> list[str]:
    sizes = sorted({n for values in measured.values() for n in values})
    others = [p for p in measured if p not in (OURS, LEAN, BUILT_IN, FLOOR, *RESEARCH)]
    order = (OURS, LEAN, *sorted(others), BUILT_IN, *RESEARCH, FLOOR)
    lines = [
        "| N | " + " | ".join(f"{n:,}" for n in sizes) + " |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for provider in [p for p in order if p in measured]:
        values = [measured[provider].get(n) for n in sizes]
        cells = " | ".join("" if v is None else _short(v) for v in values)
        lines.append(f"| {NAMES.get(provider, provider)} | {cells} |")
    return lines


def _short(ms: float) -> str:
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def _ratios(rows: list[Row]) -> list[str]:
    """What the times of losses are to each other, in words; nothing that the rows do not hold."""
    said, measured = [], _losses(rows)

    def ratios(text: str, others: dict[int, float], inverse: bool = False) -> None:
        ours = measured[OURS]
        pairs = [(n, ours[n] / t if inverse else t / ours[n]) for n, t in sorted(others.items())]
        if pairs:
            said.append(f"{text}: {', '.join(f'{r:.2f} at N = {n:,}' for n, r in pairs)}.")

    ratios("PNPLoss takes, in units of the floor", measured.get(FLOOR, {}), inverse=True)
    ratios("The fastest other loss of PML takes, in units of PNPLoss", _fastest(measured))
    ratios("PML's own PNPLoss takes, in units of PNPLoss", measured.get(BUILT_IN, {}))
    research = {p: measured[p] for p in RESEARCH if p in measured}
    ratios(f"The fastest of {', '.join(research)} takes, in units of PNPLoss", _least(research))
    for part in ("many positives", "queue"):
        for row in rows:
            if _is(row, part) and row["provider"] == OURS:
                n, m = int(row["N"]), int(row["M"])
                where = (
                    f"With {row['per_class']} examples per class at N = {n:,}"
                    if part == "many positives"
                    else f"With a CrossBatchMemory of {m:,} and N = {n:,}"
                )
                floor = times(rows, part)[FLOOR][n]
                ms = float(row["median_ms"])
                said.append(
                    f"{where} a step takes {_short(ms)} ms, {ms / floor:.2f} times the floor."
                )
    growth = times(rows, "growth")
    if len(growth.get(OURS, {})) > 1:
        said.append(f"The time of PNPLoss grows with {_growth(growth[OURS])}.")
    for n, ms in list(growth.get(LEAN, {}).items())[-1:]:
        said.append(
            f"With `chunk_size=2048` a step takes {ms / growth[OURS][n]:.2f} times as long as "
            f"without at N = {n:,}."
        )
    halves = times(rows, "small", "large", "largest", dtype="bfloat16")
    if OURS in halves:
        n = max(halves[OURS])
        ours, floor = (_short(halves[p][n]) for p in (OURS, FLOOR))
        said.append(
            f"Embeddings in bfloat16 are multiplied in float32: a step takes {ours} ms at N = "
            f"{n:,}, the floor in bfloat16 {floor} ms."
        )
    for n, ms in times(rows, "trunk").get(TRUNK, {}).items():
        share = times(rows, "trunk")[OURS][n] / ms
        said.append(
            f"Of a training step of a ResNet-50 (N = {n:,}, 224 x 224 pixels, bfloat16) PNPLoss is "
            f"{100 * share:.2f} %."
        )
    return said


def _growth(values: dict[int, float]) -> str:
    return (
        f"N to the power of {exponent(values):.2f} from N = {min(values):,} to N = {max(values):,}"
    )


def _memory(rows: list[Row]) -> list[str]:
    """Peak memory over N, without and with a chunk_size, a table and a sentence each."""
    parts = []
    for part in ("memory", "memory, lean"):
        found = [r for r in rows if _is(r, part)]
        if not found:
            continue
        first = found[0]
        chunk = f"`chunk_size={first['chunk_size']}`" if first["chunk_size"] else "no `chunk_size`"
        peaks = {int(r["N"]): int(r["peak_bytes"]) for r in found}
        cells = [f"{peak / 2**20:,.0f}" for peak in peaks.values()]
        matrices = [f"{peak / (4 * n * n):.2f}" for n, peak in peaks.items()]
        parts += [
            f"Peak memory of a step of PNPLoss beyond the inputs, with {chunk} and embeddings of "
            f"length {first['d']}:",
            "\n".join(
                [
                    f"| N | {' | '.join(f'{n:,}' for n in peaks)} |",
                    "|---" * (len(peaks) + 1) + "|",
                    f"| MiB | {' | '.join(cells)} |",
                    f"| in N x N matrices | {' | '.join(matrices)} |",
                ]
            ),
        ]
        if len(peaks) > 1 and min(peaks.values()) > 0:
            parts.append(f"It grows with {_growth(peaks)}.")
    return parts


def _inside(rows: list[Row]) -> list[str]:
    """What the parts of the loss take, and what they would take if they were written otherwise."""

    def compared(part: str, provider: str, other: str):
        measured = times(rows, part)
        others = measured.get(other, {})
        for n, ms in measured.get(provider, {}).items():
            if n in others:
                yield n, _short(ms), _short(others[n])

    said = []
    work = "Losses and gradient of given similarities take"
    kernels = times(rows, "kernel")
    for n, ms, other in compared("kernel", EAGER, COMPILED):
        plain = f"{work} {ms} ms"
        if n in kernels.get(TRITON, {}):
            plain = f"{work} {_short(kernels[TRITON][n])} ms in Triton, {ms} ms in plain PyTorch"
        said.append(
            f"{plain} at {_classes(rows, 'kernel', n)}; the same sums by `torch.compile` "
            f"take {other} ms."
        )
    for n, ms, other in compared("sigmoids", RATIOS, SINGLE):
        said.append(
            f"{work} {ms} ms at {_classes(rows, 'sigmoids', n)} with sigmoids as ratios of "
            f"exponentials, {other} ms with a sigmoid of each difference."
        )
    blocks = times(rows, "blocks")
    for n in sorted({n for values in blocks.values() for n in values}):
        sizes = [f"{_short(v[n])} in {p.rpartition(' of ')[2]}" for p, v in blocks.items()]
        said.append(
            f"{work}, in milliseconds by size of the blocks of sigmoids, at "
            f"{_classes(rows, 'blocks', n)}: {', '.join(sizes)}."
        )
    for n, ms, other in compared("products", PRODUCT, TWO_PRODUCTS):
        at_once = _short(times(rows, "products")[AT_ONCE][n])
        said.append(
            f"A step takes {ms} ms at N = {n:,} where the gradient G of the similarities is "
            "multiplied as (G + G^T) z in squares that stay in the cache, "
            f"{at_once} ms where it is multiplied so at once, and {other} ms where it is "
            "multiplied twice, as G z + G^T z."
        )
    return said


def _classes(rows: list[Row], part: str, n: int) -> str:
    row = next(r for r in rows if _is(r, part) and int(r["N"]) == n)
    return f"N = {n:,} with {row['per_class']} per class"


def plot(rows: list[Row], path: Path) -> None:
    """Time and memory over N, both axes logarithmic."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "pml_pnp"  # the same rows, the same file
    from matplotlib import pyplot as plt

    measured = times(rows, "small", "large", "largest", "growth")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for provider in sorted(measured, key=lambda p: p not in (OURS, LEAN, FLOOR)):
        points = sorted(measured[provider].items())
        ours = provider in (OURS, LEAN)
        style = {"linewidth": 2.4 if ours else 1.1, "alpha": 1.0 if ours else 0.7, "marker": "."}
        if provider == FLOOR:
            style |= {"color": "black", "linestyle": ":"}
        left.plot(*zip(*points, strict=True), label=provider, **style)
    left.set(xscale="log", yscale="log", xlabel="batch size N", ylabel="ms, forward and backward")
    left.legend(fontsize=7)
    for part, label in (("memory", OURS), ("memory, lean", f"{LEAN} (d = 128)")):
        peaks = sorted((int(r["N"]), int(r["peak_bytes"]) / 2**20) for r in rows if _is(r, part))
        if peaks:
            right.plot(*zip(*peaks, strict=True), label=label, marker=".", linewidth=2.4)
    sizes = sorted({int(r["N"]) for r in rows if r["part"].startswith("memory")})
    if sizes:
        one = [4 * n * n / 2**20 for n in sizes]
        right.plot(sizes, one, color="black", linestyle=":", label="one N x N matrix")
        right.legend(fontsize=7)
    right.set(xscale="log", yscale="log", xlabel="batch size N", ylabel="MiB beyond the inputs")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
