"""Two gloo ranks against one process that holds both halves of the batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import distributed_worker as worker
import pytest
import torch
from pytorch_metric_learning import miners

WORKER = Path(worker.__file__)
EFFICIENT = [name for name, case in worker.CASES.items() if case.get("efficient")]
JOINED = [name for name in worker.CASES if name not in EFFICIENT]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """[{case: (loss, gradient of the model)} of each rank]."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    environment = {
        **os.environ,
        **{"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": "2"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder)], env={**environment, "RANK": str(rank)}
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=600) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def alone(case):
    """Loss and gradient of the joined batch in this process."""
    x, y, ref, ref_y = worker.data()
    net, loss_func, args = worker.model(), worker.loss_function(**case), {}
    embeddings = net(x)
    if case.get("miner"):
        args["indices_tuple"] = miners.MultiSimilarityMiner()(embeddings, y)
    if case.get("references"):
        args |= {"ref_emb": ref[:, :4], "ref_labels": ref_y}
    loss = loss_func(embeddings, y, **args)
    loss.backward()
    return loss.detach(), net.weight.grad


@pytest.mark.parametrize("name", JOINED)
def test_two_ranks_take_the_same_step_as_one_process(ranks, name):
    loss, grad = alone(worker.CASES[name])
    assert grad.abs().max() > 1e-3
    for results in ranks:
        torch.testing.assert_close(results[name][0] / 2, loss)  # the wrapper counts it once a rank
        torch.testing.assert_close(results[name][1], grad)


@pytest.mark.parametrize("name", EFFICIENT)
def test_efficient_ranks_average_to_the_joined_loss(ranks, name):
    loss, _ = alone(worker.CASES[name])
    mean = sum(results[name][0] / 2 for results in ranks) / 2
    torch.testing.assert_close(mean, loss)
    assert ranks[0][name][0] != ranks[1][name][0]  # each rank ranks its own queries
    torch.testing.assert_close(ranks[0][name][1], ranks[1][name][1])
