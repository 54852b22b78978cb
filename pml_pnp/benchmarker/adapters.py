"""What powerful-benchmarker 0.9.33 (pb) needs of pytorch-metric-learning (PML) 2, and why.

`apply` changes modules, once, in a process that asks for it. `replacements` are subclasses of what
PML and pb have, under the same names, for the runner that they are registered on. With the PML that
pb pins, those are used that mend what is wrong there too: checkpoints, divergence, factories, and
the adapters of the search.
"""

import functools
import inspect
import os

from pml_pnp.benchmarker import checkpoints, divergence, factories
from pml_pnp.benchmarker.requirements import is_pinned

_applied: set[str] = set()


def apply(bayes_opt: bool) -> None:
    """Make the changes that are not made yet."""
    changes = [] if is_pinned() else [identity, record_keepers]
    changes += [ax_client, missing_folders] * bayes_opt
    for change in changes:
        if change.__name__ not in _applied:
            change()
            _applied.add(change.__name__)


def replacements() -> list[tuple[str, type]]:
    """Parts of PML to register on a runner: (module type, class)."""
    from pytorch_metric_learning import testers
    from pytorch_metric_learning.utils import logging_presets

    classes = [x for n, x in vars(testers).items() if inspect.isclass(x) and n != "BaseTester"]
    finite = [divergence.tester(cls) for cls in classes]
    hooks = checkpoints.hook_container(logging_presets.HookContainer)
    if is_pinned():
        return [*(("tester", cls) for cls in finite), ("hook_container", hooks)]
    from pml_pnp import losses

    return [
        *(("tester", tester(cls)) for cls in finite),
        ("hook_container", with_old_table_names(hooks)),
        ("accuracy_calculator", accuracy_calculator()),
        ("loss", losses.CrossBatchMemory),
    ]


def replacements_of_pb() -> list[tuple[str, type]]:
    """Parts of pb to register on a runner: (module type, class)."""
    from powerful_benchmarker import aggregators, api_parsers

    def api_parser(cls: type) -> type:
        return divergence.api_parser(checkpoints.api_parser(cls))

    parts = [("factory", cls) for cls in factories.factories()]
    for module_type, module, base, adapt in (
        ("api_parser", api_parsers, api_parsers.BaseAPIParser, api_parser),
        ("aggregator", aggregators, aggregators.BaseAggregator, divergence.aggregator),
    ):
        for name, cls in vars(module).items():
            if inspect.isclass(cls) and issubclass(cls, base):
                part = adapt(cls)
                part.__name__ = part.__qualname__ = name  # by which pb looks for it
                parts.append((module_type, part))
    return parts


def identity() -> None:
    """PML 2 has no common_functions.Identity.

    Read at pb's base_runner.py:48, model_factory.py:20 and utils/common_functions.py:29.
    """
    import torch
    from pytorch_metric_learning.utils import common_functions

    common_functions.Identity = torch.nn.Identity


def record_keepers() -> None:
    """record-keeper 0.9.32 has no `save_figures`, and renamed an argument.

    pb passes the first at record_keeper_factory.py:6, and `input_group_name_for_non_objects` at
    base_aggregator.py:33-38, base_api_parser.py:125-126 and bayes_opt_runner.py:165; all get their
    record keeper from PML's logging_presets, whose own hooks use the new name, `parent_name`.

    It replaces the middle of long names by a hash; pb asks for tables by the names that it gave
    (base_aggregator.py:54).

    It also writes the iteration into each row, and wants all values of a row to have the same. At
    base_api_parser.py:125-126 pb adds values under a number to accuracies under a name, "trained";
    at bayes_opt_runner.py:224 it averages the column.
    """
    import datetime

    from pytorch_metric_learning.utils import logging_presets
    from record_keeper import RecordKeeper

    def _datetimes_as_text(values: dict) -> dict:
        """Times as text: record-keeper 0.9.32 leaves out what it does not know."""
        return {k: str(v) if isinstance(v, datetime.datetime) else v for k, v in values.items()}

    class GroupNamingRecordKeeper(RecordKeeper):
        def update_records(
            self,
            record_these,
            global_iteration,
            *args,
            input_group_name_for_non_objects=None,
            **kwargs,
        ):
            group = input_group_name_for_non_objects
            if group is None:
                super().update_records(record_these, global_iteration, *args, **kwargs)
                return
            self._number_names(group, global_iteration)
            super().update_records(
                _datetimes_as_text(record_these), global_iteration, parent_name=group
            )

        def append_primitive(self, group, series, value, global_iteration):
            self.append_data(group, series, value, global_iteration)

        def _number_names(self, group: str, iteration: int) -> None:
            """Give a number to what waits to be written under a name."""
            for series in self.record_writer.records[group].values():
                for name in [i for i in series if isinstance(i, str)]:
                    series[iteration] = series.pop(name)

    original = logging_presets.get_record_keeper

    @functools.wraps(original)
    def get_record_keeper(*args, save_figures=False, **kwargs):
        keeper, writer, tensorboard = original(*args, **kwargs)
        if keeper is not None:
            keeper = GroupNamingRecordKeeper(tensorboard, writer, keeper.attributes_to_search_for)
        return keeper, writer, tensorboard

    logging_presets.get_record_keeper = get_record_keeper


def ax_client() -> None:
    """Ax since 0.3.7 takes objectives instead of `minimize` and `objective_name`.

    Passed at pb's bayes_opt_runner.py:253. And a log of Ax that was being written when the search
    was killed is not one that pb skips (bayes_opt_runner.py:64): it is complete or not there.
    """
    from ax.service import ax_client as module
    from powerful_benchmarker.runners import bayes_opt_runner

    takes_objectives = (
        "minimize" not in inspect.signature(module.AxClient.create_experiment).parameters
    )

    class AxClient(module.AxClient):
        def create_experiment(self, *args, minimize=None, objective_name=None, **kwargs):
            if objective_name is None:
                return super().create_experiment(*args, **kwargs)
            if takes_objectives:
                from ax.service.utils.instantiation import ObjectiveProperties

                objective = ObjectiveProperties(minimize=bool(minimize))
                kwargs["objectives"] = {objective_name: objective}
            else:
                kwargs |= {"minimize": minimize, "objective_name": objective_name}
            return super().create_experiment(*args, **kwargs)

        def save_to_json_file(self, filepath):
            super().save_to_json_file(f"{filepath}.part")
            os.replace(f"{filepath}.part", filepath)

    bayes_opt_runner.AxClient = AxClient


def missing_folders() -> None:
    """A trial of which no folder was made before the search was killed has none to delete.

    pb deletes it all the same (bayes_opt_runner.py:313), and fails whenever the search is begun.
    """
    from powerful_benchmarker.runners.bayes_opt_runner import BayesOptRunner

    original = BayesOptRunner.delete_sub_experiment_folder

    @functools.wraps(original)
    def delete_sub_experiment_folder(self, sub_experiment_name):
        os.makedirs(self.get_sub_experiment_path(sub_experiment_name), exist_ok=True)
        original(self, sub_experiment_name)

    BayesOptRunner.delete_sub_experiment_folder = delete_sub_experiment_folder


def tester(base: type) -> type:
    """A tester of PML 2 that takes `reference_set` and plain split names, as PML 0.9 did.

    pb's configs give the first (tester_factory.py:21), and tables are named after it: by their
    names pb knows what was evaluated (base_api_parser.py:91). base_api_parser.py:90 passes the
    second, where PML 2 expects (query split, reference splits).
    """

    class Tester(base):
        def __init__(self, *args, reference_set="compared_to_self", **kwargs):
            known = ("compared_to_self", "compared_to_sets_combined", "compared_to_training_set")
            if reference_set not in known:
                raise ValueError(f"reference_set must be one of {known}, got {reference_set!r}")
            super().__init__(*args, **kwargs)
            self.reference_set = reference_set

        def test(self, dataset_dict, epoch, trunk_model, embedder_model=None, splits_to_eval=None,
                 collate_fn=None):  # fmt: skip
            names = list(dataset_dict) if splits_to_eval is None else splits_to_eval
            splits = [(x, self._references(x, dataset_dict)) if isinstance(x, str) else x
                      for x in names]  # fmt: skip
            return super().test(
                dataset_dict, epoch, trunk_model, embedder_model, splits, collate_fn
            )

        def _references(self, query: str, dataset_dict) -> list[str]:
            if self.reference_set == "compared_to_sets_combined":
                return list(dataset_dict)
            return ["train" if self.reference_set == "compared_to_training_set" else query]

        def maybe_normalize(self, embeddings):
            if self.pca:  # PML 2 divides by a standard deviation, that may be 0
                embeddings = embeddings[:, embeddings.std(dim=0) > 0]
            return super().maybe_normalize(embeddings)

        def description_suffixes(self, base_name):
            name = f"_{type(self).__name__}_level_"
            suffixes = super().description_suffixes(base_name)
            return suffixes.replace(name, f"_{self.reference_set}{name}", 1)

    Tester.__name__ = Tester.__qualname__ = base.__name__  # of records, and what configs say
    return Tester


def with_old_table_names(base: type) -> type:
    """Hooks whose tables are named as in PML 0.9.

    PML 2 names them after the splits of the last test, of which pb's dummy hooks and testers have
    seen none (base_aggregator.py:60, base_api_parser.py:107), and asks a record keeper for it,
    which they do not have.
    """

    class HookContainer(base):
        def record_group_name(self, tester, split_name):
            return f"{self.base_record_group_name(tester)}_{split_name.upper()}"

    return HookContainer


def accuracy_calculator() -> type:
    """An AccuracyCalculator that ranks, by default, as far as its metrics look.

    PML 2 ranks the whole set unless told otherwise; pb's configs tell nothing
    (config_eval/default.yaml). And where no reference has the label of a query, as where new
    classes are compared to the training set, PML 2 ranks 0 of them, which fails, and the accuracy
    is NaN, of which pb makes means (base_aggregator.py:32). It was 0.
    """
    from pytorch_metric_learning.utils import accuracy_calculator as module

    class AccuracyCalculator(module.AccuracyCalculator):
        def __init__(self, *args, k="max_bin_count", **kwargs):
            super().__init__(*args, k=k, **kwargs)

        def determine_k(self, *args):
            return max(1, super().determine_k(*args))

        def _get_accuracy(self, *args, **kwargs):
            accuracies = super()._get_accuracy(*args, **kwargs)
            return {name: 0.0 if value != value else value for name, value in accuracies.items()}

    return AccuracyCalculator
