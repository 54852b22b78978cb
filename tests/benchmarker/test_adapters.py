"""The adapters by themselves, on the PML that is here; powerful-benchmarker need not be."""

import datetime
import functools
import inspect
import sqlite3

import pytest
import torch

from pml_pnp.benchmarker import adapters, requirements

if requirements.is_pinned():
    pytest.skip("there are none for PML 0.9", allow_module_level=True)

from pytorch_metric_learning import testers
from pytorch_metric_learning.utils import accuracy_calculator, common_functions, logging_presets


@pytest.fixture
def record_keepers(monkeypatch):
    """PML's factory of record keepers, adapted for the time of a test."""
    monkeypatch.setattr(logging_presets, "get_record_keeper", logging_presets.get_record_keeper)
    adapters.record_keepers()
    return functools.partial(logging_presets.get_record_keeper, save_figures=False)


def rows(folder, table):
    connection = sqlite3.connect(folder / "logs.db")
    connection.row_factory = sqlite3.Row
    return [dict(row) for row in connection.execute(f"SELECT * FROM {table}")]


def test_nothing_is_changed_before_it_is_asked_for():
    assert not hasattr(common_functions, "Identity")
    parameters = inspect.signature(logging_presets.get_record_keeper).parameters
    assert "save_figures" not in parameters


def test_every_change_is_made_once(monkeypatch):
    made = []
    for name in ("identity", "record_keepers", "ax_client", "missing_folders"):
        change = functools.partial(made.append, name)
        change.__name__ = name
        monkeypatch.setattr(adapters, name, change)
    monkeypatch.setattr(adapters, "_applied", set())
    adapters.apply(bayes_opt=False)
    adapters.apply(bayes_opt=True)
    adapters.apply(bayes_opt=True)
    assert made == ["identity", "record_keepers", "ax_client", "missing_folders"]


def test_of_the_pinned_pml_no_module_is_changed(monkeypatch):
    made = []
    for name in ("identity", "record_keepers", "ax_client", "missing_folders"):
        change = functools.partial(made.append, name)
        change.__name__ = name
        monkeypatch.setattr(adapters, name, change)
    monkeypatch.setattr(adapters, "is_pinned", lambda: True)
    monkeypatch.setattr(adapters, "_applied", set())
    adapters.apply(bayes_opt=True)
    assert made == ["ax_client", "missing_folders"]
    assert {kind for kind, _ in adapters.replacements()} == {"tester", "hook_container"}


def test_identity_is_torchs(monkeypatch):
    monkeypatch.setattr(common_functions, "Identity", None, raising=False)
    adapters.identity()
    assert common_functions.Identity is torch.nn.Identity


def test_a_record_keeper_takes_both_names_of_a_group(record_keepers, tmp_path):
    keeper, _, _ = record_keepers(str(tmp_path / "csv"), None)
    keeper.update_records({"a": 1.5}, 1, input_group_name_for_non_objects="old")
    keeper.update_records({"a": 2.5}, 1, parent_name="new")
    now = datetime.datetime(2026, 1, 2, 3, 4, 5)
    keeper.update_records({"when": now}, 1, input_group_name_for_non_objects="old")
    keeper.save_records()
    (old,), (new,) = (rows(tmp_path / "csv", t) for t in ("old", "new"))
    assert old["a"] == 1.5 and new["a"] == 2.5 and old["when"] == "2026-01-02 03:04:05"


def test_what_was_recorded_under_a_name_is_written_under_a_number(record_keepers, tmp_path):
    """As powerful-benchmarker records an ensemble: accuracies of "trained", then the rest of 3."""
    keeper, _, _ = record_keepers(str(tmp_path / "csv"), None)
    keeper.update_records({"precision_at_1": 0.5}, "trained", parent_name="ensemble")
    for record in ({"trained_status": "trained"}, {"timestamp": "now"}):
        keeper.update_records(record, 3, input_group_name_for_non_objects="ensemble")
    keeper.save_records()
    (row,) = rows(tmp_path / "csv", "ensemble")
    assert row["~iteration~"] == 3 and row["precision_at_1"] == 0.5
    assert row["trained_status"] == "trained"


def test_long_names_of_tables_are_kept(record_keepers, tmp_path):
    keeper, _, _ = record_keepers(str(tmp_path / "csv"), None)
    name = f"accuracies_{'_'.join(['long'] * 30)}_VAL"
    keeper.update_records({"a": 1}, 1, parent_name=name)
    keeper.save_records()
    assert rows(tmp_path / "csv", name)[0]["a"] == 1


TESTERS = [n for n, x in vars(testers).items() if inspect.isclass(x) and n != "BaseTester"]


@pytest.mark.parametrize("name", TESTERS)
def test_every_tester_keeps_its_name_and_takes_a_reference_set(name):
    tester = adapters.tester(getattr(testers, name))
    assert tester.__name__ == name and issubclass(tester, getattr(testers, name))
    assert tester(reference_set="compared_to_training_set").reference_set == (
        "compared_to_training_set"
    )
    with pytest.raises(ValueError, match="reference_set must be one of .* got 'all'"):
        tester(reference_set="all")


@pytest.mark.parametrize(
    ("reference_set", "expected"),
    [
        ("compared_to_self", [("train", ["train"]), ("val", ["val"])]),
        ("compared_to_sets_combined", [("train", ["train", "val"]), ("val", ["train", "val"])]),
        ("compared_to_training_set", [("train", ["train"]), ("val", ["train"])]),
    ],
)
def test_splits_by_name_become_queries_and_references(monkeypatch, reference_set, expected):
    seen = []
    base = testers.GlobalEmbeddingSpaceTester
    monkeypatch.setattr(base, "test", lambda *args: seen.append(args[5]))
    tester = adapters.tester(base)(reference_set=reference_set)
    sets = {"train": None, "val": None}
    tester.test(sets, 1, None)
    tester.test(sets, 1, None, splits_to_eval=["val"])
    tester.test(sets, 1, None, splits_to_eval=[("val", ["train"])])
    assert seen == [expected, expected[1:], [("val", ["train"])]]


def test_tables_are_named_before_any_test_and_as_by_the_pinned_pml():
    hooks = adapters.with_old_table_names(logging_presets.HookContainer)(None)
    tester = adapters.tester(testers.GlobalEmbeddingSpaceTester)
    names = [
        hooks.record_group_name(tester(reference_set=x), "val")
        for x in ("compared_to_self", "compared_to_training_set")
    ]
    assert names == [
        "accuracies_normalized_compared_to_self_GlobalEmbeddingSpaceTester_level_0_VAL",
        "accuracies_normalized_compared_to_training_set_GlobalEmbeddingSpaceTester_level_0_VAL",
    ]


def test_metrics_rank_as_far_as_they_look_unless_told_otherwise():
    calculator = adapters.accuracy_calculator()
    assert issubclass(calculator, accuracy_calculator.AccuracyCalculator)
    assert calculator().k == "max_bin_count" and calculator(k=5).k == 5


def test_without_a_reference_of_the_label_the_accuracy_is_0():
    x, y = torch.randn(6, 4), torch.arange(6) // 2
    metrics = ("precision_at_1", "mean_average_precision_at_r", "r_precision")
    calculator = adapters.accuracy_calculator()(include=metrics, device=torch.device("cpu"))
    assert calculator.get_accuracy(x, y, torch.randn(5, 4), y[:5] + 3) == dict.fromkeys(metrics, 0)
    assert calculator.get_accuracy(x, y, x, y)["precision_at_1"] == 1


def test_constant_dimensions_are_left_out_of_a_pca():
    embeddings = torch.nn.functional.pad(torch.randn(20, 3), (0, 2))
    tester = adapters.tester(testers.GlobalEmbeddingSpaceTester)(pca=2)
    assert tester.maybe_normalize(embeddings).shape == (20, 2)
    assert tester.maybe_normalize(embeddings).isfinite().all()


def test_the_parts_have_the_names_that_configs_say():
    parts = adapters.replacements()
    kinds = {"tester", "hook_container", "accuracy_calculator", "loss"}
    assert {kind for kind, _ in parts} == kinds
    names = {cls.__name__ for _, cls in parts}
    assert {"GlobalEmbeddingSpaceTester", "HookContainer", "AccuracyCalculator"} <= names


def test_register_puts_this_loss_and_the_parts_on_a_runner(monkeypatch):
    from pml_pnp import PNPLoss, benchmarker, losses

    monkeypatch.setattr(adapters, "replacements_of_pb", lambda: [("api_parser", dict)])
    registered = []

    class Runner:
        def register(self, kind, cls):
            registered.append((kind, cls))

    benchmarker.register(Runner())
    assert registered[0] == ("loss", PNPLoss) and registered[-1] == ("api_parser", dict)
    assert ("loss", losses.CrossBatchMemory) in registered
    assert len(registered) == 2 + len(adapters.replacements())
