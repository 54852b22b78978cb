"""All of `pytorch_metric_learning.losses`, with this package's PNPLoss in it.

In an existing pipeline only the import line changes, to `from pml_pnp import losses`.
`losses.PNPLoss` and `losses.CrossBatchMemory` are those of this package,
`losses.SelfSupervisedLoss` is a subclass of PML's that also takes PNPLoss, and every other name is
PML's own.

Example:
    >>> from pml_pnp import losses
    >>> memory = losses.CrossBatchMemory(losses.PNPLoss(variant="Ds"), embedding_size=128)
    >>> losses.TripletMarginLoss.__module__
    'pytorch_metric_learning.losses.triplet_margin_loss'
"""

import torch
from pytorch_metric_learning import losses as _pml
from pytorch_metric_learning.losses import *  # noqa: F403

from pml_pnp.loss import PNPLoss as PNPLoss  # "as" makes it public to type checkers
from pml_pnp.memory import CrossBatchMemory as CrossBatchMemory
from pml_pnp.memory import with_pnp_loss
from pml_pnp.sums import TakesSums as _TakesSums
from pml_pnp.sums import add_up as _add_up

__all__ = [name for name in vars(_pml) if not name.startswith("_")]
if "PNPLoss" not in __all__:
    __all__.append("PNPLoss")


class SelfSupervisedLoss(_pml.SelfSupervisedLoss, _TakesSums):
    """PML's SelfSupervisedLoss, which also takes PNPLoss, and a MultipleLosses."""

    supported_losses = with_pnp_loss(_pml.SelfSupervisedLoss)

    def forward(self, embeddings, ref_emb):
        """Compute the loss of embeddings and their views, (N, d) each."""
        arguments = self.loss_arguments(embeddings, ref_emb)
        return _add_up(self.loss, lambda part: part.value(*arguments))

    def loss_arguments(self, embeddings, ref_emb) -> tuple:
        """Return the arguments to call the loss with; a row and its view have the same label."""
        labels = torch.arange(len(embeddings), device=embeddings.device)
        if getattr(self, "symmetric", False):  # PML 2.0 has no such attribute
            batch = torch.cat([embeddings, ref_emb]), torch.cat([labels, labels])
            return *batch, None, None, None
        return embeddings, labels, None, ref_emb, labels.clone()
