"""What powerful-benchmarker needs, and the line that installs what is missing.

There are two recipes, each of three files: `base`, `no-deps` (whose own requirements contradict
each other, so that pip must not look at them) and `bayes` for hyperparameter search.
"""

import contextlib
import importlib
import importlib.util
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

FOLDER = Path(__file__).parent
CURRENT, PINNED = "current", "pinned"
# Modules, in the order in which they are looked for.
MODULES = (
    "torch",
    "pytorch_metric_learning",
    "record_keeper",
    "sklearn",
    "faiss",
    "tensorboard",
    "yaml",
    "munch",
    "gdown",
    "torchvision",
    "pretrainedmodels",
    "easy_module_attribute_getter",
    "powerful_benchmarker",
)


class MissingPackage(ImportError):
    """Something that powerful-benchmarker needs is not installed."""


def is_pinned() -> bool:
    """Whether PML is of the release that pb pins, or older."""
    return int(metadata.version("pytorch-metric-learning").partition(".")[0]) < 1


def recipe() -> str:
    """The recipe of this environment: for pb's pinned PML if that is installed, else for PML 2."""
    try:
        return PINNED if is_pinned() else CURRENT
    except metadata.PackageNotFoundError:
        return CURRENT


def install_command(recipe: str, bayes_opt: bool = False) -> str:
    """The line that installs a recipe into the current environment."""
    files = [FOLDER / f"{recipe}-{part}.txt" for part in ("base", "no-deps", "bayes")]
    commands = [f'pip install -r "{files[0]}"', f'pip install --no-deps -r "{files[1]}"']
    return " && ".join(commands + [f'pip install -r "{files[2]}"'] * bayes_opt)


def is_there(module: str) -> bool:
    """Whether there is such a module, or a package that is more than a folder of this name."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def check_installed(bayes_opt: bool) -> None:
    """Raise MissingPackage, with the line that helps, for the first module that is not there."""
    for module in (*MODULES, *["ax"] * bayes_opt):
        if not is_there(module):
            raise MissingPackage(
                f"powerful-benchmarker needs {module}, which is not installed. {_help(bayes_opt)}",
                name=module,
            )
    try:
        version = metadata.version("powerful-benchmarker")
    except metadata.PackageNotFoundError:
        version = "one that is not installed"
    if version != "0.9.33":
        raise MissingPackage(
            f"expected powerful-benchmarker 0.9.33, the metric-learning release, got {version}:\n"
            "    pip install --no-deps powerful-benchmarker==0.9.33",
            name="powerful_benchmarker",
        )
    _check_torchvision()


@contextlib.contextmanager
def check_imports(bayes_opt: bool) -> Iterator[None]:
    """Raise MissingPackage if powerful-benchmarker does not import at the end, or something before.

    As with gdown 6 or an Ax of other years, which are there, but lack what it imports.
    """
    try:
        yield
        importlib.import_module("powerful_benchmarker.runners.single_experiment_runner")
        importlib.import_module("powerful_benchmarker.datasets")
        if bayes_opt:
            importlib.import_module("powerful_benchmarker.runners.bayes_opt_runner")
    except ImportError as error:
        raise MissingPackage(
            f"powerful-benchmarker does not import with what is installed ({error}). "
            f"{_help(bayes_opt)}",
            name=error.name,
        ) from error


def _help(bayes_opt: bool) -> str:
    command = install_command(recipe(), bayes_opt)
    return (
        f"In an environment of its own, where pml_pnp is installed with --no-deps:\n    {command}"
    )


def _check_torchvision() -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an extension that reads image files
            importlib.import_module("torchvision")
    except (RuntimeError, ImportError) as error:
        raise MissingPackage(
            f"torchvision does not fit the installed torch {metadata.version('torch')} ({error}). "
            "Take both from the same index, or a torchvision that asks nothing of torch:\n"
            "    pip install --no-deps torchvision==0.16.2",
            name="torchvision",
        ) from error
