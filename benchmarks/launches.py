"""Count what a step of PNPLoss asks of the device, beside the floor of benchmarks/measure.py.

    python benchmarks/launches.py                  # on the GPU if there is one
    python benchmarks/launches.py --device cpu

For each size: operators that PyTorch runs in a step, kernels that it launches on a GPU, and
microseconds in which the host is at work. The numbers are torch.profiler's, which slows the host.
"""

import argparse
from typing import NamedTuple

import torch
from measure import FLOOR, OURS, SIZES, build
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

STEPS = 20


class Count(NamedTuple):
    """Means of one step."""

    operators: float
    launches: float
    host_us: float


def count(step, device: torch.device) -> Count:
    """Count STEPS steps, after some that are not counted."""
    for _ in range(5):
        step()
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    events = profiler.events()
    on_host = [e for e in events if e.device_type == DeviceType.CPU]
    # An operator that another one calls is a part of it.
    operators = [e for e in on_host if e.name.startswith("aten::") and not _inside(e)]
    launches = sum(e.device_type == DeviceType.CUDA for e in events)
    host_us = sum(e.self_cpu_time_total for e in on_host if "Synchronize" not in e.name)
    return Count(len(operators) / STEPS, launches / STEPS, host_us / STEPS)


def _inside(event) -> bool:
    parent = event.cpu_parent
    return parent is not None and parent.name.startswith("aten::")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", help="cpu, cuda, ...; the GPU if there is one")
    args = parser.parse_args()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    print(f"{'':8} {'N':>5} {'operators':>10} {'launches':>10} {'host us':>10}")
    for n, per_class, d in SIZES["small"]:
        for provider in (FLOOR, OURS):
            step = build(provider, n, per_class, d, device, "float32")
            print(f"{provider:8} {n:5}", *(f"{x:10.1f}" for x in count(step, device)))


if __name__ == "__main__":
    main()
