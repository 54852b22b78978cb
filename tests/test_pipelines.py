"""PNPLoss in PML's trainers, with its hooks and record-keeper."""

import csv

import pytest
import torch
from helpers import DEVICE
from pytorch_metric_learning import miners, samplers, testers, trainers
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch.utils.data import Dataset

from pml_pnp import GradCache, losses

pytest.importorskip("faiss", reason="PML's AccuracyCalculator needs faiss")


class Points(Dataset):
    """Noisy points around class centres, in one or two views; with a coarse class if hierarchy."""

    def __init__(self, n=96, classes=8, views=1, hierarchy=False):
        g = torch.Generator().manual_seed(1)
        labels = torch.arange(n) % classes
        centres = torch.randn(classes, 12, generator=g)
        self.views = [centres[labels] + torch.randn(n, 12, generator=g) for _ in range(views)]
        self.labels = torch.stack([labels, labels // 2], dim=1) if hierarchy else labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return *(view[index] for view in self.views), self.labels[index]


def linear(d_in, d_out):
    return torch.nn.Linear(d_in, d_out).to(DEVICE)


def train(trainer_class, dataset, loss_funcs, models=None, mining_funcs=None, epochs=1, **kwargs):
    """Train; returns the trainer and the weights of the trunk before and after."""
    models = {"trunk": linear(12, 10), "embedder": linear(10, 6), **(models or {})}
    trainer = trainer_class(
        models=models,
        optimizers={
            f"{name}_optimizer": torch.optim.Adam(model.parameters(), lr=0.01)
            for name, model in models.items()
        },
        batch_size=24,
        loss_funcs=loss_funcs,
        dataset=dataset,
        mining_funcs=mining_funcs,
        sampler=samplers.MPerClassSampler(dataset.labels, 4, 24, 96),
        data_device=DEVICE,
        dataloader_num_workers=0,
        **kwargs,
    )
    before = models["trunk"].weight.detach().clone()
    trainer.train(num_epochs=epochs)
    return trainer, before, models["trunk"].weight.detach()


def assert_trained(before, after):
    assert after.isfinite().all() and not torch.equal(before, after)


def metric_loss(**kwargs):
    return {"metric_loss": losses.PNPLoss(**kwargs)}


def cascaded(**kwargs):
    return trainers.CascadedEmbeddings(embedding_sizes=[3, 3], **kwargs)


RUNS = {
    "metric loss": lambda: train(trainers.MetricLossOnly, Points(), metric_loss(variant="Dq")),
    "classifier": lambda: train(
        trainers.TrainWithClassifier,
        Points(),
        {**metric_loss(), "classifier_loss": torch.nn.CrossEntropyLoss()},
        models={"classifier": linear(6, 8)},
    ),
    "cascaded embeddings": lambda: train(
        cascaded,
        Points(),
        {"metric_loss_0": losses.PNPLoss(), "metric_loss_1": losses.PNPLoss(variant="Ds")},
        mining_funcs={f"tuple_miner_{i}": miners.HDCMiner(0.5 / (i + 1)) for i in range(2)},
    ),
    "two streams": lambda: train(trainers.TwoStreamMetricLoss, Points(views=2), metric_loss()),
    "deep adversarial": lambda: train(
        trainers.DeepAdversarialMetricLearning,
        Points(),
        {**metric_loss(), "synth_loss": losses.PNPLoss(), "g_adv_loss": losses.TripletMarginLoss()},
        models={"generator": linear(30, 10)},
        loss_weights=dict.fromkeys(
            ["metric_loss", "synth_loss", "g_adv_loss", "g_hard_loss", "g_reg_loss"], 1
        ),
        g_triplets_per_anchor=2,
    ),
    "memory, GradCache": lambda: train(
        trainers.MetricLossOnly,
        Points(),
        {"metric_loss": losses.CrossBatchMemory(losses.PNPLoss(), 6, 48).to(DEVICE)},
        models={"trunk": GradCache(linear(12, 10), 5), "embedder": GradCache(linear(10, 6), 5)},
        epochs=2,
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_trainers_feed_the_loss(name):
    if name == "cascaded embeddings" and DEVICE.type != "cpu":
        pytest.skip("PML's HDCMiner indexes triplets on the CPU by those of the device")
    _, *weights = RUNS[name]()
    assert_trained(*weights)


def test_hierarchical_sampler_feeds_the_loss():
    dataset = Points(hierarchy=True)
    sampler = samplers.HierarchicalSampler(dataset.labels, 24, 4, batches_per_super_tuple=1)
    model = linear(12, 6)
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=sampler)
    for x, y in loader:
        losses.PNPLoss()(model(x.to(DEVICE)), y[:, 0]).backward()
    assert len(loader) > 0 and model.weight.grad.isfinite().all() and model.weight.grad.any()


def test_hooks_and_record_keeper_log_hyperparameters_and_statistics(tmp_path):
    pytest.importorskip("record_keeper")
    pytest.importorskip("tensorboard")
    from pytorch_metric_learning.utils import logging_presets

    keeper, _, _ = logging_presets.get_record_keeper(tmp_path / "logs", tmp_path / "tensorboard")
    hooks = logging_presets.get_hook_container(keeper, log_freq=1)
    tester = testers.GlobalEmbeddingSpaceTester(
        end_of_testing_hook=hooks.end_of_testing_hook,
        accuracy_calculator=AccuracyCalculator(k="max_bin_count", device=torch.device("cpu")),
        data_device=DEVICE,
        dataloader_num_workers=0,
    )
    loss_func = losses.PNPLoss(variant=torch.log1p, alpha=4, collect_stats=True)
    train(
        trainers.MetricLossOnly,
        Points(),
        {"metric_loss": loss_func},
        epochs=2,
        end_of_iteration_hook=hooks.end_of_iteration_hook,
        end_of_epoch_hook=hooks.end_of_epoch_hook(
            tester, {"val": Points()}, str(tmp_path / "models")
        ),
    )
    with open(tmp_path / "logs" / "metric_loss_PNPLoss.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8  # every iteration of two epochs
    hyperparameters = {"b": "2", "alpha": "4", "anneal": "0.01"}
    hyperparameters |= {"variant_name": "log1p", "include_self": "True"}
    assert hyperparameters.items() <= rows[0].items()
    for name in ("negatives_before_positive", "positives_behind_negatives"):
        assert all(float(row[name]) >= 0 for row in rows)
        assert any(float(row[name]) > 0 for row in rows)
