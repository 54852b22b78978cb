"""The picture of docs/retrieval.md: what each loss reaches on each data set, untuned and tuned."""

from collections.abc import Sequence
from pathlib import Path

TITLES = {
    "clinc150": "CLINC150",
    "clinc150_transformer": "CLINC150, transformer",
    "omniglot": "Omniglot small",
    "grocery": "Grocery 64",
}
OURS_COLOR, OTHERS_COLOR = "#c1272d", "#33588f"
# {data set: {stage: {loss: (mean, half of its 95 % interval)}}}, in percent.
Values = dict[str, dict[str, dict[str, tuple[float, float]]]]


def plot(values: Values, order: Sequence[str], ours: str, path: Path) -> None:
    """Draw a panel for each data set, with a line for each loss.

    Args:
        values: what to draw; a hollow mark for the first stage, a filled one for the second.
        order: the losses, from the top down.
        ours: what the names of this package's losses start with; they have a colour of their own.
        path: SVG file to write.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "pml_pnp"  # the same rows, the same file
    from matplotlib import pyplot as plt

    size = 3.2 * len(values) + 1.5, 0.23 * len(order) + 1
    figure, axes = plt.subplots(1, len(values), figsize=size, sharey=True, squeeze=False)
    for axis, (dataset, stages) in zip(axes[0], values.items(), strict=True):
        for stage, (name, of_loss) in enumerate(stages.items()):
            for loss, (mean, half) in of_loss.items():
                color = OURS_COLOR if loss.startswith(ours) else OTHERS_COLOR
                axis.errorbar(
                    mean,
                    order.index(loss),
                    xerr=half,
                    fmt="o",
                    markersize=4,
                    color=color,
                    markerfacecolor=color if stage else "white",
                    linewidth=1,
                )
            # In the legend alone.
            axis.plot([], [], "o", color="black", fillstyle="full" if stage else "none", label=name)
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
