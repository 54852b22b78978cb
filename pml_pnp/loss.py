"""PNPLoss, a loss function of pytorch-metric-learning (PML)."""

from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from pytorch_metric_learning import distances
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.reducers import MeanReducer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pml_pnp.autocast import autocast_off, is_autocast_on
from pml_pnp.checks import check_chunk_size, check_hyperparameters, check_inputs
from pml_pnp.kernels import (
    Origin,
    Settings,
    query_losses,
    query_losses_and_gradient,
    ranking_counts,
)
from pml_pnp.products import is_product, self_product, total_in_one_pass
from pml_pnp.relation import Relation

# PML 0.9.92, which powerful-benchmarker pins, has none; nothing is an instance of ().
BatchedDistance = getattr(distances, "BatchedDistance", ())
SELF_SIMILARITY_BLOCK = 128
LACK_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class QueriesAmongReferences(NamedTuple):
    """What CrossBatchMemory passes as `indices_tuple`: the labels count, and queries are no pairs.

    As all pairs but those of a query with its own copy, without a list of N x M of them.
    """

    columns: Tensor
    """(N,) int64, where in the references the queries are."""


class PNPLoss(BaseMetricLossFunction):
    r"""Penalize the negatives that are ranked before a positive (PNP, AAAI 2022, arXiv 2102.04640).

    For every query a of the batch, with positives P(a), negatives N(a), :math:`s_{aj}` what
    `distance` returns, k = +1 for a similarity (`distance.is_inverted`) or -1 for a distance,
    :math:`\tau` = `anneal`:

    .. math::
        R(a,p) = \sum_{n \in N(a)} \sigma\left(\frac{k (s_{an} - s_{ap})}{\tau}\right)
        \qquad
        L(a) = \operatorname*{mean}_{p \in P(a) \cup \{a\}} f(R(a,p))

    ======= ======================= ======== ==========================================
    variant f(R)                    equation gradient of a positive, as R grows
    ======= ======================= ======== ==========================================
    "O"     R                       5        constant
    "Iu"    (1 + R) log(1 + R)      7        grows without bound
    "Ib"    (bR - log(1 + bR)) / b² 9        grows to 1/b
    "Ds"    log(1 + R)              12       falls slowly
    "Dq"    1 - 1 / (1 + R)^alpha   13       falls quickly; the paper's best
    ======= ======================= ======== ==========================================

    Args:
        b: slope of "Ib", whose gradient grows to 1/b; positive. Default 2, the paper's value.
        alpha: exponent of "Dq", positive. Default 1, as in PML; 4 in the authors' README, 8 in the
            paper according to PML.
        anneal: temperature :math:`\tau`, positive, in units of `distance`. Default 0.01, the
            paper's.
        variant: a name from the table, or a differentiable callable f(R) that maps a tensor to one
            of the same shape, elementwise. An `nn.Module` with parameters is trained along.
        include_self: count the query as its own positive, as the paper's code and PML's PNPLoss do.
        chunk_size: lean mode: how many queries to compare with the references at a time. The N x M
            similarities are then never held, but computed again in backward, unless the batch is
            its own reference, `distance` a cosine similarity or dot product and `reducer` a
            `MeanReducer`. Same values, up to rounding. Default None, all at once.
        **kwargs: PML's own: `distance` (any; default `CosineSimilarity`), `reducer` (any; default
            `MeanReducer`), `embedding_regularizer`, `embedding_reg_weight`, `collect_stats`.

    Call with:
        embeddings: (N, d), any floating dtype, any device.
        labels: (N,); may be left out if `indices_tuple` is given.
        indices_tuple: triplets or pairs, as every PML miner returns them. They define P(a) and
            N(a); a repeated pair counts once, a pair of a query with itself not at all.
        ref_emb: (M, d), references to rank instead of the batch. With them the query's similarity
            to itself is `distance` of its embedding to itself.
        ref_labels: (M,); needed with `ref_emb` unless `indices_tuple` is given.

    Returns:
        What the reducer makes of L(a) over the queries with at least one positive besides
        themselves (reduction type "element"); zero, connected to the graph, if there is none. Every
        L(a) is NaN if an embedding or reference is NaN or infinite. Everything is computed in at
        least float32, with autocast off; the result has the dtype of `embeddings` and is on their
        device, but under autocast it is float32 for float16 and bfloat16 embeddings. With
        `DoNothingReducer`, the dictionary that PML's reducers take.

    Raises:
        TypeError: `b`, `alpha` or `anneal` is not a number, or `chunk_size` no integer; `variant`
            is neither a name nor callable, or does not return a tensor; `distance` does not say
            whether it is a similarity (`is_inverted`) or does not return a floating point tensor;
            an argument of the call is not the tensor described above.
        ValueError: `b`, `alpha` or `anneal` is not positive and finite; `chunk_size` is not
            positive; an unknown `variant`, or a callable one that changes the shape; neither labels
            nor tuple; `ref_emb` without labels and `ref_labels` or tuple, or `ref_labels` without
            `ref_emb`; lengths or embedding sizes that do not fit; a tuple that is not of 3 or 4
            index tensors, or an index outside the batch or the references; a distance that returns
            a matrix of another shape.
        RuntimeError: memory does not suffice for the N x M similarities, where PyTorch notices; in
            a second backward, or one with create_graph=True, embeddings or references have been
            changed in place, as a CrossBatchMemory changes its own at every call.

    Statistics: with `collect_stats=True`, `negatives_before_positive` is the mean number of
    negatives ranked before a positive and `positives_behind_negatives` the share (0 to 1) of
    positives with at least one, over the (query, positive) pairs of the last batch, by hard counts,
    without the queries themselves.

    Memory: two N x M matrices, the similarities and their gradient, and what `distance` needs
    (PML's SNRDistance N x M x d); one on a CPU for a cosine similarity or dot product, which the
    gradient overwrites; with `chunk_size` these of one chunk. The N x |P(a)| x M sigmoids are never
    held together. A tuple, and a callable `variant`, take some N x M matrices more.

    Example:
        >>> import torch
        >>> from pml_pnp import losses
        >>> loss_func = losses.PNPLoss(variant="Dq", alpha=4)
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.9, 0.1], [0.0, 1.0]])
        >>> embeddings.requires_grad_()  # doctest: +ELLIPSIS
        tensor(...
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> loss = loss_func(embeddings, labels)
        >>> loss.backward()
        >>> loss
        tensor(0.6501, grad_fn=<DivBackward0>)

    Source: Li et al., *Rethinking the Optimization of Average Precision: Only Penalizing Negative
    Instances before Positive Ones is Enough*, AAAI 2022.
    """

    def __init__(
        self,
        b=2,
        alpha=1,
        anneal=0.01,
        variant="O",
        include_self: bool = True,
        chunk_size: int | None = None,
        **kwargs,
    ) -> None:
        check_hyperparameters(b=b, alpha=alpha, anneal=anneal, variant=variant)
        check_chunk_size(chunk_size)
        super().__init__(**kwargs)
        if not hasattr(self.distance, "is_inverted"):
            raise TypeError(
                "distance must be a distance of pytorch_metric_learning or have is_inverted, "
                f"got {type(self.distance).__name__}"
            )
        self.b = b
        self.alpha = alpha
        self.anneal = anneal
        self.variant = variant
        self.include_self = include_self
        self.chunk_size = chunk_size
        self.add_to_recordable_attributes(
            list_of_names=[
                "b",
                "alpha",
                "anneal",
                "variant" if isinstance(variant, str) else "variant_name",
                "include_self",
            ],
            is_stat=False,
        )
        self.add_to_recordable_attributes(
            list_of_names=["negatives_before_positive", "positives_behind_negatives"], is_stat=True
        )

    @property
    def variant_name(self) -> str:
        """`variant` as text; recorded in its place if it is a callable, which cannot be."""
        if isinstance(self.variant, str):
            return self.variant
        return getattr(self.variant, "__name__", type(self.variant).__name__)

    def computes_itself(self) -> bool:
        """Whether no subclass stands between its parts, which would expect them as PML has them."""
        cls = type(self)
        return cls.forward is PNPLoss.forward and cls.compute_loss is PNPLoss.compute_loss

    def get_default_distance(self):
        """Return what `distance=None` stands for."""
        return CosineSimilarity()

    def forward(self, embeddings, labels=None, indices_tuple=None, ref_emb=None, ref_labels=None):
        """Compute the loss; the class docstring describes the arguments."""
        pairs = None if isinstance(indices_tuple, QueriesAmongReferences) else indices_tuple
        check_inputs(embeddings, labels, pairs, ref_emb, ref_labels)
        if ref_emb is embeddings and ref_labels is labels:
            ref_emb = ref_labels = None
        # Distance, loss, regularizer and reducer all work in float32 at least: a similarity that is
        # rounded to bfloat16 is off by up to 0.002, and is then divided by anneal.
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        device = embeddings.device.type
        autocast = is_autocast_on(device)
        with autocast_off(device):
            references = () if ref_emb is None else (ref_emb.to(dtype), ref_labels)
            loss = super().forward(embeddings.to(dtype), labels, indices_tuple, *references)
        if isinstance(loss, Tensor) and not autocast:
            loss = loss.to(embeddings.dtype)
        return loss

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb=None, ref_labels=None):
        """Return per-query losses for the reducer; PML calls this, and PML 2 sets `ref_emb`.

        A plain `MeanReducer` gets its mean: to pick out the elements that it would average, the
        host would have to wait for the GPU. A subclass with a `compute_loss` of its own gets the
        elements all the same.
        """
        # PML's losses, too, tell the batch from a set of references by identity.
        own_references = ref_emb is embeddings and ref_labels is labels
        references = None if own_references else ref_emb  # in PML 0.9 always None
        settings = Settings.checked(
            b=self.b,
            alpha=self.alpha,
            anneal=self.anneal,
            variant=self.variant,
            include_self=self.include_self,
            is_inverted=self.distance.is_inverted,
        )
        check_chunk_size(self.chunk_size)
        plain = type(self.reducer) is MeanReducer and not self.reducer.collect_stats
        if self.collect_stats:
            self._ranking_counts = 0
        batch = settings, embeddings, labels, indices_tuple, references, ref_labels
        broken = _zero_or_nan(embeddings)
        if plain and self.computes_itself():
            total, number = self._total(*batch)
            result = _already_reduced(total / (number.clamp_(min=1) + broken))
        else:
            losses, counted = self._losses(*batch)
            losses = losses + broken
            indices = counted.nonzero().squeeze(1)
            if len(indices) == 0:
                result = _already_reduced(losses.sum())
            else:
                result = {
                    "loss": {
                        "losses": losses[indices],
                        "indices": indices,
                        "reduction_type": "element",
                        "divisor": len(indices),  # read by DivisorReducer alone
                    }
                }
        if self.collect_stats:
            self._set_stats()
        return result

    def _total(self, settings, embeddings, labels, indices_tuple, references, ref_labels):
        """Sum of all L(a), and how many queries count."""
        if (
            self._is_lean(embeddings)
            and references is None
            and isinstance(self.variant, str)
            and is_product(self.distance)
            and embeddings.requires_grad
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        ):
            labels, indices_tuple = _as_it_is(labels), _as_it_is(indices_tuple)
            relation_of = partial(self._relation, settings, labels, indices_tuple, labels)
            return total_in_one_pass(
                self.distance.maybe_normalize(embeddings),
                self.chunk_size,
                partial(_losses_of, relation_of, settings),
                partial(_losses_and_gradient_of, relation_of, settings),
            )
        losses, counted = self._losses(
            settings, embeddings, labels, indices_tuple, references, ref_labels
        )
        return losses.sum(), counted.sum()

    def _is_lean(self, queries: Tensor) -> bool:
        return self.chunk_size is not None and self.chunk_size < len(queries)

    def _losses(self, settings, queries, *batch) -> tuple[Tensor, Tensor]:
        """L(a) of every query, and which count; `references` None stands for the queries."""
        if self._is_lean(queries):
            lean = self._lean
            if torch.compiler.is_compiling():  # which knows no checkpoint with a context
                lean = torch.compiler.disable(lean)  # not as a decorator: its import takes seconds
            return lean(settings, queries, *batch)
        n = len(queries)
        try:
            return self._chunk(slice(0, n), settings, None, queries, *batch)
        except RuntimeError as error:
            if any(text in str(error) for text in LACK_OF_MEMORY):
                references = batch[2]
                m = n if references is None else len(references)
                error.add_note(
                    f"There is not enough memory for the similarities of {n} queries and {m} "
                    f"references, {n * m:,} numbers, and their gradient. Give PNPLoss a "
                    "chunk_size to compare fewer queries at a time."
                )
            raise

    def _lean(self, settings, *batch) -> tuple[Tensor, Tensor]:
        """L(a) of every query, chunk by chunk, each computed again in backward."""
        if torch.is_grad_enabled():
            # What backward computes from must be what it is now; a memory, for one, moves on.
            batch = [_as_it_is(x) for x in batch]
        versions = [(x, x._version) for x in batch if isinstance(x, Tensor) and x.requires_grad]

        def run(rows: slice, recomputation: _Recomputation) -> tuple[Tensor, Tensor]:
            if any(x._version != version for x, version in versions):
                raise RuntimeError(
                    "with a chunk_size, embeddings must not be changed in place between the loss "
                    "and its backward, which computes their similarities again"
                )
            return self._chunk(rows, settings, recomputation.entered, *batch)

        chunks = []
        for first in range(0, len(batch[0]), self.chunk_size):
            rows = slice(first, min(first + self.chunk_size, len(batch[0])))
            recomputation = _Recomputation()
            chunks.append(
                checkpoint(
                    run,
                    rows,
                    recomputation,
                    use_reentrant=False,
                    context_fn=lambda r=recomputation: (nullcontext(), r),
                    # Nor losses nor gradients are made twice, which this check would find.
                    determinism_check="none",
                )
            )
        losses, counted = (torch.cat(x) for x in zip(*chunks, strict=True))
        return losses, counted

    def _chunk(
        self,
        rows,
        settings,
        recomputed,
        queries,
        labels,
        indices_tuple,
        references,
        ref_labels,
    ) -> tuple[Tensor, Tensor]:
        """L(a) of some queries, and which count."""
        whole = rows == slice(0, len(queries))
        part = queries if whole else queries[rows]
        own, self_similarity = None, None
        given = references is not None
        if not given:
            own = torch.arange(rows.start, rows.stop, device=queries.device)
            if not whole:
                references, ref_labels = queries, labels
        else:
            self_similarity = self._self_similarity(part) if self.include_self else None
            if isinstance(indices_tuple, QueriesAmongReferences):
                own, indices_tuple = indices_tuple.columns[rows], None
        similarity = _matrix(self.distance, part, references)
        product = is_product(self.distance)
        if given:  # of a product, one row tells: every reference is in it
            broken = _zero_or_nan(similarity[:1] if product else references)
        others = labels if references is None else ref_labels
        relation = self._relation(
            settings, labels, indices_tuple, others, rows, similarity, own, recomputed
        )
        origin = None
        if recomputed is None and similarity.requires_grad and product:
            origin = Origin(partial(_matrix, self.distance), part, references)
        losses = query_losses(similarity, self_similarity, relation, settings, recomputed, origin)
        return losses + broken if given else losses, relation.counted

    def _relation(
        self, settings, labels, indices_tuple, ref_labels, rows, similarity, own, recomputed=None
    ) -> Relation:
        """Positives and negatives of some queries; counts what is recorded of them."""
        m, device = similarity.shape[1], similarity.device
        if indices_tuple is None:
            relation = Relation.from_labels(labels[rows].to(device), ref_labels.to(device), own)
        else:
            relation = Relation.from_tuple(indices_tuple, rows, m, device, own)
        if self.collect_stats and not recomputed:
            self._ranking_counts += ranking_counts(similarity, relation, settings.scale > 0)
        return relation

    def _self_similarity(self, queries: Tensor) -> Tensor:
        """Similarity of each query to itself, from small blocks: only diagonals are wanted."""
        blocks = queries.split(SELF_SIMILARITY_BLOCK)
        return torch.cat([_matrix(self.distance, block, None).diagonal() for block in blocks])

    def _set_stats(self) -> None:
        before, behind, positives = self._ranking_counts.tolist()
        self.negatives_before_positive = before / max(1, positives)
        self.positives_behind_negatives = behind / max(1, positives)


def _losses_of(relation_of, settings, rows: slice, similarity: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of some queries of a batch compared with itself, and which count."""
    own = torch.arange(rows.start, rows.stop, device=similarity.device)
    relation = relation_of(rows, similarity, own, recomputed=True)
    return query_losses(similarity, None, relation, settings), relation.counted


def _losses_and_gradient_of(relation_of, settings, rows: slice, similarity: Tensor):
    """The same, and the gradient of the losses' sum with respect to the similarities."""
    own = torch.arange(rows.start, rows.stop, device=similarity.device)
    relation = relation_of(rows, similarity, own)
    losses, gradient = query_losses_and_gradient(similarity, relation, settings)
    return losses, relation.counted, gradient


def _already_reduced(loss: Tensor) -> dict:
    return {"loss": {"losses": loss, "indices": None, "reduction_type": "already_reduced"}}


class _Recomputation:
    """A context that knows whether it has been entered."""

    entered = False

    def __enter__(self) -> None:
        self.entered = True

    def __exit__(self, *_) -> None:
        self.entered = False


def _as_it_is(x):
    """A copy that later changes in place do not reach, of a tensor or of tensors."""
    if isinstance(x, Tensor):
        return x if x.requires_grad else x.clone()
    if isinstance(x, QueriesAmongReferences):
        return QueriesAmongReferences(x.columns.clone())
    return x if x is None else tuple(i.clone() for i in x)


def _matrix(distance, queries: Tensor, references: Tensor | None) -> Tensor:
    """What `distance` returns, (N, M); `references` None stands for the queries."""
    expected = (len(queries), len(queries if references is None else references))
    if isinstance(distance, BatchedDistance) and len(queries) == 0:
        distance = distance.distance
    if isinstance(distance, BatchedDistance):
        rows = []
        # A copy, whose iter_fn collects: the user's own is left alone.
        batched = BatchedDistance(
            distance.distance, lambda mat, start, end: rows.append(mat), distance.batch_size
        )
        batched(queries, references)
        matrix = torch.cat(rows)
    elif references is None and is_product(distance):
        matrix = self_product(queries, distance)
    else:
        matrix = distance(queries, references)
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        kind = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
        raise TypeError(f"distance must return a floating point tensor, got {kind}")
    if matrix.shape != expected:
        raise ValueError(
            f"distance must return a matrix of shape {expected}, got {tuple(matrix.shape)}"
        )
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def _zero_or_nan(x: Tensor) -> Tensor | int:
    """Zero, or NaN if anything is NaN or infinite: a sigmoid makes a plausible rank of infinity.

    Also where largest and smallest differ by more than the dtype holds.
    """
    if x.numel() == 0:
        return 0
    low, high = x.detach().aminmax()
    return low.sub_(high).mul_(0)
