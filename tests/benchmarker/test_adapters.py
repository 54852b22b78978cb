"""The adapters by themselves, on the PML that is here; powerful-benchmarker need not be."""

import datetime
import functools
import inspect
import types

import pytest
import torch
from helpers import sql_rows

from pml_pnp.benchmarker import adapters, requirements

if requirements.is_pinned():
    pytest.skip("there are none for PML 0.9", allow_module_level=True)

from pytorch_metric_learning import testers
from pytorch_metric_learning.utils import accuracy_calculator, common_functions, logging_presets


@pytest.fixture
def keeper(monkeypatch, tmp_path):
    """Of PML's factory of record keepers, adapted for the time of a test."""
    monkeypatch.setattr(logging_presets, "get_record_keeper", logging_presets.get_record_keeper)
    adapters.record_keepers()
    keeper, _, _ = logging_presets.get_record_keeper(str(tmp_path), None, save_figures=False)
    return keeper


def test_nothing_is_changed_before_it_is_asked_for(monkeypatch):
    assert not hasattr(common_functions, "Identity")
    parameters = inspect.signature(logging_presets.get_record_keeper).parameters
    assert "save_figures" not in parameters
    monkeypatch.setattr(common_functions, "Identity", None, raising=False)
    adapters.identity()
    assert common_functions.Identity is torch.nn.Identity


@pytest.mark.parametrize(
    ("pinned", "of_pml", "kinds"),
    [
        (False, ["identity", "record_keepers"], {"accuracy_calculator", "loss"}),
        (True, [], set()),
    ],
)
def test_every_change_is_made_once_and_to_the_pinned_pml_none(monkeypatch, pinned, of_pml, kinds):
    made = []
    for name in ("identity", "record_keepers", "ax_client", "missing_folders"):
        change = functools.partial(made.append, name)
        change.__name__ = name
        monkeypatch.setattr(adapters, name, change)
    monkeypatch.setattr(adapters, "_applied", set())
    monkeypatch.setattr(adapters, "is_pinned", lambda: pinned)
    for bayes_opt in (False, True, True):
        adapters.apply(bayes_opt)
    assert made == [*of_pml, "ax_client", "missing_folders"]
    assert {kind for kind, _ in adapters.replacements()} == {"tester", "hook_container", *kinds}


def test_a_record_keeper_takes_both_names_of_a_group_and_keeps_long_ones(keeper, tmp_path):
    long = f"accuracies_{'_'.join(['long'] * 30)}_VAL"
    now = datetime.datetime(2026, 1, 2, 3, 4, 5)
    keeper.update_records({"a": 1.5}, 1, input_group_name_for_non_objects="old")
    keeper.update_records({"when": now}, 1, input_group_name_for_non_objects="old")
    keeper.update_records({"a": 2.5}, 1, parent_name="new")
    keeper.update_records({"a": 1}, 1, parent_name=long)
    keeper.save_records()
    (old,), (new,), (last,) = (sql_rows(tmp_path / "logs.db", x) for x in ("old", "new", long))
    assert (old["a"], new["a"], last["a"]) == (1.5, 2.5, 1)
    assert old["when"] == "2026-01-02 03:04:05"


def test_what_was_recorded_under_a_name_is_written_under_a_number(keeper, tmp_path):
    """As powerful-benchmarker records an ensemble: accuracies of "trained", then the rest of 3."""
    keeper.update_records({"precision_at_1": 0.5}, "trained", parent_name="ensemble")
    for record in ({"trained_status": "trained"}, {"timestamp": "now"}):
        keeper.update_records(record, 3, input_group_name_for_non_objects="ensemble")
    keeper.save_records()
    (row,) = sql_rows(tmp_path / "logs.db", "ensemble")
    assert row["~iteration~"] == 3 and row["precision_at_1"] == 0.5
    assert row["trained_status"] == "trained"


TESTERS = [n for n, x in vars(testers).items() if inspect.isclass(x) and n != "BaseTester"]


@pytest.mark.parametrize("name", TESTERS)
def test_every_tester_keeps_its_name_and_takes_a_reference_set(name):
    tester = adapters.tester(getattr(testers, name))
    assert tester.__name__ == name and issubclass(tester, getattr(testers, name))
    name = "compared_to_training_set"
    assert tester(reference_set=name).reference_set == name
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


@pytest.mark.parametrize("reference_set", ["compared_to_self", "compared_to_training_set"])
def test_tables_are_named_before_any_test_and_as_by_the_pinned_pml(reference_set):
    hooks = adapters.with_old_table_names(logging_presets.HookContainer)(None)
    tester = adapters.tester(testers.GlobalEmbeddingSpaceTester)(reference_set=reference_set)
    name = f"accuracies_normalized_{reference_set}_GlobalEmbeddingSpaceTester_level_0_VAL"
    assert hooks.record_group_name(tester, "val") == name


def test_metrics_rank_as_far_as_they_look_and_are_0_without_a_reference_of_the_label():
    calculator = adapters.accuracy_calculator()
    assert issubclass(calculator, accuracy_calculator.AccuracyCalculator)
    assert calculator().k == "max_bin_count" and calculator(k=5).k == 5
    x, y = torch.randn(6, 4), torch.arange(6) // 2
    metrics = ("precision_at_1", "mean_average_precision_at_r", "r_precision")
    calculator = calculator(include=metrics, device=torch.device("cpu"))
    assert calculator.get_accuracy(x, y, torch.randn(5, 4), y[:5] + 3) == dict.fromkeys(metrics, 0)
    assert calculator.get_accuracy(x, y, x, y)["precision_at_1"] == 1


def test_constant_dimensions_are_left_out_of_a_pca():
    embeddings = torch.nn.functional.pad(torch.randn(20, 3), (0, 2))
    tester = adapters.tester(testers.GlobalEmbeddingSpaceTester)(pca=2)
    assert tester.maybe_normalize(embeddings).shape == (20, 2)
    assert tester.maybe_normalize(embeddings).isfinite().all()


def test_register_puts_this_loss_and_the_parts_on_a_runner(monkeypatch):
    from pml_pnp import PNPLoss, benchmarker, losses

    monkeypatch.setattr(adapters, "replacements_of_pb", lambda: [("api_parser", dict)])
    registered = []
    register = lambda kind, cls: registered.append((kind, cls))  # noqa: E731
    benchmarker.register(types.SimpleNamespace(register=register))
    assert registered[0] == ("loss", PNPLoss) and registered[-1] == ("api_parser", dict)
    assert ("loss", losses.CrossBatchMemory) in registered
    names = {(kind, cls.__name__) for kind, cls in registered}  # that configs say
    assert {("hook_container", "HookContainer"), ("tester", "GlobalEmbeddingSpaceTester")} < names
    assert ("accuracy_calculator", "AccuracyCalculator") in names
