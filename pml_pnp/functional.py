"""PNP on a similarity matrix: plain PyTorch, for code that does not use pytorch-metric-learning."""

from collections.abc import Callable

import torch
from torch import Tensor

from pml_pnp.checks import check_hyperparameters, check_relation, check_similarity, check_vector
from pml_pnp.kernels import count_negatives_before, negatives_before
from pml_pnp.variants import apply_variant


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
    r"""PNP loss of every query, from the similarities of N queries to M references.

    With :math:`s_{aj}` the similarity of query a to reference j, P(a) its positives, N(a) its
    negatives, :math:`\tau` = `anneal` and k = +1 for a similarity, -1 for a distance,

    .. math::
        R(a,p) = \sum_{n \in N(a)} \sigma\left(\frac{k (s_{an} - s_{ap})}{\tau}\right)
        \qquad
        L(a) = \operatorname*{mean}_{p \in P(a) \cup \{a\}} f(R(a,p))

    R is the soft number of negatives ranked before p (paper, eq. 5), f is chosen by `variant`
    (`pml_pnp.variants.VARIANTS`, paper eqs. 5, 7, 9, 12, 13).

    Say which reference is what to which query in one of three ways:

    - `labels` alone: the references are the queries (M = N), in the same order. Equal labels make a
      positive, unequal ones a negative, and the diagonal is the query itself.
    - `labels` and `ref_labels`: the references are another set.
    - `positive_mask` and `negative_mask`, taken as they are: leave the query itself out of both.

    Args:
        similarity: (N, M), any floating dtype and device.
        labels: (N,), any dtype that compares with ==.
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
            to one of the same shape, elementwise. It may be an `nn.Module` with parameters of its
            own.
        include_self: count the query as its own positive, as the authors' code does.
        is_inverted: True if larger means closer (a similarity), False for a distance; the name is
            pytorch-metric-learning's.

    Returns:
        `losses` (N,), in the dtype of `similarity` and on its device, and `counted` (N,), bool. A
        query without a positive besides itself is not counted and has loss zero: average with
        `losses[counted].mean()`. float16 and bfloat16 are computed in float32.

    Raises:
        TypeError: an argument that should be a tensor or a number is something else; `similarity`
            is not floating point; a mask is not bool; the callable does not return a tensor.
        ValueError: a shape does not fit; neither or both of labels and masks are given; `anneal`,
            `alpha` or `b` is not positive and finite; `variant` is an unknown name;
            `self_similarity` is missing; the callable changes the shape.

    Memory: a few N x M matrices and N x max|P(a)| numbers; the N x |P(a)| x M sigmoids are summed
    in blocks as they are made, and made again in backward.

    Example:
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
    check_hyperparameters(b=b, alpha=alpha, anneal=anneal, variant=variant)
    check_similarity(similarity)
    check_relation(similarity, labels, ref_labels, positive_mask, negative_mask)
    s = similarity.to(torch.promote_types(similarity.dtype, torch.float32))
    if labels is not None:
        positive_mask, negative_mask = masks_from_labels(similarity, labels, ref_labels)
        if ref_labels is None and self_similarity is None:
            self_similarity = s.diagonal()
    positive_mask, negative_mask = positive_mask.to(s.device), negative_mask.to(s.device)

    t, valid = _similarity_of_positives(s, positive_mask)
    counted = positive_mask.any(dim=1)
    if include_self:
        own = _checked_self_similarity(s, self_similarity)
        t = torch.cat([t, own.unsqueeze(1)], dim=1)
        valid = torch.cat([valid, counted.unsqueeze(1)], dim=1)
    scale = (1 if is_inverted else -1) / float(anneal)
    r = negatives_before(s, t, negative_mask, scale)
    # What is padding, or of a query that does not count, is kept at R = 1, so that no f, and no
    # derivative of it, is asked for at an odd place.
    r = r.masked_fill(~valid, 1)
    per_positive = apply_variant(variant, r, alpha=float(alpha), b=float(b)).masked_fill(~valid, 0)
    losses = per_positive.sum(dim=1) / valid.sum(dim=1).clamp(min=1)
    return losses.to(similarity.dtype), counted


@torch.no_grad()
def ranking_statistics(
    similarity: Tensor, positive_mask: Tensor, negative_mask: Tensor, *, is_inverted: bool = True
) -> tuple[Tensor, Tensor]:
    """How a batch is ranked, by hard counts over all its (query, positive) pairs.

    Args:
        similarity: (N, M), float32 or float64.
        positive_mask: (N, M), bool.
        negative_mask: (N, M), bool.
        is_inverted: as in `pnp_loss`.

    Returns:
        The mean number of negatives ranked strictly before a positive, and the share (0 to 1) of
        positives with at least one: two scalar tensors, zero where there is no positive.

    Example:
        >>> similarity = torch.tensor([[0.5, 0.9, 0.7, 0.1]])
        >>> positive = torch.tensor([[True, False, False, False]])
        >>> ranking_statistics(similarity, positive, ~positive)
        (tensor(2.), tensor(1.))
    """
    t, valid = _similarity_of_positives(similarity, positive_mask)
    count = count_negatives_before(similarity, t, negative_mask, 1.0 if is_inverted else -1.0)
    positives = valid.sum().clamp(min=1)
    count = count.masked_fill(~valid, 0)
    return count.sum() / positives, (count > 0).sum() / positives


def masks_from_labels(
    similarity: Tensor, labels: Tensor, ref_labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Positive and negative mask, (N, M) bool; without `ref_labels` the diagonal is in neither.

    Raises:
        TypeError: labels are no tensors.
        ValueError: their lengths are not N and M, or `similarity` is not square without
            `ref_labels`.
    """
    n, m = similarity.shape
    check_vector("labels", labels, n)
    if ref_labels is None and n != m:
        raise ValueError(
            "without ref_labels, similarity must be square (the references are the queries), "
            f"got shape {(n, m)}"
        )
    if ref_labels is not None:
        check_vector("ref_labels", ref_labels, m)
    labels = labels.to(similarity.device)
    others = labels if ref_labels is None else ref_labels.to(similarity.device)
    same = labels.unsqueeze(1) == others.unsqueeze(0)
    return (same.clone().fill_diagonal_(False) if ref_labels is None else same), ~same


def _similarity_of_positives(s: Tensor, positive_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Pack s at the positives of each row to the left of an (N, max|P(a)|) tensor.

    Returns it and which of its entries are no padding, bool.
    """
    rows, columns = positive_mask.nonzero(as_tuple=True)  # in row order
    counts = positive_mask.sum(dim=1)
    width = int(counts.max()) if len(counts) else 0
    slots = torch.arange(len(rows), device=s.device) - (counts.cumsum(0) - counts)[rows]
    index = columns.new_zeros(len(s), width).index_put_((rows, slots), columns)
    valid = torch.arange(width, device=s.device) < counts.unsqueeze(1)
    return s.gather(1, index).masked_fill(~valid, 0), valid


def _checked_self_similarity(s: Tensor, given: Tensor | None) -> Tensor:
    if given is None:
        raise ValueError(
            f"include_self=True needs self_similarity, one value for each of the {len(s)} queries, "
            "unless labels say that the references are the queries, got None"
        )
    check_vector("self_similarity", given, len(s))
    return given.to(s)
