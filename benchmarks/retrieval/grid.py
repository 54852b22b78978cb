"""Settings of every loss by length of training and learning rate, on other splits of the classes.

A run trains on three quarters of the training classes of a split (`fit`), and measures on them, on
the others (`validation`) and on the test classes of the split. Each loss has five settings, and so
has each variant of PNPLoss; the first of a peer is its default. What the advice is made of.

    python benchmarks/retrieval/grid.py --dataset clinc150 --seeds 1 2
    python benchmarks/retrieval/grid.py --dataset omniglot --losses PNP-Ds NTXent --lengths short

A run that has a row in benchmarks/results/retrieval_study/grid is not repeated.
"""

import argparse
import dataclasses
import json
import random
import time
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import study_rows as rows
import torch
import tqdm
from candidates import PROXY_LEARNING_RATE, Params, objective, similarities
from fitting import METRICS, retrieval_metrics, train
from networks import embed
from study_data import DATA_SETS, VALIDATION_SHARE, DataSet, Part, other_splits
from torch import Tensor

TEMPERATURES = (0.003, 0.01, 0.03, 0.1, 0.3)
LENGTHS = ("short", "long")  # DataSet.steps_of_grid
FOLDER = rows.RESULTS / "grid"
MOST_MEASURED = 3000  # examples of a part; of a larger one, those of classes drawn at random
WATCHED = 5  # batches at the beginning, and at the end
_SUM = {"alpha": 2.0, "beta": 50.0, "base": 0.5, "weight": 1.0}


def _of(name: str, values, **others) -> list[Params]:
    return [{name: v, **others} for v in values]


def _each(names: tuple[str, ...], *values: tuple[float, ...]) -> list[Params]:
    return [dict(zip(names, v, strict=True)) for v in values]


# {name of the table: (candidate, five settings)}
SETTINGS: dict[str, tuple[str, list[Params]]] = {
    "PNP-O": ("PNP-O", _of("anneal", TEMPERATURES)),
    "PNP-Ds": ("PNP-Ds", _of("anneal", TEMPERATURES)),
    "PNP-Dq": ("PNP-Dq", _of("anneal", TEMPERATURES, alpha=1.0)),
    "PNP-Dq alpha 4": ("PNP-Dq", _of("anneal", TEMPERATURES, alpha=4.0)),
    "PNP-Ds + MultiSimilarity": (
        "PNP-Ds + MultiSimilarity",
        _of("anneal", TEMPERATURES, **_SUM),
    ),
    "NTXent": ("NTXent", _of("temperature", (0.07, 0.01, 0.03, 0.15, 0.3))),
    "SupCon": ("SupCon", _of("temperature", (0.1, 0.01, 0.03, 0.2, 0.5))),
    "SmoothAP": ("SmoothAP", _of("temperature", (0.01, 0.003, 0.03, 0.1, 0.3))),
    "SupAP": (
        "SupAP",
        _of("temperature", (0.01, 0.003, 0.03, 0.1, 0.3), slope=100.0, margin=0.05),
    ),
    "MultiSimilarity": (
        "MultiSimilarity",
        _each(
            ("alpha", "beta", "base"),
            (2.0, 50.0, 0.5),
            (2.0, 20.0, 0.5),
            (1.0, 10.0, 0.5),
            (1.0, 10.0, 0.2),
            (4.0, 50.0, 0.8),
        ),
    ),
    "Circle": (
        "Circle",
        _each(("m", "gamma"), (0.4, 80.0), (0.25, 256.0), (0.4, 32.0), (0.2, 32.0), (0.25, 80.0)),
    ),
    "Contrastive": (
        "Contrastive",
        _each(
            ("pos_margin", "neg_margin"), (0.0, 1.0), (0.0, 0.7), (0.3, 1.0), (0.3, 1.3), (0.0, 1.3)
        ),
    ),
    "Triplet": ("Triplet", _of("margin", (0.05, 0.02, 0.1, 0.2, 0.4))),
    "FastAP": ("FastAP", _of("num_bins", (10, 5, 20, 30, 50))),
    "ProxyAnchor": (
        "ProxyAnchor",
        [
            {**p, "proxy_learning_rate": PROXY_LEARNING_RATE}
            for p in _each(
                ("margin", "alpha"), (0.1, 32.0), (0.1, 16.0), (0.3, 8.0), (0.1, 8.0), (0.3, 32.0)
            )
        ],
    ),
}
# What the two losses that lead on Omniglot have and a ranking loss lacks, left out in turn.
_MULTI_SIMILARITY = SETTINGS["MultiSimilarity"][1]
SWITCHES: dict[str, tuple[str, list[Params]]] = {
    "MultiSimilarity without threshold": ("MultiSimilarity without threshold", _MULTI_SIMILARITY),
    "MultiSimilarity without weights": ("MultiSimilarity without weights", _MULTI_SIMILARITY),
    "Circle without weights": ("Circle without weights", SETTINGS["Circle"][1]),
}
ALL = {**SETTINGS, **SWITCHES}


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of the grid."""

    loss: str
    setting: int
    steps: int
    learning_rate: float
    seed: int

    @property
    def key(self) -> tuple[str, ...]:
        """What its row is found by."""
        return (
            self.loss,
            str(self.setting),
            str(self.steps),
            f"{self.learning_rate:g}",
            str(self.seed),
        )


def main() -> None:
    """Run the command line."""
    args = _parser().parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False
    data = DATA_SETS[args.dataset]
    device = torch.device(args.device)
    path = args.results / f"{data.name}.csv"
    todo = list(_missing(data, args, path))
    for run in tqdm.tqdm(todo, desc=data.name, mininterval=10):
        if run.key in _done(path):  # by another process
            continue
        rows.add(path, _run(data, args.data_root, run, device))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True, choices=DATA_SETS)
    parser.add_argument("--data-root", help="folder of the data; by default what PML_PNP_DATA says")
    parser.add_argument("--losses", nargs="+", choices=ALL, default=list(SETTINGS))
    parser.add_argument("--settings", nargs="+", type=int, help="of every loss, from 0 to 4; all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="of the splits")
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=LENGTHS)
    parser.add_argument("--steps", nargs="+", type=int, help="instead of the data set's lengths")
    parser.add_argument("--rates", nargs="+", type=float, help="over the data set's learning rate")
    parser.add_argument("--device", default="cpu", help="of networks and losses")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the rows")
    return parser


def _missing(data: DataSet, args: argparse.Namespace, path: Path) -> Iterator[Run]:
    """What has no row, in an order that does not depend on the loss: a part is a fair sample."""
    lengths = dict(zip(LENGTHS, data.steps_of_grid, strict=True))
    done = _done(path)
    for seed in args.seeds:
        of_seed = [
            Run(loss, setting, steps, data.learning_rate * rate, seed)
            for steps in args.steps or [lengths[x] for x in args.lengths]
            for rate in args.rates or data.rates_of_grid
            for loss in args.losses
            for setting in args.settings or range(len(ALL[loss][1]))
        ]
        random.Random(seed).shuffle(of_seed)
        yield from (run for run in of_seed if run.key not in done)


def _done(path: Path) -> set[tuple[str, ...]]:
    names = ("loss", "setting", "steps", "learning_rate", "seed")
    return {tuple(row[n] for n in names) for row in rows.read(path)}


@lru_cache(maxsize=1)  # the runs of a seed follow each other, and a split is a copy
def _parts(
    data: DataSet, data_root: str | None, seed: int, device: torch.device
) -> tuple[Part, ...]:
    """The parts fit, validation and test of a split."""
    training, test = (data.read(x, data_root).to(device) for x in ("training", "test"))
    number = len(training.classes)
    return other_splits(training, test, seed, [number - round(VALIDATION_SHARE * number), number])


def _some(part: Part) -> Part:
    """At most so many examples, of whole classes."""
    order = torch.randperm(len(part.classes), generator=torch.Generator().manual_seed(0))
    sizes = part.labels.bincount(minlength=len(order)).cpu()[order].cumsum(0)
    chosen = torch.zeros(len(order), dtype=torch.bool)
    chosen[order[sizes <= max(MOST_MEASURED, int(sizes[1]))]] = True
    kept = chosen.to(part.labels.device)[part.labels]
    return Part(part.inputs[kept], part.labels[kept], part.classes, part.coarse[kept])


def _run(data: DataSet, data_root: str | None, run: Run, device: torch.device) -> rows.Row:
    parts = dict(
        zip(("fit", "validation", "test"), _parts(data, data_root, run.seed, device), strict=True)
    )
    candidate, settings = ALL[run.loss]
    params = settings[run.setting]
    data = dataclasses.replace(
        data,
        steps=run.steps,
        classes_per_batch=min(data.classes_per_batch, len(parts["fit"].classes)),
    )
    begin = time.process_time()
    watch = Watch(run.steps)
    network = train(
        data,
        parts["fit"],
        lambda classes: objective(candidate, params, classes),
        run.learning_rate,
        params.get("proxy_learning_rate", PROXY_LEARNING_RATE),
        run.seed,
        watch,
    )
    trained = time.process_time()
    measured = {}
    for name, part in parts.items():
        part = _some(part)
        metrics = retrieval_metrics(embed(network, part.inputs), part.labels)
        measured |= {f"{name} {m}": f"{metrics[m]:.5f}" for m in METRICS[:2]}
    return {
        "dataset": data.name,
        "loss": run.loss,
        "setting": run.setting,
        "steps": run.steps,
        "learning_rate": f"{run.learning_rate:g}",
        "seed": run.seed,
        **measured,
        **watch.means(),
        "parameters": json.dumps(params, sort_keys=True),
        "batch": f"{data.classes_per_batch} x {data.examples_per_class}",
        "train_seconds": f"{trained - begin:.2f}",
        "evaluation_seconds": f"{time.process_time() - trained:.2f}",
        **rows.here(device),
    }


class Watch:
    """What the first and the last batches of a run look like."""

    def __init__(self, steps: int):
        self.steps = steps
        self.seen: dict[str, list[dict[str, float]]] = {"first": [], "last": []}

    def __call__(self, step: int, embeddings: Tensor, labels: Tensor) -> None:
        """Look at a batch; training is not touched."""
        if step < WATCHED:
            self.seen["first"].append(observed(embeddings, labels))
        if step >= self.steps - WATCHED:
            self.seen["last"].append(observed(embeddings, labels))

    def means(self) -> dict[str, str]:
        """The columns of a row."""
        return {
            f"{name} {when}": f"{sum(x[name] for x in found) / len(found):.4g}"
            for when, found in self.seen.items()
            for name in found[0]
        }


@torch.no_grad()
def observed(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    """What a user can see of a batch: how it is ranked, and how its similarities are spread."""
    s, positives, negatives = similarities(embeddings, labels)
    query, positive = positives.nonzero(as_tuple=True)
    before = ((s[query] > s[query, positive][:, None]) & negatives[query]).sum(1)
    return {
        "negatives_before_positive": before.float().mean().item(),
        "std_of_negatives": s[negatives].std().item(),
        "mean_gap": (s[query, positive].mean() - s[negatives].mean()).item(),
    }


if __name__ == "__main__":
    main()
