"""Gloo ranks of tests, which conftest.py starts: rank_processes.py FOLDER.

The ranks are forks of a process that has imported everything, which takes longer than the cases.
"""

import importlib
import os
import sys
import time
from pathlib import Path

import exact_cases
import grad_cache_cases
import torch
from helpers import free_port
from torch import distributed, multiprocessing

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "ranks.py"
MODULES = {2: (grad_cache_cases, exact_cases), 3: (exact_cases,)}


def run(rank, world, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=world)
    for module in MODULES[world]:
        torch.save(module.results(rank), file_of(folder, module, world, rank))
    distributed.destroy_process_group()
    time.sleep(0.5)  # a gloo thread that lets go of a tensor later than this aborts the process


def file_of(folder, module, world, rank):
    return Path(folder) / f"{module.__name__}-{world}-{rank}.pt"


def main(folder):
    method = "fork" if sys.platform == "linux" else "spawn"
    for world in MODULES:
        arguments = (world, free_port(), folder)
        multiprocessing.start_processes(run, arguments, nprocs=world, start_method=method)
    arguments = free_port(), file_of(folder, exact_cases, 1, 0)
    multiprocessing.start_processes(exact_cases.die, arguments, nprocs=2, start_method=method)
    sys.path.append(str(BENCHMARK.parent))
    options = ["--ranks", "2", "--batch", "16", "--size", "4"]
    sys.argv = [str(BENCHMARK), *options, "--output", f"{folder}/benchmark.csv"]
    importlib.import_module("ranks").main()


if __name__ == "__main__":
    main(sys.argv[1])
