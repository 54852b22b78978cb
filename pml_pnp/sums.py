"""The losses that PML's MultipleLosses adds up, for the wrappers, which call each by itself."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from pytorch_metric_learning.losses import MultipleLosses
from pytorch_metric_learning.losses.base_loss_wrapper import BaseLossWrapper
from torch import Tensor

from pml_pnp.distances import is_unmodified


class Part(NamedTuple):
    """A loss of a sum."""

    loss: torch.nn.Module
    weight: float | Tensor = 1  # of its value
    miner: torch.nn.Module | None = None  # whose pairs or triplets it gets

    def value(self, embeddings, labels, indices_tuple, ref_emb, ref_labels) -> Tensor:
        """Call the loss, after its miner if it has one."""
        if self.miner is not None:
            indices_tuple = self.miner(embeddings, labels, ref_emb, ref_labels)
        return self.loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)


def parts_of(loss: torch.nn.Module) -> list[Part]:
    """Return the losses that `loss` adds up, those of a sum inside a sum included.

    A loss that is not a MultipleLosses is its only part.

    Raises:
        TypeError: a MultipleLosses with hooks or with a `forward` of its own, which would not be
            called.
        ValueError: a MultipleLosses without losses, or one with miners inside one with miners.
    """
    if not isinstance(loss, MultipleLosses):
        return [Part(loss)]
    if not is_unmodified(loss, "forward", "get_indices_tuple"):
        raise TypeError(
            "the losses of a MultipleLosses are called one by one here, which needs one without "
            f"hooks and with PML's forward, got {type(loss).__name__} with others"
        )
    if len(loss.losses) == 0:
        raise ValueError("expected a MultipleLosses of at least one loss, got none")
    parts = []
    for key, summand in loss.losses.items() if loss.is_dict else enumerate(loss.losses):
        miner = None
        if loss.miners and (not loss.is_dict or key in loss.miners):
            miner = loss.miners[key]
        for part in parts_of(summand):
            if miner is not None:
                check_miners([part], has_pairs=True)
                part = part._replace(miner=miner)
            parts.append(part._replace(weight=part.weight * loss.weights[key]))
    return parts


class TakesSums(BaseLossWrapper):
    """Base class, after that of PML, of a wrapper that takes a sum of the losses it takes alone."""

    def __init__(self, loss, **kwargs):
        first, *others = (part.loss for part in parts_of(loss))
        for other in others:
            self.check_loss_support(type(other).__name__)
        super().__init__(loss=first, **kwargs)


def check_miners(parts: list[Part], has_pairs: bool) -> None:
    """Raise ValueError if a part has a miner although it gets pairs from elsewhere, too."""
    if has_pairs and any(part.miner is not None for part in parts):
        raise ValueError(
            "a MultipleLosses with miners takes neither indices_tuple nor another miner, got one"
        )


def add_up(loss: torch.nn.Module, value_of: Callable[[Part], Tensor]) -> Tensor:
    """Return the sum of the weighted values of the parts of a loss."""
    if not isinstance(loss, MultipleLosses):
        return value_of(Part(loss))
    return sum(value_of(part) * part.weight for part in parts_of(loss))
