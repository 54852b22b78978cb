"""Losses and miners from what is typed."""

import pytest
import torch
from pytorch_metric_learning import distances, reducers
from retrieval.by_name import build_loss, build_miner, parse_arguments, try_out
from retrieval.errors import UserError

from pml_pnp import losses
from pml_pnp.variants import VARIANTS


def test_arguments_become_python_values():
    pairs = ["variant=Dq", "alpha=4", "anneal=1e-2", "include_self=False", "x=a=b", "y=None"]
    values = {"variant": "Dq", "alpha": 4, "anneal": 0.01, "include_self": False}
    assert parse_arguments("--loss-args", pairs) == {**values, "x": "a=b", "y": None}
    as_in_yaml = parse_arguments("--loss-args", ["a=true", "b=FALSE", "c=null", "d=none", "e=nul"])
    assert as_in_yaml == {"a": True, "b": False, "c": None, "d": None, "e": "nul"}


@pytest.mark.parametrize(
    "text", ["__import__('os').system('touch x')", "(" * 10**5, "-" * 10**5 + "1"]
)
def test_arguments_are_values_and_never_run(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    assert parse_arguments("--loss-args", [f"x={text}"]) == {"x": text}
    assert not any(tmp_path.iterdir())


def test_classes_embedding_size_distance_reducer_and_miner_are_filled_in():
    for arguments, classes in (({}, 7), ({"num_classes": 9}, 9)):
        assert build_loss("ProxyAnchorLoss", arguments, 7, 5).proxies.shape == (classes, 5)
    loss = build_loss("PNPLoss", {"distance": "LpDistance", "reducer": "SumReducer"}, 4, 8)
    assert isinstance(loss.distance, distances.LpDistance)
    assert isinstance(loss.reducer, reducers.SumReducer)
    miner = build_miner("TripletMarginMiner", {"margin": 0.1})
    memory = build_loss("PNPLoss", {}, 4, 8, memory_size=64, miner=miner)
    assert memory.miner is miner
    assert memory.embedding_memory.shape == (64, 8)


def test_a_loss_beside_is_added():
    both = build_loss("PNPLoss", {"variant": "Ds"}, 4, 8, beside="MultiSimilarityLoss")
    x, labels = torch.randn(12, 8), torch.arange(12) // 3
    alone = losses.PNPLoss(variant="Ds")(x, labels), losses.MultiSimilarityLoss()(x, labels)
    torch.testing.assert_close(both(x, labels), sum(alone))
    arguments = {"margin": 0.3}
    proxies = build_loss("PNPLoss", {}, 4, 8, 64, None, "ProxyAnchorLoss", arguments)
    assert proxies.losses[1].margin == 0.3
    assert proxies.losses[0].embedding_memory.shape == (64, 8)
    assert proxies.losses[1].proxies.shape == (4, 8)


def test_trial_gives_the_loss_beside_a_memory_no_pairs():
    miner = build_miner("MultiSimilarityMiner", {})
    both = build_loss("PNPLoss", {}, 4, 16, beside="InstanceLoss")  # which takes no pairs
    with pytest.raises(UserError, match="--beside: InstanceLoss cannot be used here"):
        try_out(both, miner, 16, 3)
    try_out(both, miner, 16, 3, beside_is_mined=False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_passes_the_trial_which_leaves_the_random_state_alone(variant):
    loss = build_loss("PNPLoss", {"variant": variant}, 4, 16)
    before = torch.get_rng_state()
    try_out(loss, None, 16, 3)
    assert torch.equal(torch.get_rng_state(), before)
