"""Compare ranking losses on one data set: untuned, and tuned by an equal number of trials.

    python benchmarks/retrieval/run.py --dataset clinc150 --data-root ../data
    python benchmarks/retrieval/run.py --dataset omniglot --stages untuned --seeds 3
    python benchmarks/retrieval/run.py --dataset clinc150 --stages tune --losses PNP-Ds SupCon
    python benchmarks/retrieval/run.py --dataset clinc150 --stages temperature batch coarse
    python benchmarks/retrieval/run.py --dataset clinc150 --stages splits --losses PNP-Ds SupCon

Every run is a row of benchmarks/results/retrieval_study. A run that has one is not repeated: the
command carries on where it was stopped. Two processes can share the work by --losses.
benchmarks/retrieval/study_tables.py makes docs/retrieval.md of the rows.
"""

import argparse
import warnings
from pathlib import Path

import optuna
import torch
from candidates import CANDIDATES
from probes import PROBES, run_probes
from probes import SEEDS as PROBE_SEEDS
from study import RATE_RANGE, SEEDS, TRIALS, Study
from study_data import DATA_SETS
from study_rows import RESULTS

STAGES = ("untrained", "untuned", "tune", "tuned")  # by default
DATABASE = Path(__file__).parents[2] / "runs" / "retrieval_study.db"


def main() -> None:
    """Run the command line."""
    args = _parser().parse_args()
    warnings.filterwarnings("ignore", "Argument ``multivariate``")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False  # a GPU computes what a CPU does
    data = DATA_SETS[args.dataset]
    device = torch.device(args.device)
    study = Study(
        data, args.data_root, args.results, args.database, args.losses, device, args.rate_range
    )
    for stage in args.stages:
        if stage == "untrained":
            study.untrained()
        elif stage == "untuned":
            study.untuned(args.seeds)
        elif stage == "tune":
            study.tune(args.trials)
        elif stage == "tuned":
            study.tuned(args.seeds, args.trials)
        elif stage == "longer":
            study.longer(args.seeds, args.trials)
        elif stage == "splits":
            study.splits(args.seeds)
        else:
            run_probes(study, stage, args.probe_seeds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True, choices=DATA_SETS)
    parser.add_argument("--data-root", help="folder of the data; by default what PML_PNP_DATA says")
    parser.add_argument(
        "--stages", nargs="+", choices=(*STAGES, "longer", "splits", *PROBES), default=STAGES
    )
    parser.add_argument("--losses", nargs="+", choices=CANDIDATES, metavar="LOSS", help="some")
    parser.add_argument(
        "--seeds", type=int, default=SEEDS, help="of the final runs, and of the splits"
    )
    parser.add_argument("--probe-seeds", type=int, default=PROBE_SEEDS, help="of the probes")
    parser.add_argument("--trials", type=int, default=TRIALS, help="for each loss")
    parser.add_argument(
        "--rate-range",
        type=float,
        default=RATE_RANGE,
        help="of the learning rates that are searched, over and under the untuned runs'",
    )
    parser.add_argument("--device", default="cpu", help="of networks and losses")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--database", type=Path, default=DATABASE, help="SQLite file of optuna")
    return parser


if __name__ == "__main__":
    main()
