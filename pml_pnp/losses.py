"""All of `pytorch_metric_learning.losses`, with this package's PNPLoss in it.

Change the import line of an existing pipeline to `from pml_pnp import losses` and nothing else:
`losses.PNPLoss` is the one of this package, `losses.CrossBatchMemory` and
`losses.SelfSupervisedLoss` are PML's and take it too, and every other name is PML's own.

Example:
    >>> from pml_pnp import losses
    >>> memory = losses.CrossBatchMemory(losses.PNPLoss(variant="Ds"), embedding_size=128)
    >>> losses.TripletMarginLoss.__module__
    'pytorch_metric_learning.losses.triplet_margin_loss'
"""

from pytorch_metric_learning import losses as _pml
from pytorch_metric_learning.losses import *  # noqa: F403

from pml_pnp.distances import is_unmodified
from pml_pnp.loss import PNPLoss
from pml_pnp.pairs import QueryColumns

__all__ = [name for name in vars(_pml) if not name.startswith("_")]
if "PNPLoss" not in __all__:
    __all__.append("PNPLoss")


# PML's wrappers admit a loss by its class name, from a list that lacks PNPLoss. The two classes
# below only lengthen it; as subclasses they pass every isinstance check on the originals.
def _with_pnp_loss(wrapper) -> staticmethod:
    supported = wrapper.supported_losses  # bound now: registration replaces it on the original
    return staticmethod(lambda: [*supported(), *_names_of_family(PNPLoss)])


def _names_of_family(cls: type) -> list[str]:
    """Names of a class and of all that are derived from it so far."""
    return [cls.__name__, *(n for sub in cls.__subclasses__() for n in _names_of_family(sub))]


class CrossBatchMemory(_pml.CrossBatchMemory):
    """PML's CrossBatchMemory, which takes PNPLoss too.

    Without a miner PML's lists all N x M pairs of batch and memory, which takes longer than to
    rank them; PNPLoss is told instead where in the memory the batch is.
    """

    supported_losses = _with_pnp_loss(_pml.CrossBatchMemory)

    def create_indices_tuple(
        self, embeddings, labels, E_mem, L_mem, input_indices_tuple, do_remove_self_comparisons
    ):
        """Pairs or triplets for the loss, or what PNPLoss takes in their place."""
        reads_labels = isinstance(self.loss, PNPLoss) and is_unmodified(
            self.loss, "forward", "compute_loss"
        )
        if self.miner or input_indices_tuple is not None or not reads_labels:
            return super().create_indices_tuple(
                embeddings, labels, E_mem, L_mem, input_indices_tuple, do_remove_self_comparisons
            )
        return QueryColumns(self.curr_batch_idx) if do_remove_self_comparisons else None


class SelfSupervisedLoss(_pml.SelfSupervisedLoss):
    """PML's SelfSupervisedLoss, which takes PNPLoss too."""

    supported_losses = _with_pnp_loss(_pml.SelfSupervisedLoss)
