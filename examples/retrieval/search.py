"""Find the images of a folder that are most like given ones, by the network of a run.

    python examples/retrieval search RUN IMAGE --index FOLDER
    python examples/retrieval search RUN FOLDER_OF_IMAGES --index FOLDER --sheet found.png

The images below the folder are embedded once; the embeddings are kept in the run's folder, and
files that are new or have changed since are embedded the next time. Images are compared by cosine
similarity. A query that lies in the folder is not found itself.
"""

import argparse
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .arguments import parser_for_run, positive
from .data import Sample
from .disk import new, write_csv
from .errors import UserError, require
from .image_tree import Skipped, read_trees
from .image_tree import summary as summary_of
from .index import Index, Neighbor
from .processes import find_device, say

ROWS_AT_MOST = 40  # of a sheet
PICTURES = (".png", ".pdf")


def parser(prog: str) -> argparse.ArgumentParser:
    """The command line."""
    flags = parser_for_run(prog, __doc__, "--device", "--workers")
    flags.add_argument("query", help="an image, or a folder of images")
    flags.add_argument("--index", required=True, metavar="FOLDER", help="where to search")
    flags.add_argument("-k", type=positive, default=10, help="how many to find (default 10)")
    flags.add_argument("--sheet", metavar="FILE", help="show them in a new picture, PNG or PDF")
    flags.add_argument("--csv", metavar="FILE", help="write them to a new table")
    return flags


def run(args: argparse.Namespace) -> int:
    """Search; returns the exit code."""
    for flag, path in (("--sheet", args.sheet), ("--csv", args.csv)):
        if path and Path(path).exists():
            raise UserError(f"{flag}: {path} exists; name a new file")
    if args.sheet:
        if Path(args.sheet).suffix.lower() not in PICTURES:
            expected = " or ".join(PICTURES)
            raise UserError(f"--sheet: expected a name that ends in {expected}, got {args.sheet}")
        require({"matplotlib": "matplotlib"})
    queries = _queries(Path(args.query))
    index = Index(args.run, args.index, find_device(args.device), args.workers)
    if index.skipped:
        say(f"skipped {len(index.skipped)} files and folders:", *summary_of(index.skipped))
    say(
        f"index: {len(index.files)} images below {args.index}, {index.embedded} embedded now, "
        f"{index.removed} removed; kept in {index.run.path / index.name}"
    )
    skipped: list[Skipped] = []
    embeddings, places = index.embed(queries, skipped)
    for x in skipped:
        say(f"skipped {x.name}: {x.reason}")
    if not places:
        raise UserError(f"no image that can be read in {args.query}")
    queries = [queries[i] for i in places]
    found = index.nearest(queries, embeddings, args.k)
    if args.csv:
        with new(Path(args.csv)) as path:
            write_csv(path, _rows(queries, found))
    if args.sheet:
        # The writer of PDF hides why a disk refuses, so that the picture is made before.
        picture = _drawn(Path(args.sheet).suffix[1:], queries, found)
        with new(Path(args.sheet)) as path:
            path.write_bytes(picture)
    for query, neighbors in zip(queries, found, strict=True):
        say(query, *(f"{i:4}  {x.similarity:.4f}  {x.name}" for i, x in enumerate(neighbors, 1)))
    return 0


def _queries(path: Path) -> list[str]:
    if path.is_file():
        return [str(path)]
    if not path.is_dir():
        raise UserError(f"expected an image or a folder of images to search for, got {path}")
    return [str(x.path) for x in read_trees([path], 0, [])[0]]


def _rows(queries: list[str], found: list[list[Neighbor]]) -> Iterator[tuple[Any, ...]]:
    yield "query", "rank", "image", "cosine similarity"
    for query, neighbors in zip(queries, found, strict=True):
        for place, x in enumerate(neighbors, 1):
            yield query, place, x.name, x.similarity


def _drawn(kind: str, queries: list[str], found: list[list[Neighbor]]) -> bytes:
    """A picture that shows each query and what was found in a row."""
    from matplotlib.figure import Figure

    if len(queries) > ROWS_AT_MOST:
        say(f"--sheet: the first {ROWS_AT_MOST} of {len(queries)} queries")
    rows = list(zip(queries, found, strict=True))[:ROWS_AT_MOST]
    columns = 1 + max(len(neighbors) for _, neighbors in rows)
    figure = Figure(figsize=(1.3 * columns, 1.6 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for (query, neighbors), (first, *others) in zip(rows, axes, strict=True):
        _show(first, query, "query")
        for ax, x in zip(others, neighbors, strict=False):
            _show(ax, x.name, f"{x.similarity:.3f}")
    stream = io.BytesIO()
    figure.savefig(stream, format=kind, dpi=120)
    return stream.getvalue()


def _show(ax, name: str, title: str) -> None:
    ax.imshow(Sample(name, "", Path(name)).open().convert("RGB"))
    ax.set_title(title, fontsize=8)
