"""The joined batch of all ranks: gathering, and checks that raise on every rank together."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor

from pml_pnp.checks import check_enqueue_mask, check_in_int64, check_inputs, check_tuple
from pml_pnp.mining import anchors_of, select_pairs
from pml_pnp.pairs import plain


class _Description(NamedTuple):
    """Description of the arguments of a rank, as integers, which the ranks exchange."""

    is_bad: int = 0  # whether this rank has raised an error
    given: int = 0  # one bit for each argument in OPTIONAL, whether it is given
    rows: int = 0
    size: int = 0
    dtype: int = 0  # index in DTYPES
    ref_rows: int = 0
    floating_labels: int = 0  # whether labels or ref_labels are floating point
    needs_grad: int = 0
    ref_needs_grad: int = 0

    def __str__(self) -> str:
        """Describe what must be the same on every rank."""
        names = [name for bit, name in enumerate(OPTIONAL) if self.given >> bit & 1]
        return f"embeddings of size {self.size} in {DTYPES[self.dtype]} with {' and '.join(names)}"


OPTIONAL = ["labels", "ref_emb", "ref_labels", "enqueue_mask", "indices_tuple"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NO_TRIPLETS = (torch.empty(0, dtype=torch.int64),) * 3


class Joined:
    """The joined batch of all ranks, which all of them construct at the same time.

    The ranks first exchange whether their arguments are valid, so that all raise an error if those
    of one are not, instead of waiting for it. Rows and pairs are in the order of the ranks; those
    of `indices_tuple` are numbered with this rank's rows first.

    Attributes:
        rows, ref_rows: numbers of embeddings and references of each rank
        needs_grad, ref_needs_grad: whether some rank needs the gradient of its own
        own_labels: of this rank
        labels, ref_labels, mask: of the joined batch, None if they were not given
        pairs: the pairs or triplets of the queries of this rank, which are numbered from 0
    """

    def __init__(
        self,
        embeddings,
        labels,
        indices_tuple=None,
        ref_emb=None,
        ref_labels=None,
        mask=None,
        error: Exception | None = None,
    ) -> None:
        self.rank = dist.get_rank()
        is_tensor = isinstance(embeddings, Tensor)
        self.device = device = embeddings.device if is_tensor else _device_of_group()
        own = _Description(is_bad=1)
        try:
            if error is not None:
                raise error
            own = _described(embeddings, labels, indices_tuple, ref_emb, ref_labels, mask)
        except (TypeError, ValueError) as caught:
            error = caught
        ranks = [_Description(*x) for x in _gather(torch.tensor(own, device=device)).tolist()]
        _raise_if_any(error, [x.is_bad for x in ranks])
        if len({str(x) for x in ranks}) > 1:
            said = "; ".join(f"rank {rank}: {x}" for rank, x in enumerate(ranks))
            raise ValueError(f"all ranks must be given the same arguments, got {said}")
        self.rows = [x.rows for x in ranks]
        self.ref_rows = None if ref_emb is None else [x.ref_rows for x in ranks]
        self.needs_grad = any(x.needs_grad for x in ranks)
        self.ref_needs_grad = any(x.ref_needs_grad for x in ranks)
        self.own_labels = self.labels = self.ref_labels = self.mask = self.pairs = None
        dtype = torch.float64 if any(x.floating_labels for x in ranks) else torch.int64
        if labels is not None:
            self.own_labels = plain(labels).to(device, dtype)
            self.labels = gather_rows(self.own_labels, self.rows)
        if ref_labels is not None:
            self.ref_labels = gather_rows(plain(ref_labels).to(device, dtype), self.ref_rows)
        if mask is not None:
            self.mask = gather_rows(mask.to(device, torch.uint8), self.rows).bool()
        if indices_tuple is not None:
            self.pairs = self._pairs_of(indices_tuple)

    def _pairs_of(self, indices_tuple) -> tuple[Tensor, ...]:
        """The pairs of this rank's queries; raises on all ranks unless each has a valid tuple."""
        ref_rows = self.rows if self.ref_rows is None else self.ref_rows
        error = None
        try:
            check_tuple(indices_tuple, sum(self.rows), sum(ref_rows))
        except (TypeError, ValueError) as caught:
            error = caught
        is_bad = torch.tensor(error is not None, dtype=torch.int64, device=self.device)
        _raise_if_any(error, _gather(is_bad).tolist())
        given = [plain(x).to(self.device, torch.int64) for x in indices_tuple]
        found = select_pairs(given, lambda a, _: a < self.rows[self.rank])
        anchors, order = anchors_of(found), self.own_first(ref_rows)
        return tuple(x if i in anchors else order[x] for i, x in enumerate(found))

    @property
    def own_rows(self) -> slice:
        """Rows of this rank in the joined batch."""
        start = sum(self.rows[: self.rank])
        return slice(start, start + self.rows[self.rank])

    def own_first(self, rows: list[int]) -> Tensor:
        """Where in the joined rows those of this rank are, and then those of the others, int64."""
        parts = list(torch.arange(sum(rows), device=self.device).split(rows))
        return torch.cat([parts.pop(self.rank), *parts])

    def gather_constant(self, x: Tensor) -> Tensor:
        """The joined rows of a tensor, of which only those of this rank have a gradient."""
        with torch.no_grad():
            joined = gather_rows(x, self.rows)
        joined[self.own_rows] = x
        return joined

    def own_pairs(self, indices_tuple) -> tuple[Tensor, ...]:
        """The pairs or triplets of this rank's queries among all, numbered like `pairs`."""
        own = self.own_rows
        found = select_pairs(indices_tuple, lambda a, _: (a >= own.start) & (a < own.stop))
        anchors = anchors_of(found)
        return tuple(x - own.start if i in anchors else x for i, x in enumerate(found))

    def gather_pairs(self) -> tuple[Tensor, ...]:
        """Gather the `pairs` of all ranks; pairs if some rank has pairs, or else triplets."""
        a, p, a2, n = lmu.convert_to_pairs(self.pairs, None)
        numbers = torch.tensor([len(self.pairs), len(a), len(n)], device=self.device)
        numbers, start = _gather(numbers).tolist(), self.own_rows.start
        positive = torch.stack((a + start, p), dim=1)
        positive = gather_rows(positive, [number for _, number, _ in numbers])
        negative = torch.stack((a2 + start, n), dim=1)
        negative = gather_rows(negative, [number for *_, number in numbers])
        # A rank that has no triplets may have an empty tuple of pairs.
        if any(kind == 4 and first + last > 0 for kind, first, last in numbers):
            return *positive.unbind(dim=1), *negative.unbind(dim=1)
        return *positive.unbind(dim=1), negative[:, 1]


def _raise_if_any(error: Exception | None, is_bad: list[int]) -> None:
    """Raise the error of this rank, or RuntimeError if another rank has one."""
    if error is not None:
        raise error
    if any(is_bad):
        rank = is_bad.index(1)
        raise RuntimeError(f"bad arguments on rank {rank}; the error there says which")


def _device_of_group() -> torch.device:
    """A device whose tensors the ranks can exchange, for a rank that was given no tensor."""
    if "nccl" in dist.get_backend_config() and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def with_gradient(x: Tensor, is_needed: bool) -> Tensor:
    """Let x require a gradient if that of another rank does, so that all take part in backward."""
    return x.detach().requires_grad_() if is_needed and not x.requires_grad else x


def gather_rows(x: Tensor, rows: list[int]) -> Tensor:
    """Join the tensors of the ranks, which have `rows[rank]` rows.

    It is differentiable: the gradient of x is the sum of those of the ranks.
    """
    longest = max(rows)
    missing = longest - len(x)
    if missing:
        x = torch.cat([x, x.new_zeros(missing, *x.shape[1:])])
    gathered = _Gather.apply(x) if longest else x.unsqueeze(0).expand(len(rows), *x.shape)
    return torch.cat([part[:number] for part, number in zip(gathered, rows, strict=True)])


def _described(embeddings, labels, indices_tuple, ref_emb, ref_labels, mask) -> _Description:
    """Check and describe the arguments of this rank."""
    # The tuple is over the joined batch, whose size is not known yet.
    any_tuple = None if indices_tuple is None else NO_TRIPLETS
    check_inputs(embeddings, labels, any_tuple, ref_emb, ref_labels)
    for name, given in (("labels", labels), ("ref_labels", ref_labels)):
        if given is not None:
            check_in_int64(name, given)
    if mask is not None:
        check_enqueue_mask(mask, len(embeddings))
    if embeddings.dtype not in DTYPES:
        raise TypeError(f"embeddings must be of one of {DTYPES}, got {embeddings.dtype}")
    optional = enumerate((labels, ref_emb, ref_labels, mask, indices_tuple))
    return _Description(
        given=sum((x is not None) << bit for bit, x in optional),
        rows=len(embeddings),
        size=embeddings.shape[1],
        dtype=DTYPES.index(embeddings.dtype),
        ref_rows=0 if ref_emb is None else len(ref_emb),
        floating_labels=any(x.is_floating_point() for x in (labels, ref_labels) if x is not None),
        needs_grad=torch.is_grad_enabled() and embeddings.requires_grad,
        ref_needs_grad=torch.is_grad_enabled() and ref_emb is not None and ref_emb.requires_grad,
    )


def _gather(x: Tensor) -> Tensor:
    """Gather tensors of one shape, (ranks, *shape of x)."""
    gathered = x.new_empty(dist.get_world_size(), *x.shape)
    dist.all_gather(list(gathered), x.contiguous())
    return gathered


# torch.distributed.nn.functional has both functions, but is deprecated from torch 2.13 on, and its
# successor is not public.
class _Gather(torch.autograd.Function):
    """Gathers x of every rank; backward sums the gradients of x over the ranks."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _gather(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _ReduceScatter.apply(grad)


class _ReduceScatter(torch.autograd.Function):
    """Sums x over the ranks, and returns the row of this rank; backward gathers."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        if x.is_cpu:  # not every CPU backend has reduce_scatter
            total = x.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(total)
            return total[dist.get_rank()].clone()
        own = x.new_empty(x.shape[1:])
        dist.reduce_scatter_tensor(own, x.contiguous())
        return own

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _Gather.apply(grad)
