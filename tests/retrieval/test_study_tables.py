"""The tables of docs/retrieval.md: what the numbers are, and that the page has them."""

import math

import pandas as pd
import pytest
import study_tables
from scipy import stats


def row(stage, loss, seed, value, dataset="tiny"):
    run = {"dataset": dataset, "stage": stage, "loss": loss, "setting": "", "seed": seed}
    run |= {"measured_on": "validation", "map_at_r": value, "parameters": "{}"}
    run |= {"precision_at_1": 0.9, "r_precision": 0.8, "steps": 3, "batch_size": 24}
    run |= {"machine": "a machine", "torch": "2.13.0", "pytorch-metric-learning": "2.9.0"}
    command = "python benchmarks/retrieval/run.py --dataset tiny --stages x"
    return {**run, "date": "2026-11-25", "command": command}


def test_every_table_of_the_pages_is_what_the_committed_rows_say():
    study_tables.publish(study_tables.PAGES, study_tables.parts(), study_tables.SCRIPT, check=True)


def test_the_interval_is_students():
    values = pd.Series([0.1, 0.2, 0.4])
    interval = stats.t.interval(0.95, 2, loc=sum(values) / 3, scale=stats.sem(values))
    assert study_tables.half_width(values) == pytest.approx((interval[1] - interval[0]) / 2)
    assert math.isnan(study_tables.half_width(values[:1]))


def test_losses_are_paired_by_seed():
    ours = pd.Series({1: 0.50, 2: 0.60, 3: 0.70, 4: 0.99})
    theirs = pd.Series({1: 0.49, 2: 0.57, 3: 0.68, 5: 0.0})
    more = {"one": theirs[:1], "same": ours, "larger": ours + 1}
    values = pd.DataFrame({"ours": ours, "theirs": theirs, **more})
    test = stats.ttest_1samp([0.01, 0.03, 0.02], 0)
    half = 100 * (test.confidence_interval(0.95).high - 0.02)
    found = study_tables.minus(values, "ours", "theirs")
    assert found == (f"+2.00 ± {half:.2f}", f"{test.pvalue:.3f}")
    for other in ("one", "ours", "missing"):
        assert study_tables.minus(values, "ours", other) == ("", "")
    assert study_tables.minus(values, "ours", "same") == ("+0.00 ± 0.00", "1.000")
    assert study_tables.minus(values, "larger", "ours") == ("+100.00 ± 0.00", "< 0.001")


def test_the_summary_is_of_the_losses_that_ran_everywhere_best_first():
    values = {
        "clinc150": {"PNP-Ds": 0.5, "SupCon": 0.4, "Triplet": 0.3, "ArcFace": 0.35},
        "grocery": {"PNP-Ds": 0.5, "SupCon": 0.4, "Triplet": 0.72},
    }
    rows = pd.DataFrame(
        row("untuned", loss, 1, value, dataset)
        for dataset, of_loss in values.items()
        for loss, value in of_loss.items()
    )
    header, _, *lines = study_tables.summary(rows, "untuned").splitlines()
    assert header == "| loss | CLINC150 | Grocery 64 | mean | least |"
    assert lines == [
        "| Triplet | -10.00 | +0.00 | -5.00 | -10.00 |",
        "| **PNP-Ds** | +10.00 | -22.00 | -6.00 | -22.00 |",
        "| SupCon | +0.00 | -32.00 | -16.00 | -32.00 |",
    ]


def test_the_picture_has_the_losses_that_ran_everywhere_and_is_the_same_for_the_same_rows(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("grocery", "omniglot"):
        losses = ("PNP-Ds", "SupCon", *["Circle"] * (name == "grocery"))
        rows = [row(stage, x, 1, 0.5, name) for stage in ("untuned", "tuned") for x in losses]
        pd.DataFrame(rows).to_csv(tmp_path / f"{name}.csv", index=False)
    for name in ("one.svg", "other.svg"):
        study_tables.picture(tmp_path, tmp_path / name)
    text = (tmp_path / "one.svg").read_text()
    assert text == (tmp_path / "other.svg").read_text()
    assert all(f"<!-- {x} -->" in text for x in ("PNP-Ds", "SupCon", "Grocery 64", "tuned"))
    assert "Circle" not in text


def test_no_rows_say_so():
    none = pd.DataFrame([row("", "", 1, 0)])[:0]
    for make in (*study_tables.PARTS.values(), study_tables.sums, study_tables.signal):
        assert make(none) == "No runs yet."


def test_of_runs_with_the_same_key_the_last_counts(tmp_path):
    rows = [row("untuned", "PNP-Ds", *x) for x in ((1, 0.5), (2, 0.5), (2, 0.6))]
    pd.DataFrame(rows).to_csv(tmp_path / "tiny.csv", index=False)
    assert study_tables.read_all(tmp_path).map_at_r.tolist() == [0.5, 0.6]


def test_the_gradients_are_those_of_the_formulas():
    header, _, *lines = study_tables.gradients().splitlines()
    column = [x.strip() for x in header.split("|")].index("R = 10")
    at_10 = {x.split("|")[1].strip(): float(x.split("|")[column]) for x in lines}
    slopes = {"O": 1, "Iu": math.log(11) + 1, "Ib": 10 / 21}
    slopes |= {"Ds": 1 / 11, "Dq": 11**-2, "Dq, alpha 4": 4 * 11**-5}
    assert at_10 == pytest.approx(slopes, rel=0.01)
