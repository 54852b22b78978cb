"""What test_distributed_exact.py compares: each rank of some against one process with all rows."""

import datetime
import os
import time
from functools import partial
from unittest import mock

import torch
from helpers import Bilinear, Scale, raised, value_and_grad
from pytorch_metric_learning import distances, miners, reducers
from pytorch_metric_learning.utils import distributed as pml_distributed
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from pml_pnp import GradCache, losses
from pml_pnp.distributed import DistributedLossWrapper, DistributedMinerWrapper

# Rows of each rank, by the number of ranks.
ROWS = {2: [8, 8], 3: [8, 0, 5]}
STEPS = 3
TIMEOUT = 10  # seconds, after which a rank that waits for one that has died gives up
similarity = partial(losses.MultiSimilarityLoss, alpha=1.0, beta=5.0)
class_weights = partial(reducers.ClassWeightedReducer, torch.arange(1.0, 30.0))
lp = partial(distances.LpDistance, normalize_embeddings=False)
miner = partial(miners.MultiSimilarityMiner, epsilon=0.2)


class Doubled(losses.PNPLoss):
    """A subclass with a compute_loss of its own, which gets pairs."""

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb=None, ref_labels=None):
        found = super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        found["loss"]["losses"] = 2 * found["loss"]["losses"]
        return found


def proxies():
    torch.manual_seed(1)
    return losses.ProxyAnchorLoss(num_classes=4, embedding_size=4, alpha=2.0).double()


def pnp_in_memory():
    return losses.CrossBatchMemory(losses.PNPLoss(anneal=0.5), 4, memory_size=37).double()


class Sum(torch.nn.Module):
    """What a MultipleLosses computes, with references as well; for one process."""

    def __init__(self, both):
        super().__init__()
        self.both = both

    def forward(self, embeddings, labels=None, indices_tuple=None, ref_emb=None, ref_labels=None):
        total = 0
        for i, loss in enumerate(self.both.losses):
            pairs = indices_tuple
            if self.both.miners is not None and self.both.miners[i] is not None:
                pairs = self.both.miners[i](embeddings, labels, ref_emb, ref_labels)
            if isinstance(loss, losses.CrossBatchMemory):
                value = loss(embeddings, labels)
            elif isinstance(loss, losses.MultipleLosses):
                value = Sum(loss)(embeddings, labels, pairs, ref_emb, ref_labels)
            else:
                value = loss(embeddings, labels, pairs, ref_emb, ref_labels)
            total = total + self.both.weights[i] * value
        return total


def scale():
    return Scale().double()


def bilinear():
    return Bilinear(4).double()


BOTH = {"sum": [similarity, losses.PNPLoss]}
OF_PAIRS = {"sum": [losses.ContrastiveLoss, losses.PNPLoss], "tuple": "pairs"}
# What is different from PNPLoss(variant="Ds", anneal=0.5) on labels, by name.
CASES = {
    "callable variant": {"loss": {"variant": scale}},
    "batched": {"loss": {"distance": lambda: distances.BatchedDistance(lp(), batch_size=3)}},
    "own distance": {"loss": {"distance": bilinear}},
    "sum": {"loss": {"reducer": reducers.SumReducer}},
    "divisor": {"loss": {"reducer": reducers.DivisorReducer}},
    "class weights": {"loss": {"reducer": class_weights}},
    "lean": {"loss": {"chunk_size": 3}},
    "lean own distance": {"loss": {"chunk_size": 3, "distance": bilinear}},
    "subclass": {"class": Doubled},
    "hook": {"hook": True},
    "floating labels": {"labels": "floating"},
    "labels of several types": {"labels": "several"},
    "one rank counts nothing": {"labels": "unique on rank 1"},
    "nothing counts": {"labels": "unique"},
    "pairs": {"tuple": "pairs"},
    "triplets": {"tuple": "triplets"},
    "pairs without labels": {"tuple": "pairs", "labels": "none"},
    "miner": {"miner": False},
    "efficient miner": {"miner": True},
    "miner of the easiest": {"miner": True, "chooses": miners.BatchEasyHardMiner},
    "references": {"references": True},
    "references that are the batch": {"references": "the batch"},
    "references and pairs": {"references": True, "tuple": "pairs"},
    "references and miner": {"references": True, "miner": True},
    "memory": {"memory": {}},
    "memory, mask": {"memory": {}, "mask": True},
    "memory, miner": {"memory": {"miner": miners.MultiSimilarityMiner}},
    "memory, Lp": {"memory": {}, "loss": {"distance": lp}},
    "memory, not exact": {"memory": {}, "efficient": False},
    "memory, mask, not exact": {"memory": {}, "mask": True, "efficient": False},
    "self-supervised": {"views": True},
    "float32": {"dtype": torch.float32},
    "float16": {"dtype": torch.float16},
    "autocast": {"dtype": torch.float32, "autocast": True},
    "GradCache": {"cached": "inside"},
    "GradCache around": {"cached": "around"},
    "GradCache, memory": {"cached": "inside", "memory": {}},
    "another loss": {"sum": [similarity], "labels": "several"},
    "sum of two": {**BOTH, "weights": [0.5, 2]},
    "sum, float16": {**BOTH, "dtype": torch.float16},
    "sum, parameters": {"sum": [proxies, losses.PNPLoss, similarity], "loss": {"variant": scale}},
    "sum of a sum": {
        "sum": [lambda: losses.MultipleLosses([losses.PNPLoss(), proxies()]), similarity]
    },
    "sum, miners": {"sum": [similarity, losses.PNPLoss, similarity], "miners": [1, 1, 0]},
    "sum, pairs": OF_PAIRS,
    "sum, miner": {**BOTH, "miner": False},
    "sum, efficient miner": {**BOTH, "miner": True},
    "sum, references": {**BOTH, "references": True},
    "sum, references and pairs": {**OF_PAIRS, "references": True},
    "sum, references and miners": {**BOTH, "references": True, "miners": [1, 1]},
    "sum in a memory": {**BOTH, "memory": {}, "weights": [0.5, 2]},
    "sum in a memory, mask": {**BOTH, "memory": {}, "mask": True},
    "sum in a memory, miners": {**BOTH, "memory": {}, "miners": [0, 1]},
    "sum of a memory": {"sum": [pnp_in_memory, similarity, losses.PNPLoss], "steps": STEPS},
    "sum of views": {**BOTH, "views": True},
    "second derivative": {"twice": True},
    "second derivative, SNR": {"twice": True, "loss": {"distance": distances.SNRDistance}},
}


# By PML's own wrapper, which takes as many rows of every rank, and enqueues its own before others.
SUM = {"reducer": reducers.SumReducer}
PMLS = {
    "labels": {"efficient": False},
    "miner": {"efficient": False, "miner": False},
    "references": {"efficient": False, "references": True},
    "memory": {"efficient": False, "memory": {}, "steps": 2},  # until the queue is full
    "sum": {"efficient": False, **BOTH, "miners": [1, 0]},
    "efficient": {"efficient": True, "loss": SUM},
    "efficient miner": {"efficient": True, "miner": True, "loss": SUM},
}
CASES |= {f"PML's: {name}": {**case, "pmls": True} for name, case in PMLS.items()}


def names(world):
    """The cases that are tried with a number of ranks."""
    return [name for name, case in CASES.items() if world == 2 or not case.get("pmls")]


def data(rows, case, step):
    """(x, labels, references, their labels, mask) of each rank; each a part of joined batch."""
    g = torch.Generator().manual_seed(step)
    n = sum(rows)
    x, ref = (torch.randn(n, 6, generator=g, dtype=torch.float64) for _ in range(2))
    y, ref_y = (torch.randint(0, 4, (n,), generator=g) for _ in range(2))
    mask = torch.rand(n, generator=g) < 0.6
    kind = case.get("labels")
    if kind in ("unique", "unique on rank 1"):
        unique = slice(0, n) if kind == "unique" else slice(rows[0], sum(rows[:2]))
        y[unique] = torch.arange(4, n + 4)[unique]
    if kind == "floating":
        y, ref_y = y / 2, ref_y / 2
    return [part.split(rows) for part in (x, y, ref, ref_y, mask)]


def model(case):
    torch.default_generator.manual_seed(0)
    return torch.nn.Linear(6, 4).to(case.get("dtype", torch.float64))


def loss_function(case):
    """The loss, inside a memory or SelfSupervisedLoss where the case says so."""
    made = {k: v() if callable(v) else v for k, v in case.get("loss", {}).items()}
    made = {"variant": "Ds", "anneal": 0.5, **made}
    loss = case.get("class", losses.PNPLoss)(**made)
    if "sum" in case:
        made = [cls(**made) if cls is losses.PNPLoss else cls() for cls in case["sum"]]
        chosen = [miner() if chosen else None for chosen in case.get("miners", [])] or None
        loss = losses.MultipleLosses(made, chosen, case.get("weights"))
    if case.get("hook"):
        loss.register_forward_pre_hook(lambda module, args: None)
    if "memory" in case:
        parts = {k: v() for k, v in case["memory"].items()}
        return losses.CrossBatchMemory(loss, 4, memory_size=37, **parts).double()
    if case.get("views"):
        return losses.SelfSupervisedLoss(loss)
    return loss


def joined_tuple(case, rows, step):
    """Pairs or triplets over the joined batch in the order of the ranks."""
    g = torch.Generator().manual_seed(100 + step)
    n = sum(rows)
    a, p, a2, q = torch.randint(0, n, (4, 6 * n), generator=g)
    return (a, p, q) if case["tuple"] == "triplets" else (a, p, a2, q)


def own_first(indices_tuple, rows, rank):
    """Where the rows of the joined batch are if those of a rank come first."""
    parts = list(torch.arange(sum(rows)).split(rows))
    order = torch.cat([parts.pop(rank), *parts])
    return tuple(torch.argsort(order)[i] for i in indices_tuple)


def gradients(loss, net, loss_func, world):
    """Gradients of net and loss, here of one rank."""
    parameters = [*net.parameters(), *(p for p in loss_func.parameters() if p.requires_grad)]
    for parameter in parameters:
        parameter.grad = None
    loss.backward()
    for parameter in loss_func.parameters():
        if world > 1 and parameter.grad is not None:  # as DistributedDataParallel does
            distributed.all_reduce(parameter.grad)
            parameter.grad /= world
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]


def steps(case, rows, rank=None):
    """[(loss, gradients, queue)] of each step: of a rank, or of one process with all rows."""
    world = 1 if rank is None else len(rows)
    net, loss_func, mine = model(case), loss_function(case), case.get("chooses", miner)()
    if rank is None and isinstance(loss_func, losses.MultipleLosses):
        loss_func = Sum(loss_func)
    if rank is not None:
        if case.get("cached") == "inside":
            net = GradCache(net, chunk_size=3)
        net = DistributedDataParallel(net)
        if case.get("cached") == "around":
            net = GradCache(net, chunk_size=3)
        efficient = case.get("efficient", "exact")
        is_pmls = case.get("pmls") and "sum" not in case
        wrapper = pml_distributed.DistributedLossWrapper if is_pmls else DistributedLossWrapper
        loss_func = wrapper(loss_func, efficient=efficient)
        mine = DistributedMinerWrapper(mine, efficient=case.get("miner", False))
        if len(set(rows)) == 1 and not {"references", "chooses"} & set(case):  # PML's own
            mine = pml_distributed.DistributedMinerWrapper(miner(), case.get("miner", False))
    results = []
    for step in range(case.get("steps", STEPS if "memory" in case else 1)):
        parts = data(rows, case, step)
        x, y, ref, ref_y, mask = (torch.cat(p) if rank is None else p[rank] for p in parts)
        x, ref = x.to(case.get("dtype", x.dtype)), ref.to(case.get("dtype", x.dtype))
        if rank is not None and case.get("labels") == "several":
            y = y.to([torch.uint8, torch.float32, torch.int16, torch.int64][rank])
        args = {} if case.get("labels") == "none" else {"labels": y}
        with torch.autocast("cpu", enabled=case.get("autocast", False)):
            embeddings = net(x)
            if case.get("references"):
                own = case["references"] == "the batch"
                args["ref_emb"] = embeddings if own else net(ref)
                args["ref_labels"] = y if own else ref_y
            if case.get("views"):
                args = {"ref_emb": net(ref)}
            if case.get("mask"):
                args["enqueue_mask"] = mask
            if "tuple" in case:
                given = joined_tuple(case, rows, step)
                args["indices_tuple"] = given if rank is None else own_first(given, rows, rank)
            if "miner" in case:
                references = [args[k] for k in ("ref_emb", "ref_labels") if k in args]
                args["indices_tuple"] = mine(embeddings, y, *references)
            loss = loss_func(embeddings, **args)
        if case.get("twice"):  # the sum over all rows of their squared gradient
            (grad,) = torch.autograd.grad(loss, embeddings, create_graph=True)
            loss = (grad / world).square().sum() * world
        queue = loss_func.loss if rank is not None else loss_func
        queue = queue.state_dict() if "memory" in case else {}
        queue = {k.removeprefix("module."): v.clone() for k, v in queue.items()}
        results.append((loss.detach(), gradients(loss, net, loss_func, world), queue))
    return results


def errors(rank):
    """What each rank raises if one of them is given something bad."""
    wrapper = DistributedLossWrapper(losses.PNPLoss(), "exact")
    memory = losses.CrossBatchMemory(losses.PNPLoss(), 4, 37)
    memories = [DistributedLossWrapper(memory, efficient) for efficient in (False, "exact")]
    views = DistributedLossWrapper(losses.SelfSupervisedLoss(losses.PNPLoss()), "exact")
    summed = losses.MultipleLosses([losses.CrossBatchMemory(losses.PNPLoss(), 4, 37)])
    summed = DistributedLossWrapper(summed, "exact")
    mined = DistributedLossWrapper(losses.MultipleLosses([losses.PNPLoss()], [miner()]), "exact")
    x, y = torch.randn(6, 4), torch.arange(6) // 2
    odd = rank == 1
    triplets, floats = (torch.zeros(1).long(),) * 3, (torch.zeros(1),) * 3
    bad_triplets = (torch.tensor([99]),) * 3
    pmls = DistributedLossWrapper(losses.PNPLoss())
    calls = {
        "labels": lambda: wrapper(x, y[:5] if odd else y),
        "no labels": lambda: wrapper(x, None if odd else y),
        "large labels": lambda: wrapper(x, (y - 9).to(torch.uint64) if odd else y),
        "size": lambda: wrapper(x[:, :3] if odd else x, y),
        "dtype": lambda: wrapper(x.double() if odd else x, y),
        "float8": lambda: wrapper(x.to(torch.float8_e4m3fn) if odd else x, y),
        "references": lambda: wrapper(x, y, None, *([x + 1, y] if odd else [])),
        "mask": lambda: memories[1](x, y, enqueue_mask=y > 1 if odd else None),
        "mask type": lambda: memories[1](x, y, enqueue_mask=y if odd else y > 1),
        "no embeddings": lambda: wrapper(None if odd else x, y),
        "memory and tuple": lambda: memories[1](x, y, triplets if odd else None),
        "memory and references": lambda: memories[0](x, y, None, *([x, y] if odd else [])),
        "memory without labels": lambda: memories[0](x, None if odd else y),
        "too many for the memory": lambda: memories[1](x.repeat(7, 1), y.repeat(7)),
        "mask without memory": lambda: wrapper(x, y, enqueue_mask=y > 1 if odd else None),
        "tuple and miners": lambda: mined(x, y, triplets if odd else None),
        "sum of a memory and tuple": lambda: summed(x, y, triplets if odd else None),
        "views": lambda: views(x, x[:5] if odd else x),
        "no views": lambda: views(x),
        "tuple": lambda: wrapper(x, y, bad_triplets),
        "tuple of one rank": lambda: wrapper(x, y, bad_triplets if odd else triplets),
        "tuple of floats": lambda: wrapper(x, y, floats if odd else triplets),
        "tuple and views": lambda: views(x, x + 1, triplets if odd else None),
        "mask in PML's mode": lambda: pmls(x, y, enqueue_mask=y > 1),
    }
    return {name: raised(call) for name, call in calls.items()}


def without_gradient(rank):
    """A rank without a model in its last step, and none with one: (loss, gradient) of each."""
    x, y = torch.arange(24.0).view(6, 4).sin().double() + rank, torch.arange(6) // 2
    wrapper = DistributedLossWrapper(losses.PNPLoss(variant="Ds", anneal=0.5), "exact")
    if rank == 1:
        x, y = x[:0], y[:0]
    else:
        x.requires_grad_()
    loss = wrapper(x, y)
    loss.backward()
    with torch.no_grad():
        value = wrapper(x, y)
    return loss.detach(), value, x.detach(), y, x.grad


def without_rows():
    """(loss, gradient) of ranks of which none has a row."""
    x, y = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    return value_and_grad(DistributedLossWrapper(losses.PNPLoss(), "exact"), x, y)


def no_pairs_are_listed():
    """Whether labels are handed to the loss of this rank without listing pairs."""
    with mock.patch.object(lmu, "get_all_pairs_indices", wraps=lmu.get_all_pairs_indices) as listed:
        DistributedLossWrapper(losses.PNPLoss(), "exact")(torch.randn(6, 4), torch.arange(6) // 2)
    return not listed.called


class AllPairs(miners.BaseMiner):
    def mine(self, embeddings, labels, ref_emb, ref_labels):
        return lmu.get_all_pairs_indices(labels, ref_labels)


def mined_rows():
    """The rows of the joined batch whose pairs are mined: without and with `efficient`."""
    x, y = torch.randn(6, 4), torch.arange(6) // 2
    mine = [DistributedMinerWrapper(AllPairs(), efficient) for efficient in (False, True)]
    return [miner(x, y)[0].unique().tolist() for miner in mine]


def results(rank):
    """{case: what `steps` returns}, and five of no case."""
    world = distributed.get_world_size()
    return {
        "errors": errors(rank),
        "no pairs": no_pairs_are_listed(),
        "without gradient": without_gradient(rank),
        "without rows": without_rows(),
        "mined": mined_rows(),
        **{name: steps(CASES[name], ROWS[world], rank) for name in names(world)},
    }


def die(rank, port, file):
    """Of two ranks one dies; write the errors of the other, and the seconds that they took."""
    torch.set_num_threads(1)
    url, timeout = f"tcp://127.0.0.1:{port}", datetime.timedelta(seconds=TIMEOUT)
    distributed.init_process_group("gloo", url, timeout=timeout, rank=rank, world_size=2)
    wrapper = DistributedLossWrapper(losses.PNPLoss(), "exact")
    x, y = torch.randn(6, 4, requires_grad=True), torch.arange(6) // 2
    loss = wrapper(x, y)
    if rank == 1:
        os._exit(0)  # between forward and backward
    begun = time.monotonic()
    found = [raised(loss.backward), raised(lambda: wrapper(x, y))]
    torch.save({"errors": found, "seconds": time.monotonic() - begun}, file)
    os._exit(0)  # the group cannot be left in order
