"""GradCache embeds a batch in chunks, so that only the activations of one chunk are in memory."""

import copy
import random
import sys
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial, wraps
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from pml_pnp.checks import check_chunk_size


class _WithSignatureOfModel:
    """A wrapper's method `forward`, which on instances has the signature of the model's.

    Hugging Face's Trainer drops the columns of a data set that are not in this signature.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __get__(self, wrapper: "GradCache | None", owner: type) -> Callable[..., Any]:
        if wrapper is None:
            return self.function

        @wraps(wrapper.module.forward)
        def forward(*args, **kwargs):
            return self.function(wrapper, *args, **kwargs)

        return forward


class GradCache(nn.Module):
    """Embeds a batch chunk by chunk, with the gradients of the whole batch.

    A loss that compares all examples of a batch with each other needs all embeddings at once, but
    not the activations of the model. The forward pass calls the model on `chunk_size` examples at a
    time and keeps only the embeddings. The backward pass starts with the gradient of the loss with
    respect to every embedding; for one chunk after the other, it calls the model again and
    propagates the gradient of the chunk through it:

        z_c = model(x_c),  dL/dw = sum over chunks c of (dz_c/dw)^T dL/dz_c

    Value and gradient are those of `model(x)` up to rounding, if the model treats the examples of
    a batch independently of each other. The second pass of a chunk must return what the first one
    did: it is compared with it, and raises an error where it differs.

    The wrapper is used like the model: in PML's trainers and testers, with every loss, miner and
    optimizer, with autocast and `GradScaler`, around a model that `torch.compile` has compiled,
    and inside or around `DistributedDataParallel`, which synchronizes the gradients once per
    backward pass in both orders. `state_dict`, `load_state_dict`, the names of parameters and
    attributes are those of the model, so that checkpoints are interchangeable. Its methods are
    called as they are, on the whole batch: only a call of the wrapper itself works in chunks.

    Args:
        model: Any `nn.Module` whose tensor arguments and outputs have one row per example. Kept
            as the attribute `module`.
        chunk_size: Number of examples that the model is called on at once; a positive integer.

    Shapes:
        - Every tensor argument, also inside of tuples, lists, dicts and `UserDict` (for models of
          Hugging Face): `(N, ...)`, with the same N. Tensors without dimensions and arguments that
          are not tensors are passed to every call unchanged, and must not have N entries.
        - Every tensor that the model returns, alone or in a tuple, list or dict (`ModelOutput`):
          `(rows of the chunk, ...)`; it is returned as `(N, ...)`.

    Memory: activations of `chunk_size` examples instead of N, and in addition the inputs, the
    outputs twice, the small graph of each chunk, of each chunk a copy of the buffers that a call
    changes, and once a copy of at most 64 MiB of those that it does not change. Time: one more
    forward pass. For a batch of at most `chunk_size` examples the model is called once, without a
    second pass. Without gradients (under `no_grad`, or if nothing
    requires them) each chunk is embedded once.

    State: the second pass of a chunk draws the random numbers of the first (of `torch`, `random`
    and `numpy.random`) under the same autocast, and finds the buffers and frozen parameters as the
    first did; after it they are as before it. Which of them change is found by comparing values
    around each chunk, so that BatchNorm and changes through `.data` count. Of more than 64 MiB,
    only the smallest are compared; of larger ones a change in place is found, and the values are
    known from the second chunk on. Nothing else is restored: an attribute, a generator of the
    model's own, the training mode, a larger buffer that is changed through `.data`. It is an error
    if an output depends on it, and otherwise a change to it happens in both passes.

    Comparison: every floating point output of the second pass must be that of the first, which
    the same kernels give to the bit (NaN equals NaN). For kernels whose results vary, an element
    may differ by sqrt(eps) times the sum of its magnitude and the mean magnitude, with the eps of
    the least precise dtype of outputs, parameters and autocast (float32 on a GPU as TF32), and
    not at all under `torch.use_deterministic_algorithms(True)`. On a GPU the host waits for each
    comparison: for one of the outputs of each chunk in the backward pass, so that nothing is added
    to `.grad` for a chunk that differs, and for one of what may have changed in the forward pass.

    Batch statistics: a `BatchNorm` layer in training mode normalizes by the mean and variance of
    a chunk, and each chunk updates the running statistics (and `num_batches_tracked`) once, in
    the forward pass, as separate calls of the model on the chunks would. Hooks of the model and of
    its submodules run in both passes; hooks of the wrapper run once per batch.

    Raises:
        TypeError: If `model` is not an `nn.Module` or `chunk_size` not an integer; when called,
            if there is no tensor to split, an argument without tensors has N entries, the model
            returns anything but tensors (and None, bools, numbers or strings) in tuples, lists and
            dicts, or a TorchScript module in it is to be trained.
        ValueError: If `chunk_size` is less than 1, or `DistributedDataParallel` is found inside
            the model; when called, if the tensor arguments have different numbers of rows, or an
            output does not have one row per example of its chunk.
        RuntimeError: If the model changes an input in place; in the backward pass, if a trained
            parameter has changed since the forward pass, or the model returns something else than
            in it.

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
        self.register_load_state_dict_post_hook(_name_keys_as_the_model)

    @_WithSignatureOfModel
    @torch.compiler.disable  # dynamo cannot trace how a second pass restores the state
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

        for i, value in enumerate(args):
            _check_no_entry_per_example(batch_size, f"args[{i}]", value)
        _check_no_entry_per_example(batch_size, "kwargs", kwargs)

        def call(rows: tuple[Tensor, ...], state: dict[str, Tensor | None] | None = None) -> Any:
            remaining = iter(rows)
            chunk_args, chunk_kwargs = _map(
                lambda _, value: next(remaining) if _is_batched(value) else value,
                "",
                (args, kwargs),
            )
            if not state:
                return self.module(*chunk_args, **chunk_kwargs)
            return functional_call(self.module, state, chunk_args, chunk_kwargs, tie_weights=False)

        passes = _Passes(self.module, call) if torch.is_grad_enabled() else None
        count = -(-batch_size // self.chunk_size)
        bounds = [batch_size * i // count for i in range(count + 1)]  # chunks of nearly equal size
        outputs = []
        for start, end in pairwise(bounds):
            rows = tuple(t[start:end] for t in tensors)
            output = passes.first(start, rows) if passes else _checked(end - start, call(rows))
            outputs.append(output)
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
        errors = args[-1]
        self.__dict__["_loading"] = prefix, errors, len(errors)

    def _fqn_modifiers(self) -> dict[str, str]:
        # torch.distributed.checkpoint asks which child's name is no part of the names of tensors.
        return {"": "module"}


def _name_keys_as_the_model(wrapper: GradCache, keys: Any) -> None:
    """Leave "module" out of the names of keys that could not be loaded (a hook after loading)."""
    prefix, errors, start = wrapper.__dict__.pop("_loading")
    inside = f"{prefix}module."
    for names in (keys.missing_keys, keys.unexpected_keys):
        names[:] = [
            prefix + name.removeprefix(inside) if name.startswith(inside) else name
            for name in names
        ]
    errors[start:] = [error.replace(inside, prefix, 1) for error in errors[start:]]


# --- the two passes


class _Passes:
    """Calls a model on chunks under `checkpoint`, which calls it again in the backward pass.

    Attributes:
        changed: names of the buffers and parameters that first passes have changed.
        small: names of those that are compared around every first pass.
        copies: of those that no first pass has changed; the chunks share them.
    """

    def __init__(self, model: nn.Module, call: Callable[..., Any]):
        if any(isinstance(m, torch.jit.ScriptModule) and _is_trained(m) for m in model.modules()):
            raise TypeError(
                "GradCache cannot train a TorchScript module, which saves other tensors for the "
                "backward pass when it is called again: wrap the module that it was made of"
            )
        self.model = model
        self.call = call
        self.dtypes = {p.dtype for p in model.parameters()}
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.changed: set[str] = set()
        self.small = _small_state(model)
        self.copies: dict[Tensor, Tensor] = {}
        self.note_versions()

    def first(self, start: int, rows: tuple[Tensor, ...]) -> Any:
        """Return the output for the rows of the batch from `start` on."""
        chunk = _Chunk(self, start, len(rows[0]))
        row_versions = [t._version for t in rows]
        # Stopped early, a second pass would not return what is to be compared.
        with set_checkpoint_early_stop(False):
            output = checkpoint(chunk.call, *rows, use_reentrant=False)
        output = chunk.end_first_pass(output)
        if row_versions != [t._version for t in rows]:
            raise RuntimeError(
                f"{type(self.model).__name__} changes its input in place, which is needed again "
                "in the backward pass: let it work on a copy, for instance with inplace=False in "
                "its first layer"
            )
        self.changed |= chunk.changed()
        varying = {chunk.before.get(name) for name in self.changed}
        self.copies = {t: copied for t, copied in chunk.copies.items() if t not in varying}
        self.note_versions()
        # With a shared cast of the weights, the gradients of all chunks would add up in float16.
        torch.clear_autocast_cache()
        return output

    def note_versions(self) -> None:
        """Record the versions of the trained parameters, to notice a later change."""
        self.versions = [p._version for p in self.trained]

    def check_versions(self) -> None:
        """Raise RuntimeError if a trained parameter has been changed in place since a pass."""
        if self.versions != [p._version for p in self.trained]:
            raise RuntimeError(
                f"a parameter of {type(self.model).__name__} has changed since the forward pass, "
                "whose activations are computed again in the backward pass: call backward before "
                "the optimizer's step"
            )


class _Chunk:
    """The first pass of a chunk, and each second one, which must return the same.

    In torch before 2.13, an error that leaves `checkpoint` leaves its hooks in place, which then
    call the model again in the backward pass of anything else. So an error of the first pass is
    kept until `checkpoint` has returned.
    """

    def __init__(self, passes: _Passes, start: int, count: int):
        self.passes = passes
        self.start, self.count = start, count
        self.outputs: dict[str, Tensor] | None = None
        self.error: Exception | None = None
        self.random_state = _random_state()
        self.before = _state(passes.model)
        self.versions = {name: t._version for name, t in self.before.items()}
        names = self.before.keys() & (passes.small | passes.changed)
        self.copies = {
            t: passes.copies[t] if t in passes.copies else t.detach().clone()
            for t in {self.before[name] for name in names}
            if _is_plain_state(t)
        }

    def call(self, *rows: Tensor) -> Any:
        """Call the model, for the first time or again."""
        if self.outputs is None:
            try:
                return self.passes.call(rows)
            except Exception as error:
                self.error = error
                return None
        self.passes.check_versions()
        with _drawing_again(self.random_state):
            output = self.passes.call(rows, self.copied_state())
        self.passes.note_versions()
        self.compare(output)
        return output

    def end_first_pass(self, output: Any) -> Any:
        """Return the checked output, or raise the error that there was."""
        error, self.error = self.error, None
        if error is not None:
            raise error
        output = _checked(self.count, output)
        self.outputs = _floating_tensors(output)
        return output

    def changed(self) -> set[str]:
        """Return the names whose tensor, version or value has changed in the first pass."""
        before, now = self.before, _state(self.passes.model)
        found = {n for n in before.keys() | now if now.get(n) is not before.get(n)}
        same = {n: t for n, t in now.items() if n not in found and not t.requires_grad}
        found |= {n for n, t in same.items() if t._version != self.versions[n]}
        # BatchNorm, and what goes through .data, change values without the version.
        copied = {n: (t, self.copies[t]) for n, t in same.items() if t in self.copies}
        found |= {n for n, (t, was) in copied.items() if t.shape != was.shape}
        unclear = [n for n in copied if n not in found | self.passes.changed]
        if unclear:
            differ = [torch.ne(*copied[n]).any() for n in unclear]
            differ = torch.stack([d.to(differ[0].device) for d in differ]).tolist()  # one wait
            found |= {n for n, differs in zip(unclear, differ, strict=True) if differs}
        return found

    def copied_state(self) -> dict[str, Tensor | None]:
        """Return copies of what the changing buffers and parameters were before the first pass."""
        copies = {None: None}  # a buffer may be None or absent at first
        for tensor in {self.before.get(name) for name in self.passes.changed} - {None}:
            source = self.copies.get(tensor, tensor)
            copies[tensor] = source.clone() if _is_plain_state(source) else source
        # A tensor that two modules share stays shared.
        return {name: copies[self.before.get(name)] for name in self.passes.changed}

    def compare(self, output: Any) -> None:
        """Raise RuntimeError unless a second pass returned what the first did, up to rounding."""
        outputs = _floating_tensors(output)
        try:
            if outputs.keys() != self.outputs.keys():
                raise AssertionError(f"Expected {[*self.outputs]}, got {[*outputs]}")
            for where, expected in self.outputs.items():
                _check_same(where, outputs[where], expected, self.passes.dtypes)
        except AssertionError as error:
            raise RuntimeError(
                f"GradCache called {type(self.passes.model).__name__} again in the backward pass, "
                "and it returned something else than in the forward pass for rows "
                f"{self.start} to {self.start + self.count - 1}. The gradient would be wrong."
                f"\n\n{error}\n\n{_REASONS}"
            ) from None


def _is_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


_REASONS = """The usual reasons are
- random numbers of a torch.Generator or numpy.random.Generator of the model's own (those of \
torch, random and numpy.random are drawn again as they were)
- state outside of buffers that each call changes, such as a counter in an attribute \
(register_buffer makes it a buffer, which is restored)
- inputs, parameters, the training mode or settings that changed after the forward pass
- kernels whose results vary (torch.use_deterministic_algorithms(True) finds them)"""


def _check_same(where: str, result: Tensor, expected: Tensor, dtypes: set[torch.dtype]) -> None:
    """Raise AssertionError with the differences unless two tensors are the same up to rounding.

    The same kernels on the same shapes return the same bits. Others (atomics, another algorithm,
    another number of threads) add up in another order, and the layers that follow amplify this
    difference of the last digit. So half of the digits have to agree, of the least precise dtype
    that is computed in, relative to the element and to the mean magnitude.
    """
    if expected.layout != torch.strided:
        result, expected = result.to_dense(), expected.to_dense()
    if result.dtype == expected.dtype and torch.equal(result, expected):
        return
    device = expected.device.type
    dtypes = {expected.dtype.to_real(), *dtypes}
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    if device != "cpu" and torch.float32 in dtypes:
        dtypes.add(torch.float16)  # whose rounding is that of TF32
    tolerance = max(_EPSILON.get(dtype, 0.0) for dtype in dtypes) ** 0.5
    if torch.are_deterministic_algorithms_enabled():
        tolerance = 0.0
    magnitude = float(expected.abs().nan_to_num(0, 0, 0).mean(dtype=torch.float32))
    torch.testing.assert_close(
        result,
        expected,
        rtol=tolerance,
        atol=tolerance * magnitude,
        equal_nan=True,
        check_stride=False,
        msg=lambda differences: f"{where}: {differences}",
    )


_EPSILON = {
    dtype: torch.finfo(dtype).eps
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Return buffers and parameters by name."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(model.named_buffers(remove_duplicate=False))}


def _is_plain_state(tensor: Tensor) -> bool:
    """Whether it is a buffer or frozen parameter of which copies can be made and compared."""
    return (
        type(tensor) in (Tensor, nn.Parameter)  # not uninitialized, quantized or sharded
        and not tensor.requires_grad
        and tensor.layout == torch.strided
        and (tensor.itemsize > 1 or not tensor.is_floating_point())
    )


_BYTES_COPIED = 2**26  # 64 MiB


def _small_state(model: nn.Module) -> set[str]:
    """Return the names of the smallest buffers and frozen parameters, as many as may be copied.

    Copying and comparing a large table would take longer than looking up the rows of a chunk.
    """
    tensors = {name: t for name, t in _state(model).items() if _is_plain_state(t)}
    names = sorted(tensors, key=lambda name: tensors[name].nbytes)
    ends = accumulate(tensors[name].nbytes for name in names)
    return {name for name, end in zip(names, ends, strict=True) if end <= _BYTES_COPIED}


def _random_state() -> tuple[Any, Any]:
    """Return the states of `random`, and of `numpy.random` if NumPy is loaded."""
    numpy_random = sys.modules.get("numpy.random")
    return random.getstate(), numpy_random and numpy_random.get_state(legacy=False)


def _set_random_state(state: tuple[Any, Any]) -> None:
    random.setstate(state[0])
    if state[1] is not None:
        sys.modules["numpy.random"].set_state(state[1])


@contextmanager
def _drawing_again(state: tuple[Any, Any]) -> Iterator[None]:
    """Let `random` and `numpy.random` continue from a state, and afterwards from where they are."""
    now = _random_state()
    _set_random_state(state)
    try:
        yield
    finally:
        _set_random_state(now)


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
        items = {
            key: _map(function, f"{where}[{key!r}]", *(v[key] for v in (value, *others)))
            for key in value
        }
        return _with_items(where, value, items)
    if isinstance(value, (tuple, list)):
        items = [
            _map(function, f"{where}[{i}]", *leaves)
            for i, leaves in enumerate(zip(value, *others, strict=True))
        ]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return function(where, value, *others)


def _with_items(where: str, value: MutableMapping, items: dict) -> MutableMapping:
    """Copy a mapping with other items, which attributes of the copy show as those of it do."""
    result = copy.copy(value)
    attributes = getattr(result, "__dict__", {})
    if getattr(value, "__dict__", None) is value:
        attributes = result.__dict__ = result  # where every item is an attribute
    for name, held in list(attributes.items()):
        if isinstance(held, (dict, list)):  # perhaps the items themselves
            attributes[name] = copy.copy(held)
    for key, item in items.items():
        before = value[key]
        result[key] = item
        if value[key] is not before:
            value[key] = before
            raise TypeError(
                f"expected a mapping that copy.copy copies with its items at {where}, such as a "
                f"dict, got {type(value).__name__}"
            )
        if attributes.get(key) is before:
            attributes[key] = item
    return result


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


def _tensors(where: str, value: Any) -> dict[str, Tensor]:
    """Return the tensors in a structure by where they are, in the order of `_map`."""
    found: dict[str, Tensor] = {}

    def collect(where: str, leaf: Any) -> None:
        if isinstance(leaf, Tensor):
            found[where] = leaf

    _map(collect, where, value)
    return found


def _batched_tensors(args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that have one row per example, in the order of `_map`."""
    found = {**_tensors("args", args), **_tensors("kwargs", kwargs)}
    found = {where: tensor for where, tensor in found.items() if _is_batched(tensor)}
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


def _check_no_entry_per_example(count: int, where: str, value: Any) -> None:
    """Raise TypeError if something without tensors has as many entries as there are examples.

    It would be passed to every call unchanged, where its first entries would stand for the
    examples of the chunk.
    """
    if isinstance(value, MutableMapping) or (
        isinstance(value, (tuple, list)) and _tensors(where, value)
    ):
        for key in value if isinstance(value, MutableMapping) else range(len(value)):
            _check_no_entry_per_example(count, f"{where}[{key!r}]", value[key])
    elif not isinstance(value, (Tensor, str, bytes)) and _length(value) == count:
        raise TypeError(
            f"what has an entry per example must be a tensor, got {type(value).__name__} with "
            f"{count} entries for {count} examples at {where}; make it an attribute of the model "
            "if it is the same for every example"
        )


def _length(value: Any) -> int | None:
    try:
        return len(value)
    except TypeError:
        return None


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


def _checked(count: int, output: Any) -> Any:
    """Check a chunk's output, and copy tensors that are views of larger ones."""

    def checked(where: str, value: Any) -> Any:
        _check_rows(count, where, value)
        if isinstance(value, Tensor) and value.layout == torch.strided:
            return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
        return value

    return _map(checked, "output", output)


def _floating_tensors(output: Any) -> dict[str, Tensor]:
    """Return the tensors of an output that two passes are compared by."""
    return {
        where: tensor.detach()
        for where, tensor in _tensors("output", output).items()
        if tensor.is_floating_point() or tensor.is_complex()
    }


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
