"""CrossBatchMemory, which adds the embeddings of earlier batches to the references of a batch."""

import warnings

import torch
from pytorch_metric_learning.losses import cross_batch_memory as pml
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor

from pml_pnp.checks import check_enqueue_mask, check_in_int64, check_inputs, check_tuple
from pml_pnp.distances import has_global_hooks, is_unmodified
from pml_pnp.loss import PNPLoss
from pml_pnp.mining import mine, without_self_pairs
from pml_pnp.pairs import QueryColumns, plain
from pml_pnp.sums import Part, TakesSums, add_up, check_miners, parts_of


def with_pnp_loss(wrapper) -> staticmethod:
    """The losses that a PML wrapper accepts, by class name, with PNPLoss and its subclasses."""
    supported = wrapper.supported_losses  # read now, since `register` replaces it in PML's class
    return staticmethod(lambda: [*supported(), *_names_of_family(PNPLoss)])


def _names_of_family(cls: type) -> list[str]:
    """Names of a class and of all its subclasses that exist so far."""
    return [cls.__name__, *(n for sub in cls.__subclasses__() for n in _names_of_family(sub))]


class CrossBatchMemory(pml.CrossBatchMemory, TakesSums):
    """PML's CrossBatchMemory, a queue of embeddings as references, which also takes PNPLoss.

    It takes a MultipleLosses as well, and adds up what its losses would be in this memory alone.

    A call enqueues the batch and then calls the loss with the batch as queries and the queue as
    references. A query is not compared with its own copy in the queue. Without a miner, PML lists
    all N x M pairs of batch and queue, which takes longer than the loss itself. Here PNPLoss gets
    the positions of the batch in the queue instead.

    Args:
        loss: PNPLoss, a loss that PML's CrossBatchMemory takes, or a MultipleLosses of such losses.
        embedding_size: d.
        memory_size: length of the queue; a full one loses its oldest embeddings.
        miner: called with the batch and the queue; its pairs or triplets go to the loss. A query's
            own copy is left out, also by a miner that chooses the most similar positive, unless
            it does not compute similarities by its `distance`: then no query counts, and a warning
            says so. A MultipleLosses may have miners instead, which are called in the same way.
        **kwargs: PML's `collect_stats`.

    Call with:
        embeddings: (N, d), any floating dtype; the queue is moved to their dtype and device.
        labels: (N,). The queue keeps integers as int64 and floating point labels as float64.
        indices_tuple: pairs or triplets in addition to those of the miner or, without a miner, to
            all pairs. Anchors are rows of the batch, positives and negatives rows of
            `embedding_memory` that are filled once the batch is enqueued.
        enqueue_mask: (N,), bool. The rows where it is true are enqueued and are not queries, the
            others are queries and are not enqueued. Not together with `indices_tuple`.
        ref_labels: must be None. PML's `DistributedLossWrapper` without a process group passes its
            `ref_emb` at the position of `enqueue_mask`, followed by this.

    Returns:
        What the loss returns.

    Raises:
        TypeError: an argument is not the tensor described above; a MultipleLosses with hooks.
        ValueError: more embeddings to enqueue than `memory_size`; embeddings of another size than
            `embedding_size`; lengths that do not fit; a uint64 label of 2**63 or more;
            `indices_tuple` and `enqueue_mask` together; `ref_labels`; a MultipleLosses with miners,
            and a miner or `indices_tuple` as well.

    Saving: `state_dict` holds the queue, its position and whether it is full. That of PML's
    CrossBatchMemory lacks the latter two: when it is loaded, the queue starts anew, with a warning.

    Memory: memory_size x (d + 1) numbers. Several calls may precede a backward, so a loss whose
    backward reads the references gets a copy of the queue. PNPLoss with a cosine similarity or dot
    product, a named variant and a `MeanReducer` does not read them, and gets no copy.

    Example:
        >>> from pml_pnp import losses
        >>> memory = losses.CrossBatchMemory(losses.PNPLoss(), embedding_size=8, memory_size=100)
        >>> loss = memory(torch.randn(32, 8), torch.arange(32) // 4)
        >>> memory.queue_idx
        32
    """

    supported_losses = with_pnp_loss(pml.CrossBatchMemory)

    def __init__(self, loss, embedding_size, memory_size=1024, miner=None, **kwargs):
        check_miners(parts_of(loss), miner is not None)
        super().__init__(loss, embedding_size, memory_size, miner, **kwargs)
        if hasattr(self, "register_load_state_dict_pre_hook"):
            self.register_load_state_dict_pre_hook(_before_loading)
        else:  # torch 2.4
            self._register_load_state_dict_pre_hook(_before_loading, with_module=True)

    def forward(self, embeddings, labels, indices_tuple=None, enqueue_mask=None, ref_labels=None):
        """Enqueue the batch and compute its loss; the class docstring describes the arguments."""
        if torch.compiler.is_compiling():
            # The position of the queue changes from call to call, and each would be compiled.
            eagerly = torch.compiler.disable(self.forward)
            return eagerly(embeddings, labels, indices_tuple, enqueue_mask, ref_labels)
        if ref_labels is not None:
            raise ValueError(
                "CrossBatchMemory has references of its own, and takes neither ref_emb nor "
                "ref_labels, got ref_labels"
            )
        batch = self.enqueue(embeddings, labels, indices_tuple, enqueue_mask)
        return add_up(self.loss, lambda part: part.loss(*batch.arguments(part)))

    def enqueue(self, embeddings, labels, indices_tuple=None, enqueue_mask=None) -> "Enqueued":
        """Enqueue a batch, given the arguments of `forward`."""
        parts = parts_of(self.loss)
        check_miners(parts, self.miner is not None or indices_tuple is not None)
        self._check(embeddings, labels, indices_tuple, enqueue_mask)
        self.reset_stats()
        labels = self._on_one_device(embeddings, labels)
        if enqueue_mask is None:
            self.add_to_memory(embeddings, labels, len(embeddings))
            batch = embeddings, labels, None, self.curr_batch_idx
        else:
            mask = enqueue_mask.to(embeddings.device)
            enqueued = embeddings[mask]
            self.add_to_memory(enqueued, labels[mask], len(enqueued))
            batch = embeddings, labels, ~mask, None
        size = self.memory_size if self.has_been_filled else self.queue_idx
        queue = self.embedding_memory[:size], self.label_memory[:size]
        if torch.is_grad_enabled() and any(_reads(part.loss, embeddings) for part in parts):
            queue = tuple(x.clone() for x in queue)
        return Enqueued(self, batch, queue, indices_tuple)

    def add_to_memory(self, embeddings, labels, batch_size) -> None:
        """Write embeddings and labels over the oldest ones of the queue."""
        is_filled = self.has_been_filled or self.queue_idx + batch_size >= self.memory_size
        super().add_to_memory(embeddings, labels, batch_size)
        self.has_been_filled = is_filled  # PML takes an empty batch for one that fills the queue

    def create_indices_tuple(
        self,
        embeddings,
        labels,
        E_mem,
        L_mem,
        input_indices_tuple,
        do_remove_self_comparisons,
        miner=None,
    ):
        """Make pairs or triplets by `miner`, or by that of the memory, or else all pairs."""
        miner = self.miner if miner is None else miner
        columns = self.curr_batch_idx if do_remove_self_comparisons else None
        if miner is not None:
            indices_tuple = mine(miner, embeddings, labels, E_mem, L_mem, columns)
        else:
            indices_tuple = without_self_pairs(lmu.get_all_pairs_indices(labels, L_mem), columns)
        if input_indices_tuple is None:
            return indices_tuple
        convert = lmu.convert_to_pairs if len(indices_tuple) == 4 else lmu.convert_to_triplets
        given = without_self_pairs(convert(input_indices_tuple, labels), columns)
        return c_f.concatenate_indices_tuples(indices_tuple, given)

    def _lists_pairs(self, loss) -> bool:
        """Whether a loss gets a list of pairs or triplets, and not the positions of the batch."""
        makes_own = type(self).create_indices_tuple is not CrossBatchMemory.create_indices_tuple
        return self.miner is not None or makes_own or not takes_query_columns(loss)

    def get_extra_state(self) -> Tensor:
        """Return the position of the queue and whether it is full, for `state_dict`."""
        return torch.tensor([self.queue_idx, self.has_been_filled])

    def set_extra_state(self, state: Tensor) -> None:
        """Restore position and fullness of the queue from a `state_dict`."""
        queue_idx, has_been_filled = state.tolist()
        self.queue_idx, self.has_been_filled = queue_idx, bool(has_been_filled)

    def _check(self, embeddings, labels, indices_tuple, enqueue_mask) -> None:
        """Raise TypeError or ValueError unless these are valid arguments of `forward`."""
        if labels is None:
            raise TypeError("labels must be a tensor, got NoneType")
        check_inputs(embeddings, labels, None, None, None)
        check_in_int64("labels", labels)
        if embeddings.shape[1] != self.embedding_size:
            raise ValueError(
                f"embeddings must have the embedding_size of the memory, {self.embedding_size}, "
                f"got {embeddings.shape[1]}"
            )
        if indices_tuple is not None:
            if enqueue_mask is not None:
                raise ValueError("expected indices_tuple or enqueue_mask, got both")
            filled = self.memory_size if self.has_been_filled else self.queue_idx + len(embeddings)
            check_tuple(indices_tuple, len(embeddings), min(filled, self.memory_size))
        if enqueue_mask is not None:
            check_enqueue_mask(enqueue_mask, len(embeddings))
        number = len(embeddings) if enqueue_mask is None else int(enqueue_mask.sum())
        if number > self.memory_size:
            raise ValueError(
                f"at most memory_size, {self.memory_size}, embeddings can be enqueued at a time, "
                f"got {number}"
            )

    def _on_one_device(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Move the queue to dtype and device of the embeddings; return labels in the queue's."""
        labels = plain(labels)
        is_floating = labels.is_floating_point() or self.label_memory.is_floating_point()
        dtype = torch.float64 if is_floating else torch.int64
        # What inference mode makes could not be written to outside of it.
        with torch.inference_mode(False):
            self.embedding_memory = self.embedding_memory.to(embeddings.device, embeddings.dtype)
            self.label_memory = self.label_memory.to(embeddings.device, dtype)
        return labels.to(embeddings.device, dtype)


class Enqueued:
    """Queries of a batch that a memory has enqueued, and what a loss of them is called with.

    Args:
        memory: CrossBatchMemory
        batch: embeddings (N, d), labels (N,), which rows are queries, (N,) bool or None for all,
            and the places of the rows in the queue, (N,) int64, or None if no query is there
        queue: references (M, d) and their labels (M,)
        indices_tuple: that of the call
        rows: of the batch
    """

    def __init__(self, memory, batch, queue, indices_tuple, rows: slice | None = None):
        self._memory, self._batch = memory, batch
        self._queue, self._indices_tuple = queue, indices_tuple
        if rows is not None:
            batch = tuple(None if t is None else t[rows] for t in batch)
        x, y, is_query, self._columns = batch
        self._queries = (x, y) if is_query is None else (x[is_query], y[is_query])
        self._pairs = {}  # by miner, which is called once for all losses

    def of(self, rows: slice) -> "Enqueued":
        """Return the queries in `rows` of the batch."""
        return Enqueued(self._memory, self._batch, self._queue, self._indices_tuple, rows)

    def arguments(self, part: Part) -> tuple:
        """Return queries, labels, pairs, triplets or QueryColumns, references, their labels."""
        indices = None
        lists_pairs = self._memory._lists_pairs(part.loss)
        if part.miner is not None or self._indices_tuple is not None or lists_pairs:
            indices = self._pairs_by(part.miner)
        elif self._columns is not None:
            indices = QueryColumns(self._columns)
        return *self._queries, indices, *self._queue

    def _pairs_by(self, miner) -> tuple[Tensor, ...]:
        """Pairs or triplets by a miner or, if it is None, as the memory makes them."""
        if miner not in self._pairs:
            is_in_queue = self._columns is not None
            if is_in_queue:
                self._memory.curr_batch_idx = self._columns
            own = {} if miner is None else {"miner": miner}  # which PML's method does not have
            self._pairs[miner] = self._memory.create_indices_tuple(
                *self._queries, *self._queue, self._indices_tuple, is_in_queue, **own
            )
        return self._pairs[miner]


def takes_query_columns(loss) -> bool:
    """Whether a loss is a PNPLoss, and no other code receives the arguments it is called with."""
    return (
        isinstance(loss, PNPLoss)
        and is_unmodified(loss, "forward", "compute_loss")
        and not has_global_hooks()
    )


def _reads(loss, embeddings: Tensor) -> bool:
    """Whether backward of a loss of these embeddings reads the references."""
    return not takes_query_columns(loss) or loss.keeps_references(embeddings)


def _before_loading(memory: CrossBatchMemory, state_dict: dict, prefix: str, *_) -> None:
    """Adapt the dtypes of the queue, and let it start anew if a part of it is missing."""
    names = ("label_memory", "embedding_memory", "_extra_state")
    labels, rows, _ = (state_dict.get(prefix + x) for x in names)
    missing = [x for x in names if prefix + x not in state_dict]
    if len(missing) == len(names):
        return
    if rows is not None:
        memory.embedding_memory = memory.embedding_memory.to(rows.dtype)  # float64 is not rounded
        if rows.shape != memory.embedding_memory.shape:  # which torch refuses: the queue stays
            state_dict[prefix + "_extra_state"] = memory.get_extra_state()
            return
    if labels is not None:
        dtype = torch.float64 if labels.is_floating_point() else torch.int64
        memory.label_memory = memory.label_memory.to(dtype)
    if missing:
        warnings.warn(
            f"the state_dict of this CrossBatchMemory does not hold {', '.join(missing)} (the "
            "position of the queue is _extra_state, which pytorch_metric_learning's does not "
            "hold); the queue starts anew",
            stacklevel=2,
        )
        state_dict[prefix + "_extra_state"] = torch.tensor([0, False])
