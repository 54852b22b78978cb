"""A picture of what queries find: each query and the images nearest to it in a row."""

import dataclasses
import io
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from .disk import new
from .errors import UserError, require

SUFFIXES = (".png", ".pdf")
CELL = 1.2  # inches
DOTS_PER_INCH = 100


@dataclasses.dataclass(frozen=True)
class Cell:
    """An image of a row, what stands above it, and the colour of its frame."""

    image: Image.Image
    title: str = ""
    frame: str = "white"


def check(path: str) -> None:
    """Refuse what `write` could not write, before any work.

    Raises:
        UserError: If there is something at `path`, its suffix is another than SUFFIXES, or
            matplotlib is missing.
    """
    if Path(path).exists():
        raise UserError(f"--sheet: {path} exists; name a new file")
    if Path(path).suffix.lower() not in SUFFIXES:
        raise UserError(
            f"--sheet: expected a name that ends in {' or '.join(SUFFIXES)}, got {path}"
        )
    require({"matplotlib": "matplotlib"})


def write(path: str, rows: Sequence[tuple[str, Sequence[Cell]]]) -> None:
    """Write rows of images, each with what stands to the left of it, to a new file."""
    # The writer of PDF hides why a disk refuses, so that the picture is made before.
    picture = _drawn(Path(path).suffix[1:].lower(), rows)
    with new(Path(path)) as part:
        part.write_bytes(picture)


def _drawn(kind: str, rows: Sequence[tuple[str, Sequence[Cell]]]) -> bytes:
    from matplotlib.figure import Figure

    columns = max(len(cells) for _, cells in rows)
    lines = max(len(cell.title.splitlines()) for _, cells in rows for cell in cells)
    has_names = any(name for name, _ in rows)
    size = CELL * (columns + 0.8 * has_names), CELL * (1 + 0.2 * lines) * len(rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for (name, cells), of_row in zip(rows, axes, strict=True):
        of_row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for ax, cell in zip(of_row, cells, strict=False):
            ax.imshow(cell.image.convert("RGB"))
            title = cell.title.encode("utf-8", "backslashreplace").decode()
            ax.set_title(title, fontsize=8, parse_math=False)  # a name may hold dollars
            ax.set(xticks=[], yticks=[])
            for spine in ax.spines.values():
                spine.set(edgecolor=cell.frame, linewidth=3)
        for ax in of_row[len(cells) :]:
            ax.set_axis_off()
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # in names of other scripts
        figure.savefig(stream, format=kind, dpi=DOTS_PER_INCH)
    return stream.getvalue()
