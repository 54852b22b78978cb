"""A run that is stopped at any moment goes on to the end of one that was not."""

import contextlib
import itertools
import os
import shutil
import types
import zipfile

import pytest
import torch
from damage import Code, damaged, same
from pytorch_metric_learning import losses, samplers, trainers
from pytorch_metric_learning.utils import accuracy_calculator, logging_presets

from pml_pnp.benchmarker import adapters, checkpoints, seeding

EPOCHS = 3
HERE = {"data_device": torch.device("cpu"), "dataloader_num_workers": 0}


class Killed(BaseException):
    pass


def trainer_of(model, optimizer, x, labels, **hooks):
    data = torch.utils.data.TensorDataset(x, labels)
    return trainers.MetricLossOnly(
        models={"trunk": model},
        optimizers={"trunk_optimizer": optimizer(model.parameters(), lr=0.05)},
        batch_size=10,
        loss_funcs={"metric_loss": losses.ContrastiveLoss()},
        mining_funcs={},
        dataset=data,
        sampler=samplers.MPerClassSampler(labels, m=2, length_before_new_iter=len(data)),
        iterations_per_epoch=4,
        **HERE,
        **hooks,
    )


def set_up(folder):
    """A trainer, and the epoch to begin with."""
    seeding.seed_everything(0)
    n = 40
    labels = torch.arange(n) // 5
    x = torch.randn(8, 6)[labels] + 0.8 * torch.randn(n, 6)
    data = torch.utils.data.TensorDataset(x, labels)
    model = torch.nn.Linear(6, 3)
    parts = {part.__name__: part for _, part in adapters.replacements()}
    keeper, _, _ = logging_presets.get_record_keeper(str(folder / "csvs"))
    metric = "mean_average_precision_at_r"
    hooks = parts["HookContainer"](keeper, primary_metric=metric)
    tester = parts["GlobalEmbeddingSpaceTester"](
        end_of_testing_hook=hooks.end_of_testing_hook,
        accuracy_calculator=accuracy_calculator.AccuracyCalculator(include=(metric,)),
        **HERE,
    )
    (folder / "models").mkdir(parents=True, exist_ok=True)
    models = str(folder / "models")
    end_of_epoch = hooks.end_of_epoch_hook(tester, {"val": data}, models)
    ends = {"end_of_iteration_hook": hooks.end_of_iteration_hook, "end_of_epoch_hook": end_of_epoch}
    trainer = trainer_of(model, torch.optim.Adam, x, labels, **ends)
    seeding._seed_epochs(trainer, (0,))
    return trainer, hooks.load_latest_saved_models(trainer, models, "cpu")


def run(folder, epochs=EPOCHS):
    trainer, epoch = set_up(folder)
    trainer.train(epoch, epochs)


def checkpoint_files(folder):
    files = (folder / "models").glob("*.pth")
    return {path.name: torch.load(path, weights_only=True) for path in files}


@contextlib.contextmanager
def stopped_at(moment):
    """Raise at one of the steps that a kill could fall between; None to count them."""
    steps = itertools.count(1)

    def stopping(f):
        def step(*args, **kwargs):
            if next(steps) == moment:
                raise Killed
            return f(*args, **kwargs)

        return step

    writer = pytest.importorskip("record_keeper").RecordWriter
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "save"), (os, "remove"), (writer, "save_records")):
            patch.setattr(owner, name, stopping(getattr(owner, name)))
        yield steps


def test_stopped_anywhere_a_run_ends_the_same(tmp_path):
    epochs = 2  # the second replaces what the first saved
    with stopped_at(None) as steps:
        run(tmp_path / "whole", epochs)
        number = next(steps) - 1
    want = checkpoint_files(tmp_path / "whole")
    assert f"trunk_{epochs}.pth" in want and any("best" in name for name in want)
    assert number > 5 * epochs
    for moment in range(1, number + 1):
        folder = tmp_path / str(moment)
        with stopped_at(moment), pytest.raises(Killed):
            run(folder, epochs)
        users_own = folder / "models" / "resnet.pth"
        torch.save({}, users_own)
        run(folder, epochs)
        assert users_own.exists(), moment
        got = checkpoint_files(folder)
        assert got.keys() >= want.keys(), moment  # what it was stopped in deleting may be there yet
        for name, state in want.items():
            torch.testing.assert_close(got[name], state, rtol=0, atol=0, msg=f"{moment}: {name}")


def test_a_torn_model_that_a_run_writes_again_is_no_damage(tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    (models / "trunk_best0.pth").write_bytes(b"torn")  # pb saves it before the first epoch
    run(tmp_path, 1)
    with pytest.raises(checkpoints.DamagedCheckpoint, match="trunk_best0.pth is damaged"):
        run(tmp_path, 2)  # which would not write it


def test_a_compressed_checkpoint_is_not_read(tmp_path):
    torch.save({"weight": torch.zeros(100)}, tmp_path / "plain.pth")
    checkpoints.check(tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in plain.namelist():
            small.writestr(name, plain.read(name))
    with pytest.raises(checkpoints.DamagedCheckpoint, match="small.pth is damaged"):
        checkpoints.check(tmp_path / "small.pth")


def test_only_unrecorded_checkpoints_are_set_aside_and_none_is_lost(tmp_path):
    run(tmp_path)
    models, torn = tmp_path / "models", {"trunk_9.pth", "trunk_best9.pth", "trunk_optimizer_9.pth"}
    for name in torn:
        (models / name).write_bytes(b"torn")
    for name in ("resnet_50.pth", "trunk.pth", "my_trunk_9.pth"):
        (models / name).write_bytes(b"the user's")
    before = {path.name for path in models.iterdir()}
    assert set_up(tmp_path)[1] == EPOCHS + 1
    assert {path.name for path in (models / "unrecorded").iterdir()} == torn
    assert {path.name for path in models.glob("*.pth")} == before - torn


def test_damaged_files_are_named_and_never_loaded(tmp_path):
    run(tmp_path)
    torch.save(Code(tmp_path / "run by a checkpoint"), tmp_path / "code")
    files = sorted((tmp_path / "models").glob("*.pth"))
    assert len(files) >= 4  # of the last epoch and the best one, of model and optimizer
    for path in files:
        content, whole = path.read_bytes(), torch.load(path, weights_only=True)
        for wrong in [*damaged(content, 100 // len(files)), (tmp_path / "code").read_bytes()]:
            path.write_bytes(wrong)
            try:
                checkpoints.check(path)
                assert same(torch.load(path, weights_only=True), whole)  # such as of a date
            except checkpoints.DamagedCheckpoint as error:
                assert f"{path} is damaged" in str(error) and f"folder {tmp_path}," in str(error)
        with pytest.raises(checkpoints.DamagedCheckpoint, match=path.name):
            set_up(tmp_path)
        path.write_bytes(content)
    assert not (tmp_path / "run by a checkpoint").exists()
    assert set_up(tmp_path)[1] == EPOCHS + 1


def test_damaged_models_are_not_evaluated(tmp_path):
    class Parser:
        model_folder = tmp_path

        def eval_model(self, epoch, model_name, load_model):
            return model_name

        def eval_ensemble(self):
            return "ensemble"

        def get_sub_experiment_dir_paths(self):
            return {"fold": {"models": str(tmp_path)}}

    parser, model = checkpoints.api_parser(Parser)(), tmp_path / "embedder_best3.pth"
    torch.save({"weight": torch.zeros(9)}, model)
    assert parser.eval_model(3, "best", load_model=True) == "best"
    assert parser.eval_ensemble() == "ensemble"
    model.write_bytes(model.read_bytes()[:-50])
    assert parser.eval_model(0, "best", load_model=False) == "best"
    for name in ("untrained_trunk", "untrained_trunk_and_embedder"):  # of which none is a file
        assert parser.eval_model(0, name, load_model=True) == name
    for evaluate in (lambda: parser.eval_model(3, "best", load_model=True), parser.eval_ensemble):
        with pytest.raises(checkpoints.DamagedCheckpoint, match="embedder_best3.pth is damaged"):
            evaluate()


def test_a_fold_is_trained_as_far_as_was_loaded():
    """Whatever the number of its files says."""

    class Parser:
        epoch = 3

        def __init__(self, resume_training):
            self.args = types.SimpleNamespace(resume_training=resume_training)
            self.latest_sub_experiment_epochs = {"fold": 9, "other": 9}

        def should_train(self, num_epochs, split_scheme_name):
            return self.latest_sub_experiment_epochs[split_scheme_name] < num_epochs

    resumed, begun = map(checkpoints.api_parser(Parser), ("latest", None))
    assert [resumed.should_train(epochs, "fold") for epochs in (2, 3)] == [False, True]
    assert resumed.latest_sub_experiment_epochs["other"] == 9
    assert [begun.should_train(epochs, "fold") for epochs in (9, 10)] == [False, True]


def test_without_records_nothing_is_touched(tmp_path):
    run(tmp_path)
    shutil.rmtree(tmp_path / "csvs")
    before = checkpoint_files(tmp_path).keys()
    assert set_up(tmp_path)[1] == EPOCHS + 1 and checkpoint_files(tmp_path).keys() == before
