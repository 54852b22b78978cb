"""GradCache embeds a batch in chunks, so that only the activations of one chunk are in memory."""

import copy
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from pml_pnp.checks import check_chunk_size


class GradCache(nn.Module):
    """Embeds a batch chunk by chunk, with the gradients of the whole batch.

    A loss that compares all examples of a batch with each other needs all embeddings at once, but
    not the activations of the model. The forward pass calls the model on `chunk_size` examples at a
    time and keeps only the embeddings. The backward pass starts with the gradient of the loss with
    respect to every embedding; for one chunk after the other, it calls the model again and
    propagates the gradient of the chunk through it:

        z_c = model(x_c),  dL/dw = sum over chunks c of (dz_c/dw)^T dL/dz_c

    Value and gradient are those of `model(x)` up to rounding, if the model treats the examples of
    a batch independently of each other. Dropout draws the same masks in both passes.

    The wrapper is used like the model: in PML's trainers and testers, with every loss, miner and
    optimizer, with autocast and `GradScaler`, around a model that `torch.compile` has compiled,
    and inside or around `DistributedDataParallel`, which synchronizes the gradients once per
    backward pass in both orders. `state_dict`, `load_state_dict`, the names of parameters and
    attributes are those of the model, so that checkpoints are interchangeable.

    Args:
        model: Any `nn.Module` whose tensor arguments and outputs have one row per example. Kept
            as the attribute `module`.
        chunk_size: Number of examples that the model is called on at once; a positive integer.

    Shapes:
        - Every tensor argument, also inside of tuples, lists, dicts and `UserDict` (for models of
          Hugging Face): `(N, ...)`, with the same N. Tensors without dimensions and arguments that
          are not tensors are passed to every call unchanged.
        - Every tensor that the model returns, alone or in a tuple, list or dict (`ModelOutput`):
          `(rows of the chunk, ...)`; it is returned as `(N, ...)`.

    Memory: activations of `chunk_size` examples instead of N, and in addition the inputs, the
    outputs and the small graph of each chunk. Time: one more forward pass. For a batch of at most
    `chunk_size` examples the model is called once, without a second pass. Without gradients (under
    `no_grad`, or if nothing requires them) each chunk is embedded once.

    Batch statistics: a `BatchNorm` layer in training mode normalizes by the mean and variance of
    a chunk, and each chunk updates the running statistics (and `num_batches_tracked`) once, in
    the forward pass, as separate calls of the model on the chunks would. The second pass works on
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
    Limited Setup*, RepL4NLP 2021 (arXiv 2101.06983), which stores the gradients of the embeddings
    explicitly. Here `torch.utils.checkpoint` does the same within one ordinary backward pass.
    """

    def __init__(self, model: nn.Module, chunk_size: int = 64):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        check_chunk_size(chunk_size)
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
        """Return the model's output for the whole batch."""
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
        bounds = [batch_size * i // count for i in range(count + 1)]  # chunks of nearly equal size
        outputs = []
        for start, end in pairwise(bounds):
            checked = partial(_checked_and_copied, end - start)
            outputs.append(_map(checked, "output", run(*(t[start:end] for t in tensors))))
        return _map(_joined, "output", *outputs)

    def _inside_ddp(self, *args, **kwargs) -> Any:
        """Call DistributedDataParallel once, with its module called in chunks inside."""
        ddp, module = self.module, self.module.module
        ddp.module = GradCache(module, self.chunk_size)
        try:
            return ddp(*args, **kwargs)
        finally:
            ddp.module = module

    def extra_repr(self) -> str:
        """Return what `print` shows in addition to the model."""
        return f"chunk_size={self.chunk_size}"

    # --- attributes, names and checkpoints are those of the model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Python looks for __deepcopy__ and the like, also before `module` is set.
            if name.startswith("__") or "module" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        of_wrapper = ("module", "chunk_size", *self.__dict__)
        if name in of_wrapper or hasattr(type(self), name) or not hasattr(self, name):
            super().__setattr__(name, value)
        else:
            setattr(self.module, name, value)

    def named_modules(
        self, memo: set | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield the wrapper, then the model's modules under the names that the model gives them.

        PyTorch derives the names of parameters and buffers from these, also in a module that
        contains the wrapper.
        """
        memo = set() if memo is None else memo
        if self not in memo:
            if remove_duplicate:
                memo.add(self)
            yield prefix, self
            yield from self.module.named_modules(memo, prefix, remove_duplicate)

    def state_dict(self, *args, **kwargs) -> dict[str, Any]:
        """Return the `state_dict` of the model."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs) -> Any:
        """Load a `state_dict` of the model or of this wrapper, which are the same."""
        return self.module.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args) -> None:
        # Called when a module that contains this wrapper loads its state_dict.
        for key in [k for k in state_dict if k.startswith(prefix)]:
            state_dict[f"{prefix}module.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _CalledTwice:
    """Calls a model under `checkpoint`, which calls it again in backward with the same result.

    `checkpoint` restores the inputs, the random state and autocast. Training mode and buffers of
    the model are restored here, and an error is raised if its parameters have changed.
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
        self.changing = self.buffers  # those that a forward pass changes; all before the first one
        self.note_versions()

    def __call__(self, *rows: Tensor) -> Any:
        row_versions = [t._version for t in rows]
        before = [(b, n, b[n], b[n]._version, b[n].detach().clone()) for b, n in self.changing]
        first_pass, second_pass = _FirstPass(self.call), _SecondPass(self)
        output = checkpoint(
            first_pass.call,
            *rows,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), second_pass),
        )
        first_pass.end()
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
        # With a shared cast of the weights, the gradients of all chunks would add up in float16.
        torch.clear_autocast_cache()
        return output

    def note_versions(self) -> None:
        """Record the versions of the parameters, to notice a later change."""
        self.versions = [p._version for p in self.parameters]


class _FirstPass:
    """Keeps an error of the model until `checkpoint` has returned.

    In torch before 2.13, an error that leaves `checkpoint` leaves its hooks in place, which then
    call the model again in the backward pass of anything else.
    """

    def __init__(self, call: Callable[..., Any]):
        self._call = call
        self._error: Exception | None = None
        self._has_ended = False

    def call(self, *rows: Tensor) -> Any:
        """Call the model; errors of the second pass are raised at once."""
        try:
            return self._call(*rows)
        except Exception as error:
            if self._has_ended:
                raise
            self._error = error
            return None

    def end(self) -> None:
        """Raise the error if there was one."""
        self._has_ended = True
        error, self._error = self._error, None
        if error is not None:
            raise error


class _SecondPass:
    """Context in which a chunk is computed again, and after which the model is as it was before.

    Attributes:
        values: what the buffers that the first pass changed contained before, by module and name.
            The running statistics of BatchNorm, whose change leaves their version as it was, may be
            missing: in training mode nothing reads them.
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
    """Apply `function(where, leaf, *leaves)` to the leaves of structures of the same form.

    A structure is a tuple, a list or a mutable mapping (dict) of structures, or a leaf.
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
    """Describe type and length or keys of a structure."""
    name = type(value).__name__
    if isinstance(value, MutableMapping):
        return f"{name} with keys {list(value)}"
    if isinstance(value, (tuple, list)):
        return f"{name} of length {len(value)}"
    return name


def _is_batched(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _batched_tensors(args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that have one row per example, in the order of `_map`."""
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
    """Raise TypeError or ValueError unless an output has `count` rows or can be left as it is."""
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


def _checked_and_copied(count: int, where: str, value: Any) -> Any:
    """Check a chunk's output, and copy it if it is a view of a larger tensor."""
    _check_rows(count, where, value)
    if isinstance(value, Tensor) and value.layout == torch.strided:
        return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
    return value


def _joined(where: str, *values: Any) -> Any:
    """Join the outputs of the chunks."""
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    if any(v != values[0] for v in values):
        raise ValueError(
            f"what the model returns beside tensors must be the same for every chunk, got {values} "
            f"at {where}"
        )
    return values[0]
