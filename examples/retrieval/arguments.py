"""What several commands take: types of numbers, and flags."""

import argparse
from typing import Any, NoReturn

from .processes import DEVICES


class Parser(argparse.ArgumentParser):
    """argparse's parser, whose errors are one line, as all errors are."""

    def error(self, message: str) -> NoReturn:
        """Say it without the usage, which hides it, and exit."""
        self.exit(2, f"{self.prog}: error: {message}; {self.prog} --help lists the flags\n")


def _number(kind: type, text: str, holds: Any, expected: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not holds(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value


def positive(text: str) -> int:
    """Read a positive integer."""
    return _number(int, text, lambda x: x > 0, "a positive integer")


def natural(text: str) -> int:
    """Read an integer of 0 or more."""
    return _number(int, text, lambda x: x >= 0, "an integer of 0 or more")


def seed(text: str) -> int:
    """Read an integer from 0 to 2^62."""
    return _number(int, text, lambda x: 0 <= x < 2**62, "an integer from 0 to 2^62")


def positive_float(text: str) -> float:
    """Read a positive number."""
    return _number(float, text, lambda x: 0 < x < float("inf"), "a positive number")


def not_negative_float(text: str) -> float:
    """Read a number of 0 or more."""
    return _number(float, text, lambda x: 0 <= x < float("inf"), "a number of 0 or more")


def below_one(text: str) -> float:
    """Read a number from 0 to below 1."""
    return _number(float, text, lambda x: 0 <= x < 1, "a number from 0 to below 1")


# Flags of the commands that take an earlier run.
_FLAGS: dict[str, dict[str, Any]] = {
    "--data-root": {
        "metavar": "PATH",
        "help": "where the run's images, of a csv the table, are now",
    },
    "--device": {"default": "auto", "help": f"{DEVICES} (default auto)"},
    "--workers": {"type": natural, "default": 0, "help": "loader processes (default 0)"},
}


def parser_for_run(prog: str, description: str, *flags: str) -> Parser:
    """The command line of a command that takes an earlier run, with some of the common flags."""
    parser = Parser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="run folder")
    for flag in flags:
        parser.add_argument(flag, **_FLAGS[flag])
    return parser
