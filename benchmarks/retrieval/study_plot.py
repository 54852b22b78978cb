"""The picture of docs/retrieval.md: what each loss reaches on each data set, untuned and tuned."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from advice import OURS
from pages import pyplot

TITLES = {
    "clinc150": "CLINC150",
    "clinc150_transformer": "CLINC150, transformer",
    "omniglot": "Omniglot small",
    "grocery": "Grocery 64",
}
OURS_COLOR, OTHERS_COLOR = "#c1272d", "#33588f"


def plot(means: pd.DataFrame, stages: Sequence[str], order: Sequence[str], path: Path) -> None:
    """Draw a panel for each data set, with a line for each loss.

    Args:
        means: of MAP@R in percent: `dataset`, `stage`, `loss`, `mean` and `half`, which is half of
            the 95 % interval.
        stages: a mark is hollow for the first of them, filled for the second.
        order: the losses, from the top down.
        path: SVG file to write.
    """
    plt = pyplot()
    names = means.dataset.unique()
    size = 3.2 * len(names) + 1.5, 0.23 * len(order) + 1
    figure, axes = plt.subplots(1, len(names), figsize=size, sharey=True, squeeze=False)
    for axis, dataset in zip(axes[0], names, strict=True):
        for filled, stage in enumerate(stages):
            for row in means[(means.dataset == dataset) & (means.stage == stage)].itertuples():
                color = OURS_COLOR if row.loss.startswith(OURS) else OTHERS_COLOR
                axis.errorbar(
                    row.mean,
                    order.index(row.loss),
                    xerr=row.half,
                    fmt="o",
                    markersize=4,
                    color=color,
                    markerfacecolor=color if filled else "white",
                    linewidth=1,
                )
            # In the legend alone.
            style = "full" if filled else "none"
            axis.plot([], [], "o", color="black", fillstyle=style, label=stage)
        axis.set_title(TITLES.get(dataset, dataset))
        axis.set_xlabel("MAP@R, %")
        axis.grid(alpha=0.3)
    first = axes[0, 0]
    first.set_yticks(range(len(order)), order)
    first.set_ylim(len(order) - 0.5, -0.5)
    first.legend(loc="upper left")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
