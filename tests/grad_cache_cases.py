"""What test_grad_cache_distributed.py compares: the cases, and what one rank of two does."""

import contextlib

import torch
from helpers import raised
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from pml_pnp import GradCache, PNPLoss

STEPS = 3
CHUNK_SIZE = 4
ROWS = 11, 6  # of each rank: 3 chunks and 2
CASES = {
    "plain": {},
    "static graph": {"static_graph": True},
    "unused parameters": {"find_unused_parameters": True},
    "bucket views": {"gradient_as_bucket_view": True},
    "accumulated": {"accumulated": True},
}
ORDERS = {
    "DDP of GradCache": lambda model, ddp: ddp(GradCache(model, CHUNK_SIZE)),
    "GradCache of DDP": lambda model, ddp: GradCache(ddp(model), CHUNK_SIZE),
}


class Net(nn.Module):
    def __init__(self, unused):
        super().__init__()
        layers = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 4)
        self.body = nn.Sequential(*layers)
        self.unused = nn.Linear(2, 2) if unused else None

    def forward(self, x):
        return self.body(x)


def model(find_unused_parameters=False, **_):
    torch.manual_seed(0)
    return Net(find_unused_parameters).double()


def data(rank, step):
    g = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(ROWS[rank], 5, generator=g, dtype=torch.float64)


def loss_of(embeddings):
    labels = torch.arange(len(embeddings), device=embeddings.device) // 2
    return PNPLoss(variant="Ds", anneal=0.3)(embeddings, labels)


def seed(rank, step):
    torch.default_generator.manual_seed(100 * step + rank)


def counted(synchronizations, bucket):
    """Communication hook that notes when all gradients have been exchanged."""
    if bucket.is_last():
        synchronizations.append(1)
    return allreduce_hook(None, bucket)


def train(order, rank, accumulated=False, **options):
    """State of the model after STEPS, and how often the gradients were synchronized."""
    net, synchronizations = model(**options), []

    def ddp(module):
        wrapped = DistributedDataParallel(module, **options)
        wrapped.register_comm_hook(synchronizations, counted)
        return wrapped

    wrapped, optimizer = ORDERS[order](net, ddp), torch.optim.SGD(net.parameters(), lr=0.5)
    for step in range(STEPS):
        waits = accumulated and step < STEPS - 1
        with wrapped.no_sync() if waits else contextlib.nullcontext():
            seed(rank, step)
            loss_of(wrapped(data(rank, step))).backward()
        if not waits:
            optimizer.step()
            optimizer.zero_grad()
    return {"state": net.state_dict(), "synchronizations": len(synchronizations)}


def refused():
    """What is said about DistributedDataParallel inside of a model."""
    trunk = DistributedDataParallel(nn.Linear(5, 4))
    return raised(lambda: GradCache(nn.Sequential(trunk, nn.Linear(4, 2)), CHUNK_SIZE))


def names():
    """Keys of a checkpoint in both orders."""
    plain = DistributedDataParallel(model())
    wrapped = [make(model(), DistributedDataParallel) for make in ORDERS.values()]
    return [list(m.state_dict()) for m in (plain, *wrapped)]


def results(rank):
    """{(order, case): state of the model, number of synchronizations}, and two of no case."""
    found = {"refused": refused(), "names": names()}
    for order in ORDERS:
        for name, case in CASES.items():
            found[order, name] = train(order, rank, **case)
    return found
