"""Measure what a step of DistributedLossWrapper costs a rank.

    python benchmarks/ranks.py                        # 1, 2 and 4 gloo ranks on this machine
    python benchmarks/ranks.py --ranks 2 --batch 256  # others

A step is forward and backward of the loss of a joined batch, 4 per class, of which each rank has
its share, without a model. The time is that of the processor in a rank's process, which does not
depend on how many ranks share a core, and leaves out waiting for the others. Bytes are counted at
the calls of torch.distributed. Rows go to a new file in benchmarks/results/ranks; of these
benchmarks/report.py makes a table of docs/distributed.md, and another of what it calculates.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from rows import MACHINE, RESULTS, machine, new_file, write

from pml_pnp import losses
from pml_pnp.distributed import DistributedLossWrapper

MODES = {"False": False, "True": True, '"exact"': "exact"}
PER_CLASS = 4
STEPS = 9
COLUMNS = (
    *("efficient", "device", "dtype", "ranks", "N", "per_class", "d"),
    *("median_ms", "repeats", "gathered_bytes", "reduced_bytes", *MACHINE),
)


def main() -> None:
    """Run the command line."""
    args = _parser().parse_args()
    torch.set_num_threads(1)
    path = new_file(RESULTS / "ranks", args.output, torch.device("cpu"), False)
    rows = _rows(args.ranks, args.batch, args.size)
    write(path, COLUMNS, rows, "{ranks} ranks, efficient={efficient:8}")
    print(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--batch", type=int, default=4096, help="rows of all ranks together")
    parser.add_argument("--size", type=int, default=512, help="of an embedding")
    parser.add_argument("--output", type=Path, help="file to write")
    return parser


def _rows(ranks: list[int], batch: int, size: int) -> Iterator[dict[str, str | int]]:
    method = "fork" if sys.platform == "linux" else "spawn"  # forks have everything imported
    for number in ranks:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.start_processes(
                _of_rank, (number, batch, size, folder), nprocs=number, start_method=method
            )
            found = json.loads(Path(folder, "found.json").read_text())
        for mode, measured in found.items():
            yield {
                **{"efficient": mode, "device": "cpu", "dtype": "float32", "ranks": number},
                **{"N": batch, "per_class": PER_CLASS, "d": size, "repeats": STEPS},
                **measured,
                **machine(torch.device("cpu"), __file__),
            }


def _of_rank(rank: int, world: int, batch: int, size: int, folder: str) -> None:
    """Write what a step of each mode takes rank 0 to found.json in a folder."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    torch.manual_seed(0)
    embeddings = torch.randn(batch, size).split(batch // world)[rank].requires_grad_()
    labels = (torch.arange(batch) // PER_CLASS).split(batch // world)[rank]
    found = {}
    for mode, efficient in MODES.items():
        loss_func = DistributedLossWrapper(losses.PNPLoss(variant="Dq"), efficient)
        times, counted = [], _Counted()
        for _ in range(STEPS + 1):
            dist.barrier()
            counted.begin()
            began = time.process_time()
            loss_func(embeddings, labels).backward()
            times.append(1e3 * (time.process_time() - began))
            counted.end()
        found[mode] = {
            "median_ms": f"{statistics.median(times[1:]):.4g}",
            "gathered_bytes": counted.gathered,
            "reduced_bytes": counted.reduced,
        }
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()
    time.sleep(0.5)  # a gloo thread that lets go of a tensor later than this aborts the process


class _Counted:
    """Bytes of the other ranks that reach this one in a step, if messages travel in a ring."""

    def begin(self) -> None:
        self.gathered = self.reduced = 0
        self.originals = dist.all_gather, dist.all_reduce
        others = dist.get_world_size() - 1

        def all_gather(parts, x, *args):
            self.gathered += others * x.numel() * x.element_size()
            return self.originals[0](parts, x, *args)

        def all_reduce(x, *args):
            self.reduced += 2 * others * x.numel() * x.element_size() // (others + 1)
            return self.originals[1](x, *args)

        dist.all_gather, dist.all_reduce = all_gather, all_reduce

    def end(self) -> None:
        dist.all_gather, dist.all_reduce = self.originals


if __name__ == "__main__":
    main()
