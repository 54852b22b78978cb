"""A model whose batch is embedded in chunks, so that its activations never exist all at once."""

import copy
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint


class GradCache(nn.Module):
    """Embeds a batch chunk by chunk, with the gradients of the whole batch.

    A loss that compares all examples of a batch with each other needs all embeddings at once, but
    not the activations that made them. The forward pass calls the model on `chunk_size` examples
    at a time and keeps the embeddings alone; the backward pass, which knows the gradient of the
    loss with respect to every embedding, calls the model on one chunk after the other again and
    sends that chunk's gradient through it:

        z_c = model(x_c),  dL/dw = sum over chunks c of (dz_c/dw)^T dL/dz_c

    Value and gradient are those of `model(x)` up to rounding, if the model treats the examples of
    a batch independently of each other. Dropout draws the same masks in both passes.

    The wrapper takes the model's place: in PML's trainers and testers, with every loss, miner and
    optimizer, with autocast and `GradScaler`, around a model that `torch.compile` has compiled,
    and inside or around `DistributedDataParallel`, which synchronizes the gradients once per
    backward pass in both orders. `state_dict`, `load_state_dict`, the names of parameters and
    attributes are those of the model, so that checkpoints are interchangeable.

    Args:
        model: Any `nn.Module` whose tensor arguments and outputs have one row per example. Kept
            as the attribute `module`.
        chunk_size: Number of examples that the model is called on at once; a positive integer.

    Shapes:
        - Every tensor argument, also inside of tuples, lists and (as Hugging Face's models take
          them) dicts and `UserDict`: `(N, ...)`, with the same N. Tensors without dimensions and
          arguments that are no tensors are passed to every call as they are.
        - Every tensor that the model returns, alone or in a tuple, list or dict (`ModelOutput`):
          `(rows of the chunk, ...)`; it is returned as `(N, ...)`.

    Memory: activations of `chunk_size` examples instead of N; beyond them the inputs, the outputs
    and the small graph of each chunk. Time: one more forward pass. A batch of at most
    `chunk_size` examples is passed on in one call without a second pass. Without gradients (under
    `no_grad`, or if nothing requires them) the batch is embedded in chunks once.

    Batch statistics: a `BatchNorm` layer in training mode normalizes by the mean and variance of
    a chunk, and each chunk updates the running statistics (and `num_batches_tracked`) once, in
    the forward pass, as calling the model on the chunks in turn would. The second pass works on
    copies of all buffers, so it updates nothing. Hooks of the model and of its submodules run in
    both passes; hooks of the wrapper run once per batch.

    Raises:
        TypeError: If `model` is not an `nn.Module` or `chunk_size` not an integer; when called,
            if there is no tensor to split, or the model returns anything but tensors (and None,
            bools, numbers or strings) in tuples, lists and dicts.
        ValueError: If `chunk_size` is less than 1, or `DistributedDataParallel` is found inside
            the model; when called, if the tensor arguments have different numbers of rows, or an
            output does not have one row per example of its chunk.
        RuntimeError: If the model changes an input in place, or if a parameter has changed between
            forward and backward pass.

    Example:
        >>> import torch
        >>> from pml_pnp import GradCache, PNPLoss
        >>> trunk = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU())
        >>> model = GradCache(torch.nn.Sequential(trunk, torch.nn.Linear(64, 16)), chunk_size=100)
        >>> x, labels = torch.randn(1000, 32), torch.arange(1000) // 4
        >>> embeddings = model(x)
        >>> embeddings.shape
        torch.Size([1000, 16])
        >>> PNPLoss()(embeddings, labels).backward()
        >>> list(model.state_dict())
        ['0.0.weight', '0.0.bias', '1.weight', '1.bias']

    Source: Gao, Zhang, Han, Callan, *Scaling Deep Contrastive Learning Batch Size under Memory
    Limited Setup*, RepL4NLP 2021 (arXiv 2101.06983), which keeps the gradients of the embeddings
    by hand. Here `torch.utils.checkpoint` does so inside one ordinary backward pass.
    """

    def __init__(self, model: nn.Module, chunk_size: int = 64):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, Integral):
            raise TypeError(f"chunk_size must be a positive integer, got {chunk_size!r}")
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be a positive integer, got {chunk_size}")
        for name, part in model.named_modules():
            if isinstance(part, DistributedDataParallel) and part is not model:
                raise ValueError(
                    "model must not contain DistributedDataParallel, which would synchronize once "
                    f"per chunk: use DistributedDataParallel(GradCache(model)), got one at {name!r}"
                )
        self.module = model
        self.chunk_size = int(chunk_size)

    @torch.compiler.disable  # dynamo cannot trace checkpoint with a context of its own
    def forward(self, *args, **kwargs) -> Any:
        """The model's output for the whole batch."""
        if isinstance(self.module, DistributedDataParallel):
            return self._inside_ddp(*args, **kwargs)
        tensors = _batched_tensors(args, kwargs)
        batch_size = len(tensors[0])
        if batch_size <= self.chunk_size:
            output = self.module(*args, **kwargs)
            _map(partial(_check_rows, batch_size), "output", output)
            return output

        def call(*rows: Tensor) -> Any:
            remaining = iter(rows)
            chunk_args, chunk_kwargs = _map(
                lambda _, value: next(remaining) if _is_batched(value) else value,
                "",
                (args, kwargs),
            )
            return self.module(*chunk_args, **chunk_kwargs)

        run = _CalledTwice(self.module, call) if torch.is_grad_enabled() else call
        count = -(-batch_size // self.chunk_size)
        bounds = [batch_size * i // count for i in range(count + 1)]  # no chunk of one left over
        outputs = []
        for start, end in pairwise(bounds):
            own_rows = partial(_own_rows, end - start)
            outputs.append(_map(own_rows, "output", run(*(t[start:end] for t in tensors))))
        return _map(_joined, "output", *outputs)

    def _inside_ddp(self, *args, **kwargs) -> Any:
        """One forward pass of DistributedDataParallel, in which its own module runs in chunks."""
        ddp, module = self.module, self.module.module
        ddp.module = GradCache(module, self.chunk_size)
        try:
            return ddp(*args, **kwargs)
        finally:
            ddp.module = module

    def extra_repr(self) -> str:
        """What `print` shows beside the model."""
        return f"chunk_size={self.chunk_size}"

    # --- in the model's place: its attributes, its names, its checkpoints

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Python asks an instance for __deepcopy__ and the like, before there is a module too.
            if name.startswith("__") or "module" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = name in ("module", "chunk_size") or name in self.__dict__ or hasattr(type(self), name)
        if own or not hasattr(self, name):
            super().__setattr__(name, value)
        else:
            setattr(self.module, name, value)

    def named_modules(
        self, memo: set | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """The wrapper, then the model's modules by the model's own names.

        Names of parameters and buffers follow from these, here and in a module that contains this.
        """
        memo = set() if memo is None else memo
        if self not in memo:
            if remove_duplicate:
                memo.add(self)
            yield prefix, self
            yield from self.module.named_modules(memo, prefix, remove_duplicate)

    def state_dict(self, *args, **kwargs) -> dict[str, Any]:
        """That of the model."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs) -> Any:
        """Load one of the model or of this wrapper: they are the same."""
        return self.module.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args) -> None:
        # Called where this is part of a module that is loaded.
        for key in [k for k in state_dict if k.startswith(prefix)]:
            state_dict[f"{prefix}module.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _CalledTwice:
    """Calls a model under `checkpoint`: now, and again in the backward pass with the same result.

    `checkpoint` restores the inputs, the random state and autocast. What a model also has, its
    training mode, its buffers and its parameters, is looked after here.
    """

    def __init__(self, model: nn.Module, call: Callable[..., Any]):
        self.name = type(model).__name__
        self.call = call
        self.modes = [(m, m.training) for m in model.modules()]
        self.parameters = list(model.parameters())
        self.buffers = [
            (m._buffers, name)
            for m, _ in self.modes
            for name, buffer in m._buffers.items()
            if buffer is not None
        ]
        self.changing = self.buffers  # those that the first pass changes: all, until it has run
        self.note_versions()

    def __call__(self, *rows: Tensor) -> Any:
        row_versions = [t._version for t in rows]
        before = [(b, n, b[n], b[n]._version, b[n].detach().clone()) for b, n in self.changing]
        second_pass = _SecondPass(self)
        output = checkpoint(
            self.call,
            *rows,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), second_pass),
        )
        if row_versions != [t._version for t in rows]:
            raise RuntimeError(
                f"{self.name} changes its input in place, which is needed again in the backward "
                "pass: let it work on a copy, for instance with inplace=False in its first layer"
            )
        for buffers, name, buffer, version, value in before:
            if buffers[name] is not buffer or buffer._version != version:
                second_pass.values[id(buffers), name] = value
        self.changing = [(b, n) for b, n in self.changing if (id(b), n) in second_pass.values]
        self.note_versions()
        # The gradients of all chunks with respect to one cast weight would add up in float16.
        torch.clear_autocast_cache()
        return output

    def note_versions(self) -> None:
        """Remember which state of the parameters the last pass left."""
        self.versions = [p._version for p in self.parameters]


class _SecondPass:
    """Context in which one chunk is computed again, which leaves the model as it was before.

    Attributes:
        values: What those buffers held before the first pass that it changed. The running
            statistics of BatchNorm need not be among them: in training mode nothing reads them.
    """

    def __init__(self, first_pass: _CalledTwice):
        self.first_pass = first_pass
        self.values: dict[tuple[int, str], Tensor] = {}

    def __enter__(self) -> None:
        if self.first_pass.versions != [p._version for p in self.first_pass.parameters]:
            raise RuntimeError(
                f"a parameter of {self.first_pass.name} has changed since the forward pass, whose "
                "activations are computed again in the backward pass: call backward before the "
                "optimizer's step"
            )
        self.modes = [(m, m.training) for m, _ in self.first_pass.modes]
        for module, training in self.first_pass.modes:
            module.training = training
        self.kept = [(b, n, b[n]) for b, n in self.first_pass.buffers]
        copies: dict[int, Tensor] = {}  # a buffer that two modules share stays shared
        for buffers, name, buffer in self.kept:
            if id(buffer) not in copies:
                value = self.values.get((id(buffers), name), buffer)
                copies[id(buffer)] = value.detach().clone()
            buffers[name] = copies[id(buffer)]

    def __exit__(self, *_) -> None:
        for buffers, name, buffer in self.kept:
            buffers[name] = buffer
        for module, training in self.modes:
            module.training = training
        self.first_pass.note_versions()


# --- batches and outputs of any form


def _map(function: Callable[..., Any], where: str, value: Any, *others: Any) -> Any:
    """Apply `function(where, leaf, *leaves)` to the leaves of structures of one form.

    A structure is a tuple, a list or a dict (any mapping that can be written to) of structures.
    """
    for other in others:
        if _form(other) != _form(value):
            raise ValueError(
                "the model must return the same structure for every chunk, got "
                f"{_form(value)} and {_form(other)} at {where}"
            )
    if isinstance(value, MutableMapping):
        result = copy.copy(value)
        for key in value:
            leaves = (v[key] for v in (value, *others))
            result[key] = _map(function, f"{where}[{key!r}]", *leaves)
        return result
    if isinstance(value, (tuple, list)):
        items = [
            _map(function, f"{where}[{i}]", *leaves)
            for i, leaves in enumerate(zip(value, *others, strict=True))
        ]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return function(where, value, *others)


def _form(value: Any) -> str:
    name = type(value).__name__
    if isinstance(value, MutableMapping):
        return f"{name} with keys {list(value)}"
    if isinstance(value, (tuple, list)):
        return f"{name} of length {len(value)}"
    return name


def _is_batched(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _batched_tensors(args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that have one row per example, in the order in which `_map` meets them."""
    found: dict[str, Tensor] = {}

    def collect(where: str, value: Any) -> None:
        if _is_batched(value):
            found[where] = value

    _map(collect, "args", args)
    _map(collect, "kwargs", kwargs)
    if not found:
        raise TypeError(
            "expected at least one tensor with a row per example among the arguments, also in "
            "tuples, lists and dicts, got "
            + (", ".join(type(a).__name__ for a in (*args, *kwargs.values())) or "no argument")
        )
    if len({len(t) for t in found.values()}) > 1:
        sizes = ", ".join(f"{len(t)} in {where}" for where, t in found.items())
        raise ValueError(f"all tensor arguments must have one row per example, got rows: {sizes}")
    return list(found.values())


def _check_rows(count: int, where: str, value: Any) -> None:
    """Raise TypeError or ValueError unless chunks of this can be joined to a batch."""
    if isinstance(value, Tensor):
        if value.ndim == 0 or len(value) != count:
            raise ValueError(
                f"every tensor that the model returns must have one row per example, {count} "
                f"here, got shape {tuple(value.shape)} at {where}"
            )
    elif not isinstance(value, (bool, int, float, str, type(None))):
        raise TypeError(
            "the model must return tensors, alone or in tuples, lists and dicts, got "
            f"{type(value).__name__} at {where}"
        )


def _own_rows(count: int, where: str, value: Any) -> Any:
    """Check a chunk's output, and copy it if it would keep a larger tensor alive."""
    _check_rows(count, where, value)
    if isinstance(value, Tensor) and value.layout == torch.strided:
        return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
    return value


def _joined(where: str, *values: Any) -> Any:
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    if any(v != values[0] for v in values):
        raise ValueError(
            f"what the model returns beside tensors must be the same for every chunk, got {values} "
            f"at {where}"
        )
    return values[0]
