"""What test_distributed_failures.py looks at: two ranks, of which one dies.

Ranks whose arguments are bad, and that go on, are in exact_cases.py.
"""

import datetime
import os
import time

import torch
from exact_cases import raised
from torch import distributed

from pml_pnp import losses
from pml_pnp.distributed import DistributedLossWrapper

TIMEOUT = 10  # seconds


def run(rank, port, file):
    """Write the errors of rank 0, and the seconds that they took, to a file."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        f"tcp://127.0.0.1:{port}",
        timeout=datetime.timedelta(seconds=TIMEOUT),
        rank=rank,
        world_size=2,
    )
    wrapper = DistributedLossWrapper(losses.PNPLoss(), "exact")
    x, y = torch.randn(6, 4, requires_grad=True), torch.arange(6) // 2
    loss = wrapper(x, y)
    if rank == 1:
        os._exit(0)  # dies between forward and backward
    begun = time.monotonic()
    errors = [raised(loss.backward), raised(lambda: wrapper(x, y))]
    torch.save({"errors": errors, "seconds": time.monotonic() - begun}, file)
    os._exit(0)  # the group cannot be left in order
