"""Find the images of a folder that are most like given ones, by the network of a run.

    python examples/retrieval search RUN IMAGE --index FOLDER
    python examples/retrieval search RUN FOLDER_OF_IMAGES --index FOLDER --sheet found.png

The images below the folder are embedded once; the embeddings are kept in the run's folder, and
files that are new or have changed since are embedded the next time. Images are compared by cosine
similarity. A query that lies in the folder is not found itself.
"""

import argparse
import csv
from pathlib import Path

from .arguments import natural, positive
from .data import Sample
from .errors import UserError
from .image_tree import Skipped, read_trees
from .image_tree import summary as summary_of
from .index import Index, Neighbor
from .processes import find_device, say

ROWS_AT_MOST = 40  # of a sheet


def parser(prog: str) -> argparse.ArgumentParser:
    """The command line."""
    flags = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("run", help="run folder")
    flags.add_argument("query", help="an image, or a folder of images")
    flags.add_argument("--index", required=True, metavar="FOLDER", help="where to search")
    flags.add_argument("-k", type=positive, default=10, help="how many to find (default 10)")
    flags.add_argument("--sheet", metavar="FILE", help="show them in a new picture, PNG or PDF")
    flags.add_argument("--csv", metavar="FILE", help="write them to a new table")
    flags.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    flags.add_argument("--workers", type=natural, default=0, help="loader processes (default 0)")
    return flags


def run(args: argparse.Namespace) -> int:
    """Search; returns the exit code."""
    for flag, path in (("--sheet", args.sheet), ("--csv", args.csv)):
        if path and Path(path).exists():
            raise UserError(f"{flag}: {path} exists; name a new file")
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
        _write_table(Path(args.csv), queries, found)
    if args.sheet:
        _draw(args.sheet, queries, found)
    for query, neighbors in zip(queries, found, strict=True):
        print(query)
        for place, x in enumerate(neighbors, 1):
            print(f"{place:4}  {x.similarity:.4f}  {x.name}")
    return 0


def _queries(path: Path) -> list[str]:
    if path.is_file():
        return [str(path)]
    if not path.is_dir():
        raise UserError(f"expected an image or a folder of images to search for, got {path}")
    return [str(x.path) for x in read_trees([path], 0, [])[0]]


def _write_table(path: Path, queries: list[str], found: list[list[Neighbor]]) -> None:
    with path.open("x", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["query", "rank", "image", "cosine similarity"])
        for query, neighbors in zip(queries, found, strict=True):
            for place, x in enumerate(neighbors, 1):
                writer.writerow([query, place, x.name, x.similarity])


def _draw(path: str, queries: list[str], found: list[list[Neighbor]]) -> None:
    """Show each query and what was found in a row."""
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
    figure.savefig(path, dpi=120)


def _show(ax, name: str, title: str) -> None:
    ax.imshow(Sample(name, "", Path(name)).open().convert("RGB"))
    ax.set_title(title, fontsize=8)
