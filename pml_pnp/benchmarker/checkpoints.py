"""Checkpoints that a killed run can be resumed from, whenever it was killed.

At the end of an epoch PML writes what was recorded, then the files of the checkpoint one by one,
each time deleting those of the epoch before (save_models_and_eval and save_models of its
HookContainer, the same in 0.9.92 and 2.9). What is missing when pb resumes begins anew, with no
more than a line in the log: a run killed among these goes on with a new optimizer, or without its
best model.
"""

import re
from pathlib import Path


def hook_container(base: type) -> type:
    """A HookContainer by which a checkpoint counts once it is whole and what led to it recorded.

    Nothing that stands before it is deleted until then.
    """
    from pytorch_metric_learning.utils import common_functions as c_f

    class HookContainer(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._superseded = []

        def save_models(self, trainer, model_folder, curr_suffix, prev_suffix=None):
            super().save_models(trainer, model_folder, curr_suffix)
            if prev_suffix is not None:
                self._superseded.append(prev_suffix)

        def save_models_and_eval(self, trainer, dataset_dict, model_folder, *args, **kwargs):
            self.record_keeper.save_records = lambda: None  # not yet
            try:
                best_epoch = super().save_models_and_eval(
                    trainer, dataset_dict, model_folder, *args, **kwargs
                )
            finally:
                del self.record_keeper.save_records
            self.record_keeper.save_records()
            while self._superseded:
                suffix = self._superseded.pop()
                for name in self.saveable_trainer_objects:
                    c_f.delete_dict_of_models(getattr(trainer, name, {}), suffix, model_folder)
            return best_epoch

        def load_latest_saved_models(self, trainer, model_folder, *args, **kwargs):
            recorded = self._recorded_epochs()
            for path in Path(model_folder).glob("*.pth"):
                epoch = re.search(r"_(?:best)?(\d+)$", path.stem)
                if epoch and int(epoch[1]) not in recorded | {0}:
                    path.unlink()
            return super().load_latest_saved_models(trainer, model_folder, *args, **kwargs)

        def _recorded_epochs(self) -> set[int]:
            query = self.record_keeper.query
            tables = [row["name"] for row in query("SELECT name FROM sqlite_master")]
            end = f"_{self.validation_split_name.upper()}"
            tables = [x for x in tables if x.startswith("accuracies") and x.endswith(end)]
            return {int(row["epoch"]) for x in tables for row in query(f"SELECT epoch FROM {x}")}

    return HookContainer
