"""Measure time and memory of PNPLoss, of other losses, and of the products that all of them need.

    python benchmarks/measure.py                       # everything, for this machine's device
    python benchmarks/measure.py --only small queue    # some of it
    python benchmarks/measure.py --device cuda --dtypes float32 bfloat16

A row is one provider at one size: forward and backward of the whole loss from embeddings. Rows are
written as they are measured, to a new file in benchmarks/results; benchmarks/report.py makes
docs/performance.md, the table in the README and the plot of them.

The floor is the part of a step that every loss on a similarity matrix has: normalize, multiply to
similarities, and backward from a gradient that is already there, as autograd does it. Providers of
a size are measured in turn, several times around, in one process, so that other work on the machine
changes their ratios little. Memory is the peak beyond the inputs, each number from a process of its
own.

Parts:
    small, large, largest  all losses that a batch of this size suits
    many positives         PNPLoss with large classes
    growth                 PNPLoss over N, with and without a chunk_size
    queue                  PNPLoss in a CrossBatchMemory
    kernel                 losses and gradient of given similarities, against torch.compile
    blocks                 the same in blocks of several sizes
    sigmoids               the same, as ratios of exponentials and as sigmoids of differences
    products               three ways to multiply the gradient of a batch with itself
    trunk                  PNPLoss within a training step of a ResNet-50
    memory, memory, lean   peak of PNPLoss, without and with a chunk_size
"""

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import peers
import torch
from pytorch_metric_learning import losses as pml_losses
from rows import (
    MACHINE,
    RESULTS,
    TIMES,
    machine,
    new_file,
    number_of_process,
    peak_bytes,
    times_in_turn,
    write,
)
from torch.nn.functional import normalize

from pml_pnp import losses
from pml_pnp.ops import eager, product
from pml_pnp.ops.settings import Settings
from pml_pnp.pairs import Relation

OURS, LEAN, FLOOR, BUILT_IN = "PNPLoss", "PNPLoss, lean", "floor", "PNPLoss of PML"
EAGER, TRITON = "ops/eager.py", "ops/triton.py"
COMPILED = "the same sums by torch.compile"
PRODUCT, AT_ONCE = "PNPLoss, in squares", "PNPLoss, not in squares"
TWO_PRODUCTS = "PNPLoss, two products"
RATIOS, SINGLE = "sigmoids as ratios", "sigmoids one by one"
BLOCKS = {f"{EAGER}, blocks of {x} MiB": int(x * 2**18) for x in (1, 2.5, 4, 5, 10, 20)}
TRUNK = "ResNet-50 and PNPLoss"
CHUNK = 2048
PEERS = (
    "SmoothAPLoss",
    "FastAPLoss",
    "MultiSimilarityLoss",
    "SupConLoss",
    "ContrastiveLoss",
    "TripletMarginLoss",
    "NTXentLoss",
)
RESEARCH = ("SmoothAP", "SupAP", "RecallAtK")  # of peers.py
# The largest batch of the table, with 4 per class, for which a provider takes at most about 3 s and
# 1.5 GiB on a CPU; NTXentLoss takes 2.7 GiB at 384.
LARGEST = {
    **dict.fromkeys((BUILT_IN, "SmoothAPLoss", "NTXentLoss"), 384),
    **dict.fromkeys(("FastAPLoss", "TripletMarginLoss", "SupAP"), 1024),
    **dict.fromkeys(("MultiSimilarityLoss", "SupConLoss", "ContrastiveLoss"), 4096),
    **dict.fromkeys(("SmoothAP", "RecallAtK"), 4096),
}
# (N, per class, d) of each part.
SIZES = {
    "small": [(n, 4, 512) for n in (32, 112, 384, 1024)],
    "large": [(4096, 4, 512)],
    "largest": [(16384, 4, 512)],
    "many positives": [(1024, 32, 512)],
    "growth": [(n, 4, 512) for n in (512, 1024, 2048, 4096, 8192)],
    "queue": [(384, 4, 512)],
    "kernel": [(n, 4, 512) for n in (384, 4096)],
    "blocks": [(1024, 32, 512), (4096, 4, 512)],
    "products": [(n, 4, 512) for n in (384, 4096)],
    "sigmoids": [(384, 4, 512), (1024, 32, 512), (4096, 4, 512)],
    "trunk": [(384, 4, 512)],
    "memory": [(n, 4, 512) for n in (1024, 2048, 4096, 8192, 16384)],
    "memory, lean": [(n, 4, 128) for n in (4096, 8192, 16384, 32768)],
}
ON_GPU_ALONE = ("largest", "trunk")
ON_CPU_ALONE = ("blocks", "products", "sigmoids")
QUEUE = 65536
COLUMNS = (
    *("part", "provider", "device", "dtype", "N", "M", "per_class", "d", "chunk_size"),
    *(*TIMES, "peak_bytes", *MACHINE),
)


def main() -> None:
    """Run the command line."""
    args = _parser().parse_args()
    warnings.filterwarnings("ignore", "var\\(\\)|Converting a tensor")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.memory_of:  # the process that measures one number
        provider, n, per_class, d = args.memory_of
        print(_peak_bytes(provider, int(n), int(per_class), int(d), device, args.dtypes[0]))
        return
    path = new_file(RESULTS, args.output, device, args.append)
    not_here = ON_GPU_ALONE if device.type == "cpu" else ON_CPU_ALONE
    parts = args.only or [p for p in SIZES if p not in not_here]
    rows = _rows(parts, device, args.dtypes, args.rounds, args.seconds)
    write(path, COLUMNS, rows, "{part:15} {provider:20} N={N:<6}")
    print(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", help="cpu, cuda, ...; the GPU if there is one")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], help="of the embeddings")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(SIZES),
        help="parts; all, but some on a GPU and some on a CPU alone",
    )
    parser.add_argument("--rounds", type=int, default=5, help="times around the providers")
    parser.add_argument("--seconds", type=float, default=0.3, help="at least, for one of them")
    parser.add_argument("--threads", type=int, help="of PyTorch; its own choice by default")
    parser.add_argument("--output", type=Path, help="file to write; by default DEVICE-DATE.csv")
    parser.add_argument("--append", action="store_true", help="to a file that exists")
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    return parser


# --- what is measured


def build(provider: str, n: int, per_class: int, d: int, device, dtype: str) -> Callable[[], None]:
    """Make one training step of a provider from embeddings on: forward and backward."""
    x = torch.randn(n, d, device=device, dtype=getattr(torch, dtype), requires_grad=True)
    labels = torch.arange(n, device=device) // per_class
    if provider == FLOOR:
        ones = torch.ones(n, n, device=device, dtype=x.dtype)

        def step() -> None:
            z = normalize(x)
            (z @ z.T).backward(ones)
            x.grad = None

        return step
    if provider == OURS:
        loss_func = losses.PNPLoss(variant="Dq")
    elif provider == LEAN:
        loss_func = losses.PNPLoss(variant="Dq", chunk_size=CHUNK)
    elif provider == BUILT_IN:
        loss_func = pml_losses.PNPLoss(variant="Dq")
    else:
        loss_func = getattr(peers if provider in RESEARCH else pml_losses, provider)()

    def step() -> None:
        loss_func(x, labels).backward()
        x.grad = None

    return step


def build_queue(provider: str, n: int, per_class: int, d: int, device, dtype: str):
    """Make one step with a full memory of QUEUE embeddings."""
    x = torch.randn(n, d, device=device, dtype=getattr(torch, dtype), requires_grad=True)
    queue = torch.randn(QUEUE, d, device=device, dtype=x.dtype)
    labels = torch.arange(n, device=device) // per_class
    if provider == FLOOR:
        ones = torch.ones(n, QUEUE, device=device, dtype=x.dtype)

        def step() -> None:
            (normalize(x) @ normalize(queue).T).backward(ones)
            x.grad = None

        return step
    memory = losses.CrossBatchMemory(losses.PNPLoss(variant="Dq"), d, QUEUE).to(device)
    memory.add_to_memory(queue, torch.arange(QUEUE, device=device) // per_class, QUEUE)

    def step() -> None:
        memory.queue_idx = 0  # the same place, so that the number of positives stays
        memory(x, labels).backward()
        x.grad = None

    return step


def build_trunk(provider: str, n: int, per_class: int, d: int, device, dtype: str):
    """Make a training step of a ResNet-50 on images of 224 x 224 in bfloat16, or its loss alone."""
    if provider == OURS:
        return build(provider, n, per_class, d, device, "bfloat16")
    from torchvision.models import resnet50

    model = resnet50(num_classes=d).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    images = torch.randn(n, 3, 224, 224, device=device).to(memory_format=torch.channels_last)
    labels = torch.arange(n, device=device) // per_class
    loss_func = losses.PNPLoss(variant="Dq")

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            embeddings = model(images)
        loss_func(embeddings, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def build_kernel(provider: str, n: int, per_class: int, d: int, device, dtype: str):
    """Make the part of a step between the two products: losses and gradient of a similarity."""
    z = normalize(torch.randn(n, d, device=device))
    s, labels = z @ z.T, torch.arange(n, device=device) // per_class
    relation = Relation.from_labels(labels, labels, torch.arange(n, device=device))
    settings = Settings(100.0, "Dq", 1.0, 2.0, True)
    if provider == TRITON:
        from pml_pnp.ops import triton

        return partial(triton.losses_and_gradient, s, None, relation, settings, True)
    if provider != COMPILED:
        block = BLOCKS.get(provider, eager.CPU_BLOCK)
        sums = partial(eager.losses_and_gradient, s, None, relation, settings, True)
        return _with(eager, "CPU_BLOCK", block, sums)
    index = relation.positives(per_class, per_class)

    def ranks(x, t):
        r = torch.sigmoid((x.unsqueeze(1) - t.unsqueeze(2)) * settings.scale).sum(dim=2)
        f = -torch.expm1(-torch.log1p(r))
        return f.mean(dim=1), torch.exp(-2 * torch.log1p(r))

    def gradients(x, t, w):
        y = torch.sigmoid((x.unsqueeze(1) - t.unsqueeze(2)) * settings.scale)
        y = w.unsqueeze(2) * y * (1 - y)
        return y.sum(dim=1), y.sum(dim=2)

    ranks, gradients = (torch.compile(f, dynamic=False) for f in (ranks, gradients))

    def step() -> None:
        t = s.gather(1, index)
        x = s.scatter(1, index, float("-inf"))
        _, w = ranks(x, t)
        grad, grad_t = gradients(x, t, w)
        grad.scatter_add_(1, index, -grad_t)

    return step


def build_product(provider: str, n: int, per_class: int, d: int, device, dtype: str):
    """Make a step that multiplies the gradient of s = z z^T in one of three ways, or the floor.

    The gradient of z is (G + G^T) z: one product of the sum, in squares or at once, or two products
    G z and G^T z, as autograd makes them.
    """
    step = build(FLOOR if provider == FLOOR else OURS, n, per_class, d, device, dtype)
    if provider == TWO_PRODUCTS:
        return _with(product, "_times_both", lambda grad, z: grad @ z + grad.T @ z, step)
    return _with(product, "CPU_TILE", n if provider == AT_ONCE else product.CPU_TILE, step)


def build_sigmoids(provider: str, n: int, per_class: int, d: int, device, dtype: str):
    """Make losses and gradient of a similarity, with sigmoids in one way or the other."""
    step = build_kernel(EAGER, n, per_class, d, device, dtype)
    ranges = dict.fromkeys(eager.LARGEST_RANGE, -1.0) if provider == SINGLE else eager.LARGEST_RANGE
    return _with(eager, "LARGEST_RANGE", ranges, step)


def _with(module, name: str, value, step: Callable[[], object]) -> Callable[[], None]:
    """Make a step that takes another value for a constant of a module."""
    usual = getattr(module, name)

    def changed() -> None:
        setattr(module, name, value)
        step()
        setattr(module, name, usual)

    return changed


def _rows(parts: list[str], device, dtypes: list[str], rounds: int, seconds: float):
    """Yield the rows one by one."""
    for part in parts:
        for dtype in dtypes:
            for n, per_class, d in SIZES[part]:
                sizes = {"N": n, "M": n, "per_class": per_class, "d": d}
                if part == "queue":
                    sizes["M"] = QUEUE
                where = {"device": device.type, **machine(device, __file__)}
                row = {"part": part, "dtype": dtype, **sizes, **where}
                if part.startswith("memory"):
                    provider = LEAN if "lean" in part else OURS
                    size = provider, n, per_class, d
                    peak = _in_process(size, device, dtype)
                    yield {**row, **_named(provider), "peak_bytes": peak}
                    continue
                for provider, times in _times(
                    part, n, per_class, d, device, dtype, rounds, seconds
                ):
                    yield {**row, **_named(provider), **times}


def _named(provider: str) -> dict[str, str | int]:
    return {"provider": provider, "chunk_size": CHUNK if provider == LEAN else ""}


def _times(part: str, n: int, per_class: int, d: int, device, dtype: str, rounds: int, seconds):
    """Time of each provider, measured in turn."""
    providers = [FLOOR, OURS]
    if part in ("small", "large"):
        providers += [p for p in (BUILT_IN, *PEERS, *RESEARCH) if n <= LARGEST[p]]
    if part in ("large", "growth") and n >= 4096:
        providers.append(LEAN)
    make = build_queue if part == "queue" else build
    others = {
        "kernel": ([EAGER, *([] if device.type == "cpu" else [TRITON]), COMPILED], build_kernel),
        "blocks": (list(BLOCKS), build_kernel),
        "products": ([FLOOR, PRODUCT, AT_ONCE, TWO_PRODUCTS], build_product),
        "sigmoids": ([RATIOS, SINGLE], build_sigmoids),
        "trunk": ([OURS, TRUNK], build_trunk),
    }
    providers, make = others.get(part, (providers, make))
    steps = {p: make(p, n, per_class, d, device, dtype) for p in providers}
    return times_in_turn(steps, rounds, seconds)


def _in_process(size: tuple, device, dtype: str) -> int:
    """Peak memory of one step, from a process in which nothing else has been done."""
    where = "--device", device, "--threads", torch.get_num_threads()
    return number_of_process(__file__, *where, "--dtypes", dtype, "--memory-of", *size)


def _peak_bytes(provider: str, n: int, per_class: int, d: int, device, dtype: str) -> int:
    build(provider, 64, 4, d, device, dtype)()  # what libraries take for themselves
    return peak_bytes(build(provider, n, per_class, d, device, dtype), device)


if __name__ == "__main__":
    main()
