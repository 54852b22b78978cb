"""Compare losses with powerful-benchmarker: train, evaluate and ensemble each, and tabulate.

    python benchmark.py                                        # digits, nothing to download
    python benchmark.py --dataset omniglot --dataset-root DATA/omniglot-small
    python benchmark.py --losses with_pnp triplet --seeds 0    # some of it
    python benchmark.py -- --patience 3                        # with flags of powerful-benchmarker

Every loss is trained once for each seed, over the folds of the configs, with the arguments of its
overlay, which are pytorch-metric-learning's defaults but for what its name says; nothing is tuned.
When the same command is given again, a killed run continues where it was, to the same end, and what
is finished is not run again. The table is of the experiments that the command names, results.csv of
all in the folder. On one machine the same seeds give the same table.
"""

import argparse
import contextlib
import io
import json
import logging
import sys
import zlib
from pathlib import Path

from run import CONFIGS, UserError, explained, run

from pml_pnp.benchmarker import command_line, prepare
from pml_pnp.benchmarker.requirements import is_pinned

# Files of configs/config_loss_and_miners, or of the package.
LOSSES = (
    "with_pnp",
    "pnp_recommended",
    "pnp_ds",
    "pnp_ds_0.03",
    "pnp_ds_0.1",
    "pnp_o",
    "multi_similarity",
    "triplet",
    "contrastive",
    "ntxent",
    "fast_ap",
    "smooth_ap",
)
NEEDS_PML_2 = ("smooth_ap",)
DIVERGED = "diverged"  # key of finished.json


def main() -> None:
    """Run the command line."""
    args = _parser().parse_args()
    prepare(bayes_opt=False)  # before the imports that need what it looks for
    from parts import DATASETS
    from results_table import save, table

    wanted = _runnable(args.losses)
    data = DATASETS[args.dataset](args.dataset_root)  # a UserError if they cannot be read
    settings = {"epochs": args.epochs, "flags": args.flags, "images": _fingerprint(data)}
    folder = Path(args.output) / args.dataset
    for seed in args.seeds:
        for loss in wanted:
            _experiment(folder, loss, seed, args, settings)
    rows = save(folder)
    asked = rows[rows.loss.isin(wanted) & rows.seed.isin(map(str, args.seeds))]
    print(f"\n{table(asked)}\n\nall experiments of {folder}: {folder / 'results.csv'}")


def _runnable(losses: list[str]) -> list[str]:
    """Those that the installed PML has; raises UserError for a name that no overlay has."""
    folders = [x / "config_loss_and_miners" for x in (CONFIGS, command_line.CONFIGS)]
    known = {path.stem for folder in folders for path in folder.glob("*.yaml")}
    if unknown := sorted(set(losses) - known):
        raise UserError(f"--losses must be of {', '.join(sorted(known))}, got {unknown[0]}")
    missing = NEEDS_PML_2 if is_pinned() else ()
    for loss in dict.fromkeys(x for x in losses if x in missing):
        print(f"{loss} skipped: not in the pytorch-metric-learning of this environment", flush=True)
    wanted = [x for x in dict.fromkeys(losses) if x not in missing]
    if not wanted:
        raise UserError("no loss is left to run")
    return wanted


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


def _fingerprint(data) -> str:
    """The number of images, and a checksum of them and their labels."""
    checksum = zlib.crc32(data.labels.tobytes())
    for image in data.images:
        checksum = zlib.crc32(image.tobytes(), checksum)
    return f"{len(data)} ({checksum:08x})"


def _experiment(
    folder: Path, loss: str, seed: int, args: argparse.Namespace, settings: dict
) -> None:
    name = f"{loss}-{seed}"
    configs, done = folder / name / "configs", folder / name / "finished.json"
    was_begun = (configs / "config_foldernames.yaml").exists()  # the last of them to be written
    _check_settings(folder / f"{name}.json", settings, was_begun)
    if done.exists():
        print(f"{name}: finished before", flush=True)
        _say_if_diverged(name, json.loads(done.read_text(encoding="utf-8")).get(DIVERGED, False))
        return
    common = ["--experiment_name", name, "--root_experiment_folder", str(folder)]
    common += ["--dataset_root", args.dataset_root, "--seed", str(seed)]
    train = list(common)
    if was_begun:
        train += ["--resume_training", "latest"]
    else:
        for path in configs.glob("config_*.yaml"):  # of a run killed while it wrote them
            path.unlink()
        train += ["--config_loss_and_miners", f"[default, {loss}]"]
        if args.dataset != "digits":
            train += ["--config_dataset", f"[default, {args.dataset}]"]
        if args.epochs:
            train += ["--num_epochs_train", str(args.epochs)]
        train += args.flags
    test = ["--splits_to_eval", "[test]"]
    print(f"{name}: {'continuing' if was_begun else 'training'}", flush=True)
    diverged = _run(train, args.verbose)
    _run([*common, "--evaluate", *test], args.verbose)
    _run([*common, "--evaluate_ensemble", *test], args.verbose)
    from results_table import about

    done.write_text(json.dumps({**about(args.dataset), DIVERGED: diverged}), encoding="utf-8")
    _say_if_diverged(name, diverged)


def _say_if_diverged(name: str, diverged: bool) -> None:
    if diverged:
        print(f"{name}: the model diverged, and counts by its epochs before that", flush=True)


def _check_settings(path: Path, settings: dict, was_begun: bool) -> None:
    """Write down how an experiment is begun, or see that it was begun so."""
    if not was_begun:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings), encoding="utf-8")
    elif path.exists():
        begun = json.loads(path.read_text(encoding="utf-8"))
        if begun != {key: settings[key] for key in begun}:  # an earlier version wrote fewer
            raise UserError(
                f"{path.stem} was begun with {begun}, not with {settings}: name another folder "
                "with --output"
            )


def _run(argv: list[str], verbose: bool) -> bool:
    """One run in this process, without its log and progress bars unless `verbose` or if it fails.

    Returns whether the model diverged, of which powerful-benchmarker only logs a line.
    """
    diverged = []

    def watch(record: logging.LogRecord) -> bool:
        diverged.append("the model diverged" in record.getMessage())
        return True

    said = io.StringIO()
    logging.getLogger().addFilter(watch)
    try:
        if verbose:
            run(argv)
        else:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                logging.basicConfig(stream=said, force=True)
                run(argv)
    except BaseException:
        sys.stderr.write(said.getvalue()[-4000:])
        raise
    finally:
        logging.getLogger().removeFilter(watch)
    return any(diverged)


if __name__ == "__main__":
    explained("benchmark.py", main)
