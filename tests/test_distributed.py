"""Two gloo ranks against one process that holds both halves of the batch."""

import distributed_cases as cases
import pytest
import torch
from pytorch_metric_learning import miners

from pml_pnp.sums import call

EFFICIENT = [name for name, case in cases.CASES.items() if case.get("efficient")]
JOINED = [name for name in cases.CASES if name not in EFFICIENT]


@pytest.fixture
def found(ranks):
    """Of each rank, what `results` of distributed_cases.py describes."""
    return ranks(cases, 2)


def alone(case):
    """Loss and gradient of the joined batch in this process."""
    x, y, ref, ref_y = cases.data()
    net, loss_func, args = cases.model(), cases.loss_function(**case), {}
    embeddings = net(x)
    if case.get("miner"):
        args["indices_tuple"] = miners.MultiSimilarityMiner()(embeddings, y)
    if case.get("references"):
        args |= {"ref_emb": ref[:, :4], "ref_labels": ref_y}
    loss = call(loss_func, embeddings, y, **args)
    loss.backward()
    return loss.detach(), net.weight.grad


@pytest.mark.parametrize("name", JOINED)
def test_two_ranks_take_the_same_step_as_one_process(found, name):
    loss, grad = alone(cases.CASES[name])
    assert grad.abs().max() > 1e-3
    for results in found:
        torch.testing.assert_close(results[name][0] / 2, loss)  # the wrapper counts it once a rank
        torch.testing.assert_close(results[name][1], grad)


@pytest.mark.parametrize("name", EFFICIENT)
def test_efficient_ranks_average_to_the_joined_loss(found, name):
    loss, _ = alone(cases.CASES[name])
    mean = sum(results[name][0] / 2 for results in found) / 2
    torch.testing.assert_close(mean, loss)
    assert found[0][name][0] != found[1][name][0]  # each rank ranks its own queries
    torch.testing.assert_close(found[0][name][1], found[1][name][1])
