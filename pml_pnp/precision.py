"""The precision of the computation: at least float32, with autocast off."""

from contextlib import AbstractContextManager, nullcontext

import torch


@torch.compiler.assume_constant_result  # torch before 2.13 breaks the graph at the call
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def is_autocast_on(device_type: str) -> bool:
    """Whether autocast is on for a device type."""
    return _has_autocast(device_type) and torch.is_autocast_enabled(device_type)


def autocast_off(device_type: str) -> AbstractContextManager:
    """Context manager that turns autocast off for a device type."""
    if is_autocast_on(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float64 for float64, float32 for every other floating dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32
