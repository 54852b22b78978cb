"""One run of the study: train a network with a loss, and measure how well it retrieves."""

import dataclasses
import time
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from networks import embed
from pytorch_metric_learning.samplers import MPerClassSampler
from study_data import DataSet, Part
from torch import Tensor, nn
from torch.nn.functional import normalize

QUERIES_AT_A_TIME = 1024
METRICS = ("map_at_r", "precision_at_1", "r_precision")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run came to: its metrics, by METRICS, and how long it took in seconds of CPU."""

    metrics: dict[str, float]
    train_seconds: float
    evaluation_seconds: float


def run(
    data: DataSet,
    train_on: Part,
    measured: Part,
    make_objective: Callable[[int], nn.Module],
    learning_rate: float,
    proxy_learning_rate: float,
    seed: int,
    each_step: Callable[[int, Tensor, Tensor], None] = lambda step, embeddings, labels: None,
) -> Outcome:
    """Train on one part and measure on another; the other arguments are those of `train`."""
    begin = time.process_time()
    network = train(
        data, train_on, make_objective, learning_rate, proxy_learning_rate, seed, each_step
    )
    trained = time.process_time()
    metrics = retrieval_metrics(embed(network, measured.inputs), measured.labels)
    return Outcome(metrics, trained - begin, time.process_time() - trained)


def train(
    data: DataSet,
    part: Part,
    make_objective: Callable[[int], nn.Module],
    learning_rate: float,
    proxy_learning_rate: float,
    seed: int,
    each_step: Callable[[int, Tensor, Tensor], None] = lambda step, embeddings, labels: None,
) -> nn.Module:
    """The network, trained.

    Initial weights, batches and augmentation follow from the seed alone, whatever the loss: runs of
    two losses with the same seed are a pair. Network and loss are where the inputs to train on are.

    Args:
        data: network, augmentation, batch and number of steps.
        part: what to train on.
        make_objective: number of training classes -> module of (embeddings, labels).
        learning_rate: of the network, at the first step; it falls to zero along a cosine.
        proxy_learning_rate: the same for parameters of the objective.
        seed: of the run.
        each_step: called with the number of the step, the embeddings and the labels.
    """
    torch.manual_seed(seed)
    device = part.inputs.device
    network = data.network(part.inputs).to(device)
    objective = make_objective(len(part.classes)).to(device)
    groups = parameter_groups(network, learning_rate, data.head_rate)
    if proxies := list(objective.parameters()):
        groups.append({"params": proxies, "lr": proxy_learning_rate})
    # Unfused, it takes a quarter of a step of the transformer on a CPU.
    optimizer = torch.optim.Adam(groups, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, data.steps)
    generator = torch.Generator().manual_seed(seed)
    network.train()
    for step, indices in enumerate(batches(part.labels, data, seed).to(device)):
        embeddings = network(data.augment(part.inputs[indices], generator))
        labels = part.labels[indices]
        each_step(step, embeddings, labels)
        loss = objective(embeddings, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network


def parameter_groups(network: nn.Module, learning_rate: float, head_rate: float) -> list[dict]:
    """What an optimizer takes: the last layer at `head_rate` times the others' learning rate."""
    if head_rate == 1:
        return [{"params": list(network.parameters()), "lr": learning_rate}]
    *trunk, head = network.children()
    of_trunk = [p for part in trunk for p in part.parameters()]
    return [
        {"params": of_trunk, "lr": learning_rate},
        {"params": list(head.parameters()), "lr": learning_rate * head_rate},
    ]


@lru_cache(maxsize=4)  # the losses of a seed have the same, and the sampler is slow
def batches(labels: Tensor, data: DataSet, seed: int) -> Tensor:
    """Indices of all batches, (steps, batch size), by PML's sampler."""
    size = data.classes_per_batch * data.examples_per_class
    np.random.seed(seed)  # PML's sampler draws from NumPy's own generator
    sampler = MPerClassSampler(labels.cpu(), data.examples_per_class, size, data.steps * size)
    return torch.tensor(list(sampler)).view(data.steps, size)


@torch.no_grad()
def retrieval_metrics(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    """MAP@R, precision@1 and R-precision by cosine similarity, each example a query to the others.

    As PML's AccuracyCalculator, which takes minutes where many examples share a class. Embeddings
    that are not finite find nothing.

    Raises:
        ValueError: a class of one example, which has nothing to find.
    """
    embeddings, labels = embeddings.cpu(), labels.cpu()  # NumPy selects what is nearest
    if not embeddings.isfinite().all():
        return dict.fromkeys(METRICS, 0.0)
    number = labels.bincount()[labels] - 1
    if number.min() < 1:
        raise ValueError("expected at least two examples of each class, got one of some class")
    unit, most = normalize(embeddings), int(number.max())
    rank = torch.arange(1, most + 1)
    total = torch.zeros(3, dtype=torch.float64)
    for rows in torch.arange(len(labels)).split(QUERIES_AT_A_TIME):
        s = unit[rows] @ unit.T
        s[torch.arange(len(rows)), rows] = -2  # the query itself, below every similarity
        # NumPy selects the first R of a long row in a fraction of the time that topk takes.
        first = torch.from_numpy(np.argpartition(s.numpy(), -most, axis=1)[:, -most:].copy())
        order = s.gather(1, first).argsort(dim=1, descending=True)
        of_neighbours = labels[first.gather(1, order)]
        r = number[rows][:, None]
        hit = (of_neighbours == labels[rows][:, None]) & (rank <= r)
        precision = hit.cumsum(1).double() / rank
        total[0] += ((precision * hit).sum(1) / r[:, 0]).sum()
        total[1] += hit[:, 0].sum()
        total[2] += (hit.sum(1).double() / r[:, 0]).sum()
    return dict(zip(METRICS, (total / len(labels)).tolist(), strict=True))
