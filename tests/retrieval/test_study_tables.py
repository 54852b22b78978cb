"""The tables of docs/retrieval.md: what the numbers are, and that the page has them."""

import json
import math

import pandas as pd
import pytest
import study_tables
from scipy import stats


def row(stage, loss, seed, value, setting="", dataset="tiny", **parameters):
    run = {"dataset": dataset, "stage": stage, "loss": loss, "setting": setting, "seed": seed}
    run |= {"measured_on": "validation", "map_at_r": value, "parameters": json.dumps(parameters)}
    run |= {"precision_at_1": 0.9, "r_precision": 0.8, "steps": 3, "batch_size": 24}
    run |= {"machine": "a machine", "torch": "2.13.0", "pytorch-metric-learning": "2.9.0"}
    command = "python benchmarks/retrieval/run.py --dataset tiny --stages x"
    return {**run, "date": "2026-11-25", "command": command}


def made(part, rows, *more):
    """A part of the page, of these rows."""
    make = study_tables.PARTS.get(part) or getattr(study_tables, part)
    return make(pd.DataFrame(rows), *more)


def cells(table, loss):
    line = next(x for x in table.splitlines() if x.replace("*", "").startswith(f"| {loss} |"))
    return [x.strip() for x in line.strip("|").split("|")]


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


def test_a_final_table_compares_with_the_best_peer():
    rows = [row("untuned", "PNP-Ds", s, 0.5 + s / 100) for s in (1, 2, 3)]
    rows += [row("untuned", "SupCon", s, 0.4 + s / 50) for s in (1, 2, 3)]
    rows += [row("untuned", "Triplet", s, 0.1) for s in (1, 2, 3)]
    rows += [row("tuned", "SupCon", 1, 0.9)]
    table = made("untuned", rows)
    assert "MAP@R minus that of SupCon" in table
    half = 100 * stats.t.ppf(0.975, 2) * 0.01 / math.sqrt(3)
    assert cells(table, "PNP-Ds")[1] == f"52.00 ± {half:.2f}"
    assert cells(table, "PNP-Ds")[4:6] == ["3", f"+8.00 ± {half:.2f}"]
    assert cells(table, "SupCon")[5:] == ["", ""]
    positions = [table.index(f"| {x} ") for x in ("**PNP-Ds**", "SupCon", "Triplet")]
    assert positions == sorted(positions)


def test_the_conditions_of_a_table_are_a_command_for_all_its_losses_and_their_seeds():
    rows = [row("untuned", loss, 1, 0.5) for loss in ("PNP-Ds", "PNP-Ds, memory")]
    begin = "python benchmarks/retrieval/run.py --dataset tiny"
    rows[0]["command"] = f"{begin} --device cuda --seeds 5 --stages tune tuned"
    rows[1]["command"] = f"{begin} --stages untuned --losses 'PNP-Ds, memory' --device cuda"
    text = made("conditions", rows)
    assert text.count("python") == 1 and text.endswith(f", `{begin} --device cuda`")
    splits = made("conditions", [row("splits", "PNP-Ds", 1, 0.5)])
    assert splits.endswith("--dataset tiny --stages splits`")
    rows = [row("settings", "PNP-Ds", s, 0.5, "a") for s in (1, 2, 3)]
    rows += [row("settings", "PNP-Dq", 1, 0.5, "a")]
    text = made("conditions_of_probe", rows)
    assert text.startswith("MAP@R in percent on validation, 1 to 3 seeds, 3 steps, on a machine, ")
    assert text.endswith("--dataset tiny --stages settings --probe-seeds 3`")
    assert ", 3 seeds, " in made("conditions_of_probe", rows[:3])


def test_what_is_without_training_stands_beside_a_table_of_the_same_split():
    rows = [row(x, "SupCon", 1, 0.4) for x in ("untuned", "splits")]
    rows += [row("untrained", "untrained", 1, 0.25)]
    assert "; without training MAP@R 25.00, precision@1 90.00," in made("untuned", rows)
    assert "without training" not in made("splits", rows)


def test_the_summary_is_of_the_losses_that_ran_everywhere_best_first():
    values = {
        "clinc150": {"PNP-Ds": 0.5, "SupCon": 0.4, "Triplet": 0.3, "ArcFace": 0.35},
        "grocery": {"PNP-Ds": 0.5, "SupCon": 0.4, "Triplet": 0.72},
    }
    rows = [
        row("untuned", loss, 1, value, dataset=dataset)
        for dataset, of_loss in values.items()
        for loss, value in of_loss.items()
    ]
    header, _, *lines = made("summary", rows, "untuned").splitlines()
    assert header == "| loss | CLINC150 | Grocery 64 | mean | least |"
    assert lines == [
        "| Triplet | -10.00 | +0.00 | -5.00 | -10.00 |",
        "| **PNP-Ds** | +10.00 | -22.00 | -6.00 | -22.00 |",
        "| SupCon | +0.00 | -32.00 | -16.00 | -32.00 |",
    ]
    assert made("summary", rows, "tuned") == "No runs yet."


def test_the_summary_leaves_out_what_lacks_a_seed_and_tuning_with_the_transformer():
    rows = [row("untuned", "SupCon", s, 0.4) for s in (1, 2)] + [row("untuned", "Circle", 1, 0.9)]
    assert "Circle" not in made("summary", rows, "untuned")
    sets = ("clinc150", "clinc150_transformer")  # with which few losses are tuned
    rows = [row("tuned", "SupCon", 1, 0.4, dataset=dataset) for dataset in sets]
    assert made("summary", rows, "tuned").startswith("| loss | CLINC150 | mean |")
    assert made("summary", rows, "untuned") == "No runs yet."


def test_a_sum_is_compared_with_its_part_seed_by_seed():
    both = [row("untuned", "PNP-Ds + Contrastive", s, 0.5 + s / 100) for s in (1, 2, 3)]
    alone = [row("untuned", "Contrastive", s, 0.4 + s / 50) for s in (1, 2, 3)]
    _, _, line = made("sums", both + alone).splitlines()
    half = 100 * stats.t.ppf(0.975, 2) * 0.01 / math.sqrt(3)
    p = stats.ttest_1samp([0.09, 0.08, 0.07], 0).pvalue
    assert line == (
        f"| PNP-Ds + Contrastive | Contrastive | untuned | +8.00 ± {half:.2f} (p = {p:.3f}) |"
    )


def test_the_picture_has_every_loss_and_is_the_same_for_the_same_rows(tmp_path):
    pytest.importorskip("matplotlib")
    more = [(stage, "Circle") for stage in ("untuned", "tuned")]
    for name, runs in {"grocery": [*FINAL, *more], "omniglot": FINAL}.items():
        rows = [row(*run, s, 0.5, dataset=name) for run in runs for s in (1, 2)]
        pd.DataFrame(rows).to_csv(tmp_path / f"{name}.csv", index=False)
    for name in ("one.svg", "other.svg"):
        study_tables.picture(tmp_path, tmp_path / name)
    text = (tmp_path / "one.svg").read_text()
    assert text == (tmp_path / "other.svg").read_text()
    assert all(f"<!-- {x} -->" in text for x in ("PNP-Ds", "SupCon", "Grocery 64", "tuned"))
    assert "Circle" not in text  # which did not run on both data sets


FINAL = (("untuned", "PNP-Ds"), ("untuned", "SupCon"), ("tuned", "SupCon"))


def test_the_tuned_table_has_the_setting_and_trials_are_counted_from_the_default():
    rows = [row("tuned", "PNP-Ds", 1, 0.5, anneal=0.0512345, memory_size=1024)]
    assert cells(made("tuned", rows), "PNP-Ds")[-1] == "anneal 0.0512, memory_size 1024"
    rows = [row("tune", "PNP-Ds", 0, v, str(i)) for i, v in ((1, 0.3), (0, 0.2), (2, 0.1))]
    assert cells(made("trials", rows), "PNP-Ds") == ["**PNP-Ds**", "3", "20.00", "30.00"]


def test_the_temperatures_are_columns():
    rows = [row("temperature", "PNP-Dq", s, 0.5, "alpha 4, 0.05") for s in (1, 2)]
    rows += [row("temperature", "PNP-Dq", 1, 0.4, "0.01")]
    rows += [row("temperature", "PNP-Dq auto 1/2", 1, 0.3, "0.25")]
    table = made("temperature", rows)
    assert "| loss | 0.01 | 0.05 | 0.25 σ |" in table
    assert cells(table, "PNP-Dq alpha 4") == ["PNP-Dq alpha 4", "", "50.00 ± 0.00", ""]
    assert cells(table, "PNP-Dq, of the batch") == ["PNP-Dq, of the batch", "", "", "30.00"]


def test_no_rows_say_so():
    none = pd.DataFrame([row("", "", 1, 0)])[:0]
    assert all(make(none).startswith("No ") for make in study_tables.PARTS.values())


def test_the_parts_are_made_of_the_rows_of_a_folder_in_which_a_run_counts_once(tmp_path):
    """Runs tuned over a wider range have tables of their own."""
    untuned = [row("untuned", "PNP-Ds", s, 0.5) for s in (1, 2, 2)]  # one by two processes
    tuned, longer = row("tuned", "SupCon", 1, 0.25), row("longer", "SupCon", 1, 0.5)
    (tmp_path / "wider").mkdir()
    for name, rows in (("tiny.csv", [*untuned, tuned]), ("wider/tiny.csv", [tuned, longer])):
        pd.DataFrame(rows).to_csv(tmp_path / name, index=False)
    with (tmp_path / "tiny.csv").open("a") as file:
        file.write("tiny,untuned,PNP-")  # a run that is being written
    signal = study_tables.RESULTS / study_tables.SIGNAL
    (tmp_path / study_tables.SIGNAL).write_bytes(signal.read_bytes())
    assert study_tables.read_all(tmp_path).seed.tolist() == [1, 2, 1]
    parts = study_tables.parts(tmp_path)
    assert "| **PNP-Ds** | 50.00 ± 0.00 | 90.00" in parts["tiny untuned"]
    assert "| SupCon | 25.00 |" in parts["tiny wider tuned"]
    assert "| SupCon | 50.00 |" in parts["tiny wider longer"]
    assert "tiny longer" not in parts  # where no run is of more steps


def test_pnp_is_compared_with_smooth_ap_over_the_seeds_of_both():
    rows = [row("untuned", "SmoothAP", s, 0.5 + s / 100) for s in (1, 2, 3)]
    rows += [row("untuned", "PNP-O", s, 0.4 + s / 100) for s in (2, 3, 4)]
    rows += [row("temperature", "PNP-Ds", s, 0.9) for s in (1, 2, 3)]
    rows += [{**r, "dataset": "without"} for r in rows[3:]]
    table = made("positives_before", rows)
    found = cells(table, "tiny")
    assert found[1:3] == ["52.00 ± 2.48", "-10.00 ± 0.00"]
    assert found[4:] == [""] * 4
    assert "without" not in table


def test_the_temperature_of_the_batch_is_compared_with_the_best_fixed_one():
    rows = [row("temperature", "PNP-Ds", s, 0.5 + s / 100, "0.01") for s in (1, 2, 3)]
    rows += [row("temperature", "PNP-Ds", s, 0.6 + s / 100, "0.05") for s in (1, 2, 3)]
    values = {1: 0.62, 2: 0.64, 3: 0.63}
    rows += [row("temperature", "PNP-Ds auto 1/2", s, values[s], "0.25") for s in (1, 2, 3)]
    rows += [row("temperature", "PNP-Dq", s, 0.9, "alpha 4.0, 0.05") for s in (1, 2, 3)]
    table = made("anneal_of_the_batch", rows)
    found = cells(table, "tiny")
    assert found[1:4] == ["PNP-Ds", "0.05", "62.00 ± 2.48"]
    shares = dict(zip(study_tables.AUTO_SHARES, found[4::2], strict=True))
    assert shares["0.25"].startswith("+1.00 ± ")
    assert shares["0.5"] == ""
    assert "PNP-Dq" not in table  # no temperature of the batch was tried with it


def test_the_gradients_are_those_of_the_formulas():
    header, _, *lines = study_tables.gradients().splitlines()
    column = [x.strip() for x in header.split("|")].index("R = 10")
    at_10 = {x.split("|")[1].strip(): float(x.split("|")[column]) for x in lines}
    slopes = {"O": 1, "Iu": math.log(11) + 1, "Ib": 10 / 21}
    slopes |= {"Ds": 1 / 11, "Dq": 11**-2, "Dq, alpha 4": 4 * 11**-5}
    assert at_10 == pytest.approx(slopes, rel=0.01)


def test_settings_are_compared_with_the_default():
    rows = [row("settings", "PNP-Ds", s, 0.5 + s / 100, "include_self True") for s in (1, 2)]
    rows += [row("settings", "PNP-Dq", s, 0.51 + s / 50, "alpha 2.0") for s in (1, 2)]
    table = made("settings", rows)
    assert cells(table, "PNP-Ds, include_self True")[4:] == ["", ""]
    assert cells(table, "PNP-Dq, alpha 2.0")[4].startswith("+2.50 ± ")


def test_larger_batches_are_compared_with_the_smallest():
    rows = [row("batch", "PNP-O", s, 0.5 + s / 100, "7 x 4") for s in (1, 2)]
    rows += [row("batch", "PNP-O", s, 0.51 + s / 50, "28 x 4") for s in (1, 2)]
    table = made("batch", rows)
    assert "| 28 x 4 minus 7 x 4 | p |" in table
    assert "14 x 16 minus" not in table
    assert cells(table, "PNP-O")[3].startswith("+2.50 ± ")


def test_losses_on_coarse_labels_are_compared_with_the_one_that_blurs():
    rows = [row("coarse", "PNP-Iu", s, 0.5 + s / 100, "anneal 0.05") for s in (1, 2)]
    rows += [row("coarse", "PNP-Ds", s, 0.51 + s / 50, "anneal 0.05") for s in (1, 2)]
    rows += [row("coarse", "untrained", s, 0.6) for s in (1, 2)]
    table = made("coarse", rows)
    assert cells(table, "PNP-Ds, anneal 0.05")[4].startswith("+2.50 ± ")
    assert cells(table, "PNP-Iu, anneal 0.05")[4:] == ["", ""]
    assert table.index("untrained") < table.index("| PNP-Ds")
