"""The command line: one front for the commands, and what becomes of their errors."""

import argparse
import shlex
import sys
import time
import traceback
from importlib import import_module
from typing import TextIO

from . import processes, screen
from .arguments import Parser
from .errors import UserError
from .processes import rank
from .run_folder import RunFolder

# A command is a module of this name, with `parser(prog)` and `run(args)`.
COMMANDS = {
    "train": "train an embedding and evaluate it on classes it has never seen",
    "report": "make report.html in a run's folder: a page of what was learned",
    "search": "find the images of a folder that are most like given ones",
    "export": "write the network and its embeddings for use elsewhere",
    "compare": "a table over several runs",
}


def main(argv: list[str] | None = None) -> int:
    """Run `python examples/retrieval COMMAND ...`; returns the exit code."""
    parser = Parser(
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
    screen.start(silent=rank() > 0)
    try:
        return module.run(module.parser(prog).parse_args(argv)) or screen.exit_code()
    except UserError as error:
        if rank() == 0 or not error.common or _is_from_loader(error):
            _say_last(f"{prog}: error: {_one_line(error)}", sys.stderr)
        else:
            time.sleep(2)  # torchrun ends all processes with the first; let rank 0 speak before
        return 2
    except KeyboardInterrupt:
        if rank() == 0:
            run = screen.folder_of_log()
            resume = f"; continue with --resume {shlex.quote(str(run))}"
            known = run is not None and RunFolder.is_at(run)
            _say_last("interrupted" + (resume if known else ""), sys.stdout)
        return 130
    except Exception:
        screen.log_if_possible(traceback.format_exc())
        raise
    finally:
        screen.stop()
        processes.stop()


def _say_last(line: str, stream: TextIO) -> None:
    """Print and log, and do not fail for a full disk, of which the line may tell."""
    screen.write(line, stream)
    screen.log_if_possible(line)


def _is_from_loader(error: UserError) -> bool:
    return "Original Traceback" in str(error)  # of the loader process, before the message


def _one_line(error: UserError) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].partition("UserError: ")[2] if _is_from_loader(error) else " ".join(lines)
