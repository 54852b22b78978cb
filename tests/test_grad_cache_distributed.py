"""GradCache with DistributedDataParallel: two gloo ranks against one process."""

import grad_cache_cases as cases
import pytest
import torch


@pytest.fixture
def found(ranks):
    """Of each rank, what `results` of grad_cache_cases.py describes."""
    return ranks(cases, 2)


def alone(accumulated=False, **options):
    """The same steps without GradCache, for each rank's chunks in turn; buffers are of rank 0."""
    net = cases.model(**options)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for step in range(cases.STEPS):
        for rank in range(2):
            before = {name: b.clone() for name, b in net.named_buffers()}
            cases.seed(rank, step)
            x = cases.data(rank, step)
            chunks = {11: [3, 4, 4], 6: [3, 3]}[len(x)]
            loss = cases.loss_of(torch.cat([net(chunk) for chunk in x.split(chunks)]))
            (loss / 2).backward()  # DistributedDataParallel averages over the ranks
            if rank == 1:
                net.load_state_dict(before, strict=False)
        if not accumulated or step == cases.STEPS - 1:
            optimizer.step()
            optimizer.zero_grad()
    return net.state_dict()


@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize("order", cases.ORDERS)
def test_two_ranks_take_the_same_steps_as_one_process(found, order, name):
    expected, untrained = alone(**cases.CASES[name]), cases.model().state_dict()
    assert (expected["body.0.weight"] - untrained["body.0.weight"]).abs().max() > 1e-3
    torch.testing.assert_close(found[0][order, name]["state"], expected)
    for key in dict(cases.model(**cases.CASES[name]).named_parameters()):
        torch.testing.assert_close(found[1][order, name]["state"][key], expected[key])
    # Gradients are synchronized once a step.
    steps = 1 if cases.CASES[name].get("accumulated") else cases.STEPS
    assert [results[order, name]["synchronizations"] for results in found] == [steps] * 2


def test_ddp_inside_of_the_model_is_refused(found):
    assert found[0]["refused"] == (
        "ValueError: model must not contain DistributedDataParallel, which would synchronize once "
        "per chunk: use DistributedDataParallel(GradCache(model)), got one at '0'"
    )


def test_checkpoints_are_interchangeable_with_ddp_alone(found):
    plain, *wrapped = found[0]["names"]
    assert plain[0] == "module.body.0.weight" and wrapped == [plain, plain]
