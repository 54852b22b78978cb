"""powerful-benchmarker's run.py, with a loss, overlays and a seed more."""

import argparse
import difflib
import logging
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from pml_pnp.benchmarker import prepare, register
from pml_pnp.benchmarker.seeding import seed_everything, seed_runs

CONFIGS = Path(__file__).parent / "configs"
# What pb reads of its configs; a flag can give it where a config does not.
READ_BY_PB = (
    "aggregator",
    "api_parser",
    "check_untrained_accuracy",
    "dataset",
    "ensemble",
    "factories",
    "hook_container",
    "layers_to_extract",
    "log_data_to_tensorboard",
    "loss_funcs",
    "mining_funcs",
    "models",
    "num_epochs_train",
    "optimizers",
    "override_required_compatible_factories",
    "patience",
    "sampler",
    "save_figures_on_tensorboard",
    "save_interval",
    "save_lists_in_db",
    "skip_ensemble_eval_if_already_done",
    "skip_eval_if_already_done",
    "split_manager",
    "splits_to_eval",
    "tester",
    "trainer",
    "transforms",
)


class UnknownConfig(FileNotFoundError):
    """An overlay, or an experiment to go on with, that is not there."""


def main(argv: list[str] | None = None, parts: Iterable[tuple[str, type]] = ()) -> None:
    """Run powerful-benchmarker (pb).

    Args:
        argv: the command line; that of the process by default.
        parts: (module type, class or module) to register besides, as `runner.register` takes them.

    Raises:
        MissingPackage: something is not installed; the message says how to install it.
        UnknownConfig: an overlay, or the experiment to resume or evaluate, is not there.
        SystemExit: a flag is unknown or not what it should be, or the experiment's folder is taken.
    """
    argv = _split_lists(sys.argv[1:] if argv is None else argv)
    args, rest = _parser().parse_known_args(argv)
    bayes_opt = args.bayes_opt_iters > 0
    prepare(bayes_opt)
    logging.getLogger().setLevel(logging.INFO)
    # pb reads the command line of the process, again and again.
    before, sys.argv = sys.argv, [sys.argv[0], *argv]
    try:
        runner = build_runner(args, rest)
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


def _split_lists(argv: Iterable[str]) -> list[str]:
    """Lists and dictionaries word by word, as pb reads them, whether they were quoted or not."""
    return [word for x in argv for word in (x.split() if x[:1] in ("[", "{") else [x])]


def _parser() -> argparse.ArgumentParser:
    """The flags of pb's run.py and of its runners, and --seed; the rest are of its configs."""
    parser = argparse.ArgumentParser(
        prog="python -m pml_pnp.benchmarker",
        allow_abbrev=False,
        epilog="powerful-benchmarker also takes --CONFIG [default, OVERLAY, ...] for each of "
        "its config folders, and whatever those configs hold, as in --num_epochs_train 5 or "
        "--loss_funcs~OVERRIDE~ {metric_loss: {PNPLoss: {variant: Dq}}}.",
    )
    parser.add_argument("--experiment_name", required=True, help="of its folder")
    parser.add_argument("--resume_training", choices=["latest", "best"], help="go on from there")
    parser.add_argument("--evaluate", action="store_true", help="the model of each fold")
    parser.add_argument("--evaluate_ensemble", action="store_true", help="of the folds' models")
    parser.add_argument("--reproduce_results", metavar="FOLDER", help="of the experiment")
    parser.add_argument("--pytorch_home", default=None, help="where pretrained weights are kept")
    parser.add_argument("--dataset_root", default="datasets")
    parser.add_argument("--root_experiment_folder", default="experiments")
    parser.add_argument("--global_db_path", default=None)
    parser.add_argument("--merge_argparse_when_resuming", action="store_true")
    parser.add_argument("--root_config_folder", default=None, help="pb's own by default")
    parser.add_argument("--bayes_opt_iters", type=int, default=0)
    parser.add_argument("--reproductions", type=_range, default=0, help="N, or FIRST,LAST")
    parser.add_argument(
        "--seed", type=_seed, default=None, help="of everything random; none if left out"
    )
    return parser


def check_flags(words: Iterable[str], keys: Iterable[str]) -> list[str]:
    """The names of the flags among these words, which must be keys of configs.

    Args:
        words: what is left of a command line.
        keys: of the configs that are read.

    Raises:
        SystemExit: a flag is none of them; the message names the nearest.
    """
    parser, known = _parser(), {_plain(key) for key in (*keys, *READ_BY_PB)}
    flags = [word[2:] for word in words if re.match("--[a-zA-Z]", word)]  # as pb tells them
    for flag in flags:
        name, equals, value = flag.partition("=")
        base = name.partition("~")[0]
        if _plain(name) not in known:
            if base in known:
                parser.error(
                    f"unknown ending of --{name}: expected ~OVERRIDE~, ~APPLY~N, ~SWAP~N, ~DELETE~ "
                    "or none"
                )
            names = [*parser._option_string_actions, *(f"--{key}" for key in known)]
            near = difflib.get_close_matches(f"--{base}", names, n=1, cutoff=0.5)
            parser.error(f"unknown flag --{name}" + "".join(f": did you mean {x}?" for x in near))
        if equals:
            parser.error(f"--{flag}: powerful-benchmarker reads a space, as in --{name} {value}")
    return [_plain(flag) for flag in flags]


def _plain(key: str) -> str:
    """A key of a config without the ending that says how it is merged or searched."""
    endings = "~(OVERRIDE|DELETE|BAYESIAN|LOG_BAYESIAN|INT_BAYESIAN)~|~(APPLY|SWAP)~[0-9]+"
    return re.sub(f"({endings})$", "", key)


def _seed(text: str) -> int:
    seed = int(text)
    if seed < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {seed}")
    return seed


def _range(text: str) -> int | list[int]:
    numbers = [int(x) for x in text.split(",")]
    if len(numbers) > 2 or min(numbers) < 0:
        raise argparse.ArgumentTypeError(f"must be N, or FIRST,LAST, got {text}")
    return numbers if len(numbers) == 2 else numbers[0]


def build_runner(args: argparse.Namespace, words: Iterable[str] = ()):
    """Make pb's runner for these flags, which finds packaged overlays by bare name and can seed.

    Args:
        args: the flags of `_parser`.
        words: the other words of the command line; an unknown flag among them ends the program.
    """
    from powerful_benchmarker.runners.single_experiment_runner import SingleExperimentRunner
    from powerful_benchmarker.utils.common_functions import load_yaml

    class OverlaysAndSeed:
        words: Iterable[str] = ()

        def setup_yaml_reader(self):
            reader = super().setup_yaml_reader()
            if self.words:
                paths = [path for group in self._configs(reader.args).values() for path in group]
                keys = {k for p in paths if Path(p).is_file() for k in load_yaml(p) or {}}
                flags = check_flags(self.words, keys)
                ignored = [flag for flag in flags if flag in keys]
                if args.resume_training and ignored and not self.merge_argparse_when_resuming:
                    logging.warning(
                        "without --merge_argparse_when_resuming a resumed experiment keeps its "
                        "configs, and ignores %s",
                        ", ".join(f"--{flag}" for flag in ignored),
                    )
                self.words = ()
            return reader

        def _configs(self, args):
            """The paths of the configs that flags can be of."""
            paths = dict(self.determine_where_to_get_yamls(args))
            if args.reproduce_results:
                folder = str(Path(args.reproduce_results, "configs"))
                for name, saved in self.get_saved_config_paths(args, folder).items():
                    paths[name] = [*paths[name], *saved]
            return paths

        def get_root_config_paths(self, *args):
            paths = super().get_root_config_paths(*args)
            return {k: [_packaged(p) for p in v] for k, v in paths.items()}

        def get_saved_config_paths(self, args, config_folder=None):
            if config_folder is None and not Path(args.place_to_save_configs).is_dir():
                raise UnknownConfig(
                    f"no experiment {args.experiment_name!r} in {self.root_experiment_folder}"
                )
            paths = super().get_saved_config_paths(args, config_folder)
            # For those that an older experiment lacks pb takes its own, and so it does for all.
            if config_folder and not any(Path(p).is_file() for v in paths.values() for p in v):
                raise UnknownConfig(f"no experiment to reproduce: no config in {config_folder}")
            return paths

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
        runner = Single(**kwargs)
        runner.words = words
        return runner
    from powerful_benchmarker.runners import bayes_opt_runner

    class Search(OverlaysAndSeed, bayes_opt_runner.BayesOptRunner):
        seed = args.seed

        def __init__(self, **kwargs):
            self.words = words  # read in there
            super().__init__(**kwargs)

        def _configs(self, args):
            if Path(args.place_to_save_configs).is_dir():
                return self.get_saved_config_paths(args)
            return self.get_root_config_paths(args)

        def run(self):
            if self.seed is not None:
                seed_everything(self.seed)  # Ax draws, too
            super().run()

        def read_yaml_and_find_bayes(self, find_bayes_params=True, **kwargs):
            configs = Path(self.root_experiment_folder, args.experiment_name, "configs")
            are_new = not configs.exists()
            read = super().read_yaml_and_find_bayes(find_bayes_params, **kwargs)
            if find_bayes_params and not read[1]:
                if are_new:  # they were saved in between
                    shutil.rmtree(configs)
                raise UnknownConfig(
                    "--bayes_opt_iters needs a config with a key that ends in ~BAYESIAN~, "
                    "~LOG_BAYESIAN~ or ~INT_BAYESIAN~, as the overlay with_pnp_bayes_opt has"
                )
            return read

        def get_single_experiment_runner(self):
            runner = super().get_single_experiment_runner()
            runner.__class__ = Single  # every trial is seeded
            return runner

    return Search(bayes_opt_iters=args.bayes_opt_iters, reproductions=args.reproductions, **kwargs)


def _packaged(path: str) -> str:
    """That file of the user's or pb's, or else the packaged overlay of its name."""
    if Path(path).is_file():
        return path
    packaged = CONFIGS / Path(path).parent.name / Path(path).name
    if packaged.is_file():
        return str(packaged)
    folders = Path(path).parent, packaged.parent
    known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    raise UnknownConfig(f"no {Path(path).name} in {folders[0]}, which knows {', '.join(known)}")
