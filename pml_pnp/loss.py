"""PNPLoss, a loss function of pytorch-metric-learning (PML)."""

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.reducers import MeanReducer
from torch import Tensor

from pml_pnp.checks import check_chunk_size, check_hyperparameters, check_inputs, check_part
from pml_pnp.distances import (
    frozen,
    has_global_hooks,
    is_product,
    is_unmodified,
    self_similarities,
    similarity_matrix,
)
from pml_pnp.ops.product import mean_of_losses, zero_or_nan
from pml_pnp.ops.recompute import in_chunks
from pml_pnp.ops.settings import Settings
from pml_pnp.ops.similarity import COUNTS, query_losses, ranking_counts
from pml_pnp.pairs import Pairs, QueryColumns, plain
from pml_pnp.precision import at_least_float32, autocast_off, is_autocast_on

# PML 3 has another name for it, and would not call this loss's own.
if not hasattr(BaseMetricLossFunction, "get_default_distance"):
    raise ImportError(
        "expected pytorch-metric-learning 2, got "
        f"{version('pytorch-metric-learning')}; pml_pnp.functional needs none"
    )

LACK_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class PNPLoss(BaseMetricLossFunction):
    r"""Penalize the negatives that are ranked before a positive (PNP, AAAI 2022, arXiv 2102.04640).

    Let P(a) and N(a) be the positives and negatives of a query a, :math:`s_{aj}` what `distance`
    returns for it and reference j, k = +1 for a similarity (`distance.is_inverted`) or -1 for a
    distance, and :math:`\tau` = `anneal`. The loss of the query is

    .. math::
        R(a,p) = \sum_{n \in N(a)} \sigma\left(\frac{k (s_{an} - s_{ap})}{\tau}\right)
        \qquad
        L(a) = \operatorname*{mean}_{p \in P(a) \cup \{a\}} f(R(a,p))

    Args:
        b: slope of "Ib", whose gradient grows to 1/b. Default 2, the paper's value.
        alpha: exponent of "Dq". Default 1, as in PML; 4 in the authors' README, 8 in the paper
            according to PML.
        anneal: temperature :math:`\tau`, in units of `distance`. Default 0.01, the paper's. `b`,
            `alpha` and `anneal` may be from 1e-30 to 1e30, for float64 embeddings from 1e-300 to
            1e300.
        variant: f(R) by name, "O": R (the paper's equation 5), "Iu": (1 + R) log(1 + R) (7), "Ib":
            (bR - log(1 + bR)) / b² (9), "Ds": log(1 + R) (12), "Dq": 1 - 1 / (1 + R)^alpha (13, the
            paper's best); or a differentiable callable that maps a tensor R to one of the same
            shape, elementwise. The parameters of an `nn.Module` receive gradients.
        include_self: whether the query is its own positive, as in the paper's code and in PML.
        chunk_size: number of queries to compare with the references at a time, so that the N x M
            similarities are never all in memory. Values are the same up to rounding. Default None,
            all queries at once.
        **kwargs: arguments of every PML loss: `distance` (any; default `CosineSimilarity`),
            `reducer` (any; default `MeanReducer`), `embedding_regularizer`, `embedding_reg_weight`,
            `collect_stats`.

    Call with:
        embeddings: (N, d), any floating dtype, any device.
        labels: (N,), real; may be left out if `indices_tuple` is given.
        indices_tuple: triplets or pairs, as every PML miner returns them. They define P(a) and
            N(a); a repeated pair counts once, a pair of a query with itself not at all.
        ref_emb: (M, d), references to rank instead of the batch. The similarity of a query to
            itself is then `distance` of its embedding to itself.
        ref_labels: (M,), real; needed with `ref_emb` unless `indices_tuple` is given.

    Returns:
        The reducer's result for L(a) of the queries that have at least one positive besides
        themselves (reduction type "element"), or zero, connected to the graph, if there are none.
        Every L(a) is NaN if an embedding or reference, or a length that `distance` divides by, is
        NaN or infinite. Everything is computed in at least float32, with autocast off. The result
        has the dtype of `embeddings` and is on their device; under autocast it is float32 for
        float16 and bfloat16 embeddings. `DoNothingReducer` returns the dictionary that PML's
        reducers take.

    Raises:
        TypeError: an argument is not of the type described above; a `reducer`, `distance` or
            `embedding_regularizer` is a class or a name, or a `distance` has no `is_inverted` or
            does not return a floating point tensor.
        ValueError: a number is outside its range; an unknown `variant`, or a callable one that
            changes the shape; neither labels nor tuple; `ref_emb` without labels and `ref_labels`
            or tuple, or `ref_labels` without `ref_emb`; lengths or embedding sizes that do not fit;
            a tuple that is not of 3 or 4 index tensors, or an index outside the batch or the
            references; a distance that returns a matrix of another shape.
        RuntimeError: PyTorch reports that the N x M similarities do not fit into memory; in
            backward, a tensor that it needs has been changed in place.

    Statistics: with `collect_stats=True`, `negatives_before_positive` is the mean number of
    negatives ranked before a positive and `positives_behind_negatives` the share (0 to 1) of
    positives with at least one, over the (query, positive) pairs of the last batch, by hard counts,
    without the queries themselves.

    Memory: two N x M matrices, the similarities and their gradient, and what `distance` needs
    (N x M x d for PML's SNRDistance). With a `chunk_size` N is that of a chunk, and backward
    computes each chunk again. With a cosine similarity or dot product under a `MeanReducer` nothing
    is computed twice, and one N x M matrix is enough, with `ref_emb` at most 128 MiB of it at a
    time; on a GPU, the Triton kernel needs up to 128 MiB more. The `N x |P(a)| x M` sigmoids are
    never all in memory. A tuple and a callable `variant` need a few matrices more.

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
        >>> loss.detach()
        tensor(0.6501)

    Source: Li et al., *Rethinking the Optimization of Average Precision: Only Penalizing Negative
    Instances before Positive Ones is Enough*, AAAI 2022.
    """

    # PML's names in PML's order, which others may read; `variants.VARIANTS` is the whole table.
    VARIANTS = ["Ds", "Dq", "Iu", "Ib", "O"]

    def __init__(
        self,
        b: float = 2,
        alpha: float = 1,
        anneal: float = 0.01,
        variant: str | Callable[[Tensor], Tensor] = "O",
        include_self: bool = True,
        chunk_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        check_hyperparameters(b, alpha, anneal, variant, include_self)
        check_chunk_size(chunk_size, or_none=True)
        for name in ("reducer", "embedding_regularizer"):
            check_part(name, kwargs.get(name))
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
        variant_record = "variant" if isinstance(variant, str) else "variant_name"
        self.add_to_recordable_attributes(
            list_of_names=["b", "alpha", "anneal", variant_record, "include_self"], is_stat=False
        )
        self.add_to_recordable_attributes(
            list_of_names=["negatives_before_positive", "positives_behind_negatives"], is_stat=True
        )

    @property
    def variant_name(self) -> str:
        """The name of `variant`, which PML records instead of a callable."""
        if isinstance(self.variant, str):
            return self.variant
        return getattr(self.variant, "__name__", type(self.variant).__name__)

    def get_default_distance(self):
        """Return the distance to use if none is given."""
        return CosineSimilarity()

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Any:
        """Compute the loss; the class docstring describes the arguments."""
        if indices_tuple is not None and torch.compiler.is_compiling():
            # The length of a tuple changes from call to call, and each length would be compiled.
            eagerly = torch.compiler.disable(self.forward)
            return eagerly(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        given_tuple = None if isinstance(indices_tuple, QueryColumns) else indices_tuple
        check_inputs(embeddings, labels, given_tuple, ref_emb, ref_labels)
        if ref_emb is embeddings and ref_labels is labels:
            ref_emb = ref_labels = None
        embeddings, labels, ref_labels = plain(embeddings), plain(labels), plain(ref_labels)
        # Distance, loss, regularizer and reducer compute in at least float32: rounding a similarity
        # to bfloat16 changes it by up to 0.002, and anneal, which divides it, is about 0.01.
        dtype = at_least_float32(embeddings.dtype)
        device = embeddings.device.type
        autocast = is_autocast_on(device)
        if autocast and torch.compiler.is_compiling():
            # The backward of a compiled product would round to the type of the caller's autocast.
            eagerly = torch.compiler.disable(self.forward)
            return eagerly(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        with autocast_off(device):
            references = () if ref_emb is None else (plain(ref_emb).to(dtype), ref_labels)
            loss = super().forward(embeddings.to(dtype), labels, indices_tuple, *references)
        if isinstance(loss, Tensor) and not autocast:
            loss = loss.to(embeddings.dtype)
        return loss

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb=None, ref_labels=None):
        """Return the dictionary that PML's reducers take, with the losses of the queries.

        PML's `forward` calls this; PML 2 passes the embeddings as `ref_emb` if none is given. For a
        plain `MeanReducer` the mean is computed here: to select the queries that count, the host
        would have to wait for the GPU. A subclass that overrides this method or `forward` gets the
        losses of the queries.
        """
        if self._needs_chunks(embeddings) and torch.compiler.is_compiling():
            eagerly = torch.compiler.disable(self.compute_loss)
            return eagerly(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        # PML's own losses recognize the batch as its own references by identity, too.
        is_own = ref_emb is None or (ref_emb is embeddings and ref_labels is labels)
        references = None if is_own else ref_emb  # in PML 0.9 always None
        hyperparameters = self.b, self.alpha, self.anneal, self.variant, self.include_self
        settings = Settings.checked(
            *hyperparameters, is_inverted=self.distance.is_inverted, dtype=embeddings.dtype
        )
        check_chunk_size(self.chunk_size, or_none=True)
        n, m = embeddings.shape[0], (embeddings if is_own else references).shape[0]
        pairs = Pairs(labels, indices_tuple, ref_labels, n, m, is_own, embeddings.device)
        is_plain_mean = self._reducer_is_plain_mean()
        try:
            if is_plain_mean and self._similarity_is_product(embeddings):
                mean, counts = mean_of_losses(
                    embeddings,
                    references,
                    pairs,
                    settings,
                    normalized=self.distance.normalize_embeddings,
                    chunk_size=self.chunk_size,
                    with_counts=self.collect_stats,
                )
            else:
                losses, counted, counts = self._query_losses(
                    embeddings, references, pairs, settings
                )
                if is_plain_mean:
                    mean = losses.sum() / counted.sum().clamp(min=1)
        except RuntimeError as error:
            _add_note_on_memory(error, n, m)
            raise
        if self.collect_stats:
            # Tensor.tolist fails in torch 2.4 for a tensor that torch.func wraps.
            before, behind, positives = map(float, counts.view(-1, COUNTS).sum(dim=0).cpu())
            self.negatives_before_positive = before / max(1, positives)
            self.positives_behind_negatives = behind / max(1, positives)
        return _already_reduced(mean) if is_plain_mean else _elements(losses, counted)

    def _needs_chunks(self, embeddings: Tensor) -> bool:
        return self.chunk_size is not None and self.chunk_size < len(embeddings)

    def _query_losses(
        self, embeddings: Tensor, references: Tensor | None, pairs: Pairs, settings: Settings
    ) -> tuple[Tensor, Tensor, Tensor]:
        """L(a) of all queries by any distance, which of them count, and `ranking_counts`."""
        distance, function = self.distance, partial(_losses_of, pairs, self.collect_stats)
        if not self._needs_chunks(embeddings):
            rows = slice(0, embeddings.shape[0])
            losses, *others = function(distance, settings, rows, embeddings, references)
        else:
            parts = _frozen(distance, settings)
            losses, *others = in_chunks(
                partial(function, distance, settings),
                lambda: partial(_losses_of, pairs, False, *_frozen(*parts)),
                self.chunk_size,
                embeddings,
                references,
                self.parameters(),
            )
        return losses + _nan_unless_finite(distance, embeddings, references), *others

    def _reducer_is_plain_mean(self) -> bool:
        """Whether the reducer takes the mean of the losses, and no other code receives them."""
        cls, reducer = type(self), self.reducer
        return (
            cls.forward is PNPLoss.forward
            and cls.compute_loss is PNPLoss.compute_loss
            and type(reducer) is MeanReducer
            and not reducer.collect_stats
            and is_unmodified(reducer, "forward", "reduce_the_loss", "element_reduction")
        )

    def _similarity_is_product(self, embeddings: Tensor) -> bool:
        """Whether the similarities are a matrix product, and no other code receives them."""
        return (
            isinstance(self.variant, str)
            and type(embeddings) is Tensor
            and not torch.compiler.is_compiling()
            and is_product(self.distance)
            and not has_global_hooks()
        )

    def keeps_references(self, embeddings: Tensor) -> bool:
        """Whether backward reads `ref_emb`, which must then not be changed in place before it."""
        return not (
            self._reducer_is_plain_mean() and self._similarity_is_product(plain(embeddings))
        )


def _frozen(distance, settings: Settings) -> tuple[object, Settings]:
    """Copy distance and settings for backward, which later changes do not affect."""
    if not torch.is_grad_enabled():
        return distance, settings
    return frozen(distance), settings._replace(variant=frozen(settings.variant))


def _losses_of(
    pairs: Pairs,
    with_counts: bool,
    distance,
    settings: Settings,
    rows: slice,
    queries: Tensor,
    references: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """L(a) of the queries in `rows`, which of them count, and `ranking_counts` as one row."""
    is_whole = rows.stop - rows.start == queries.shape[0]
    block = queries if is_whole else queries[rows]
    self_similarity = None
    if references is None:
        references = None if is_whole else queries
    elif settings.include_self:
        self_similarity = self_similarities(distance, block)
    s = similarity_matrix(distance, block, references)
    relation = pairs.of(rows)
    losses = query_losses(s, self_similarity, relation, settings)
    if with_counts:
        counts = ranking_counts(s, relation, settings.scale > 0)
    else:
        counts = losses.new_zeros(COUNTS)
    return losses, relation.counted(), counts.unsqueeze(0)


def _nan_unless_finite(distance, *tensors: Tensor | None) -> Tensor:
    """NaN if an embedding, or a length that `distance` divides by, is NaN or infinite, else 0."""
    p = getattr(distance, "p", None)
    normalizes = getattr(distance, "normalize_embeddings", False) and isinstance(p, (int, float))
    given = [x.detach() for x in tensors if x is not None]
    if normalizes:
        given = [torch.linalg.vector_norm(x, p, dim=1) for x in given]
    return sum(zero_or_nan(x) for x in given)


def _add_note_on_memory(error: RuntimeError, n: int, m: int) -> None:
    """Say what needs memory and what to do, if the error is a lack of memory."""
    if any(text in str(error) for text in LACK_OF_MEMORY):
        error.add_note(
            f"There is not enough memory for the similarities of {n} queries and {m} references, "
            f"{n * m:,} numbers, and their gradient. Give PNPLoss a chunk_size to compare fewer "
            "queries at a time."
        )


def _elements(losses: Tensor, counted: Tensor) -> dict:
    """The dictionary with the losses of the queries that count, which PML's reducers reduce."""
    indices = counted.nonzero().squeeze(1)
    if len(indices) == 0:
        return _already_reduced(losses.sum())
    return {
        "loss": {
            "losses": losses[indices],
            "indices": indices,
            "reduction_type": "element",
            "divisor": len(indices),  # read by DivisorReducer alone
        }
    }


def _already_reduced(loss: Tensor) -> dict:
    """The dictionary for a loss that PML's reducers return as it is."""
    return {"loss": {"losses": loss, "indices": None, "reduction_type": "already_reduced"}}
