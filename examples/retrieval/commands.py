"""The command line: one front for the commands, and what becomes of their errors."""

import argparse
import sys
import time
from importlib import import_module

from . import processes
from .errors import UserError
from .processes import rank, say

# A command is a module of this name, with `parser(prog)` and `run(args)`.
COMMANDS = {
    "train": "train an embedding and evaluate it on classes it has never seen",
    "report": "make report.html in a run's folder: a page of what was learned",
}


def main(argv: list[str] | None = None) -> int:
    """Run `python examples/retrieval COMMAND ...`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="retrieval",
        description="\n".join(f"{name:10}{text}" for name, text in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=list(COMMANDS), help="COMMAND --help says more")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command")
    args = parser.parse_args(argv)
    return run(args.command, args.arguments, f"retrieval {args.command}")


def run(command: str, argv: list[str] | None, prog: str) -> int:
    """Run one command, which calls itself `prog`; returns the exit code."""
    module = import_module(f".{command}", __package__)
    try:
        return module.run(module.parser(prog).parse_args(argv))
    except UserError as error:
        if rank() == 0 or not error.common or _is_from_loader(error):
            print(f"{prog}: error: {_one_line(error)}", file=sys.stderr, flush=True)
        else:
            time.sleep(2)  # torchrun ends all processes with the first; let rank 0 speak before
        return 2
    except KeyboardInterrupt:
        say("interrupted; a run whose folder exists continues with --resume FOLDER")
        return 130
    finally:
        processes.stop()


def _is_from_loader(error: UserError) -> bool:
    return "Original Traceback" in str(error)  # of the loader process, before the message


def _one_line(error: UserError) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].partition("UserError: ")[2] if _is_from_loader(error) else " ".join(lines)
