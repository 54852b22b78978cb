"""What a type checker knows of the public names: for `pyright -p tests/typing`, never called."""

from typing import Any, assert_type

from pytorch_metric_learning import miners
from torch import Tensor, nn

import pml_pnp
from pml_pnp import GradCache, PNPLoss, distributed, functional, losses
from pml_pnp.losses import CrossBatchMemory, SelfSupervisedLoss


def types(embeddings: Tensor, labels: Tensor, mask: Tensor) -> None:
    assert_type(losses.PNPLoss, type[PNPLoss])
    assert_type(losses.PNPLoss.VARIANTS, list[str])
    loss_func = losses.PNPLoss(variant="Ds", anneal=0.1, alpha=4, b=2.0, chunk_size=None)
    assert_type(loss_func, PNPLoss)
    assert_type(loss_func.anneal, float)
    assert_type(loss_func.chunk_size, int | None)
    loss_func.anneal = 0.05
    losses.PNPLoss(variant=lambda r: r / (1 + r))
    losses.PNPLoss(variant=nn.Softplus())
    assert_type(loss_func(embeddings, labels), Any)  # so types torch every module
    loss_func.forward(embeddings, labels, None, embeddings, labels)

    assert_type(functional.pnp_loss(embeddings, labels), tuple[Tensor, Tensor])
    assert_type(functional.ranking_statistics(embeddings, mask, ~mask), tuple[Tensor, Tensor])
    assert_type(pml_pnp.register(), None)
    assert_type(pml_pnp.unregister(), None)
    assert_type(pml_pnp.__version__, str)

    # The rest of PML's namespace, and the wrappers that take this loss.
    losses.TripletMarginLoss(margin=0.1)
    assert_type(losses.CrossBatchMemory(loss_func, embedding_size=4), CrossBatchMemory)
    assert_type(losses.SelfSupervisedLoss(loss_func), SelfSupervisedLoss)
    distributed.DistributedLossWrapper(loss_func, efficient="exact")
    distributed.DistributedMinerWrapper(miners.MultiSimilarityMiner(), efficient=True)
    assert_type(GradCache(nn.Linear(4, 4), chunk_size=2), GradCache)


def errors(similarity: Tensor, labels: Tensor) -> None:
    """A comment whose line has no such error is an error itself."""
    losses.PNPLoss(anneal="0.1")  # pyright: ignore[reportArgumentType]
    losses.PNPLoss(variant=1)  # pyright: ignore[reportArgumentType]
    losses.PNPLoss(chunk_size=1.5)  # pyright: ignore[reportArgumentType]
    functional.pnp_loss(similarity, labels, normalize=True)  # pyright: ignore[reportCallIssue]
    pml_pnp.registered()  # pyright: ignore[reportAttributeAccessIssue]
