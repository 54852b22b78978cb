"""What makes pages of rows: reads CSV files, prints tables, replaces parts of pages."""

import io
import re
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


def markdown(table: pd.DataFrame, corner: str | None = None) -> str:
    """A table whose first columns are its index; fractions have two digits.

    Args:
        table: to print; NaN is an empty cell.
        corner: head of the first column, by default the name of the index.
    """

    def cell(value) -> str:
        if pd.isna(value):
            return ""
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    flat = table.rename_axis(corner or table.index.names).reset_index(allow_duplicates=True)
    lines = [[*flat.columns], *flat.itertuples(index=False)]
    head, *body = ("| " + " | ".join(map(cell, line)) + " |" for line in lines)
    return "\n".join([head, "|---" * len(flat.columns) + "|", *body])


def where(rows: pd.DataFrame, machine: str = "hardware") -> str:
    """Machines, versions, dates and commands of rows.

    Args:
        rows: measured.
        machine: the column of it.
    """
    machines = (rows[machine] + ", torch " + rows.torch).unique()
    pml = rows.filter(regex="^pytorch.metric.learning$").iloc[-1, 0]
    dates = " to ".join(sorted({rows.date.min(), rows.date.max()}))
    commands = ", ".join(f"`{x}`" for x in rows.command.unique())
    return f"{', and on '.join(machines)}, PML {pml}, {dates}, {commands}"


def publish(pages: Iterable[Path], made: dict[str, str], script: str, check: bool = False) -> None:
    """Write the made parts between their markers; or only check that they are there already.

    Args:
        pages: that have markers.
        made: the parts, by the name in their markers.
        script: that makes them, as in their markers.
        check: write nothing.

    Raises:
        SystemExit: if nothing is made for a marker, or `check` finds another text there.
    """
    marker = re.compile(rf"(<!-- (.+), of {re.escape(script)} -->\n)")
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    for page, old in texts.items():
        for begin, name in marker.findall(old):
            before, _, rest = texts[page].partition(begin)
            _, end, after = rest.partition(END)
            if name not in made or not end:
                sys.exit(f"{page}: {begin.strip()} has no rows, or no {END}")
            texts[page] = f"{before}{begin}{made[name]}\n{END}{after}"
        if check and texts[page] != old:
            sys.exit(f"{page} is not what the rows say: run this without --check")
    if not check:
        for page, text in texts.items():
            page.write_text(text, encoding="utf-8")


def pyplot():
    """Return matplotlib.pyplot, of which the same rows get the same SVG file."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "pml_pnp"
    from matplotlib import pyplot

    return pyplot
