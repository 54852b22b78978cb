"""What the benchmarks share: times and memory of steps, and rows about them in a CSV file."""

import csv
import datetime
import io
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import tqdm
from torch.utils.benchmark import Timer

RESULTS = Path(__file__).parent / "results"
TIMES = ("median_ms", "q20_ms", "q80_ms", "repeats")
MACHINE = (
    "hardware",
    "threads",
    "python",
    "torch",
    "pytorch_metric_learning",
    "pml_pnp",
    "date",
    "command",
)
Step = Callable[[], object]


def times_in_turn(
    steps: dict[str, Step], rounds: int, seconds: float
) -> Iterator[tuple[str, dict[str, str | int]]]:
    """Time of each step, all of them measured in turn, several times around."""
    timers = {
        provider: Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
        for provider, step in steps.items()
    }
    times = {provider: [] for provider in steps}
    for timer in timers.values():
        timer.timeit(1)
    for _ in range(rounds):
        for provider, timer in timers.items():
            times[provider] += timer.blocked_autorange(min_run_time=seconds).times
    for provider, t in times.items():
        low, *_, high = statistics.quantiles(t, n=5) if len(t) > 1 else (t[0], t[0])
        quantiles = {"median_ms": statistics.median(t), "q20_ms": low, "q80_ms": high}
        yield provider, {**{k: f"{1e3 * v:.4g}" for k, v in quantiles.items()}, "repeats": len(t)}


def number_of_process(script: str, *arguments: object) -> int:
    """The number that a script prints, from a process in which nothing else has been done."""
    command = [sys.executable, script, *map(str, arguments)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_bytes(step: Step, device: torch.device) -> int:
    """Peak memory of a step beyond what is there before it; once a process on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.max_memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    before = _resident_peak()
    step()
    return _resident_peak() - before


def _resident_peak() -> int:
    """Most bytes of memory this process has had; its parent's do not count."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def machine(device: torch.device, script: str) -> dict[str, str | int]:
    """Where a row was measured, and by which command."""
    return {
        "hardware": _hardware(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pytorch_metric_learning": metadata.version("pytorch-metric-learning"),
        "pml_pnp": metadata.version("pml_pnp"),
        "date": str(datetime.date.today()),
        "command": shlex.join(["python", f"benchmarks/{Path(script).name}", *sys.argv[1:]]),
    }


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {os.cpu_count()} cores"


def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def new_file(folder: Path, given: Path | None, device: torch.device, append: bool) -> Path:
    """The file to write to: the given one, or one named for device and date.

    Raises:
        SystemExit: If it exists, and rows shall not be appended.
    """
    path = given or folder / f"{device.type}-{datetime.date.today()}.csv"
    if path.exists() and not append:
        raise SystemExit(f"{path} exists; name another with --output, or --append to it")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def add(path: Path, row: dict[str, Any]) -> None:
    """Append a row in one write, so that two processes can share the file.

    A new file gets the row's keys as its header. A last line that a kill cut short is removed.

    Raises:
        SystemExit: If the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_bytes() if path.exists() else b""
    header, line = (_line(values) for values in (row, row.values()))
    if not (text.startswith(header) or header.startswith(text)):
        raise SystemExit(f"{path} has other columns than {', '.join(row)}")
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        os.truncate(path, whole)
    with path.open("ab", buffering=0) as file:
        file.write(line if whole else header + line)


def _line(values: Iterable) -> bytes:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue().encode()


def write(path: Path, columns: Iterable[str], rows: Iterable[dict], label: str) -> None:
    """Add rows as they come; `label` is a format string of what to print of each."""
    for row in rows:
        add(path, {**dict.fromkeys(columns, ""), **row})
        shown = row.get("median_ms") or f"{row['peak_bytes'] / 2**20:.0f} MiB"
        tqdm.tqdm.write(f"{label.format(**row)} {shown}")
