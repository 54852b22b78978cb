"""PNPLoss in PML's trainers, with its samplers, testers, hooks and record-keeper."""

import numpy as np
import pytest
import torch
from helpers import DEVICE, sql_rows
from pytorch_metric_learning import miners, reducers, samplers, testers, trainers
from pytorch_metric_learning.utils import common_functions as c_f
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


def train(loss_funcs, cls=trainers.MetricLossOnly, dataset=None, models=None, epochs=1, **kwargs):
    """Train; returns the trainer and the weights of the trunk before and after."""
    dataset = Points() if dataset is None else dataset
    models = {"trunk": linear(12, 10), "embedder": linear(10, 6), **(models or {})}
    if "sampler" not in kwargs:
        kwargs["sampler"] = samplers.MPerClassSampler(dataset.labels, 4, 24, 96)
    adam = {f"{k}_optimizer": torch.optim.Adam(m.parameters(), lr=0.01) for k, m in models.items()}
    kwargs |= {"data_device": DEVICE, "dataloader_num_workers": 0, "dataset": dataset}
    trainer = cls(models=models, optimizers=adam, batch_size=24, loss_funcs=loss_funcs, **kwargs)
    before = models["trunk"].weight.detach().clone()
    trainer.train(num_epochs=epochs)
    return trainer, before, models["trunk"].weight.detach()


def make_tester(cls=testers.GlobalEmbeddingSpaceTester, device=DEVICE, **kwargs):
    calculator = AccuracyCalculator(
        include=("mean_average_precision_at_r",), k="max_bin_count", device=torch.device("cpu")
    )
    kwargs |= {"data_device": device, "dataloader_num_workers": 0}
    return cls(accuracy_calculator=calculator, **kwargs)


def assert_trained(before, after):
    assert after.isfinite().all() and not torch.equal(before, after)


def metric_loss(**kwargs):
    return {"metric_loss": losses.PNPLoss(**kwargs)}


RUNS = {
    "metric loss": lambda: train(metric_loss(variant="Dq")),
    "miner": lambda: train(
        metric_loss(anneal=0.05), mining_funcs={"tuple_miner": miners.BatchHardMiner()}
    ),
    "classifier": lambda: train(
        {**metric_loss(), "classifier_loss": torch.nn.CrossEntropyLoss()},
        trainers.TrainWithClassifier,
        models={"classifier": linear(6, 8)},
    ),
    "cascaded embeddings": lambda: train(
        {"metric_loss_0": losses.PNPLoss(), "metric_loss_1": losses.PNPLoss(variant="Ds")},
        trainers.CascadedEmbeddings,
        mining_funcs={f"tuple_miner_{i}": miners.HDCMiner(0.5 / (i + 1)) for i in range(2)},
        embedding_sizes=[3, 3],
    ),
    "two streams": lambda: train(metric_loss(), trainers.TwoStreamMetricLoss, Points(views=2)),
    "deep adversarial": lambda: train(
        {**metric_loss(), "synth_loss": losses.PNPLoss(), "g_adv_loss": losses.TripletMarginLoss()},
        trainers.DeepAdversarialMetricLearning,
        models={"generator": linear(30, 10)},
        loss_weights=dict.fromkeys(
            ["metric_loss", "synth_loss", "g_adv_loss", "g_hard_loss", "g_reg_loss"], 1
        ),
        g_triplets_per_anchor=2,
    ),
    "tuples to weights": lambda: train(
        metric_loss(),
        sampler=samplers.TuplesToWeightsSampler(
            linear(12, 6),
            miners.MultiSimilarityMiner(),
            Points(),
            data_device=DEVICE,
            dataloader_num_workers=0,
        ),
    ),
    "fixed triplets": lambda: train(
        metric_loss(),
        sampler=samplers.FixedSetOfTriplets(Points().labels, 24),
        mining_funcs={"tuple_miner": miners.EmbeddingsAlreadyPackagedAsTriplets()},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_trainers_and_samplers_feed_the_loss(name):
    if name == "cascaded embeddings" and DEVICE.type != "cpu":
        pytest.skip("PML's HDCMiner indexes triplets on the CPU by those of the device")
    _, *weights = RUNS[name]()
    assert_trained(*weights)


def test_a_memory_in_a_trainer_is_saved_and_loaded_by_pmls_hooks(tmp_path):
    def memory(**kwargs):
        return losses.CrossBatchMemory(losses.PNPLoss(), 6, memory_size=64, **kwargs)

    loss_func, fresh = memory(miner=miners.MultiSimilarityMiner()), memory()
    trainer, *weights = train({"metric_loss": loss_func}, epochs=2)
    assert_trained(*weights)
    assert loss_func.has_been_filled
    c_f.save_dict_of_models(trainer.loss_funcs, "1", str(tmp_path))
    c_f.load_dict_of_models({"metric_loss": fresh}, "1", str(tmp_path), DEVICE)
    torch.testing.assert_close(fresh.embedding_memory, loss_func.embedding_memory.cpu())


def test_hierarchical_sampler_feeds_the_loss():
    dataset = Points(hierarchy=True)
    sampler = samplers.HierarchicalSampler(dataset.labels, 24, 4, batches_per_super_tuple=1)
    model = linear(12, 6)
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=sampler)
    for x, y in loader:
        losses.PNPLoss()(model(x.to(DEVICE)), y[:, 0]).backward()
    assert len(loader) > 0 and model.weight.grad.isfinite().all() and model.weight.grad.any()


def test_m_per_class_sampler_makes_every_query_count():
    dataset = Points()
    sampler = samplers.MPerClassSampler(dataset.labels, 3, 24, 24)
    x, y = zip(*(dataset[i] for i in sampler), strict=True)
    loss_func = losses.PNPLoss(reducer=reducers.MeanReducer(collect_stats=True))
    loss_func(torch.stack(x), torch.stack(y))
    assert loss_func.reducer.losses_size == 24


@pytest.mark.parametrize(
    ("tester_class", "dataset"),
    [
        (testers.GlobalEmbeddingSpaceTester, Points()),
        (testers.GlobalTwoStreamEmbeddingSpaceTester, Points(views=2)),
        (testers.WithSameParentLabelTester, Points(hierarchy=True)),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_testers_measure_what_the_loss_trained(tester_class, dataset):
    two_streams = len(dataset.views) == 2
    trainer_class = trainers.TwoStreamMetricLoss if two_streams else trainers.MetricLossOnly
    sampler = samplers.MPerClassSampler(dataset.labels.view(96, -1)[:, 0], 4, 24, 96)
    models = {"trunk": linear(12, 10), "embedder": linear(10, 6)}
    tester = make_tester(tester_class, torch.device("cpu"), label_hierarchy_level=0)

    def score():
        parts = [model.cpu() for model in models.values()]
        accuracies = tester.test({"val": dataset}, 0, *parts)["val"]
        for model in models.values():
            model.to(DEVICE)
        return accuracies["mean_average_precision_at_r_level0"]

    untrained = score()
    loss_funcs = metric_loss(variant="Ds", anneal=0.05)
    train(loss_funcs, trainer_class, dataset, models, epochs=15, sampler=sampler)
    assert score() > untrained + 0.02


def test_hooks_and_record_keeper_log_hyperparameters_and_statistics(tmp_path):
    pytest.importorskip("record_keeper")
    pytest.importorskip("tensorboard")
    from pytorch_metric_learning.utils import logging_presets
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    keeper, _, _ = logging_presets.get_record_keeper(tmp_path / "logs", tmp_path / "tensorboard")
    hooks = logging_presets.get_hook_container(keeper, log_freq=1)
    tester = make_tester(end_of_testing_hook=hooks.end_of_testing_hook)
    train(
        metric_loss(variant=torch.log1p, alpha=4, collect_stats=True),
        epochs=2,
        end_of_iteration_hook=hooks.end_of_iteration_hook,
        end_of_epoch_hook=hooks.end_of_epoch_hook(tester, {"val": Points()}, f"{tmp_path}/models"),
    )
    keeper.tensorboard_writer.flush()
    hyperparameters = {"b": 2, "alpha": 4, "anneal": 0.01}
    hyperparameters |= {"variant_name": "log1p", "include_self": 1}
    statistics = ["negatives_before_positive", "positives_behind_negatives"]

    rows = sql_rows(tmp_path / "logs" / "logs.db", "metric_loss_PNPLoss")
    assert len(rows) == 8  # every iteration of two epochs
    assert {name: rows[0][name] for name in hyperparameters} == hyperparameters
    assert all(row[name] >= 0 for row in rows for name in statistics)
    assert any(row["negatives_before_positive"] > 0 for row in rows)

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = events.Tags()["scalars"]
    for name in ["alpha", *statistics]:
        assert f"metric_loss_PNPLoss/{name}" in tags
    assert any("mean_average_precision_at_r" in tag for tag in tags)


CACHED = {
    "PNPLoss": lambda: losses.PNPLoss(variant="Dq", anneal=0.05),
    "memory": lambda: losses.CrossBatchMemory(losses.PNPLoss(anneal=0.05), 6, 48).to(DEVICE),
    "MultiSimilarityLoss": losses.MultiSimilarityLoss,
}


@pytest.mark.parametrize("name", CACHED)
def test_grad_cache_takes_the_place_of_trunk_and_embedder(name):
    """The trainer takes the same steps, and the tester sees the same embeddings."""
    weights, embeddings = [], []
    for wrap in (lambda model: model, lambda model: GradCache(model, 5)):
        torch.manual_seed(3)
        np.random.seed(3)
        models = {"trunk": wrap(linear(12, 10)), "embedder": wrap(linear(10, 6))}
        _, *before_and_after = train(
            {"metric_loss": CACHED[name]()},
            models=models,
            mining_funcs={"tuple_miner": miners.MultiSimilarityMiner()} if "Multi" in name else {},
            epochs=2,
        )
        assert_trained(*before_and_after)
        weights.append(before_and_after[1])
        embeddings.append(make_tester().get_all_embeddings(Points(), *models.values())[0])
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(*embeddings, rtol=1e-3, atol=1e-4)
