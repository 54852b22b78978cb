"""One process or many: what a script needs to know about `torchrun`."""

import datetime
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from . import screen
from .errors import UserError

# Rank 0 evaluates alone while the others wait; large test sets take a while. Elsewhere a process
# that no longer answers is an error after PyTorch's own timeout.
PATIENCE_WITH_RANK_ZERO = datetime.timedelta(hours=6)
DEVICES = "auto, cpu, cuda, cuda:N or mps"
_waiting: dist.ProcessGroup | None = None
SECONDS_TO_LET_GO = 0.5


def launched_by_torchrun() -> bool:
    """Whether the environment says that this is one of torchrun's processes."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def world_size() -> int:
    """Number of processes that train together; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if launched_by_torchrun() else 1


def rank() -> int:
    """This process's number; 0 without torchrun."""
    return int(os.environ["RANK"]) if launched_by_torchrun() else 0


def say(*lines: str) -> None:
    """Print on rank 0, above any progress bar, and log it."""
    if rank() == 0:
        for line in lines:
            screen.show(line)


def find_device(name: str) -> torch.device:
    """The device of this process by name, or the best one there is for `auto`.

    Raises:
        UserError: If it cannot be used here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and torch.backends.mps.is_available():
            name = "mps"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError(f"expected {DEVICES}")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device: {name!r} cannot be used here: {reason}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def start(device: torch.device) -> None:
    """Join the process group if torchrun launched us."""
    if not launched_by_torchrun():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=_store(), rank=rank(), world_size=world_size())
    global _waiting
    _waiting = dist.new_group(backend="gloo", timeout=PATIENCE_WITH_RANK_ZERO)


def _store() -> dist.Store:
    """Where the processes tell each other their addresses.

    torchrun keeps it when it restarts them (pytorch issue 135712), so that some would look for
    those that died. The number of restarts is the same for all as long as there is one torchrun.
    """
    store, _, _ = next(rendezvous("env://", rank(), world_size()))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"restart {restarts}", store)
    return store


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
        # DistributedDataParallel keeps the group's threads alive. One of them that lets go of
        # its last tensor while Python finalizes aborts the process (pytorch issue 190489).
        time.sleep(SECONDS_TO_LET_GO)


def on_rank_zero(function: Callable[[], Any]) -> Any:
    """Call `function` on rank 0 alone; its result, or its `UserError`, reaches every rank."""
    if not dist.is_initialized():
        return function()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = function()
        except UserError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, src=0, group=_waiting)
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


def gather(value: Any) -> list[Any]:
    """The `value` of each rank, in rank order; on rank 0 only, elsewhere an empty list."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values, dst=0)
    return values or []


def parallel(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Wrap in DistributedDataParallel under torchrun; a module without gradients needs none."""
    trainable = any(p.requires_grad for p in module.parameters())
    if not (dist.is_initialized() and trainable):
        return module
    return DistributedDataParallel(module, [device] if device.type == "cuda" else None)


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside DistributedDataParallel, or the module itself."""
    return module.module if isinstance(module, DistributedDataParallel) else module
