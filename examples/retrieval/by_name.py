"""Losses and miners by name, with arguments that were typed on the command line."""

import ast
import difflib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from pytorch_metric_learning import distances, miners, reducers
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.miners import BaseMiner

from pml_pnp import losses

from .errors import UserError

# Arguments whose value may be the name of a class.
CLASS_ARGUMENTS = {"distance": distances, "reducer": reducers}
TRIAL_CLASSES = 4
# As YAML, JSON and other programs spell what Python spells with a capital letter.
WORDS = {"true": True, "false": False, "none": None, "null": None}


def parse_arguments(flag: str, pairs: Sequence[str]) -> dict[str, Any]:
    """`["variant=Dq", "alpha=4"]` to `{"variant": "Dq", "alpha": 4}`."""
    arguments = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not (equals and key.isidentifier()):
            raise UserError(f"{flag}: expected name=value, got {pair!r}")
        try:
            arguments[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two: too deep
            arguments[key] = WORDS.get(text.lower(), text)
    return arguments


def build_loss(
    name: str,
    arguments: dict[str, Any],
    num_classes: int,
    embedding_size: int,
    memory_size: int = 0,
    miner: torch.nn.Module | None = None,
    beside: str | None = None,
    beside_arguments: dict[str, Any] | None = None,
) -> torch.nn.Module:
    """A loss of `pml_pnp.losses`, inside a CrossBatchMemory with `miner` if `memory_size` > 0.

    The loss `beside`, without memory, is added to it. `num_classes` and `embedding_size` are filled
    in for a loss that takes them, and PNPLoss counts the negatives before the positives, for the
    records.

    Raises:
        UserError: For a name or an argument that is not taken.
    """
    known = {"num_classes": num_classes, "embedding_size": embedding_size}

    def build(flag: str, name: str, arguments: dict[str, Any]) -> torch.nn.Module:
        cls = _class_by_name(flag, losses, BaseMetricLossFunction, name)
        filled = {k: v for k, v in known.items() if k in _parameters(cls)}
        if issubclass(cls, losses.PNPLoss):
            filled["collect_stats"] = True
        return _construct(f"{flag}-args", cls, {**filled, **arguments})

    loss = build("--loss", name, arguments)
    if memory_size:
        try:
            loss = losses.CrossBatchMemory(loss, embedding_size, memory_size, miner=miner)
        except Exception as error:  # PML raises a bare Exception for a loss it does not list
            raise UserError(f"--memory-size: {error}") from error
    if beside is None:
        return loss
    return losses.MultipleLosses([loss, build("--beside", beside, beside_arguments or {})])


def build_miner(name: str, arguments: dict[str, Any]) -> torch.nn.Module:
    """A miner of `pytorch_metric_learning.miners`.

    Raises:
        UserError: For a name or an argument that is not taken.
    """
    cls = _class_by_name("--miner", miners, BaseMiner, name)
    return _construct("--miner-args", cls, arguments)


def try_out(
    loss: torch.nn.Module,
    miner: torch.nn.Module | None,
    embedding_size: int,
    m_per_class: int,
    beside_is_mined: bool = True,
) -> None:
    """Call loss and miner once on random embeddings, to find now what fails only when called.

    `beside_is_mined` says whether a loss beside gets the miner's pairs as well.

    Raises:
        UserError: If either cannot be used in this way.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(TRIAL_CLASSES).repeat_interleave(m_per_class)
    embeddings = torch.randn(len(labels), embedding_size, generator=generator)
    parts = loss.losses if isinstance(loss, losses.MultipleLosses) else [loss]
    indices = None
    if miner is not None:
        with _trial("--miner", miner):
            indices = miner(embeddings, labels)
    for flag, part in zip(("--loss", "--beside"), parts, strict=False):
        pairs = indices if flag == "--loss" or beside_is_mined else None
        with _trial(flag, part):
            part(embeddings.requires_grad_(), labels, pairs).backward()


@contextmanager
def _trial(flag: str, module: torch.nn.Module) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # every loss has its own way to fail
        name = type(module).__name__
        raise UserError(f"{flag}: {name} cannot be used here: {_one_line(error)}") from error


def _class_by_name(flag: str, module: ModuleType, base: type, name: str) -> type:
    names = [
        n
        for n in dir(module)
        if inspect.isclass(c := getattr(module, n))
        and issubclass(c, base)
        and not n.startswith("Base")
    ]
    if name not in names:
        by_small_letters = {n.lower(): n for n in names}
        alike = difflib.get_close_matches(name.lower(), by_small_letters, 3, 0.5)
        near = [by_small_letters[n] for n in alike] or names
        raise UserError(f"{flag}: unknown name {name!r}; expected for instance {', '.join(near)}")
    return getattr(module, name)


def _construct(flag: str, cls: type, arguments: dict[str, Any]) -> torch.nn.Module:
    parameters = _parameters(cls)
    unknown = [k for k in arguments if k not in parameters]
    if unknown:
        raise UserError(
            f"{flag}: {cls.__name__} has no argument {', '.join(unknown)}; "
            f"it takes {', '.join(map(str, parameters.values()))}"
        )
    try:
        return cls(**{k: _class_argument(k, v) for k, v in arguments.items()})
    except Exception as error:  # every loss has its own way to refuse a value
        raise UserError(
            f"{flag}: {cls.__name__}: {_one_line(error)}; "
            f"it takes {', '.join(map(str, parameters.values()))}"
        ) from error


def _class_argument(key: str, value: Any) -> Any:
    """An instance of the class that `value` names, where an argument is a distance or reducer."""
    module = CLASS_ARGUMENTS.get(key)
    if module is None or not isinstance(value, str):
        return value
    if not hasattr(module, value):
        raise ValueError(f"no {key} is called {value!r}")
    return getattr(module, value)()


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Arguments by name, those that `**kwargs` hands on to base classes included."""
    parameters: dict[str, inspect.Parameter] = {}
    for c in cls.__mro__:
        if "__init__" not in vars(c) or c is torch.nn.Module:
            continue
        own = list(inspect.signature(c.__init__).parameters.values())[1:]
        for p in own:
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                parameters.setdefault(p.name, p.replace(annotation=p.empty))
        if not any(p.kind is p.VAR_KEYWORD for p in own):
            break
    return parameters


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
