"""A run of benchmarks/measure.py over all of its parts, at sizes that take a moment."""

import sys

import pytest
from helpers import needs_built_in

pytest.importorskip("pandas", reason="the report needs pandas: pip install '.[benchmarks]'")
pytestmark = needs_built_in  # beside which PNPLoss is measured


@pytest.fixture(scope="module")
def measure(report):
    import measure

    with pytest.MonkeyPatch.context() as patch:
        tiny = {part: [(8, 4, 4)] for part in measure.SIZES}
        patch.setattr(measure, "SIZES", tiny)
        patch.setattr(measure, "QUEUE", 16)
        # A process of its own, and a compiler, take longer than the rest together.
        patch.setattr(measure, "number_of_process", lambda *_: 1024)
        patch.setattr(measure.torch, "compile", lambda f, **_: f)
        yield measure


@pytest.fixture(scope="module")
def rows(measure, report, tmp_path_factory):
    """Rows of every part but those for GPUs alone."""
    path = tmp_path_factory.mktemp("measure") / "rows.csv"
    parts = [part for part in measure.SIZES if part not in measure.ON_GPU_ALONE]
    arguments = ["--only", *parts, "--rounds", "1", "--seconds", "0.001", "--threads", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["measure.py", *arguments, "--output", str(path)])
        measure.main()
    return report.read([path])


def test_every_part_runs_and_writes_full_rows(measure, rows):
    assert {*rows.part} == set(measure.SIZES) - set(measure.ON_GPU_ALONE)
    assert {"SmoothAP", "SupAP", "RecallAtK", "SupConLoss"} <= {*rows.provider}
    assert (rows.peak_bytes.where(rows.part.str.startswith("memory"), rows.median_ms) > 0).all()
    assert rows[["hardware", "torch", "date"]].notna().all(axis=None)
    assert rows.command.str.contains("measure.py").all()


def test_every_loss_has_a_line_and_what_was_not_measured_is_not_mentioned(measure, rows, report):
    page = "\n\n".join(report.parts(rows).values())
    assert all(f"\n| {loss}" in page for loss in (*measure.PEERS, *measure.RESEARCH))
    parts = report.parts(rows[rows.part.isin(["small", "memory"])])
    assert list(parts) == ["cpu", "cpu losses", "cpu memory"]


def test_a_file_that_exists_is_not_overwritten(measure, monkeypatch, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("mine")
    monkeypatch.setattr(sys, "argv", ["measure.py", "--only", "small", "--output", str(path)])
    with pytest.raises(SystemExit, match="exists; name another"):
        measure.main()
    assert path.read_text() == "mine"


def test_what_a_step_asks_of_the_device_is_counted(measure):
    import launches

    device = measure.torch.device("cpu")
    floor, ours = (
        launches.count(measure.build(x, 8, 4, 4, device, "float32"), device)
        for x in (measure.FLOOR, measure.OURS)
    )
    assert 10 < floor.operators < ours.operators < 100
    assert floor.launches == ours.launches == 0
    assert floor.host_us > 0
