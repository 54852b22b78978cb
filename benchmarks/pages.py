"""What makes pages of rows: reads CSV files, prints tables, replaces parts of pages."""

import io
import sys
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

END = "<!-- end -->"


def read(paths: Iterable[Path], **options) -> pd.DataFrame:
    """All rows of CSV files. A last line that is not whole, which a kill cut short, is left out.

    Args:
        paths: of the files.
        options: of `pandas.read_csv`.
    """
    texts = [path.read_text(encoding="utf-8") for path in paths]
    whole = [text[: text.rfind("\n") + 1] for text in texts]
    options = {"float_precision": "round_trip", **options}
    frames = [pd.read_csv(io.StringIO(text), **options) for text in whole if text]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def markdown(table: pd.DataFrame, corner: str | None = None, rule: str = "---") -> str:
    """A table whose cells are numbers with two digits, or text; the index is the first column.

    Args:
        table: to print; NaN is an empty cell.
        corner: head of the first column, by default the name of the index.
        rule: of a column, below its head.
    """

    def cell(value) -> str:
        if isinstance(value, str):
            return value
        return "" if pd.isna(value) else f"{value:.2f}"

    heads = [str(x) for x in (corner or table.index.name, *table.columns)]
    lines = [[str(i), *map(cell, row)] for i, row in zip(table.index, table.values, strict=True)]
    head, *body = ("| " + " | ".join(line) + " |" for line in (heads, *lines))
    return "\n".join([head, f"|{rule}" * len(heads) + "|", *body])


def fill(text: str, made: dict[str, str], script: str) -> str:
    """The text with every part made anew that it has markers for.

    Args:
        text: of a page.
        made: the parts, by the name in their markers.
        script: that makes them, as in their markers.
    """
    for name, part in made.items():
        begin = f"<!-- {name}, of {script} -->"
        before, found, rest = text.partition(begin)
        if found:
            text = f"{before}{begin}\n{part}\n{END}{rest.partition(END)[2]}"
    return text


def write(texts: dict[Path, str], check: bool) -> None:
    """Write the pages; or only check that they are so already.

    Raises:
        SystemExit: if `check` finds a page that is not so.
    """
    for page, text in texts.items():
        if not check:
            page.write_text(text, encoding="utf-8")
        elif not page.exists() or text != page.read_text(encoding="utf-8"):
            sys.exit(f"{page} is not what the rows say: run this without --check")


def pyplot():
    """Return matplotlib.pyplot, of which the same rows get the same SVG file."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "pml_pnp"
    from matplotlib import pyplot

    return pyplot
