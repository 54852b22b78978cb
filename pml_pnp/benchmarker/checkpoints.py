"""Checkpoints that a killed run can be resumed from, whenever it was killed.

At the end of an epoch PML writes what was recorded, then the files of the checkpoint one by one,
each time deleting those of the epoch before (save_models_and_eval and save_models of its
HookContainer, the same in 0.9.92 and 2.9). What is missing when pb resumes begins anew, with no
more than a line in the log: a run killed among these goes on with a new optimizer, or without its
best model. What is damaged is loaded all the same: torch does not look at checksums.
"""

import logging
import os
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

UNRECORDED = "unrecorded"


class DamagedCheckpoint(RuntimeError):
    """A file of a checkpoint is not as it was written; the message says what to do."""


def hook_container(base: type) -> type:
    """A HookContainer that counts a checkpoint once it is fully written and its epoch recorded.

    The one before is kept until then. Files of a later epoch than the last recorded one are set
    aside when training is resumed, and the epoch done again. What is left is checked.
    """
    from pytorch_metric_learning.utils import common_functions as c_f

    class HookContainer(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._superseded = []
            self._first_epoch = 1

        def end_of_epoch_hook(
            self, tester, dataset_dict, model_folder, test_interval=1, *args, **kwargs
        ):
            self._first_epoch = test_interval
            return super().end_of_epoch_hook(
                tester, dataset_dict, model_folder, test_interval, *args, **kwargs
            )

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
                for objects in self._saved(trainer):
                    c_f.delete_dict_of_models(objects, suffix, model_folder)
            return best_epoch

        def load_latest_saved_models(self, trainer, model_folder, *args, **kwargs):
            last = max(self._recorded_epochs(), default=None)
            names = [re.escape(name) for objects in self._saved(trainer) for name in objects]
            pattern = re.compile(rf"(?:{'|'.join(names)})_(?:best)?(\d+)\.pth")
            kept = {}
            for path in Path(model_folder).glob("*.pth"):
                match = pattern.fullmatch(path.name)
                epoch = int(match[1]) if match else 0
                # Where nothing is recorded, of later epochs it has been lost since.
                if epoch == self._first_epoch if last is None else epoch > max(0, last):
                    _set_aside(path)
                elif match:
                    kept[path] = epoch
            if any(kept.values()):  # else pb begins anew, and writes those of epoch 0 again
                for path in kept:
                    check(path)
            return super().load_latest_saved_models(trainer, model_folder, *args, **kwargs)

        def _saved(self, trainer) -> list[dict]:
            return [getattr(trainer, name, {}) for name in self.saveable_trainer_objects]

        def _recorded_epochs(self) -> list[int]:
            query = self.record_keeper.query
            tables = [row["name"] for row in query("SELECT name FROM sqlite_master")]
            end = f"_{self.validation_split_name.upper()}"
            tables = [x for x in tables if "accuracies" in x and x.endswith(end)]
            return [int(row["epoch"]) for x in tables for row in query(f"SELECT epoch FROM {x}")]

    return HookContainer


def api_parser(base: type) -> type:
    """An API parser of pb that counts as trained what was loaded.

    By itself pb counts files, before those of an unrecorded epoch are set aside
    (folder_creator.py:39, base_api_parser.py:135). It loads what is damaged.
    """

    class Parser(base):
        def eval_model(self, epoch, model_name, *args, load_model=False, **kwargs):
            # An untrained model is made anew, also where a kill has left that of epoch 0 in pieces.
            if load_model and not model_name.startswith("untrained"):
                check_best(self.model_folder)
            return super().eval_model(epoch, model_name, *args, load_model=load_model, **kwargs)

        def eval_ensemble(self):
            for paths in self.get_sub_experiment_dir_paths().values():
                check_best(paths["models"])
            return super().eval_ensemble()

        def should_train(self, num_epochs, split_scheme_name):
            if self.args.resume_training == "latest":
                self.latest_sub_experiment_epochs[split_scheme_name] = self.epoch - 1
            return super().should_train(num_epochs, split_scheme_name)

    return Parser


def check_best(folder: str) -> None:
    """Check the models that pb evaluates."""
    for part in ("trunk", "embedder"):
        for path in Path(folder).glob(f"{part}_best*.pth"):
            check(path)


def check(path: Path) -> None:
    """Compare a file with its checksums, and see that loading it runs no code from it.

    Raises:
        DamagedCheckpoint: It is not as `torch.save` wrote it.
    """
    try:
        with path.open("rb") as file:
            load_checked(file)
    except Exception as error:  # in many ways
        raise DamagedCheckpoint(
            f"{path} is damaged, or was not written by this program ({type(error).__name__}); if "
            "its run was killed and not resumed, --resume_training latest does the epoch again; "
            f"if it was, remove the folder {path.parents[1]}, and that trains the fold anew"
        ) from error


def load_checked(file: BinaryIO) -> Any:
    """What `torch.save` wrote to a file, on the CPU; no code from it is run.

    It is compared with its checksums, at which `torch.load` does not look.

    Raises:
        Exception: of many types, if it is damaged.
    """
    import torch

    with zipfile.ZipFile(file) as archive:
        if any(x.compress_type != zipfile.ZIP_STORED for x in archive.infolist()):
            raise zipfile.BadZipFile("compressed, as torch.save never does")
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"the checksum of {damaged} is another")
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def _set_aside(path: Path) -> None:
    folder = path.parent / UNRECORDED
    folder.mkdir(exist_ok=True)
    os.replace(path, folder / path.name)
    logging.warning("%s is of an epoch that was not recorded: moved to %s", path.name, folder)
