"""Measure time and memory of a training step with GradCache and on the whole batch at once.

    python benchmarks/grad_cache.py                    # 256, 1,024 and 4,096 images
    python benchmarks/grad_cache.py --sizes 64 128     # others

A step is forward and backward of the example's small trunk, a linear embedder and PNPLoss on
images of 28 x 28, 4 per class. Rows are written as they are measured, to a new file in
benchmarks/results/grad_cache; benchmarks/report.py makes the table in docs/large_batches.md of
them. Memory is the peak beyond model and images, each number from a process of its own.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from rows import (
    MACHINE,
    RESULTS,
    TIMES,
    Step,
    machine,
    new_file,
    number_of_process,
    peak_bytes,
    times_in_turn,
    write,
)
from torch import nn

from pml_pnp import GradCache, PNPLoss

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from retrieval.trunks import SMALL, SmallTransform, build_trunk  # noqa: E402

CHUNK_SIZES = {"whole batch": 0, "GradCache": 64}
IMAGE_SIZE, EMBEDDING_SIZE, PER_CLASS = 28, 128, 4
COLUMNS = (
    *("provider", "device", "dtype", "N", "per_class", "d", "image_size", "chunk_size"),
    *(*TIMES, "peak_bytes", *MACHINE),
)


def main() -> None:
    """Run the command line."""
    args = _parser().parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.memory_of:  # the process that measures one number
        chunk_size, n = args.memory_of
        # What libraries take for themselves, in more than one chunk as later.
        build(min(chunk_size, PER_CLASS // 2), PER_CLASS, device)()
        print(peak_bytes(build(chunk_size, n, device), device))
        return
    path = new_file(RESULTS / "grad_cache", args.output, device, args.append)
    write(path, COLUMNS, _rows(args.sizes, device, args.rounds), "{provider:12} N={N:<6}")
    print(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", help="cpu, cuda, ...; the GPU if there is one")
    parser.add_argument("--sizes", nargs="+", type=int, default=[256, 1024, 4096], help="images")
    parser.add_argument("--rounds", type=int, default=3, help="times around the providers")
    parser.add_argument("--threads", type=int, help="of PyTorch; its own choice by default")
    parser.add_argument("--output", type=Path, help="file to write; by default DEVICE-DATE.csv")
    parser.add_argument("--append", action="store_true", help="to a file that exists")
    parser.add_argument("--memory-of", nargs=2, type=int, help=argparse.SUPPRESS)
    return parser


def build(chunk_size: int, n: int, device: torch.device) -> Step:
    """Make one training step; a chunk size of 0 stands for the whole batch at once."""
    torch.manual_seed(0)
    trunk = build_trunk(SMALL, False, None, SmallTransform(IMAGE_SIZE, "L"))
    model = nn.Sequential(trunk.module, nn.Linear(trunk.num_features, EMBEDDING_SIZE)).to(device)
    if chunk_size:
        model = GradCache(model, chunk_size)
    images = torch.randn(n, 1, IMAGE_SIZE, IMAGE_SIZE, device=device)
    labels = torch.arange(n, device=device) // PER_CLASS
    loss_func = PNPLoss(variant="Ds", anneal=0.05)

    def step() -> None:
        loss_func(model(images), labels).backward()
        model.zero_grad()

    return step


def _rows(sizes: list[int], device: torch.device, rounds: int) -> Iterator[dict]:
    """Yield the rows one by one."""
    shared = {"device": device.type, "dtype": "float32", "per_class": PER_CLASS}
    shared |= {"d": EMBEDDING_SIZE, "image_size": IMAGE_SIZE, **machine(device, __file__)}
    for n in sizes:
        peaks = {
            provider: number_of_process(
                __file__, "--device", device, "--threads", torch.get_num_threads(),
                "--memory-of", chunk_size, n,
            )
            for provider, chunk_size in CHUNK_SIZES.items()
        }  # fmt: skip
        steps = {provider: build(size, n, device) for provider, size in CHUNK_SIZES.items()}
        for provider, times in times_in_turn(steps, rounds, seconds=0.5):
            sizes_of_row = {"N": n, "chunk_size": CHUNK_SIZES[provider] or n}
            peak = {"peak_bytes": peaks[provider]}
            yield {"provider": provider, **shared, **sizes_of_row, **times, **peak}


if __name__ == "__main__":
    main()
