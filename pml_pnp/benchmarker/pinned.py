"""PNPLoss for the pytorch-metric-learning that powerful-benchmarker pins, 0.9.92.

Its losses get three arguments: there are no references. Everything else is what
`pml_pnp.loss.PNPLoss` does.
"""

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import BaseMetricLossFunction

from pml_pnp.checks import check_hyperparameters
from pml_pnp.kernels import Settings, query_losses
from pml_pnp.relation import Relation


class PNPLoss(BaseMetricLossFunction):
    """Penalize the negatives that are ranked before a positive; see `pml_pnp.loss.PNPLoss`.

    Args:
        b, alpha, anneal, variant, include_self: as there.
        **kwargs: `distance`, `reducer`, `embedding_regularizer`, ... of PML 0.9.92.
    """

    def __init__(self, b=2, alpha=1, anneal=0.01, variant="O", include_self=True, **kwargs):
        check_hyperparameters(b=b, alpha=alpha, anneal=anneal, variant=variant)
        super().__init__(**kwargs)
        self.b = b
        self.alpha = alpha
        self.anneal = anneal
        self.variant = variant
        self.include_self = include_self
        self.add_to_recordable_attributes(
            list_of_names=["b", "alpha", "anneal", "variant", "include_self"], is_stat=False
        )

    def get_default_distance(self):
        """Return what `distance=None` stands for."""
        return CosineSimilarity()

    def compute_loss(self, embeddings, labels, indices_tuple=None):
        """Return per-query losses for the reducer."""
        settings = Settings.checked(
            b=self.b,
            alpha=self.alpha,
            anneal=self.anneal,
            variant=self.variant,
            include_self=self.include_self,
            is_inverted=self.distance.is_inverted,
        )
        similarity = self.distance(embeddings)
        n, device = len(embeddings), embeddings.device
        own = torch.arange(n, device=device)
        if indices_tuple is None:
            relation = Relation.from_labels(labels, labels, own)
        else:
            relation = Relation.from_tuple(indices_tuple, slice(0, n), n, device, own)
        losses = query_losses(similarity, None, relation, settings)
        indices = relation.counted.nonzero().squeeze(1)
        if len(indices) == 0:
            total = losses.sum()
            return {"loss": {"losses": total, "indices": None, "reduction_type": "already_reduced"}}
        return {
            "loss": {
                "losses": losses[indices],
                "indices": indices,
                "reduction_type": "element",
            }
        }
