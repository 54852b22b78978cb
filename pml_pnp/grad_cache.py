"""GradCache embeds a batch in chunks, so that only the activations of one chunk are in memory."""

from collections.abc import Callable, Iterator
from functools import partial, wraps
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from pml_pnp.checks import check_chunk_size
from pml_pnp.passes import Passes
from pml_pnp.structures import (
    batched_tensors,
    check_no_entry_per_example,
    check_rows,
    checked,
    join,
    map_leaves,
    replace_batched,
)


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
    if an output depends on it, and otherwise a change to it happens in both passes. A tensor in
    an attribute is that of the last chunk; a warning names it if it needs a gradient.

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
    def forward(self, *args, **kwargs) -> Any:
        """Return the model's output for the whole batch."""
        if torch.compiler.is_compiling():
            # Dynamo, which takes seconds to import, cannot trace how a second pass restores state.
            return torch.compiler.disable(self.forward)(*args, **kwargs)
        if isinstance(self.module, DistributedDataParallel):
            return self._inside_ddp(*args, **kwargs)
        tensors = batched_tensors(args, kwargs)
        batch_size = len(tensors[0])
        if batch_size <= self.chunk_size:
            output = self.module(*args, **kwargs)
            map_leaves(partial(check_rows, batch_size), "output", output)
            return output

        for i, value in enumerate(args):
            check_no_entry_per_example(batch_size, f"args[{i}]", value)
        check_no_entry_per_example(batch_size, "kwargs", kwargs)

        def call(rows: tuple[Tensor, ...], state: dict[str, Tensor | None] | None = None) -> Any:
            of_rows = replace_batched((args, kwargs), rows)
            if state:
                return functional_call(self.module, state, *of_rows, tie_weights=False)
            return self.module(*of_rows[0], **of_rows[1])

        passes = Passes(self.module, call) if torch.is_grad_enabled() else None
        count = -(-batch_size // self.chunk_size)
        bounds = [batch_size * i // count for i in range(count + 1)]  # chunks of nearly equal size
        outputs = []
        for start, end in pairwise(bounds):
            rows = tuple(t[start:end] for t in tensors)
            output = passes.first(start, rows) if passes else checked(end - start, call(rows))
            outputs.append(output)
        if passes:
            passes.warn_of_kept()
        return map_leaves(join, "output", *outputs)

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
