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
from pytorch_metric_learning import losses, samplers, testers, trainers
from pytorch_metric_learning.utils import accuracy_calculator, logging_presets

from pml_pnp.benchmarker import adapters, checkpoints, requirements, seeding

EPOCHS = 3


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
        data_device=torch.device("cpu"),
        dataloader_num_workers=0,
        **hooks,
    )


def set_up(folder, hook_container):
    """A trainer, its hooks, and the epoch to begin with."""
    seeding.seed_everything(0)
    n = 40
    labels = torch.arange(n) // 5
    x = torch.randn(8, 6)[labels] + 0.8 * torch.randn(n, 6)
    data = torch.utils.data.TensorDataset(x, labels)
    model = torch.nn.Linear(6, 3)
    csvs = str(folder / "csvs")
    keeper, _, _ = logging_presets.get_record_keeper(csvs)
    calculator = accuracy_calculator.AccuracyCalculator(include=("mean_average_precision_at_r",))
    hooks = hook_container(keeper, primary_metric="mean_average_precision_at_r")
    tester_class = testers.GlobalEmbeddingSpaceTester
    if not requirements.is_pinned():
        tester_class = adapters.tester(tester_class)
    tester = tester_class(
        end_of_testing_hook=hooks.end_of_testing_hook,
        dataloader_num_workers=0,
        data_device=torch.device("cpu"),
        accuracy_calculator=calculator,
    )
    models = folder / "models"
    models.mkdir(parents=True, exist_ok=True)
    trainer = trainer_of(
        model,
        torch.optim.Adam,
        x,
        labels,
        end_of_iteration_hook=hooks.end_of_iteration_hook,
        end_of_epoch_hook=hooks.end_of_epoch_hook(tester, {"val": data}, str(models)),
    )
    seeding._seed_epochs(trainer, (0,))
    return trainer, hooks, hooks.load_latest_saved_models(trainer, str(models), "cpu")


def run(folder, hook_container, epochs=EPOCHS):
    trainer, _, epoch = set_up(folder, hook_container)
    trainer.train(epoch, epochs)


def checkpoint_files(folder):
    return {
        path.name: torch.load(path, weights_only=True) for path in (folder / "models").glob("*.pth")
    }


@pytest.fixture
def hook_container():
    return dict(adapters.replacements())["hook_container"]


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
        patch.setattr(torch, "save", stopping(torch.save))
        patch.setattr(os, "remove", stopping(os.remove))
        patch.setattr(writer, "save_records", stopping(writer.save_records))
        yield steps


def test_stopped_anywhere_a_run_ends_the_same(tmp_path, hook_container):
    epochs = 2  # the second replaces what the first saved
    with stopped_at(None) as steps:
        run(tmp_path / "whole", hook_container, epochs)
        number = next(steps) - 1
    want = checkpoint_files(tmp_path / "whole")
    assert f"trunk_{epochs}.pth" in want and any("best" in name for name in want)
    assert number > 5 * epochs
    for moment in range(1, number + 1):
        folder = tmp_path / str(moment)
        with stopped_at(moment), pytest.raises(Killed):
            run(folder, hook_container, epochs)
        users_own = folder / "models" / "resnet.pth"
        torch.save({}, users_own)
        run(folder, hook_container, epochs)
        assert users_own.exists(), moment
        got = checkpoint_files(folder)
        assert got.keys() >= want.keys(), moment  # what it was stopped in deleting may be there yet
        for name, state in want.items():
            torch.testing.assert_close(got[name], state, rtol=0, atol=0, msg=f"{moment}: {name}")


def test_a_torn_model_that_a_run_writes_again_is_no_damage(tmp_path, hook_container):
    models = tmp_path / "models"
    models.mkdir()
    (models / "trunk_best0.pth").write_bytes(b"torn")  # pb saves it before the first epoch
    run(tmp_path, hook_container, 1)
    with pytest.raises(checkpoints.DamagedCheckpoint, match="trunk_best0.pth is damaged"):
        run(tmp_path, hook_container, 2)  # which would not write it


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


def test_only_unrecorded_checkpoints_are_set_aside_and_none_is_lost(tmp_path, hook_container):
    run(tmp_path, hook_container)
    models = tmp_path / "models"
    for name in ("trunk_9.pth", "trunk_best9.pth", "trunk_optimizer_9.pth"):
        (models / name).write_bytes(b"torn")
    for name in ("resnet_50.pth", "trunk.pth", "my_trunk_9.pth"):
        (models / name).write_bytes(b"the user's")
    before = {path.name for path in models.iterdir()}
    _, _, epoch = set_up(tmp_path, hook_container)
    assert epoch == EPOCHS + 1
    aside = {path.name for path in (models / "unrecorded").iterdir()}
    assert aside == {"trunk_9.pth", "trunk_best9.pth", "trunk_optimizer_9.pth"}
    assert {path.name for path in models.glob("*.pth")} == before - aside


def test_damaged_files_are_named_and_never_loaded(tmp_path, hook_container):
    run(tmp_path, hook_container)
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
            set_up(tmp_path, hook_container)
        path.write_bytes(content)
    assert not (tmp_path / "run by a checkpoint").exists()
    assert set_up(tmp_path, hook_container)[2] == EPOCHS + 1


def test_damaged_models_are_not_evaluated(tmp_path):
    class Parser:
        model_folder = tmp_path

        def eval_model(self, epoch, model_name, load_model):
            return model_name

        def eval_ensemble(self):
            return "ensemble"

        def get_sub_experiment_dir_paths(self):
            return {"fold": {"models": str(tmp_path)}}

    parser = checkpoints.api_parser(Parser)()
    torch.save({"weight": torch.zeros(9)}, tmp_path / "embedder_best3.pth")
    assert parser.eval_model(3, "best", load_model=True) == "best"
    assert parser.eval_ensemble() == "ensemble"
    content = (tmp_path / "embedder_best3.pth").read_bytes()
    (tmp_path / "embedder_best3.pth").write_bytes(content[:-50])
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
        args = types.SimpleNamespace(resume_training="latest")

        def __init__(self):
            self.latest_sub_experiment_epochs = {"fold": 9, "other": 9}

        def should_train(self, num_epochs, split_scheme_name):
            return self.latest_sub_experiment_epochs[split_scheme_name] < num_epochs

    resumed, begun = checkpoints.api_parser(Parser)(), checkpoints.api_parser(Parser)()
    assert [resumed.should_train(epochs, "fold") for epochs in (2, 3)] == [False, True]
    assert resumed.latest_sub_experiment_epochs["other"] == 9
    begun.args = types.SimpleNamespace(resume_training=None)
    assert [begun.should_train(epochs, "fold") for epochs in (9, 10)] == [False, True]


def test_without_records_nothing_is_touched(tmp_path, hook_container):
    run(tmp_path, hook_container)
    shutil.rmtree(tmp_path / "csvs")
    before = checkpoint_files(tmp_path).keys()
    _, _, epoch = set_up(tmp_path, hook_container)
    assert epoch == EPOCHS + 1 and checkpoint_files(tmp_path).keys() == before
