"""What test_distributed.py compares: the cases, and what one rank of two does."""

import torch
from pytorch_metric_learning import miners
from pytorch_metric_learning.utils.distributed import (
    DistributedLossWrapper,
    DistributedMinerWrapper,
)
from torch.nn.parallel import DistributedDataParallel

from pml_pnp import distributed as ours
from pml_pnp import losses

# Named so that each is one parametrized test: (with miner, with references, with memory, efficient)
CASES = {
    "plain": {},
    "efficient": {"efficient": True},
    "miner": {"miner": True},
    "efficient miner": {"miner": True, "efficient": True},
    "references": {"references": True},
    "memory": {"memory": True},
    "sum": {"sum": True},
    "efficient sum": {"sum": True, "efficient": True},
}


def data(half=None):
    """Inputs, labels, references, their labels; `half` 0 or 1 of one rank, None for both."""
    g = torch.Generator().manual_seed(3)
    x, ref = (torch.randn(24, 6, generator=g, dtype=torch.float64) for _ in range(2))
    y, ref_y = (torch.randint(0, 4, (24,), generator=g) for _ in range(2))
    y[:8] = y[12:20] = torch.arange(8) % 4  # every query counts on either rank
    rows = slice(None) if half is None else slice(12 * half, 12 * half + 12)
    return x[rows], y[rows], ref[rows], ref_y[rows]


def model():
    torch.manual_seed(0)
    return torch.nn.Linear(6, 4).double()


def loss_function(memory=False, sum=False, **_):
    """The loss; a sum has a miner, whose pairs are the same for own and for all queries."""
    loss = losses.PNPLoss(variant="Ds", anneal=0.05)
    if sum:
        mined = [miners.MultiSimilarityMiner(), None]
        return losses.MultipleLosses([loss, losses.PNPLoss()], mined, weights=[1, 2])
    return losses.CrossBatchMemory(loss, 4, 48).double() if memory else loss


def results(rank):
    """{case: (loss, gradient of the model)}."""
    x, y, ref, ref_y = data(rank)
    found = {}
    for name, case in CASES.items():
        net = DistributedDataParallel(model())
        efficient = case.get("efficient", False)
        wrapper = ours.DistributedLossWrapper if "sum" in case else DistributedLossWrapper
        loss_func = wrapper(loss_function(**case), efficient=efficient)
        embeddings, args = net(x), {}
        if case.get("miner"):
            miner = DistributedMinerWrapper(miners.MultiSimilarityMiner(), efficient=efficient)
            args["indices_tuple"] = miner(embeddings, y)
        if case.get("references"):
            args |= {"ref_emb": ref[:, :4], "ref_labels": ref_y}
        loss = loss_func(embeddings, y, **args)
        loss.backward()
        found[name] = (loss.detach(), net.module.weight.grad.clone())
    return found
