"""PNP on a similarity matrix: plain PyTorch, for code that does not use pytorch-metric-learning."""

from collections.abc import Callable

from torch import Tensor

from pml_pnp.checks import check_masks, check_matrix, check_relation, check_vector
from pml_pnp.ops.settings import Settings
from pml_pnp.ops.similarity import query_losses, ranking_counts
from pml_pnp.pairs import Pairs, Relation, plain
from pml_pnp.precision import at_least_float32


def pnp_loss(
    similarity: Tensor,
    labels: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    positive_mask: Tensor | None = None,
    negative_mask: Tensor | None = None,
    self_similarity: Tensor | None = None,
    b: float = 2,
    alpha: float = 1,
    anneal: float = 0.01,
    variant: str | Callable[[Tensor], Tensor] = "O",
    include_self: bool = True,
    is_inverted: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""Compute the PNP loss of N queries from their similarities to M references.

    With :math:`s_{aj}` the similarity of query a to reference j, P(a) its positives, N(a) its
    negatives, :math:`\tau` = `anneal` and k = +1 for a similarity, -1 for a distance,

    .. math::
        R(a,p) = \sum_{n \in N(a)} \sigma\left(\frac{k (s_{an} - s_{ap})}{\tau}\right)
        \qquad
        L(a) = \operatorname*{mean}_{p \in P(a) \cup \{a\}} f(R(a,p))

    R is the soft number of negatives ranked before p (paper, eq. 5), f is chosen by `variant`
    (`pml_pnp.variants.VARIANTS`, paper eqs. 5, 7, 9, 12, 13).

    Positives and negatives are given in one of three ways:

    - `labels` alone: the references are the queries (M = N), in the same order. Equal labels make a
      positive, unequal ones a negative, and the diagonal is the query itself.
    - `labels` and `ref_labels`: the references are another set.
    - `positive_mask` and `negative_mask`, neither of which may contain the query itself.

    Args:
        similarity: (N, M), any floating dtype and device.
        labels: (N,), any real dtype.
        ref_labels: (M,).
        positive_mask: (N, M), bool.
        negative_mask: (N, M), bool.
        self_similarity: (N,), the similarity of each query to itself. Needed when `include_self` is
            on, except with `labels` alone, where it is the diagonal of `similarity`.
        b: slope of variant "Ib", whose gradient grows to 1/b. Positive; 2 in the paper.
        alpha: exponent of variant "Dq". Positive; 4 in the authors' README, 8 in the paper
            according to pytorch-metric-learning.
        anneal: temperature of the sigmoid, in units of `similarity`. Positive; 0.01 in the paper.
        variant: "O", "Iu", "Ib", "Ds", "Dq", or a differentiable callable f(R) that maps a tensor
            to one of the same shape, elementwise. The parameters of an `nn.Module` receive
            gradients.
        include_self: whether to count the query as its own positive, as the authors' code does.
        is_inverted: True if larger means closer (a similarity), False for a distance; the name is
            pytorch-metric-learning's.

    Returns:
        `losses` (N,), in the dtype of `similarity` and on its device, and `counted` (N,), bool. A
        query without a positive besides itself is not counted and has loss zero: average with
        `losses[counted].mean()`. float16 and bfloat16 input is computed in float32.

    Raises:
        TypeError: an argument that should be a tensor or a number is something else; `similarity`
            is not floating point; a mask is not bool; the callable does not return a tensor.
        ValueError: a shape does not fit; neither or both of labels and masks are given; `anneal`,
            `alpha` or `b` is not positive and finite; `variant` is an unknown name;
            `self_similarity` is missing; the callable changes the shape.

    Memory: two N x M matrices, `similarity` and its gradient. The `N x |P(a)| x M` sigmoids are
    computed and summed in blocks. With a callable `variant` they are computed again in backward,
    and a few matrices more are needed.

    Example:
        >>> import torch
        >>> similarity = torch.tensor([[1.0, 0.8, 0.9], [0.8, 1.0, 0.7], [0.9, 0.7, 1.0]])
        >>> labels = torch.tensor([0, 0, 1])
        >>> losses, counted = pnp_loss(similarity, labels, anneal=0.05, variant="Ds")
        >>> losses
        tensor([0.3722, 0.0575, 0.0000])
        >>> counted
        tensor([ True,  True, False])
        >>> losses[counted].mean()
        tensor(0.2148)

    Source: Li et al., *Rethinking the Optimization of Average Precision: Only Penalizing Negative
    Instances before Positive Ones is Enough*, AAAI 2022, arXiv 2102.04640.
    """
    check_matrix("similarity", similarity, "(N, M)")
    dtype, device = at_least_float32(similarity.dtype), similarity.device
    settings = Settings.checked(
        b, alpha, anneal, variant, include_self, is_inverted=is_inverted, dtype=dtype
    )
    check_relation(similarity, labels, ref_labels, positive_mask, negative_mask)
    holds_queries, (n, m) = labels is not None and ref_labels is None, similarity.shape
    if labels is None:
        relation = Relation.from_masks(positive_mask.to(device), negative_mask.to(device))
    else:
        relation = Pairs(labels, None, ref_labels, n, m, holds_queries, device).of(slice(0, n))
    if include_self and not (holds_queries and self_similarity is None):
        if self_similarity is None:
            raise ValueError(
                f"include_self=True needs self_similarity, one value for each of the "
                f"{n} queries, unless labels say that the references are the "
                "queries, got None"
            )
        check_vector("self_similarity", self_similarity, n)
        self_similarity = plain(self_similarity).to(device, dtype)
    s = plain(similarity).to(dtype)
    losses = query_losses(s, self_similarity, relation, settings)
    return losses.to(similarity.dtype), relation.counted()


def ranking_statistics(
    similarity: Tensor, positive_mask: Tensor, negative_mask: Tensor, *, is_inverted: bool = True
) -> tuple[Tensor, Tensor]:
    """Count the negatives ranked before positives, over all (query, positive) pairs of a batch.

    Args:
        similarity: (N, M), float32 or float64.
        positive_mask: (N, M), bool.
        negative_mask: (N, M), bool.
        is_inverted: as in `pnp_loss`.

    Returns:
        The mean number of negatives ranked strictly before a positive, and the share (0 to 1) of
        positives with at least one: two scalar tensors, zero where there is no positive.

    Example:
        >>> import torch
        >>> similarity = torch.tensor([[0.5, 0.9, 0.7, 0.1]])
        >>> positive = torch.tensor([[True, False, False, False]])
        >>> ranking_statistics(similarity, positive, ~positive)
        (tensor(2.), tensor(1.))
    """
    check_matrix("similarity", similarity, "(N, M)")
    check_masks(similarity, positive_mask, negative_mask)
    s = plain(similarity).to(at_least_float32(similarity.dtype))
    relation = Relation.from_masks(positive_mask.to(s.device), negative_mask.to(s.device))
    before, behind, positives = ranking_counts(s, relation, is_inverted)
    return before / positives.clamp(min=1), behind / positives.clamp(min=1)
