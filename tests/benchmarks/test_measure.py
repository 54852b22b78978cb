"""A run of benchmarks/measure.py over all of its parts, at sizes that take a moment."""

import csv
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import measure

    tiny = {part: [(8, 4, 4)] for part in measure.SIZES}
    monkeypatch.setattr(measure, "SIZES", tiny)
    monkeypatch.setattr(measure, "QUEUE", 16)
    # A process of its own, and a compiler, take longer than the rest together.
    monkeypatch.setattr(measure, "number_of_process", lambda *_: 1024)
    monkeypatch.setattr(measure.torch, "compile", lambda f, **_: f)
    return measure


def test_every_part_runs_and_writes_full_rows(measure, monkeypatch, tmp_path):
    path = tmp_path / "rows.csv"
    parts = [part for part in measure.SIZES if part not in measure.ON_GPU_ALONE]
    arguments = ["--only", *parts, "--rounds", "1", "--seconds", "0.001", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["measure.py", *arguments, "--output", str(path)])
    measure.main()
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["part"] for row in rows} == set(parts)
    assert {"SmoothAP", "SupAP", "RecallAtK", "SupConLoss"} <= {row["provider"] for row in rows}
    for row in rows:
        assert float(row["peak_bytes" if row["part"].startswith("memory") else "median_ms"]) > 0
        assert row["hardware"] and row["torch"] and row["date"] and "measure.py" in row["command"]


def test_a_file_that_exists_is_not_overwritten(measure, monkeypatch, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("mine")
    monkeypatch.setattr(sys, "argv", ["measure.py", "--only", "small", "--output", str(path)])
    with pytest.raises(SystemExit, match="exists; name another"):
        measure.main()
    assert path.read_text() == "mine"
