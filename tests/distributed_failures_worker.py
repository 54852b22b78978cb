"""One of two ranks: python distributed_failures_worker.py RANK FILE_OF_THE_GROUP."""

import datetime
import json
import os
import sys

import torch
from torch import distributed

from pml_pnp import losses
from pml_pnp.distributed import DistributedLossWrapper


def raised(function):
    """Type and text of the error, or None."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main():
    rank, file = int(sys.argv[1]), sys.argv[2]
    timeout = datetime.timedelta(seconds=10)
    distributed.init_process_group(
        "gloo", f"file://{file}", timeout=timeout, rank=rank, world_size=2
    )
    wrapper = DistributedLossWrapper(losses.PNPLoss(), "exact")
    views = DistributedLossWrapper(losses.SelfSupervisedLoss(losses.PNPLoss()), "exact")
    x, y = torch.randn(6, 4, requires_grad=True), torch.arange(6) // 2
    good = tuple(torch.tensor([i]) for i in range(3))
    odd = {
        "range": (torch.tensor([99]),) * 3,
        "dtype": (torch.tensor([0.5]),) * 3,
        "length": (torch.tensor([0]),) * 2,
    }
    results = {k: raised(lambda v=v: wrapper(x, y, v if rank else good)) for k, v in odd.items()}
    results["views"] = raised(lambda: views(x, x + 1, good if rank else None))
    results["mask"] = raised(
        lambda: DistributedLossWrapper(losses.PNPLoss())(x, y, enqueue_mask=y > 1)
    )
    results["good"] = raised(lambda: wrapper(x, y, good).backward())
    loss = wrapper(x, y)
    print(json.dumps(results), flush=True)
    if rank == 1:
        os._exit(3)  # dies between forward and backward
    print(json.dumps([raised(loss.backward), raised(lambda: wrapper(x, y))]), flush=True)
    os._exit(0)  # the group cannot be left in order


if __name__ == "__main__":
    main()
