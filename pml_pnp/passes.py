"""Calls a model on a chunk, and again in the backward pass, which must compute the same."""

import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from pml_pnp.structures import checked, floating_tensors


class Passes:
    """Calls a model on chunks under `checkpoint`, which calls it again in the backward pass.

    Attributes:
        changed: names of the buffers and parameters that first passes have changed.
        small: names of those that are compared around every first pass.
        copies: of those that no first pass has changed; the chunks share them.
    """

    def __init__(self, model: nn.Module, call: Callable[..., Any]):
        scripted = [m for m in model.modules() if isinstance(m, torch.jit.ScriptModule)]
        if any(p.requires_grad for m in scripted for p in m.parameters()):
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
        self.kept = WeakValueDictionary(_kept_in_attributes(model))
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

    def warn_of_kept(self) -> None:
        """Warn if calls have left a tensor of their graph in an attribute of a module."""
        now = _kept_in_attributes(self.model)
        names = [name for name, tensor in now.items() if tensor is not self.kept.get(name)]
        if names:
            warnings.warn(
                f"{type(self.model).__name__} keeps tensors that need a gradient in attributes "
                f"({', '.join(names)}), which GradCache leaves as the last chunk set them: a loss "
                "of these has neither value nor gradient of the other chunks. Return such a "
                "tensor with one row per example; detached, it may stay in an attribute",
                stacklevel=2,
            )

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

    def __init__(self, passes: Passes, start: int, count: int):
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
        output = checked(self.count, output)
        self.outputs = floating_tensors(output)
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
        outputs = floating_tensors(output)
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
    # Not of a dtype in which nothing is computed: integers, float8.
    epsilons = [torch.finfo(d).eps for d in dtypes if d.is_floating_point and d.itemsize > 1]
    tolerance = max(epsilons, default=0.0) ** 0.5
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


def _kept_in_attributes(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a graph in attributes of modules, also in a list or dict, by name.

    What a hook computes of parameters, as the old `weight_norm` does, is the same for all chunks.
    """
    found = {}
    for prefix, module in model.named_modules():
        attributes = vars(module)
        hooks = module._forward_pre_hooks.values()
        computed = {id(attributes.get(getattr(hook, "name", None))) for hook in hooks}
        for name, value in attributes.items():
            held = value.values() if isinstance(value, dict) else value
            held = held if isinstance(value, (dict, list, tuple)) else [value]
            for x in held:
                if isinstance(x, Tensor) and x.grad_fn is not None and id(x) not in computed:
                    found[f"{prefix}.{name}".removeprefix(".")] = x
    return found


BYTES_COPIED = 2**26  # 64 MiB


def _small_state(model: nn.Module) -> set[str]:
    """Return the names of the smallest buffers and frozen parameters, as many as may be copied.

    Copying and comparing a large table would take longer than looking up the rows of a chunk.
    """
    tensors = {name: t for name, t in _state(model).items() if _is_plain_state(t)}
    names = sorted(tensors, key=lambda name: tensors[name].nbytes)
    ends = accumulate(tensors[name].nbytes for name in names)
    return {name for name, end in zip(names, ends, strict=True) if end <= BYTES_COPIED}


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
