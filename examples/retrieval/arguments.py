"""Types of numbers that flags take, each with an error that says what was expected."""

import argparse
from typing import Any


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


def fraction(text: str) -> float:
    """Read a number between 0 and 1."""
    return _number(float, text, lambda x: 0 < x < 1, "a number between 0 and 1")
