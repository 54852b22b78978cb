"""powerful-benchmarker's run.py, with a loss, overlays and a seed more."""

import argparse
import logging
import sys
from collections.abc import Iterable
from pathlib import Path

from pml_pnp.benchmarker import prepare, register
from pml_pnp.benchmarker.seeding import seed_everything, seed_runs

CONFIGS = Path(__file__).parent / "configs"


def main(argv: list[str] | None = None, parts: Iterable[tuple[str, type]] = ()) -> None:
    """Run powerful-benchmarker (pb).

    Args:
        argv: the command line; that of the process by default.
        parts: (module type, class or module) to register besides, as `runner.register` takes them.

    Raises:
        MissingPackage: something is not installed; the message says how to install it.
        SystemExit: a flag is not what it should be, or the experiment's folder is taken.
    """
    argv = _in_words(sys.argv[1:] if argv is None else argv)
    args, _ = _parser().parse_known_args(argv)
    bayes_opt = args.bayes_opt_iters > 0
    prepare(bayes_opt)
    logging.getLogger().setLevel(logging.INFO)
    # pb reads the command line of the process, again and again.
    before, sys.argv = sys.argv, [sys.argv[0], *argv]
    try:
        runner = build_runner(args)
        register(runner)
        for module_type, part in parts:
            runner.register(module_type, part)
        runner.run()
    except SystemExit as exit:
        if exit.code is None:  # folder_creator.py:12, with a line in the log
            raise SystemExit(
                f"a folder of this experiment_name is in {args.root_experiment_folder}: continue "
                "it with --resume_training latest, or name another"
            ) from exit
        raise
    finally:
        sys.argv = before


def _in_words(argv: Iterable[str]) -> list[str]:
    """Lists and dictionaries as pb reads them, word by word, whether they were quoted or not."""
    return [word for x in argv for word in (x.split() if x[:1] in ("[", "{") else [x])]


def _parser() -> argparse.ArgumentParser:
    """The flags of pb's run.py, and --seed; pb itself reads the rest."""
    parser = argparse.ArgumentParser(
        prog="python -m pml_pnp.benchmarker",
        allow_abbrev=False,
        epilog="powerful-benchmarker takes --experiment_name, --resume_training, --evaluate, "
        "--evaluate_ensemble, --reproduce_results, --CONFIG [default, OVERLAY, ...] for each of "
        "its config folders, and whatever those configs hold, as in --num_epochs_train 5 or "
        "--loss_funcs~OVERRIDE~ {metric_loss: {PNPLoss: {variant: Dq}}}.",
    )
    parser.add_argument("--pytorch_home", default=None, help="where pretrained weights are kept")
    parser.add_argument("--dataset_root", default="datasets")
    parser.add_argument("--root_experiment_folder", default="experiments")
    parser.add_argument("--global_db_path", default=None)
    parser.add_argument("--merge_argparse_when_resuming", action="store_true")
    parser.add_argument("--root_config_folder", default=None, help="pb's own by default")
    parser.add_argument("--bayes_opt_iters", type=int, default=0)
    parser.add_argument("--reproductions", default="0", help="N, or FIRST,LAST")
    parser.add_argument(
        "--seed", type=_seed, default=None, help="of everything random; none if left out"
    )
    return parser


def _seed(text: str) -> int:
    seed = int(text)
    if seed < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {seed}")
    return seed


def build_runner(args: argparse.Namespace):
    """Make pb's runner for these flags, which finds packaged overlays by bare name and can seed."""
    from powerful_benchmarker.runners.single_experiment_runner import SingleExperimentRunner

    class OverlaysAndSeed:
        def get_root_config_paths(self, *args):
            paths = super().get_root_config_paths(*args)
            return {k: [_packaged(p) for p in v] for k, v in paths.items()}

        def get_api_parser(self, *args):
            parser = super().get_api_parser(*args)
            if self.seed is not None:
                seed_runs(parser, self.seed)
            return parser

    class Single(OverlaysAndSeed, SingleExperimentRunner):
        seed = args.seed

    kwargs = {
        name: getattr(args, name)
        for name in (
            "dataset_root",
            "root_experiment_folder",
            "pytorch_home",
            "root_config_folder",
            "global_db_path",
            "merge_argparse_when_resuming",
        )
    }
    if args.bayes_opt_iters <= 0:
        return Single(**kwargs)
    from powerful_benchmarker.runners import bayes_opt_runner

    class Search(OverlaysAndSeed, bayes_opt_runner.BayesOptRunner):
        seed = args.seed

        def run(self):
            if self.seed is not None:
                seed_everything(self.seed)  # Ax draws, too
            super().run()

        def get_single_experiment_runner(self):
            runner = super().get_single_experiment_runner()
            runner.__class__ = Single  # every trial is seeded
            return runner

    reproductions = [int(x) for x in args.reproductions.split(",")]
    return Search(
        bayes_opt_iters=args.bayes_opt_iters,
        reproductions=reproductions if len(reproductions) > 1 else reproductions[0],
        **kwargs,
    )


def _packaged(path: str) -> str:
    """The packaged overlay of that name, if the path leads to none of the user's or pb's."""
    if Path(path).is_file():
        return path
    packaged = CONFIGS / Path(path).parent.name / Path(path).name
    return str(packaged) if packaged.is_file() else path
