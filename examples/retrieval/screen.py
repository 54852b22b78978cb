"""What is said: on the screen, and in the log of a run."""

import datetime
import functools
import os
import socket
import sys
import warnings
from pathlib import Path
from typing import TextIO

import tqdm

from .disk import writing
from .errors import UserError

_show_bar = tqdm.tqdm.__init__
_show_warning = warnings.showwarning
_log: Path | None = None
_kept: list[str] = []  # said before there was a log
_exit_code = 0
# A name of a file must not steer the terminal that it is shown on.
CONTROL = {x: f"\\x{x:02x}" for x in (*range(32), *range(127, 160)) if chr(x) not in "\t\n"}
UNREAD = 141  # 128 and the number of SIGPIPE, as a shell says it
UNWRITTEN = 1


def start(silent: bool) -> None:
    """Begin a command.

    Args:
        silent: Whether another process shows the progress bars. Without a terminal none are shown.
    """
    # The bars belong to PML's trainer and tester, which offer no switch for them.
    disable = True if silent else None  # None: unless stderr is a terminal
    tqdm.tqdm.__init__ = functools.partialmethod(_show_bar, disable=disable)
    warnings.showwarning = _warn
    _forget()


def stop() -> None:
    """End a command: what is said from now on is no longer logged."""
    tqdm.tqdm.__init__ = _show_bar
    warnings.showwarning = _show_warning
    _forget()


def show(line: str) -> None:
    """Print above any progress bar, and log it."""
    write(line, sys.stdout)
    log(line)


def write(line: str, stream: TextIO) -> None:
    """Print above any progress bar; nothing from when it cannot be written any more."""
    global _exit_code
    encoding = stream.encoding or "utf-8"  # which not every file name can be written in
    line = line.translate(CONTROL).encode(encoding, "backslashreplace").decode(encoding)
    try:
        tqdm.tqdm.write(line, file=stream)
        stream.flush()  # a kill, or who reads along, comes at any time
    except OSError as error:
        _exit_code = UNREAD if isinstance(error, BrokenPipeError) else UNWRITTEN
        # What is written or flushed from now on, at the latest when Python exits, goes nowhere.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        if _exit_code == UNWRITTEN and stream is not sys.stderr:
            write(f"cannot write the output: {error.strerror}", sys.stderr)


def exit_code() -> int:
    """141 if the reader of a pipe has gone, as `head` does; 1 for a full disk; 0 else."""
    return _exit_code


def folder_of_log() -> Path | None:
    """The folder of the run that is logged."""
    return _log and _log.parent


def log(text: str) -> None:
    """Append to the log of the run, or keep it until there is one."""
    if _log is None:
        _kept.append(text)
        return
    with writing(_log), _log.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text.translate(CONTROL) + "\n")


def log_if_possible(text: str) -> None:
    """Append the message of an error, which a log that cannot be written must not hide."""
    try:
        log(text)
    except UserError:
        pass


def log_to(path: Path) -> None:
    """Append to this file what was said since the command began, and all that follows."""
    global _log
    _log = path
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    log(f"--- {now}, process {os.getpid()} on {socket.gethostname()}")
    while _kept:
        log(_kept.pop(0))


def _forget() -> None:
    global _log, _exit_code
    _log, _exit_code = None, 0
    _kept.clear()


def _warn(message, category, filename, lineno, file=None, line=None) -> None:
    _show_warning(message, category, filename, lineno, file, line)
    log_if_possible(warnings.formatwarning(message, category, filename, lineno, line).rstrip())
