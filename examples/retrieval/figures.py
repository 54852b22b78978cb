"""The report's diagrams, drawn by matplotlib."""

import base64
import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch

# Grey and two colours that can be read on white and on black.
INK = "#7d828a"
COLORS = {"untrained": "#d9822b", "trained": "#3d8bd4"}
HATCHES = {"untrained": "///", "trained": ""}  # for who does not tell the colours apart
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "grid.alpha": 0.25,
    "grid.color": INK,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "svg.hashsalt": "report",  # the same diagram is the same text
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclasses.dataclass(frozen=True)
class Diagram:
    """A diagram for a page: an SVG as a data URI, and what it shows in words."""

    title: str
    uri: str
    alt: str


def curve(title: str, epochs: Sequence[float], values: Sequence[float]) -> Diagram:
    """One quantity over the epochs."""

    def draw(axes: Any) -> None:
        marker = "." if len(values) < 100 else None
        axes.plot(epochs, values, color=COLORS["trained"], marker=marker, linewidth=1.5)
        axes.set_xlabel("epoch")
        axes.set_xlim(left=0)
        axes.ticklabel_format(axis="y", useOffset=False)
        if min(values) == max(values) > 0:
            axes.set_ylim(0, 2 * values[0])

    alt = (
        f"{title} over {epochs[-1]:g} epochs: {values[0]:.4g} at first, {values[-1]:.4g} at last, "
        f"between {min(values):.4g} and {max(values):.4g}"
    )
    return Diagram(title, _drawn(4.6, 2.6, draw), alt)


def negatives_histogram(counts: dict[str, torch.Tensor]) -> Diagram:
    """Shares of the pairs of query and positive by the number of negatives in between.

    Args:
        counts: For each network, how many pairs have 0, 1, 2, ... negatives ranked before.
    """
    title = "Negatives ranked before a positive"
    longest = max(int(x.nonzero().max()) for x in counts.values())
    edges = [0, 1]
    while edges[-1] <= longest:
        edges.append(2 * edges[-1])
    ranges = list(zip(edges[:-1], edges[1:], strict=True))
    names = [str(low) if high == low + 1 else f"{low}-{high - 1}" for low, high in ranges]
    shares = {
        network: [float(x[low:high].sum() / x.sum()) for low, high in ranges]
        for network, x in counts.items()
    }
    width = 0.8 / len(shares)

    def draw(axes: Any) -> None:
        for i, (network, heights) in enumerate(shares.items()):
            left = [x + (i - (len(shares) - 1) / 2) * width for x in range(len(names))]
            style = {"color": COLORS[network], "hatch": HATCHES[network], "edgecolor": "white"}
            axes.bar(left, heights, width, label=network, linewidth=0, **style)
        axes.set_xticks(range(len(names)), names, rotation=30 if len(names) > 8 else 0)
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("negatives before the positive")
        axes.set_ylabel("share of pairs")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)

    none = ", ".join(f"{x[0]:.1%} {network}" for network, x in shares.items())
    return Diagram(title, _drawn(9.4, 3.0, draw), f"{title}; pairs without any: {none}")


def _drawn(width: float, height: float, draw: Callable[[Any], None]) -> str:
    """What `draw` draws on the axes of a figure, as a data URI."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(stream.getvalue()).decode()}"
