"""One of two gloo ranks, which conftest.py starts: rank.py FOLDER."""

import sys
import time
from pathlib import Path

import distributed_cases
import grad_cache_cases
import torch
from torch import distributed


def main():
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    found = {cases.__name__: cases.results(rank) for cases in (distributed_cases, grad_cache_cases)}
    torch.save(found, Path(sys.argv[1]) / f"rank{rank}.pt")
    distributed.destroy_process_group()
    time.sleep(0.5)  # a gloo thread that lets go of a tensor later than this aborts the process


if __name__ == "__main__":
    main()
