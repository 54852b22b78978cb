"""DistributedLossWrapper(efficient="exact") where one rank of two is given bad pairs, or dies."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pml_pnp import losses
from pml_pnp.distributed import DistributedLossWrapper

WORKER = Path(__file__).with_name("distributed_failures_worker.py")


@pytest.fixture(scope="module")
def ranks(once):
    """What each rank wrote, line by line, and the seconds that both took."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")

    def start(folder):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run([sys.executable, WORKER, folder], check=True, timeout=300, env=environment)

    folder = once("failing ranks", start)
    written = [(folder / f"{rank}.jsonl").read_text() for rank in range(2)]
    ends = json.loads((folder / "ends.json").read_text())
    assert ends["codes"] == [0, 3], written
    lines = [[json.loads(line) for line in text.splitlines()] for text in written]
    return [*lines, ends["seconds"]]


@pytest.mark.parametrize(
    ("name", "of_rank_1"),
    [
        ("range", r"ValueError: indices_tuple\[0\] must hold indices from 0 to 11, got 99"),
        ("dtype", "TypeError: indices_tuple must be .* got torch.float32 at position 0"),
        ("length", "ValueError: indices_tuple must be 3 or 4 .* got 2"),
        ("views", "ValueError: SelfSupervisedLoss takes no indices_tuple"),
    ],
)
def test_bad_pairs_of_one_rank_are_an_error_on_both(ranks, name, of_rank_1):
    assert re.match("RuntimeError: bad arguments on rank 1", ranks[0][0][name])
    assert re.match(of_rank_1, ranks[1][0][name])


def test_ranks_go_on_after_an_error(ranks):
    assert ranks[0][0]["good"] is None and ranks[1][0]["good"] is None


def test_a_mask_without_a_memory_is_refused_in_every_mode(ranks):
    assert ranks[0][0]["mask"].startswith("ValueError: enqueue_mask needs a CrossBatchMemory")


def test_pairs_for_views_are_refused_in_one_process():
    views = DistributedLossWrapper(losses.SelfSupervisedLoss(losses.PNPLoss()), "exact")
    x, pairs = torch.randn(4, 3), (torch.tensor([0]),) * 3
    with pytest.raises(ValueError, match="SelfSupervisedLoss takes no indices_tuple"):
        views(x, x + 1, pairs)


def test_a_rank_that_dies_is_an_error_for_the_other(ranks):
    of_backward, of_next_step = ranks[0][1]
    assert of_backward and of_backward.startswith(("RuntimeError", "DistBackendError"))
    assert of_next_step and of_next_step.startswith(("RuntimeError", "DistBackendError"))
    assert ranks[2] < 60  # the timeout of the group is 10 s
