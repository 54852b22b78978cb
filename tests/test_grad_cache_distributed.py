"""GradCache with DistributedDataParallel: two gloo ranks against one process."""

import os
import subprocess
import sys
from pathlib import Path

import grad_cache_worker as worker
import pytest
import torch


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """[{(order, case): state of the model, number of synchronizations} of each rank]."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command += [worker.__file__, str(folder)]
    subprocess.run(command, check=True, env=environment, timeout=600)
    return [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(2)]


def alone(accumulated=False, **options):
    """The same steps without GradCache, for each rank's chunks in turn; buffers are of rank 0."""
    net = worker.model(**options)
    for step in range(worker.STEPS):
        for rank in range(2):
            before = {name: b.clone() for name, b in net.named_buffers()}
            worker.seed(rank, step)
            x = worker.data(rank, step)
            chunks = {11: [3, 4, 4], 6: [3, 3]}[len(x)]
            loss = worker.loss_of(torch.cat([net(chunk) for chunk in x.split(chunks)]))
            (loss / 2).backward()  # DistributedDataParallel averages over the ranks
            if rank == 1:
                net.load_state_dict(before, strict=False)
        if not accumulated or step == worker.STEPS - 1:
            worker.update(net.parameters())
    return net.state_dict()


@pytest.mark.parametrize("name", worker.CASES)
@pytest.mark.parametrize("order", worker.ORDERS)
def test_two_ranks_take_the_same_steps_as_one_process(ranks, order, name):
    expected, untrained = alone(**worker.CASES[name]), worker.model().state_dict()
    assert (expected["body.0.weight"] - untrained["body.0.weight"]).abs().max() > 1e-3
    torch.testing.assert_close(ranks[0][order, name]["state"], expected)
    for key in dict(worker.model(**worker.CASES[name]).named_parameters()):
        torch.testing.assert_close(ranks[1][order, name]["state"][key], expected[key])


@pytest.mark.parametrize("name", worker.CASES)
@pytest.mark.parametrize("order", worker.ORDERS)
def test_gradients_are_synchronized_once_a_step(ranks, order, name):
    steps = 1 if worker.CASES[name].get("accumulated") else worker.STEPS
    assert [results[order, name]["synchronizations"] for results in ranks] == [steps] * 2


def test_ddp_inside_of_the_model_is_refused(ranks):
    assert ranks[0]["refused"] == (
        "model must not contain DistributedDataParallel, which would synchronize once per chunk: "
        "use DistributedDataParallel(GradCache(model)), got one at '0'"
    )


def test_checkpoints_are_interchangeable_with_ddp_alone(ranks):
    plain, *wrapped = ranks[0]["names"]
    assert plain[0] == "module.body.0.weight" and wrapped == [plain, plain]
