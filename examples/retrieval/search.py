"""Find the images of a folder that are most like given ones, by the network of a run.

    python examples/retrieval search RUN IMAGE --index FOLDER
    python examples/retrieval search RUN FOLDER_OF_IMAGES --index FOLDER --sheet found.png

The images below the folder are embedded once; the embeddings are kept in the run's folder, and
files that are new or have changed since are embedded the next time. Images are compared by cosine
similarity. A query that lies in the folder is not found itself.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import sheet
from .arguments import parser_for_run, positive
from .data import Sample
from .disk import new, write_csv
from .errors import UserError
from .image_tree import Skipped, read_trees
from .image_tree import summary as summary_of
from .index import Index, Neighbor
from .processes import find_device, say

ROWS_AT_MOST = 40  # of a sheet
NAME_AT_MOST = 20  # characters of a file's name that stand above its image


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
    if args.sheet:
        sheet.check(args.sheet)
    if args.csv and Path(args.csv).exists():
        raise UserError(f"--csv: {args.csv} exists; name a new file")
    skipped: list[Skipped] = []
    queries = _queries(Path(args.query), skipped)
    _say_skipped(skipped, args.query)
    index = Index(args.run, args.index, find_device(args.device), args.workers)
    _say_skipped(index.skipped, args.index)
    say(
        f"index: {len(index.files)} images below {args.index}, {index.embedded} embedded now, "
        f"{index.removed} removed; {index.kept}"
    )
    unread: list[Skipped] = []
    embeddings, places = index.embed(queries, unread)
    for x in unread:
        say(f"skipped {x.name}: {x.reason}")
    if not places:
        raise UserError(f"no image that can be read in {args.query}")
    queries = [queries[i] for i in places]
    found = index.nearest(queries, embeddings, args.k)
    if args.csv:
        with new(Path(args.csv)) as path:
            write_csv(path, _rows(queries, found))
    if args.sheet:
        sheet.write(args.sheet, _pictured(queries, found))
    for query, neighbors in zip(queries, found, strict=True):
        say(_line(query))
        say(*(_line(f"{i:4}  {x.similarity:.4f}  {x.name}") for i, x in enumerate(neighbors, 1)))
    return 0


def _line(text: str) -> str:
    return text.replace("\n", "\\n")  # in the name of a file


def _say_skipped(skipped: Sequence[Skipped], folder: str) -> None:
    if skipped:
        say(f"skipped {len(skipped)} files and folders below {folder}:", *summary_of(skipped))


def _queries(path: Path, skipped: list[Skipped]) -> list[str]:
    if path.is_file():
        return [str(path)]
    if not path.is_dir():
        raise UserError(f"expected an image or a folder of images to search for, got {path}")
    return [str(x.path) for x in read_trees([path], 0, skipped)[0]]


def _rows(queries: list[str], found: list[list[Neighbor]]) -> Iterator[tuple[Any, ...]]:
    yield "query", "rank", "image", "cosine similarity"
    for query, neighbors in zip(queries, found, strict=True):
        for place, x in enumerate(neighbors, 1):
            yield query, place, x.name, x.similarity


def _pictured(
    queries: list[str], found: list[list[Neighbor]]
) -> list[tuple[str, list[sheet.Cell]]]:
    """Rows of the sheet: a query and what was found for it."""
    if len(queries) > ROWS_AT_MOST:
        say(f"--sheet: the first {ROWS_AT_MOST} of {len(queries)} queries")
    return [
        ("", [_cell(query, "query"), *(_cell(x.name, f"{x.similarity:.3f}") for x in neighbors)])
        for query, neighbors in list(zip(queries, found, strict=True))[:ROWS_AT_MOST]
    ]


def _cell(name: str, title: str) -> sheet.Cell:
    file = "/".join(Path(name).parts[-2:])
    if len(file) > NAME_AT_MOST:
        file = "…" + file[1 - NAME_AT_MOST :]
    return sheet.Cell(Sample(name, "", Path(name)).open(), f"{title}\n{file}")
