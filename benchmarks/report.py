"""Make the figures of the README and of docs/, and the plots, of the committed rows.

python benchmarks/report.py                  # all of benchmarks/results, into the pages
python benchmarks/report.py --check          # only whether the pages say what the rows say

Speed and memory are of the rows that benchmarks/measure.py wrote, in benchmarks/results; retrieval
is of those of examples/powerful_benchmarker/benchmark.py, in benchmarks/results/retrieval; large
batches are of those of benchmarks/grad_cache.py, in benchmarks/results/grad_cache.
"""

import argparse
import csv
import math
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
RETRIEVAL = RESULTS / "retrieval"
GRAD_CACHE = RESULTS / "grad_cache"
END = "<!-- end -->"
OURS, LEAN, FLOOR, BUILT_IN = "PNPLoss", "PNPLoss, lean", "floor", "PNPLoss of PML"
EAGER, COMPILED = "ops/eager.py", "the same sums by torch.compile"
PRODUCT, TWO_PRODUCTS = "PNPLoss, in squares", "PNPLoss, two products"
RATIOS, SINGLE = "sigmoids as ratios", "sigmoids one by one"
TRUNK = "ResNet-50 and PNPLoss"
NAMES = {
    OURS: "**PNPLoss**",
    LEAN: "**PNPLoss, lean** (`chunk_size=2048`)",
    BUILT_IN: "PML's PNPLoss",
    FLOOR: "normalize and multiply alone",
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
        "<!-- speed, of benchmarks/report.py -->": section(rows),
        "<!-- rows, of benchmarks/report.py -->": summary(rows),
        "<!-- retrieval, of benchmarks/report.py -->": retrieval(),
        "<!-- grad_cache, of benchmarks/report.py -->": grad_cache(),
    }
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    for begin, block in blocks.items():
        holders = [page for page, text in texts.items() if begin in text]
        if not holders:
            sys.exit(f"no page holds {begin}")
        for page in holders:
            texts[page] = _with(texts[page], begin, block)
    for page, text in texts.items():
        if args.check and text != page.read_text(encoding="utf-8"):
            sys.exit(f"{page.relative_to(ROOT)} is not what benchmarks/report.py makes")
        if not args.check:
            page.write_text(text, encoding="utf-8")
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


def times(rows: list[Row], *parts: str) -> dict[str, dict[int, float]]:
    """{provider: {N: median in ms}} of some parts, for float32."""
    result: dict[str, dict[int, float]] = {}
    for row in rows:
        if _is(row, *parts):
            result.setdefault(row["provider"], {})[int(row["N"])] = float(row["median_ms"])
    return result


def _is(row: Row, *parts: str) -> bool:
    return row["part"] in parts and row["dtype"] == "float32"


def exponent(values: dict[int, float]) -> float:
    """Slope of log(value) over log(N), by least squares."""
    x, y = [math.log(n) for n in values], [math.log(v) for v in values.values()]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return products / sum((a - mx) ** 2 for a in x)


def section(rows: list[Row]) -> str:
    """What the README says about each device."""
    return "\n\n".join(_of_device([r for r in rows if r["device"] == d]) for d in devices(rows))


def summary(rows: list[Row]) -> str:
    """Four rows of the table, for the README, and where all are."""
    rows = [r for r in rows if r["device"] == "cpu"]
    measured = times(rows, "small", "large")
    shown = {p: measured[p] for p in (OURS, "SupConLoss", BUILT_IN, FLOOR) if p in measured}
    first = rows[0]
    return "\n".join(
        [
            f"Milliseconds of forward and backward, from embeddings of length 512, 4 per class "
            f"({first['hardware']}, {first['threads']} threads, {first['date']}; all losses in "
            "[docs/performance.md](docs/performance.md)):",
            "",
            *_table(shown),
        ]
    )


def _of_device(rows: list[Row]) -> str:
    first = rows[0]
    device = first["device"]
    versions = f"torch {first['torch']}, PML {first['pytorch_metric_learning']}"
    commands = ", ".join(f"`{c}`" for c in dict.fromkeys(r["command"] for r in rows))
    lines = [
        "Milliseconds of forward and backward, from embeddings of length 512, 4 per class, float32 "
        f"({first['hardware']}, {first['threads']} threads, {versions}, {first['date']}, "
        f"{commands}):",
        "",
        *_table(times(rows, "small", "large")),
        "",
        *_sentences(rows),
        "",
        f"![Time and memory over the batch size](../benchmarks/results/{device}.svg)",
    ]
    return "\n".join(lines)


def _table(measured: dict[str, dict[int, float]]) -> list[str]:
    sizes = sorted({n for values in measured.values() for n in values})
    middle = sorted(p for p in measured if p not in NAMES)
    order = [p for p in (OURS, LEAN, *middle, BUILT_IN, FLOOR) if p in measured]
    lines = [
        "| N | " + " | ".join(f"{n:,}" for n in sizes) + " |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for provider in order:
        values = [measured[provider].get(n) for n in sizes]
        cells = " | ".join("" if v is None else _short(v) for v in values)
        lines.append(f"| {NAMES.get(provider, provider)} | {cells} |")
    return lines


def _short(ms: float) -> str:
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def _sentences(rows: list[Row]) -> list[str]:
    """What the rows say in words; nothing that they do not hold."""
    said = []
    small = times(rows, "small", "large")
    if FLOOR in small:
        ratios = [f"{small[OURS][n] / v:.2f} at N = {n:,}" for n, v in small[FLOOR].items()]
        said.append(f"- Times the floor (normalize and multiply alone): {', '.join(ratios)}.")
    if FLOOR in small:
        others = {p: v for p, v in small.items() if p not in (OURS, LEAN, FLOOR)}
        ratios = [
            f"{min(v[n] for v in others.values() if n in v) / small[OURS][n]:.2f} at N = {n:,}"
            for n in small[OURS]
        ]
        said.append(f"- The fastest of all other losses takes, times as long: {', '.join(ratios)}.")
    if BUILT_IN in small:
        n = max(small[BUILT_IN])
        ratio = small[BUILT_IN][n] / small[OURS][n]
        said.append(f"- PML's own PNPLoss takes {ratio:,.0f} times as long at N = {n:,}.")
    for part, text in (
        ("many positives", "With 32 per class at N = 1,024"),
        ("queue", "With 384 queries and a CrossBatchMemory of 65,536"),
    ):
        t = times(rows, part)
        for n in t.get(FLOOR, {}):
            said.append(f"- {text}: {t[OURS][n] / t[FLOOR][n]:.2f} times the floor.")
    growth = times(rows, "growth").get(OURS)
    if growth:
        said.append(
            f"- Time grows with N to the power of {exponent(growth):.2f} from N = {min(growth):,} "
            f"to {max(growth):,}."
        )
        lean = times(rows, "growth")[LEAN]
        n = max(lean)
        said.append(
            f"- Lean mode takes {lean[n] / growth[n]:.2f} times as long as the normal one at "
            f"N = {n:,}."
        )
    for n, ms in times(rows, "trunk").get(TRUNK, {}).items():
        share = times(rows, "trunk")[OURS][n] / ms
        said.append(
            f"- Of a training step of a ResNet-50 (N = {n:,}, 224 x 224, bfloat16) the loss is "
            f"{100 * share:.2f} %."
        )
    for n, ms in times(rows, "kernel").get(EAGER, {}).items():
        compiled = times(rows, "kernel")[COMPILED][n]
        said.append(
            "- Between the two products, losses and gradient of the similarities take "
            f"{_short(ms)} ms at N = {n:,}; the same sums by `torch.compile` {_short(compiled)} ms."
        )
    for n, ms in times(rows, "products").get(PRODUCT, {}).items():
        twice = times(rows, "products")[TWO_PRODUCTS][n]
        said.append(
            f"- One product for the gradient of a batch with itself: {_short(ms)} ms a step at "
            f"N = {n:,}; with the two that autograd makes, {_short(twice)} ms."
        )
    for row in rows:
        if _is(row, "sigmoids") and row["provider"] == RATIOS:
            single = next(
                r for r in rows
                if _is(r, "sigmoids") and r["provider"] == SINGLE
                and (r["N"], r["per_class"]) == (row["N"], row["per_class"])
            )  # fmt: skip
            said.append(
                f"- Losses and gradient of the similarities at N = {int(row['N']):,} with "
                f"{row['per_class']} per class: {_short(float(row['median_ms']))} ms with sigmoids "
                f"as ratios, {_short(float(single['median_ms']))} ms one by one."
            )
    for part, text in (("memory", "Memory"), ("memory, lean", "Memory in lean mode (d = 128)")):
        peaks = {int(r["N"]): int(r["peak_bytes"]) for r in rows if _is(r, part)}
        for n in sorted(peaks):
            if n in (8192, max(peaks)):
                said.append(
                    f"- {text} beyond the inputs at N = {n:,}: {peaks[n] / 2**20:,.0f} MiB, or "
                    f"{peaks[n] / (4 * n * n):.2f} similarity matrices."
                )
        if len(peaks) > 1:
            said.append(
                f"- {text} grows with N to the power of {exponent(peaks):.2f} from "
                f"N = {min(peaks):,}."
            )
    return said


def plot(rows: list[Row], path: Path) -> None:
    """Time and memory over N, both axes logarithmic."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "pml_pnp"  # the same rows, the same file
    from matplotlib import pyplot as plt

    measured = times(rows, "small", "large", "growth")
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
