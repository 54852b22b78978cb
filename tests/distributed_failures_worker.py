"""Two ranks, of which one fails: python distributed_failures_worker.py FOLDER.

The ranks are forks of a process that has imported everything, which takes longer than the rest.
Each writes RANK.jsonl, and the process writes ends.json: exit codes, and the seconds of both.
"""

import datetime
import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import distributed, multiprocessing

from pml_pnp import losses
from pml_pnp.distributed import DistributedLossWrapper


def raised(function):
    """Type and text of the error, or None."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def run(rank, folder):
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=10)
    distributed.init_process_group(
        "gloo", f"file://{folder}/group", timeout=timeout, rank=rank, world_size=2
    )
    output = (folder / f"{rank}.jsonl").open("w")
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
    print(json.dumps(results), file=output, flush=True)
    if rank == 1:
        os._exit(3)  # dies between forward and backward
    errors = [raised(loss.backward), raised(lambda: wrapper(x, y))]
    print(json.dumps(errors), file=output, flush=True)
    os._exit(0)  # the group cannot be left in order


def main(folder):
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    began = time.monotonic()
    processes = [context.Process(target=run, args=(rank, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        process.kill()
        process.join()
    ends = {"codes": [x.exitcode for x in processes], "seconds": time.monotonic() - began}
    (folder / "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
