"""Every PML miner x reducer x distance, against the reference."""

import inspect

import pytest
import torch
from helpers import DISTANCES, batch, expected_losses
from pytorch_metric_learning import distances, miners, reducers

from pml_pnp import PNPLoss

MINERS = {
    "angular": lambda: miners.AngularMiner(angle=10),
    "easy-semihard": miners.BatchEasyHardMiner,
    "hard-semihard": lambda: miners.BatchEasyHardMiner("hard", "semihard"),
    "all-hard": lambda: miners.BatchEasyHardMiner("all", "hard"),
    "hard-all": lambda: miners.BatchEasyHardMiner("hard", "all"),
    "batch hard": miners.BatchHardMiner,
    "distance weighted": miners.DistanceWeightedMiner,
    "already packaged": miners.EmbeddingsAlreadyPackagedAsTriplets,
    "hdc": miners.HDCMiner,
    "multi similarity": miners.MultiSimilarityMiner,
    "pair margin": miners.PairMarginMiner,
    "triplet margin": miners.TripletMarginMiner,
    "triplet margin, hard": lambda: miners.TripletMarginMiner(type_of_triplets="hard"),
    "uniform histogram": miners.UniformHistogramMiner,
}
CLASS_WEIGHTS = torch.linspace(0.1, 2, 20)


def mean(values):
    return sum(values) / len(values) if values else 0.0


# name: (reducer, what it makes of the losses; those for "class weighted" are weighted before)
REDUCERS = {
    "mean": (reducers.MeanReducer, mean),
    "sum": (reducers.SumReducer, sum),
    "threshold": (
        lambda: reducers.ThresholdReducer(low=0.5, high=3),
        lambda v: mean([x for x in v if 0.5 < x < 3]),
    ),
    "average of non-zero": (
        reducers.AvgNonZeroReducer,
        lambda v: mean([x for x in v if x > 1e-38]),  # float32's zero
    ),
    "per anchor": (reducers.PerAnchorReducer, mean),
    "per anchor, sum": (lambda: reducers.PerAnchorReducer(reducers.SumReducer()), sum),
    "class weighted": (lambda: reducers.ClassWeightedReducer(CLASS_WEIGHTS.clone()), mean),
    "divisor": (reducers.DivisorReducer, mean),
    "multiple": (lambda: reducers.MultipleReducers({"loss": reducers.SumReducer()}), sum),
    "nothing": (reducers.DoNothingReducer, None),
}


@pytest.mark.parametrize(
    ("module", "ours"),
    [
        (miners, MINERS.values()),
        (reducers, [make for make, _ in REDUCERS.values()]),
        (distances, DISTANCES.values()),
    ],
)
def test_every_class_of_pml_is_tried(module, ours):
    theirs = {c for n, c in vars(module).items() if inspect.isclass(c) and n[:4] != "Base"}
    assert theirs <= {type(make()) for make in ours}


# tests/test_properties.py has all distances with tuples, references and reducers.
@pytest.mark.parametrize("miner_name", [None, *MINERS])
@pytest.mark.parametrize("distance_name", ["cosine", "lp"])
def test_miner_distance_and_every_reducer_work_together(miner_name, distance_name, device):
    x, y = batch(device=device)
    indices = None if miner_name is None else MINERS[miner_name]()(x, y)
    distance = DISTANCES[distance_name]().to(device)
    kwargs = {"distance": distance, "anneal": 0.1, "variant": "Ds"}
    losses = expected_losses(x, y, indices, **kwargs)
    assert losses  # the miner found something to rank
    for name, (make_reducer, reduce) in REDUCERS.items():
        result = PNPLoss(reducer=make_reducer(), **kwargs)(x, y, indices)
        if reduce is None:
            elements = result["loss"]
            assert elements["reduction_type"] == "element"
            assert elements["indices"].tolist() == sorted(losses)
            got = dict(zip(sorted(losses), elements["losses"].tolist(), strict=True))
            assert got == pytest.approx(losses, rel=1e-3, abs=1e-6)
        else:
            weights = CLASS_WEIGHTS if name == "class weighted" else torch.ones(20)
            weighted = [loss * weights[int(y[a])].item() for a, loss in losses.items()]
            assert result.item() == pytest.approx(reduce(weighted), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("ranked", [True, False])
@pytest.mark.parametrize("reducer_name", REDUCERS)
def test_reducers_pass_on_the_gradient(reducer_name, ranked, dtype, device):
    """Of a batch with nothing to rank it is zero."""
    x, y = batch(dtype=dtype, device=device)
    y = y if ranked else torch.arange(len(y))
    result = PNPLoss(reducer=REDUCERS[reducer_name][0](), variant="Ds")(x.requires_grad_(), y)
    if reducer_name == "nothing":
        result = result["loss"]["losses"]
        result = result.sum() if ranked else x.sum() * 0 + result
    result.backward()
    assert x.grad.isfinite().all() and x.grad.any() == ranked and (result != 0) == ranked
