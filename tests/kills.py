"""Programs that are killed at random moments, in processes that have imported everything already.

A program is divided into phases by its functions: one name while the function runs, and a name
from its end on. Narrow phases are hit by counting: SIGKILL comes at a random one of the calls and
returns (of Python and of C) that an undisturbed run has in the phase. Moments in the middle of a
call are hit by the clock.
"""

import itertools
import json
import multiprocessing
import os
import pkgutil
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from unittest import mock

START, END = "start", "end"
ANY = "by the clock"


class Program:
    """`main(*arguments)` in processes of its own.

    Args:
        main: `module:function`; it is called with a list of strings.
        phases: `module:class.function` -> the name of the phase; after the first it is `END`.
        folder: For what the processes print, and for the phase that they are in.
        imports: What the program imports late.
    """

    def __init__(self, main: str, phases: dict[str, str], folder: Path, imports: tuple[str, ...]):
        self.main, self.phases, self.folder = main, phases, folder
        self.context = multiprocessing.get_context("forkserver")
        modules = [name.partition(":")[0] for name in (main, *phases)]
        self.context.set_forkserver_preload([*imports, *modules])
        self.counts: dict[str, int] = {}
        self.seconds = 0.0

    def run(self, arguments: list, phase: str = "", moment: float = 0.0) -> str | None:
        """One run, killed at a moment of a phase (a share of an undisturbed run of it) or nowhere.

        Returns the phase in which it was killed, None if it came to its end before.
        """
        event = int(moment * self.counts.get(phase, 0)) + 1
        counted = phase in self.counts or not self.counts  # which takes time
        process = self.context.Process(
            target=_run,
            args=(self.main, [str(x) for x in arguments], self.phases, self.folder),
            kwargs={"phase": phase, "event": event, "counted": counted},
        )
        process.start()
        if phase == ANY:
            process.join(moment * self.seconds)
            process.kill()
        process.join(900)
        if process.exitcode == -signal.SIGKILL:
            return f"{phase}, {self.now()}" if phase == ANY else self.now()
        assert process.exitcode == 0, (self.folder / "output").read_text()[-6000:]
        return None

    def measure(self, arguments: list) -> None:
        """Run undisturbed, and count what a phase has."""
        imported = self.context.Process(target=time.sleep, args=(0,))
        imported.start()
        imported.join(900)
        begun = time.monotonic()
        assert self.run(arguments) is None
        self.seconds = time.monotonic() - begun
        self.counts = json.loads((self.folder / "counts").read_text())
        assert self.counts.keys() == {START, END, *self.phases.values()}

    def now(self) -> str:
        """The phase in which the last run is, or was when it ended."""
        return (self.folder / "phase").read_text().strip()

    def kill(self, arguments_of, kills: int, in_a_row: int, check) -> None:
        """Kill runs so often, each at most `in_a_row` times.

        `arguments_of(number)` makes those of a run that continues itself; when that has ended,
        `check(number)` is called.
        """
        phases = itertools.cycle([*self.counts, ANY])
        generator = random.Random(0)
        done: Counter[str] = Counter()
        for number in itertools.count():
            arguments = arguments_of(number)
            for _ in range(in_a_row):
                killed = self.run(arguments, next(phases), generator.random())
                if killed is None:
                    break
                done[killed] += 1
                if done.total() == kills:
                    break
            assert self.run(arguments) is None
            check(number)
            print(f"run {number}: {dict(done)}", flush=True)
            if done.total() >= kills:
                return


def _run(main, arguments, phases, folder, phase, event, counted):
    os.setsid()
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdout, sys.stderr = (open(x, "w", closefd=False) for x in (1, 2))
    place = os.open(folder / "phase", os.O_WRONLY | os.O_CREAT)
    now = ""

    def enter(name):
        nonlocal now
        before, now = now, name
        os.pwrite(place, name.ljust(40).encode(), 0)
        return before

    for name, its_phase in phases.items():
        _wrap(name, its_phase, name == next(iter(phases)), enter)
    enter(START)
    counts = Counter()

    def count(*_):
        counts[now] += 1
        if now == phase and counts[now] == event:
            os.kill(os.getpid(), signal.SIGKILL)

    call = pkgutil.resolve_name(main)
    if counted:
        sys.setprofile(count)
    try:
        code = call(arguments)
    finally:
        sys.setprofile(None)
    (folder / "counts").write_text(json.dumps(counts))
    sys.stdout.flush()
    os._exit(code or 0)


def _wrap(name, phase, is_last, enter):
    original = pkgutil.resolve_name(name)

    def in_phase(*args, **kwargs):
        before = enter(phase)
        try:
            return original(*args, **kwargs)
        finally:
            enter(END if is_last else before)

    mock.patch(name.replace(":", "."), in_phase).start()
