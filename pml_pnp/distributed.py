"""PML's wrappers for the embeddings of all ranks, with an exact mode that divides the work."""

import torch
import torch.distributed as dist
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import reducers
from pytorch_metric_learning.utils import distributed as pml_distributed
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor

from pml_pnp.joined import Joined, with_gradient
from pml_pnp.loss import PNPLoss
from pml_pnp.memory import CrossBatchMemory, takes_query_columns, without_self_pairs
from pml_pnp.pairs import QueryColumns, Relation, plain
from pml_pnp.precision import at_least_float32

EXACT = "exact"
MEANS = (reducers.MeanReducer, reducers.DivisorReducer, reducers.ClassWeightedReducer)
SUMS = (reducers.SumReducer,)


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

    A CrossBatchMemory enqueues the joined batch in the order of the ranks, so that its queue is the
    same on every rank. PML's wrapper puts each rank's own rows first.

    Args:
        loss: any that PML's wrapper takes. With "exact" a PNPLoss, or this package's
            CrossBatchMemory or a SelfSupervisedLoss around one. Its reducer must be a MeanReducer,
            DivisorReducer, ClassWeightedReducer or SumReducer, without embedding_regularizer.
        efficient: False (default), True or "exact".

    Call with:
        embeddings: (N, d), of this rank, as are all arguments. With "exact" and with a
            CrossBatchMemory, N may differ between ranks. A rank without examples passes the (0, d)
            output of its model for an empty batch, so that the model takes part in backward.
        labels: (N,).
        indices_tuple: pairs or triplets over the joined batch with this rank's rows first, as
            DistributedMinerWrapper makes them; "exact" uses those of this rank's queries. Not with
            a CrossBatchMemory, which may have its own miner, or a SelfSupervisedLoss.
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
            not fit together (raised on every rank).
        RuntimeError: another rank was given bad arguments.

    Every rank must make the same calls, forward and backward. If a rank ends with another error,
    the others end after the timeout of the process group at the latest.

    Memory: with "exact" the gathered embeddings and their gradient, 2 x (sum of N) x d numbers, and
    what the loss needs for N queries.

    Example:
        >>> from pml_pnp import losses
        >>> from pml_pnp.distributed import DistributedLossWrapper
        >>> loss_func = DistributedLossWrapper(losses.PNPLoss(), efficient="exact")
        >>> loss = loss_func(torch.randn(32, 8), torch.arange(32) // 4)
    """

    def __init__(self, loss, efficient: bool | str = False):
        if efficient == EXACT:
            inner = loss
            if isinstance(loss, (CrossBatchMemory, pml_losses.SelfSupervisedLoss)):
                inner = loss.loss
            _check_loss(inner)
            super().__init__(inner)
            self.loss, self.efficient = loss, EXACT
        elif isinstance(efficient, str):
            raise ValueError(f'efficient must be False, True or "exact", got {efficient!r}')
        else:
            super().__init__(loss, efficient)

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
        is_alone = not pml_distributed.is_distributed() or dist.get_world_size() == 1
        if isinstance(self.loss, pml_losses.CrossBatchMemory):
            if ref_emb is not None or ref_labels is not None:
                raise ValueError(
                    "CrossBatchMemory has references of its own, and takes neither ref_emb nor "
                    "ref_labels"
                )
            if is_alone:
                return self.loss(embeddings, labels, indices_tuple, enqueue_mask)
            return self._loss_with_memory(embeddings, labels, indices_tuple, enqueue_mask)
        if enqueue_mask is not None:
            raise ValueError("enqueue_mask needs a CrossBatchMemory, got one without it")
        if self.efficient != EXACT:
            return super().forward(*arguments)
        loss, error = self.loss, None
        if isinstance(loss, pml_losses.SelfSupervisedLoss):
            views = labels if ref_emb is None else ref_emb
            if is_alone and indices_tuple is None:
                return loss(embeddings, views)
            try:
                arguments = self._self_supervised_arguments(embeddings, views, indices_tuple)
            except (TypeError, ValueError) as caught:
                if is_alone:
                    raise
                arguments, error = (embeddings, None, None, None, None), caught
            loss = loss.loss
        if is_alone:
            return loss(*arguments)
        return _joined_loss(loss, *_exact_arguments(loss, *arguments, error))

    def _loss_with_memory(self, embeddings, labels, indices_tuple, enqueue_mask):
        """Compute the loss of the joined batch with a CrossBatchMemory."""
        error = None
        if indices_tuple is not None:
            error = ValueError(
                "with several ranks a CrossBatchMemory takes no indices_tuple, got one: give it a "
                "miner"
            )
        elif labels is None:
            error = TypeError("labels must be a tensor, got NoneType")
        joined = Joined(embeddings, labels, mask=enqueue_mask, error=error)
        with torch.no_grad():
            parts = joined.gather(embeddings)
            if enqueue_mask is not None:
                mask = enqueue_mask.to(embeddings.device, torch.uint8)
                enqueue_mask = torch.cat(joined.gather(mask)).bool()
        parts[joined.rank] = embeddings
        batch = torch.cat(parts), torch.cat(joined.labels), None, enqueue_mask
        if self.efficient != EXACT:
            return self.loss(*batch) * len(parts)
        arguments = self.loss.loss_arguments(*batch, rows=joined.own_rows)
        return _joined_loss(self.loss.loss, *arguments)

    def _self_supervised_arguments(self, embeddings, views, indices_tuple) -> tuple:
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
        labels = torch.arange(len(embeddings), device=embeddings.device) * dist.get_world_size()
        labels += dist.get_rank()
        if getattr(self.loss, "symmetric", False):  # PML 2.0 has no such attribute
            batch = torch.cat([embeddings, views]), torch.cat([labels, labels])
            return *batch, None, None, None
        return embeddings, labels, None, views, labels.clone()


class DistributedMinerWrapper(pml_distributed.DistributedMinerWrapper):
    """PML's DistributedMinerWrapper, for ranks that may have different numbers of rows.

    The pairs or triplets are over the joined batch with this rank's rows first: with
    `efficient=True` those of this rank's queries, otherwise all. DistributedLossWrapper with
    `efficient="exact"` needs only the former. With `ref_emb`, PML's wrapper drops the pairs of a
    query and the reference of the same index; this one does not.
    """

    def forward(self, emb, labels, ref_emb=None, ref_labels=None):
        """Mine the joined batch."""
        if not pml_distributed.is_distributed() or dist.get_world_size() == 1:
            return self.miner(emb, labels, ref_emb, ref_labels)
        joined = Joined(emb, labels, ref_emb, ref_labels)
        with torch.no_grad():
            references = torch.cat(joined.own_first(joined.gather(emb)))
            all_labels = torch.cat(joined.own_first(joined.labels))
            if not self.efficient:
                emb, labels = references, all_labels
            else:
                labels = joined.labels[joined.rank]
            if ref_emb is not None:
                references = torch.cat(joined.own_first(joined.gather_references(ref_emb)))
                all_labels = torch.cat(joined.own_first(joined.ref_labels))
            elif not self.efficient:
                return self.miner(emb, labels)
            if len(emb) == 0:
                return tuple(labels.new_empty(0, dtype=torch.int64) for _ in range(4))
            indices_tuple = self.miner(emb, labels, references, all_labels)
        if ref_emb is not None:
            return indices_tuple
        return without_self_pairs(indices_tuple, torch.arange(len(emb), device=emb.device))


def _check_loss(loss) -> None:
    """Raise TypeError unless the joined loss is a mean or sum of the losses of the ranks."""
    if not isinstance(loss, PNPLoss):
        raise TypeError(
            'efficient="exact" needs a PNPLoss, or a CrossBatchMemory of pml_pnp.losses or a '
            f"SelfSupervisedLoss around one, got {type(loss).__name__}"
        )
    if loss.embedding_regularizer is not None:
        raise TypeError(
            'efficient="exact" takes no embedding_regularizer, got '
            f"{type(loss.embedding_regularizer).__name__}: add its loss to that of the wrapper"
        )
    if type(loss.reducer) not in MEANS + SUMS:
        names = ", ".join(cls.__name__ for cls in MEANS + SUMS)
        raise TypeError(
            f'efficient="exact" needs a reducer that is a mean or a sum over queries, {names}, '
            f"got {type(loss.reducer).__name__}"
        )


def _exact_arguments(
    loss, embeddings, labels, indices_tuple, ref_emb, ref_labels, error: Exception | None
) -> tuple:
    """Return the arguments of this rank's loss: its queries, all references, its own first."""
    if ref_emb is embeddings and ref_labels is labels:
        ref_emb = ref_labels = None
    joined = Joined(
        embeddings, labels, ref_emb, ref_labels, has_tuple=indices_tuple is not None, error=error
    )
    n = len(embeddings)
    if joined.labels is not None:
        labels = joined.labels[joined.rank]
    all_labels = joined.labels if ref_emb is None else joined.ref_labels
    all_labels = None if all_labels is None else torch.cat(joined.own_first(all_labels))
    # The gradient is summed over the ranks in the dtype of the gathered embeddings.
    dtype = at_least_float32(embeddings.dtype)
    if ref_emb is None:
        embeddings = with_gradient(embeddings, joined.needs_grad)
        references = joined.gather(embeddings.to(dtype))
    else:
        ref_emb = with_gradient(ref_emb, joined.ref_needs_grad)
        references = joined.gather_references(ref_emb.to(dtype))
    references = torch.cat(joined.own_first(references))
    columns = torch.arange(n, device=embeddings.device) if ref_emb is None else None
    if indices_tuple is not None:
        joined.check_tuple(indices_tuple, len(references))
        indices_tuple = _pairs_of_first(n, indices_tuple, embeddings.device)
        if columns is not None:
            indices_tuple = without_self_pairs(indices_tuple, columns)
    elif columns is not None and takes_query_columns(loss):
        indices_tuple = QueryColumns(columns)
    elif columns is not None:
        indices_tuple = lmu.get_all_pairs_indices(labels, all_labels)
        indices_tuple = without_self_pairs(indices_tuple, columns)
    return embeddings, labels, indices_tuple, references, all_labels


def _pairs_of_first(n: int, indices_tuple, device) -> tuple[Tensor, ...]:
    """Return the pairs of the first n queries."""
    indices_tuple = [plain(i).to(device, torch.int64) for i in indices_tuple]
    if len(indices_tuple) == 3:
        a, p, q = indices_tuple
        indices_tuple = a, p, a, q
    a1, p, a2, q = indices_tuple
    return a1[a1 < n], p[a1 < n], a2[a2 < n], q[a2 < n]


def _joined_loss(loss, queries, labels, indices_tuple, references, ref_labels) -> Tensor:
    """Compute the loss of the queries of all ranks, from that of this rank's queries.

    Its gradient is the part of this rank times the number of ranks, so that the mean over the ranks
    is the gradient of the joined loss.
    """
    _check_loss(loss)
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
        return Relation.from_labels(labels, ref_labels, columns).counted.sum().to(like)
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
