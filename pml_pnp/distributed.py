"""PML's wrappers for the embeddings of all ranks, with an exact mode that divides the work."""

import warnings
from functools import cached_property

import torch
import torch.distributed as dist
from pytorch_metric_learning import reducers
from pytorch_metric_learning.losses import (
    BaseMetricLossFunction,
    MultipleLosses,
    cross_batch_memory,
    self_supervised_loss,
)
from pytorch_metric_learning.utils import distributed as pml_distributed
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor

from pml_pnp.joined import Joined, gather_rows, with_gradient
from pml_pnp.loss import PNPLoss
from pml_pnp.losses import CrossBatchMemory, SelfSupervisedLoss
from pml_pnp.memory import takes_query_columns
from pml_pnp.mining import mine, without_self_pairs
from pml_pnp.pairs import QueryColumns, Relation
from pml_pnp.precision import at_least_float32
from pml_pnp.sums import Part, add_up, check_miners, parts_of

EXACT = "exact"
MEANS = (reducers.MeanReducer, reducers.DivisorReducer, reducers.ClassWeightedReducer)
SUMS = (reducers.SumReducer,)
NO_MEMORY = "enqueue_mask needs a CrossBatchMemory, got one without it"


class DistributedLossWrapper(pml_distributed.DistributedLossWrapper):
    """PML's DistributedLossWrapper, with a mode that is exact and divides the work among ranks.

    The loss is that of a single process with the joined batch, which has the rows of all ranks.

    ================  =================  =====================  ====================================
    efficient         queries of a rank  references             gradient, averaged over the ranks
    ================  =================  =====================  ====================================
    False, as in PML  all                all                    of the joined batch
    True, as in PML   its own            all, without gradient  without the part of the references
    "exact"           its own            all, with gradient     of the joined batch
    ================  =================  =====================  ====================================

    With "exact", a PNPLoss is divided in this way, and any other loss is computed of all queries by
    every rank. A MultipleLosses is the sum of what its losses are alone, in every mode.

    A CrossBatchMemory enqueues the joined batch in the order of the ranks, so that its queue is the
    same on every rank. PML's wrapper puts each rank's own rows first.

    Args:
        loss: any that PML's wrapper takes, or a MultipleLosses of such losses. With "exact" a loss
            of PML, a MultipleLosses, or this package's CrossBatchMemory or a SelfSupervisedLoss
            around one. The reducer of a PNPLoss must then be a MeanReducer, DivisorReducer,
            ClassWeightedReducer or SumReducer, and it must have no embedding_regularizer.
        efficient: False (default), True or "exact".

    Call with:
        embeddings: (N, d), of this rank, as are all arguments. With "exact" and with a
            CrossBatchMemory, N may differ between ranks. A rank without examples passes the (0, d)
            output of its model for an empty batch, so that the model takes part in backward.
        labels: (N,).
        indices_tuple: pairs or triplets over the joined batch with this rank's rows first, as
            DistributedMinerWrapper makes them; "exact" uses those of this rank's queries. Not with
            a CrossBatchMemory, which may have its own miner, a SelfSupervisedLoss, or a
            MultipleLosses with miners. Those are called with the joined batch.
        ref_emb, ref_labels: references of this rank. With a SelfSupervisedLoss the views of
            `embeddings`, which may also come second, as in its own call.
        enqueue_mask: (N,), bool, with a CrossBatchMemory.

    Returns:
        False, True: as in PML, the loss of this rank's call times the number of ranks. "exact": the
        loss of the joined batch, the same number on every rank. The mean of the gradients over the
        ranks, which DistributedDataParallel and FSDP compute, is the gradient of the joined batch,
        also for parameters of the loss. A sum of gradients must be divided by the number of ranks.
        Without a process group, or with one rank, the return value of the loss.

    Raises:
        TypeError, ValueError: the mode does not support a loss, reducer or argument; arguments do
            not fit together; with "exact" or a CrossBatchMemory, a uint64 label of 2**63 or more.
        RuntimeError: another rank was given bad arguments, with "exact" or a CrossBatchMemory. The
            other modes do not find this out, as PML's wrapper does not.

    Every rank must make the same calls, forward and backward. If a rank ends with another error,
    the others end after the timeout of the process group at the latest.

    Memory: with "exact" the gathered embeddings and their gradient, 2 x (sum of N) x d numbers, and
    what a PNPLoss needs for N queries, another loss for all.

    Example:
        >>> from pml_pnp import losses
        >>> from pml_pnp.distributed import DistributedLossWrapper
        >>> loss_func = DistributedLossWrapper(losses.PNPLoss(), efficient="exact")
        >>> loss = loss_func(torch.randn(32, 8), torch.arange(32) // 4)
    """

    def __init__(self, loss, efficient: bool | str = False):
        if isinstance(efficient, str) and efficient != EXACT:
            raise ValueError(f'efficient must be False, True or "exact", got {efficient!r}')
        inner = loss
        if efficient == EXACT:
            is_of_views = isinstance(loss, self_supervised_loss.SelfSupervisedLoss)
            inner = loss.loss if is_of_views else loss
            _check_loss(inner)
        for part in parts_of(inner):  # PML checks each of them
            super().__init__(part.loss, False if efficient == EXACT else efficient)
        self.loss, self.efficient = loss, efficient

    def forward(
        self,
        embeddings,
        labels=None,
        indices_tuple=None,
        ref_emb=None,
        ref_labels=None,
        enqueue_mask=None,
    ):
        """Compute the loss of the joined batch; the class docstring describes the arguments."""
        arguments = embeddings, labels, indices_tuple, ref_emb, ref_labels
        has_memory = isinstance(self.loss, cross_batch_memory.CrossBatchMemory)
        if self.efficient != EXACT and not has_memory:
            return self._as_in_pml(arguments, enqueue_mask)
        if not pml_distributed.is_distributed() or dist.get_world_size() == 1:
            loss, arguments = self._checked(arguments, enqueue_mask, is_alone=True)
            if has_memory:
                return loss(embeddings, labels, indices_tuple, enqueue_mask)
            if loss is not self.loss:  # inside a SelfSupervisedLoss
                return self.loss(embeddings, labels if ref_emb is None else ref_emb)
            return add_up(loss, lambda part: part.value(*arguments))
        error = None
        try:
            loss, arguments = self._checked(arguments, enqueue_mask, is_alone=False)
        except (TypeError, ValueError) as caught:
            error = caught  # which the joined batch raises, on all ranks
        joined = Joined(*arguments, enqueue_mask, error)
        embeddings, _, _, ref_emb, _ = arguments
        if self.efficient == EXACT:
            return add_up(loss, _Exact(loss, joined, embeddings, ref_emb).value_of)
        batch = joined.gather_constant(embeddings)
        return loss(batch, joined.labels, None, joined.mask) * dist.get_world_size()

    def _checked(self, arguments: tuple, enqueue_mask, is_alone: bool) -> tuple:
        """Return the loss of the joined batch, and its arguments on this rank, if these fit it."""
        loss, (embeddings, labels, indices_tuple, ref_emb, ref_labels) = self.loss, arguments
        if isinstance(loss, cross_batch_memory.CrossBatchMemory):
            _check_memory_arguments(labels, indices_tuple, ref_emb, ref_labels, is_alone)
        elif enqueue_mask is not None:
            raise ValueError(NO_MEMORY)
        elif isinstance(loss, self_supervised_loss.SelfSupervisedLoss):
            views = labels if ref_emb is None else ref_emb
            arguments = _self_supervised_arguments(loss, embeddings, views, indices_tuple)
            loss = loss.loss
        elif not is_alone and ref_emb is embeddings and ref_labels is labels:
            arguments = embeddings, labels, indices_tuple, None, None
        parts = parts_of(loss)
        check_miners(parts, indices_tuple is not None)
        if (
            isinstance(loss, MultipleLosses)
            and any(x is not None for x in (indices_tuple, ref_emb, ref_labels))
            and any(isinstance(part.loss, CrossBatchMemory) for part in parts)
        ):
            raise ValueError(
                "a CrossBatchMemory in a MultipleLosses takes neither indices_tuple, ref_emb nor "
                "ref_labels here, got one"
            )
        return loss, arguments

    def _as_in_pml(self, arguments: tuple, enqueue_mask) -> Tensor:
        """Return what PML's wrapper does, and the sum of that for a MultipleLosses."""
        if enqueue_mask is not None:
            raise ValueError(NO_MEMORY)
        if isinstance(self.loss, MultipleLosses):
            check_miners(parts_of(self.loss), arguments[2] is not None)
            return add_up(self.loss, lambda part: self._wrapped(part).value(*arguments))
        if not pml_distributed.is_distributed():  # PML says so since 2.6, and failed before
            warnings.warn(
                "DistributedLossWrapper is being used in a non-distributed setting. "
                "Returning the loss as is.",
                stacklevel=3,
            )
            return self.loss(*arguments)
        return super().forward(*arguments)

    def _wrapped(self, part: Part) -> Part:
        """Wrap the loss and the miner of a MultipleLosses like this wrapper its loss."""
        loss, miner = DistributedLossWrapper(part.loss, self.efficient), part.miner
        if miner is not None:
            miner = DistributedMinerWrapper(miner, self.efficient)
        return Part(loss, miner=miner)


class DistributedMinerWrapper(pml_distributed.DistributedMinerWrapper):
    """PML's DistributedMinerWrapper, for ranks that may have different numbers of rows.

    The pairs or triplets are over the joined batch with this rank's rows first: with
    `efficient=True` those of this rank's queries, otherwise all. DistributedLossWrapper with
    `efficient="exact"` needs only the former. A query's own copy among the references of
    `efficient=True` is not chosen, as in a CrossBatchMemory. With `ref_emb`, PML's wrapper drops
    the pairs of a query and the reference of the same index; this one does not.
    """

    def forward(self, emb, labels, ref_emb=None, ref_labels=None):
        """Mine the joined batch."""
        if not pml_distributed.is_distributed() or dist.get_world_size() == 1:
            return self.miner(emb, labels, ref_emb, ref_labels)
        joined = Joined(emb, labels, None, ref_emb, ref_labels)
        order = joined.own_first(joined.rows)
        with torch.no_grad():
            batch = gather_rows(emb, joined.rows)[order], joined.labels[order]
            if ref_emb is not None:
                order = joined.own_first(joined.ref_rows)
                references = gather_rows(ref_emb, joined.ref_rows)[order], joined.ref_labels[order]
            elif self.efficient:
                references = batch
            else:
                return self.miner(*batch)
            queries = (emb, joined.own_labels) if self.efficient else batch
            columns = None if ref_emb is not None else torch.arange(len(emb), device=emb.device)
            return mine(self.miner, *queries, *references, columns)


def _check_loss(loss) -> None:
    """Raise TypeError or ValueError unless the joined loss can be computed exactly."""
    for part in parts_of(loss):
        if isinstance(part.loss, CrossBatchMemory):
            check_miners([part], has_pairs=True)
            _check_loss(part.loss.loss)
        elif isinstance(part.loss, PNPLoss):
            _check_divisible(part.loss)
        elif not isinstance(part.loss, BaseMetricLossFunction):
            raise TypeError(
                'efficient="exact" needs losses of pytorch_metric_learning, a MultipleLosses, or '
                "one inside a CrossBatchMemory of pml_pnp.losses or a SelfSupervisedLoss, got "
                f"{type(part.loss).__name__}"
            )


def _check_divisible(loss: PNPLoss) -> None:
    """Raise TypeError unless the joined loss is a mean or sum of the losses of the ranks."""
    if loss.embedding_regularizer is not None:
        raise TypeError(
            'efficient="exact" takes no embedding_regularizer of a PNPLoss, got '
            f"{type(loss.embedding_regularizer).__name__}: add its loss to that of the wrapper"
        )
    if type(loss.reducer) not in MEANS + SUMS:
        names = ", ".join(cls.__name__ for cls in MEANS + SUMS)
        raise TypeError(
            'efficient="exact" needs a PNPLoss whose reducer is a mean or a sum over queries, '
            f"{names}, got {type(loss.reducer).__name__}"
        )


def _check_memory_arguments(labels, indices_tuple, ref_emb, ref_labels, is_alone: bool) -> None:
    """Raise TypeError or ValueError unless these can be used with a CrossBatchMemory."""
    if ref_emb is not None or ref_labels is not None:
        raise ValueError(
            "CrossBatchMemory has references of its own, and takes neither ref_emb nor ref_labels"
        )
    if labels is None:
        raise TypeError("labels must be a tensor, got NoneType")
    if indices_tuple is not None and not is_alone:
        raise ValueError(
            "with several ranks a CrossBatchMemory takes no indices_tuple, got one: give it a miner"
        )


def _self_supervised_arguments(loss, embeddings, views, indices_tuple) -> tuple:
    """Return the arguments with which SelfSupervisedLoss calls its loss.

    A row and its view have the same label, and no other row of any rank has it.
    """
    if indices_tuple is not None:
        raise ValueError("SelfSupervisedLoss takes no indices_tuple, got one")
    for name, x in (("embeddings", embeddings), ("ref_emb", views)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if embeddings.shape != views.shape:
        raise ValueError(
            f"ref_emb must have the shape of embeddings, {tuple(embeddings.shape)}, got "
            f"{tuple(views.shape)}"
        )
    x, labels, _, views, _ = SelfSupervisedLoss.loss_arguments(loss, embeddings, views)
    if pml_distributed.is_distributed():
        labels = labels * dist.get_world_size() + dist.get_rank()
    return x, labels, None, views, None if views is None else labels.clone()


class _Exact:
    """The joined batch, whose rows are in the order of the ranks, and the value of losses of it.

    Each rank computes a PNPLoss of its own queries only, and any other loss of all queries.
    """

    def __init__(self, loss, joined: Joined, embeddings: Tensor, ref_emb: Tensor | None) -> None:
        self.joined, self.references = joined, None
        self.embeddings = with_gradient(embeddings, joined.needs_grad)
        if ref_emb is not None:
            ref_emb = with_gradient(ref_emb, joined.ref_needs_grad)
            ref_emb = ref_emb.to(at_least_float32(ref_emb.dtype))
            self.references = gather_rows(ref_emb, joined.ref_rows)
        # A PNPLoss in a memory needs the gradient of its own queries only.
        parts = parts_of(loss)
        in_memory = [part for part in parts if isinstance(part.loss, CrossBatchMemory)]
        inner = [part for memory in in_memory for part in parts_of(memory.loss.loss)]
        self._is_constant = len(parts) == len(in_memory) and all(map(_is_divided, inner))

    @cached_property
    def batch(self) -> Tensor:
        """The joined batch; its gradient is summed over the ranks in this dtype."""
        if self._is_constant:
            return self.joined.gather_constant(self.embeddings)
        dtype = at_least_float32(self.embeddings.dtype)
        return gather_rows(self.embeddings.to(dtype), self.joined.rows)

    @cached_property
    def arguments(self) -> tuple:
        """What one process would be given: batch, labels, references and their labels."""
        dtype = self.embeddings.dtype
        references = None if self.references is None else self.references.to(dtype)
        return self.batch.to(dtype), self.joined.labels, references, self.joined.ref_labels

    @cached_property
    def all_pairs(self) -> tuple[Tensor, ...] | None:
        """The pairs or triplets that the ranks were given."""
        return None if self.joined.pairs is None else self.joined.gather_pairs()

    def value_of(self, part: Part) -> Tensor:
        """Return the value of a loss of the joined batch, with the gradient of this rank."""
        if isinstance(part.loss, CrossBatchMemory):
            return self._value_in_memory(part.loss)
        joined, loss = self.joined, part.loss
        mined = None if part.miner is None else part.miner(*self.arguments)
        if not _is_divided(part):
            x, labels, *references = self.arguments
            return loss(x, labels, self.all_pairs if mined is None else mined, *references)
        queries = self.embeddings, joined.own_labels
        pairs = joined.pairs if mined is None else joined.own_pairs(mined)
        if self.references is not None:
            return _joined_loss(loss, *queries, pairs, self.references, joined.ref_labels)
        rows = joined.own_rows
        columns = torch.arange(rows.start, rows.stop, device=self.batch.device)
        if pairs is None and takes_query_columns(loss):
            pairs = QueryColumns(columns)
        else:  # all pairs, if there are none yet
            pairs = lmu.convert_to_pairs(pairs, joined.own_labels, joined.labels)
            pairs = without_self_pairs(pairs, columns)
        return _joined_loss(loss, *queries, pairs, self.batch, joined.labels)

    def _value_in_memory(self, memory: CrossBatchMemory) -> Tensor:
        """Enqueue the joined batch, and return the value of the loss of a memory."""
        batch, labels, *_ = self.arguments
        enqueued = memory.enqueue(batch, labels, enqueue_mask=self.joined.mask)
        own = enqueued.of(self.joined.own_rows)

        def value_of(part: Part) -> Tensor:
            if _is_divided(part):
                return _joined_loss(part.loss, *own.arguments(part))
            return part.loss(*enqueued.arguments(part))

        return add_up(memory.loss, value_of)


def _is_divided(part: Part) -> bool:
    """Whether each rank computes the loss of its own queries only."""
    return isinstance(part.loss, PNPLoss)


def _joined_loss(loss, queries, labels, indices_tuple, references, ref_labels) -> Tensor:
    """Compute the loss of the queries of all ranks, from that of this rank's queries.

    Its gradient is the part of this rank times the number of ranks, so that the mean over the ranks
    is the gradient of the joined loss.
    """
    _check_divisible(loss)
    loss_of_rank = loss(queries, labels, indices_tuple, references, ref_labels)
    if references.requires_grad:
        # All ranks take part in the backward of gathering, also one whose loss is constant.
        loss_of_rank = loss_of_rank + references[:0].sum().to(loss_of_rank.dtype)
    dtype = at_least_float32(loss_of_rank.dtype)
    part = loss_of_rank.to(dtype)
    number = part.new_ones(())
    if type(loss.reducer) in MEANS:
        number = _number_of_counted(len(queries), labels, indices_tuple, ref_labels, part)
        part = part * number
    total = torch.stack([part.detach(), number]).double()
    dist.all_reduce(total)
    if type(loss.reducer) in MEANS:
        divisor = total[1].clamp(min=1)
        total, part = total / divisor, part / divisor.to(dtype)
    part = part * dist.get_world_size()
    return _ReplaceValue.apply(part, total[0].to(dtype)).to(loss_of_rank.dtype)


def _number_of_counted(n: int, labels, indices_tuple, ref_labels, like: Tensor) -> Tensor:
    """Number of queries that have a positive besides themselves, (), dtype and device of `like`."""
    if indices_tuple is None or isinstance(indices_tuple, QueryColumns):
        columns = None if indices_tuple is None else indices_tuple.columns
        return Relation.from_labels(labels, ref_labels, columns).counted().sum().to(like)
    counted = like.new_zeros(n)
    counted[indices_tuple[0]] = 1
    return counted.sum()


class _ReplaceValue(torch.autograd.Function):
    """Returns `value`, and passes its gradient to x."""

    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None
