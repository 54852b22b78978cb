"""From the logs of powerful-benchmarker to a table."""

import json
import sqlite3
import statistics
import sys

import benchmark
import pandas as pd
import pytest
import results_table
from results_table import METRICS


def write(path, table, rows):
    path.parent.mkdir(parents=True)
    with sqlite3.connect(path) as connection:
        pd.DataFrame(rows).to_sql(table, connection, index=False)


def accuracies(value):
    return {f"{metric}_level0": value for metric in METRICS}


@pytest.fixture
def command(monkeypatch, capsys):
    """What the command prints of a folder."""

    def run(folder):
        monkeypatch.setattr(sys, "argv", [results_table.__file__, str(folder)])
        results_table.main()
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def logs(tmp_path):
    """Two losses, two seeds, two folds; all metrics of a model are the same number."""
    for loss, best in (("good", 0.9), ("bad_one", 0.5)):
        for seed in (0, 1):
            experiment = tmp_path / f"{loss}-{seed}"
            (experiment / "configs").mkdir(parents=True)
            for fold in (0, 1):
                rows = [
                    {"epoch": -1, **accuracies(0.2)},
                    {"epoch": 0, **accuracies(0.3)},
                    {"epoch": 2, **accuracies(0.99)},  # evaluated before training went on
                    {"epoch": 4, **accuracies(best + 0.02 * seed + 0.01 * fold)},
                ]
                path = experiment / f"Test50_{fold}" / "saved_csvs" / "logs.db"
                write(path, "accuracies_normalized_GlobalEmbeddingSpaceTester_level_0_TEST", rows)
            found = {"untrained_trunk": 0.1, "trained": best + 0.05}
            rows = [{"epoch": x, "trained_status": x, **accuracies(v)} for x, v in found.items()]
            path = experiment / "meta_logs" / "saved_csvs" / "logs.db"
            write(path, "ConcatenateEmbeddings_accuracies_level_0_TEST", rows)
    return tmp_path


def test_rows_are_of_each_fold_trained_and_not_and_of_the_ensemble(logs):
    rows = list(results_table.rows_of(logs / "good-1", "good", 1))
    assert {str(row["epoch"]) for row in rows if row["models"] == "fold"} == {"4"}
    found = sorted((row["models"], round(row["precision_at_1"], 6)) for row in rows)
    assert found == [("ensemble", 0.95), ("fold", 0.92), ("fold", 0.93), *[("untrained", 0.3)] * 2]


def test_the_command_writes_rows_table_and_plot(logs, command):
    values = [90 + 2 * seed + fold for seed in (0, 1) for fold in (0, 1)]
    cell = f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
    lines = command(logs)
    assert lines[0].startswith("| loss | MAP@R, % | P@1, % | RP, % |")
    assert lines[2] == f"| good | {cell} | {cell} | {cell} | 95.0 ± 0.0 |"
    assert lines[3].startswith("| bad_one | 51.5 ")
    assert lines[4] == "| untrained | 30.0 ± 0.0 | 30.0 ± 0.0 | 30.0 ± 0.0 |  |"
    assert len((logs / "results.csv").read_text().splitlines()) == 1 + 2 * 2 * 5
    assert "<svg" in (logs / "results.svg").read_text()


def test_other_names_are_losses_as_they_are(logs, command):
    (logs / "good-0").rename(logs / "trial")
    (logs / "good-1").rename(logs / "my-trial")
    (logs / "nothing" / "configs").mkdir(parents=True)
    names = [line.split(" | ")[0] for line in command(logs)[2:]]
    assert names == ["| my-trial", "| trial", "| bad_one", "| untrained"]


def test_rows_say_where_and_when_they_were_made(logs):
    about = results_table.about("digits")
    assert about["torch"] and about["date"] and about["command"].startswith("python ")
    (logs / "good-1" / "finished.json").write_text(json.dumps({**about, "date": "2001-02-03"}))
    results_table.save(logs)
    rows = pd.read_csv(logs / "results.csv")
    rows = rows[(rows.loss == "good") & (rows.seed == 1)]
    assert {*rows.date} == {"2001-02-03"} and {*rows.torch} == {about["torch"]}


def test_a_benchmark_of_some_losses_keeps_the_rows_of_the_others(logs, monkeypatch, capsys):
    (logs / "experiments").mkdir()
    (logs / "experiments" / "digits").symlink_to(logs)
    for name in ("prepare", "_experiment"):
        monkeypatch.setattr(benchmark, name, lambda *args, **kwargs: None)
    monkeypatch.setattr(benchmark, "_runnable", lambda losses: losses)
    asked = ["--losses", "good", "--seeds", "1", "--output", str(logs / "experiments")]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *asked])
    benchmark.main()
    lines = capsys.readouterr().out.splitlines()[3:5]
    assert lines[0].startswith("| good | 92.5 ") and lines[1].startswith("| untrained | 30.0 ")
    assert len((logs / "results.csv").read_text().splitlines()) == 1 + 2 * 2 * 5


def test_a_folder_without_results_is_said_to_be_one(tmp_path, command):
    with pytest.raises(SystemExit, match=f"no experiment with test accuracies in {tmp_path}"):
        command(tmp_path)


def test_means_of_fewer_models_say_so(logs, command):
    assert "models" not in command(logs)[0]
    (database,) = (logs / "good-1" / "Test50_1").rglob("logs.db")
    with sqlite3.connect(database) as connection:  # a fold that broke off before its first test
        for (name,) in [*connection.execute("SELECT name FROM sqlite_master")]:
            connection.execute(f"DELETE FROM {name} WHERE CAST(epoch AS INT) > 0")
    head, _, *lines = command(logs)
    cells = [x.strip("| ").split(" | ") for x in (head, *lines)]
    column = cells[0].index("models")
    assert {x[0]: x[column] for x in cells[1:3]} == {"good": "3 of 4", "bad_one": "4 of 4"}
