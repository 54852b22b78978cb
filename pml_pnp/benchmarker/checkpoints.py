"""Checkpoints that a killed run can be resumed from, whenever it was killed.

PML writes what an epoch recorded, then one file after another of its checkpoint, each time deleting
that of the epoch before (save_models_and_eval and save_models of its HookContainer, the same in
0.9.92 and 2.9); and what is missing when pb resumes begins anew, with no more than a line in the
log. So that a run killed among these would go on with a new optimizer, or without its best model.
"""

import os
from pathlib import Path

UNFINISHED = "unfinished"


def hook_container(base: type) -> type:
    """A HookContainer whose checkpoints come to be at once, with what was recorded of them."""
    from pytorch_metric_learning.utils import common_functions as c_f

    class HookContainer(base):
        def _saved(self, trainer) -> list[dict]:
            return [getattr(trainer, name, None) or {} for name in self.saveable_trainer_objects]

        def save_models(self, trainer, model_folder, curr_suffix, prev_suffix=None):
            if not self.do_save_models:
                return
            unfinished = Path(model_folder) / UNFINISHED
            unfinished.mkdir(parents=True, exist_ok=True)
            for objects in self._saved(trainer):
                c_f.save_dict_of_models(objects, curr_suffix, str(unfinished))
            # The trunk last: it is what a checkpoint is looked for by.
            files = unfinished.glob(f"*_{curr_suffix}.pth")
            for path in sorted(files, key=lambda p: p.name.startswith("trunk_")):
                os.replace(path, Path(model_folder) / path.name)
            if prev_suffix is not None:
                self._superseded = [*getattr(self, "_superseded", []), prev_suffix]

        def save_models_and_eval(self, trainer, dataset_dict, model_folder, *args, **kwargs):
            self.record_keeper.save_records = lambda: None  # not yet
            try:
                best_epoch = super().save_models_and_eval(
                    trainer, dataset_dict, model_folder, *args, **kwargs
                )
            finally:
                del self.record_keeper.save_records
            self.record_keeper.save_records()
            for suffix in self.__dict__.pop("_superseded", []):
                _delete(model_folder, suffix)
            return best_epoch

        def load_latest_saved_models(self, trainer, model_folder, *args, **kwargs):
            recorded = self._recorded_epochs()
            for path in Path(model_folder).glob("trunk_*.pth"):
                suffix = path.stem.removeprefix("trunk_")
                if int(suffix.removeprefix("best")) not in recorded | {0}:
                    _delete(model_folder, suffix)
            return super().load_latest_saved_models(trainer, model_folder, *args, **kwargs)

        def _recorded_epochs(self) -> set[int]:
            query = self.record_keeper.query
            tables = [row["name"] for row in query("SELECT name FROM sqlite_master")]
            suffix = f"_{self.validation_split_name.upper()}"
            names = [x for x in tables if x.startswith("accuracies") and x.endswith(suffix)]
            return {int(row["epoch"]) for x in names for row in query(f"SELECT epoch FROM {x}")}

    return HookContainer


def _delete(model_folder, suffix) -> None:
    """Delete a checkpoint, the file that it is looked for by first."""
    files = Path(model_folder).glob(f"*_{suffix}.pth")
    for path in sorted(files, key=lambda p: not p.name.startswith("trunk_")):
        path.unlink()
