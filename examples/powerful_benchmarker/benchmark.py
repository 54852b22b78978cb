"""Compare losses with powerful-benchmarker: train, evaluate and ensemble each, and tabulate.

    python benchmark.py                                        # digits, nothing to download
    python benchmark.py --dataset omniglot --dataset-root DATA/omniglot-small
    python benchmark.py --losses with_pnp triplet --seeds 0    # some of it
    python benchmark.py -- --patience 3                        # with flags of powerful-benchmarker

Every loss is trained once for each seed, over the folds of the configs, at the default arguments of
pytorch-metric-learning; nothing is tuned. A killed run continues where it was when the same command
is given again, to the same end; what is finished is not run again. The same seeds give the same
table.
"""

import argparse
import contextlib
import io
import json
import logging
import shutil
import sys
from importlib import metadata
from pathlib import Path

from results_table import plot, read, rows_of, table, write
from run import run

from pml_pnp.benchmarker import prepare
from pml_pnp.benchmarker.requirements import MissingPackage

# Files of configs/config_loss_and_miners, or of the package.
LOSSES = (
    "with_pnp",
    "pnp_ds",
    "pnp_o",
    "multi_similarity",
    "triplet",
    "contrastive",
    "ntxent",
    "fast_ap",
    "smooth_ap",
)
NEEDS_PML_2 = ("smooth_ap",)


def main() -> None:
    """Run the command line."""
    args = _parser().parse_args()
    prepare()
    _check_data(args.dataset, args.dataset_root)
    folder = Path(args.output) / args.dataset
    wanted = [x for x in args.losses if not (x in NEEDS_PML_2 and _is_pinned())]
    for skipped in sorted(set(args.losses) - set(wanted)):
        print(f"{skipped} skipped: not in pytorch-metric-learning of this environment", flush=True)
    for seed in args.seeds:
        for loss in wanted:
            _experiment(folder, loss, seed, args)
    rows = [row for loss in wanted for seed in args.seeds for row in rows_of(folder, loss, seed)]
    path = folder / "results.csv"
    write(path, rows, args.dataset)
    rows = read(path)
    print(f"\n{table(rows)}\n\nwritten to {path}")
    plot(rows, folder / "results.svg")


def _check_data(dataset: str, root: str) -> None:
    from parts import DATASETS, UserError

    try:
        DATASETS[dataset](root)
    except UserError as error:
        sys.exit(f"benchmark.py: error: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", choices=["digits", "omniglot"], default="digits")
    parser.add_argument("--dataset-root", default="datasets", help="folder of the data")
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), metavar="OVERLAY")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="of each fold; the config's by default")
    parser.add_argument("--output", default="experiments", help="folder of all experiments")
    parser.add_argument(
        "--verbose", action="store_true", help="show what powerful-benchmarker says"
    )
    parser.add_argument(
        "flags", nargs="*", help="after a --: flags of powerful-benchmarker for training"
    )
    return parser


def _is_pinned() -> bool:
    return metadata.version("pytorch-metric-learning").startswith("0.")


def _experiment(folder: Path, loss: str, seed: int, args: argparse.Namespace) -> None:
    name = f"{loss}-{seed}"
    done = folder / name / "finished"
    _check_begun(folder / f"{name}.json", {"epochs": args.epochs, "flags": args.flags})
    if done.exists():
        print(f"{name}: finished before", flush=True)
        return
    common = ["--experiment_name", name, "--root_experiment_folder", str(folder)]
    common += ["--dataset_root", args.dataset_root, "--seed", str(seed)]
    train = list(common)
    configs = folder / name / "configs"
    if (configs / "config_foldernames.yaml").exists():  # the last of them to be written
        train += ["--resume_training", "latest"]
    else:
        shutil.rmtree(configs, ignore_errors=True)
        train += ["--config_loss_and_miners", "[default,", f"{loss}]"]
        if args.dataset != "digits":
            train += ["--config_dataset", "[default,", f"{args.dataset}]"]
        if args.epochs:
            train += ["--num_epochs_train", str(args.epochs)]
        train += args.flags
    test = ["--splits_to_eval", "[test]"]
    print(f"{name}: {'continuing' if '--resume_training' in train else 'training'}", flush=True)
    _run(train, args.verbose)
    _run([*common, "--evaluate", *test], args.verbose)
    _run([*common, "--evaluate_ensemble", *test], args.verbose)
    done.touch()


def _check_begun(path: Path, settings: dict) -> None:
    """Write down how an experiment is begun, or see that it was begun so."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings), encoding="utf-8")
    elif (begun := json.loads(path.read_text(encoding="utf-8"))) != settings:
        sys.exit(
            f"benchmark.py: error: {path.stem} was begun with {begun}, not with {settings}: "
            "name another folder with --output"
        )


def _run(argv: list[str], verbose: bool) -> None:
    """One run in this process, without its log and progress bars unless it fails."""
    if verbose:
        return run(argv)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            logging.basicConfig(stream=said, force=True)
            run(argv)
    except BaseException:
        sys.stderr.write(said.getvalue()[-4000:])
        raise


if __name__ == "__main__":
    try:
        main()
    except MissingPackage as error:
        sys.exit(f"benchmark.py: error: {error}")
