"""Batches and outputs of models: tensors, alone or in tuples, lists and dicts of any depth.

A structure is a tuple, a list or a mutable mapping (dict) of structures, or a leaf.
"""

import copy
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor


def map_leaves(function: Callable[..., Any], where: str, value: Any, *others: Any) -> Any:
    """Apply `function(where, leaf, *leaves)` to the leaves of structures of the same form."""
    for other in others:
        if _form(other) != _form(value):
            raise ValueError(
                "the model must return the same structure for every chunk, got "
                f"{_form(value)} and {_form(other)} at {where}"
            )
    keys = _keys(value)
    if keys is None:
        return function(where, value, *others)
    items = {
        key: map_leaves(function, f"{where}[{key!r}]", *(v[key] for v in (value, *others)))
        for key in keys
    }
    if isinstance(value, MutableMapping):
        return _with_items(where, value, items)
    items = list(items.values())
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _keys(value: Any) -> Iterable | None:
    """Return the keys or indices of the items of a structure, or None for a leaf."""
    if isinstance(value, MutableMapping):
        return list(value)
    return range(len(value)) if isinstance(value, (tuple, list)) else None


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


def is_batched(value: Any) -> bool:
    """Whether a leaf is a tensor with one row per example."""
    return isinstance(value, Tensor) and value.ndim > 0


def tensors_in(where: str, value: Any) -> dict[str, Tensor]:
    """Return the tensors in a structure by where they are, in the order of `map_leaves`."""
    leaves: dict[str, Any] = {}
    map_leaves(leaves.__setitem__, where, value)
    return {where: leaf for where, leaf in leaves.items() if isinstance(leaf, Tensor)}


def replace_batched(value: Any, tensors: Iterable[Tensor]) -> Any:
    """Copy a structure with other tensors in place of those that have one row per example."""
    remaining = iter(tensors)
    return map_leaves(lambda _, x: next(remaining) if is_batched(x) else x, "", value)


def batched_tensors(args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that have one row per example, in the order of `map_leaves`."""
    found = {**tensors_in("args", args), **tensors_in("kwargs", kwargs)}
    found = {where: tensor for where, tensor in found.items() if is_batched(tensor)}
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


def check_no_entry_per_example(count: int, where: str, value: Any) -> None:
    """Raise TypeError if something without tensors has as many entries as there are examples.

    It would be passed to every call unchanged, where its first entries would stand for the
    examples of the chunk.
    """
    if isinstance(value, MutableMapping) or (
        isinstance(value, (tuple, list)) and tensors_in(where, value)
    ):
        for key in _keys(value):
            check_no_entry_per_example(count, f"{where}[{key!r}]", value[key])
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


def check_rows(count: int, where: str, value: Any) -> None:
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


def checked(count: int, output: Any) -> Any:
    """Check a chunk's output, and copy tensors that are views of larger ones."""

    def check_and_copy(where: str, value: Any) -> Any:
        check_rows(count, where, value)
        if isinstance(value, Tensor) and value.layout == torch.strided:
            return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
        return value

    return map_leaves(check_and_copy, "output", output)


def floating_tensors(output: Any) -> dict[str, Tensor]:
    """Return the tensors of an output that two passes are compared by."""
    return {
        where: tensor.detach()
        for where, tensor in tensors_in("output", output).items()
        if tensor.is_floating_point() or tensor.is_complex()
    }


def join(where: str, *values: Any) -> Any:
    """Join the outputs of the chunks."""
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    if any(v != values[0] for v in values):
        raise ValueError(
            f"what the model returns beside tensors must be the same for every chunk, got {values} "
            f"at {where}"
        )
    return values[0]
