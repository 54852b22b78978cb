"""What a run is made of: the flags of the command line, their defaults, and an earlier run's."""

import argparse
import os
import sys
from importlib import metadata
from typing import Any

import torch

from .by_name import parse_arguments
from .data import DATA_ROOT_VARIABLE, PML_DATASETS, READERS
from .errors import UserError
from .processes import world_size
from .run_folder import RunFolder
from .trunks import SMALL, SMALL_IMAGE_SIZE

DEFAULTS: dict[str, Any] = {
    "dataset": "digits",
    "data_root": None,
    "val_fraction": 0.2,
    "turned_classes": False,
    "skip_verify": False,
    "trunk": SMALL,
    "pretrained": False,
    "freeze_batchnorm": False,
    "image_size": None,
    "embedding_size": 128,
    "loss": "PNPLoss",
    "loss_args": None,
    "miner": None,
    "miner_args": {},
    "memory_size": 0,
    "batch_size": 64,
    "grad_cache": 0,
    "samples_per_class": 4,
    "epochs": 20,
    "patience": 10,
    "lr": 1e-3,
    "loss_lr": None,
    "weight_decay": 0.0,
    "ema_decay": 0.0,
    "seed": 0,
    "amp": False,
    "device": "auto",
    "workers": 0,
}
# What docs/retrieval.md says to start with.
PNP_ARGS = {"variant": "Ds", "anneal": 0.1}
# For pretrained trunks, the paper's.
PAPER_PNP_ARGS = {"variant": "Dq", "alpha": 4}
# An untested starting point for a pretrained trunk.
FINE_TUNING = {
    "freeze_batchnorm": True,
    "embedding_size": 512,
    "batch_size": 112,
    "lr": 1e-5,
    "weight_decay": 4e-4,
    "epochs": 60,
}
# The paper's trunk.
PAPER_TRUNK = {"trunk": "resnet50", "pretrained": True, "workers": 8}
DATASET_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {
        "image_size": 8,
        "turned_classes": True,
        # Few images make validation, by which the best epoch is chosen, jump from epoch to epoch.
        "ema_decay": 0.997,
    },
    "omniglot": {"image_size": 28},
    "grocery": {"image_size": 64},
    "folder": {"image_size": 64, "workers": 2},
    **{name: PAPER_TRUNK for name in PML_DATASETS},
}
# What may differ when a run continues; everything else would make it another run.
RESUMABLE = ("epochs", "device", "workers", "data_root", "skip_verify", "grad_cache")


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The flags of a run; only what is typed gets into the namespace."""
    flags = argparse.ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        epilog=(
            "Validation data, by which the best epoch is chosen and training stops, come from\n"
            "the training classes only: with 20 classes or more whole classes are held out, with\n"
            "fewer some images of each. Which ones follows from --seed. Defaults marked * depend\n"
            "on the data set and are printed when training starts."
        ),
    )

    def add(group, flag, text, **kwargs):
        default = DEFAULTS.get(flag[2:].replace("-", "_"))
        plain = default is None or default is False or default == {}
        shown = "" if plain else f" (default {default})"
        group.add_argument(flag, help=text + shown, **kwargs)

    switch = argparse.BooleanOptionalAction
    data = flags.add_argument_group("data")
    add(data, "--dataset", "data set", choices=list(READERS))
    add(data, "--data-root", f"its folder; by default what ${DATA_ROOT_VARIABLE} names")
    add(data, "--val-fraction", "share of training data held out", type=_fraction)
    add(data, "--skip-verify", "do not decode every image before training", action="store_true")
    add(
        data,
        "--turned-classes",
        "turned and mirrored copies as classes to train on *",
        action=switch,
    )
    add(data, "--image-size", "side of the input, in pixels *", type=_positive)
    add(data, "--workers", "loader processes *; results depend on it if images vary", type=_natural)

    model = flags.add_argument_group("model")
    add(model, "--trunk", f"{SMALL!r} or a timm model *")
    add(
        model,
        "--pretrained",
        "load timm's weights; then defaults are those of fine-tuning *",
        action=switch,
    )
    add(model, "--freeze-batchnorm", "keep BatchNorm's statistics as they are *", action=switch)
    add(model, "--embedding-size", "length of an embedding *", type=_positive)

    loss = flags.add_argument_group("loss")
    add(loss, "--loss", "a loss of pml_pnp.losses")
    add(loss, "--loss-args", "its arguments", nargs="+", metavar="NAME=VALUE")
    add(loss, "--miner", "a miner of pytorch_metric_learning.miners")
    add(loss, "--miner-args", "its arguments", nargs="+", metavar="NAME=VALUE")
    add(loss, "--memory-size", "embeddings in a CrossBatchMemory; 0 for none", type=_natural)

    training = flags.add_argument_group("training")
    add(training, "--batch-size", "batch of all processes together *", type=_positive)
    add(
        training,
        "--grad-cache",
        "largest number of images whose activations the trunk keeps; larger batches go through it "
        "in chunks, see docs/large_batches.md; 0 for no limit",
        type=_natural,
    )
    add(training, "--samples-per-class", "images of each class in a batch", type=_positive)
    add(training, "--epochs", "epochs at most *", type=_positive)
    add(training, "--patience", "epochs without improvement before stopping", type=_natural)
    add(training, "--lr", "learning rate of Adam *", type=_positive_float)
    add(training, "--loss-lr", "that of the loss's parameters; as --lr", type=_positive_float)
    add(training, "--weight-decay", "weight decay of Adam *", type=_not_negative_float)
    add(
        training,
        "--ema-decay",
        "evaluate and keep an exponential moving average of the weights with this decay; 0 for "
        "none *",
        type=_decay,
    )
    add(training, "--seed", "seed of everything random", type=_seed)
    add(training, "--amp", "trunk in mixed precision", action="store_true")
    add(training, "--device", "auto, cpu, cuda, cuda:N or mps")

    run = flags.add_argument_group("run folder")
    add(run, "--output-dir", "where run folders are made (default runs)")
    add(run, "--name", "name of the run folder; must be new")
    add(
        run,
        "--resume",
        "run folder to continue, with its own configuration; --epochs may be "
        "raised, --device, --workers and --grad-cache changed, after which the end may differ",
        metavar="FOLDER",
    )
    add(run, "--report", "make report.html in it at the end (the default)", action=switch)
    return flags


def _number(kind: type, text: str, holds: Any, expected: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not holds(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value


def _positive(text: str) -> int:
    return _number(int, text, lambda x: x > 0, "a positive integer")


def _natural(text: str) -> int:
    return _number(int, text, lambda x: x >= 0, "an integer of 0 or more")


def _seed(text: str) -> int:
    return _number(int, text, lambda x: 0 <= x < 2**62, "an integer from 0 to 2^62")


def _positive_float(text: str) -> float:
    return _number(float, text, lambda x: 0 < x < float("inf"), "a positive number")


def _not_negative_float(text: str) -> float:
    return _number(float, text, lambda x: 0 <= x < float("inf"), "a number of 0 or more")


def _decay(text: str) -> float:
    return _number(float, text, lambda x: 0 <= x < 1, "a number from 0 to below 1")


def _fraction(text: str) -> float:
    return _number(float, text, lambda x: 0 < x < 1, "a number between 0 and 1")


def configured(given: dict[str, Any]) -> dict[str, Any]:
    """The full configuration of a new run, from what was typed."""
    given = _with_parsed_arguments(given)
    dataset = given.get("dataset", DEFAULTS["dataset"])
    config = {**DEFAULTS, **DATASET_DEFAULTS[dataset], **given}
    if config["pretrained"]:
        config = {**config, **FINE_TUNING, **given}
    if config["trunk"] != DATASET_DEFAULTS[dataset].get("trunk", SMALL):
        # The data set's image size was meant for its own trunk.
        own = SMALL_IMAGE_SIZE if config["trunk"] == SMALL else None
        config["image_size"] = given.get("image_size", own)
    if config["loss_args"] is None:
        config["loss_args"] = _default_loss_args(config)
    if config["loss_lr"] is None:
        config["loss_lr"] = config["lr"]
    config["world_size"] = world_size()
    config["versions"] = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        **{x: _version(x) for x in ("pytorch-metric-learning", "pml_pnp")},
    }
    return config


def absolute_root(config: dict[str, Any]) -> str | None:
    """Where the data are, to continue from another folder and without the variable."""
    root = config["data_root"] or os.environ.get(DATA_ROOT_VARIABLE)
    return os.path.abspath(root) if root and config["dataset"] != "digits" else None


def _default_loss_args(config: dict[str, Any]) -> dict[str, Any]:
    if config["loss"] != "PNPLoss":
        return {}
    return PAPER_PNP_ARGS if config["pretrained"] else PNP_ARGS


def resumed(path: str, given: dict[str, Any]) -> tuple[RunFolder, dict[str, Any]]:
    """An earlier run and its configuration; what is typed must not contradict it."""
    run = RunFolder.existing(path)
    config = of_run(run, "--resume")
    for key, value in _with_parsed_arguments(given).items():
        flag = "--" + key.replace("_", "-")
        if key == "epochs" and value < config[key]:
            raise UserError(f"--resume: {flag} can only be raised from {config[key]}, got {value}")
        if key in RESUMABLE:
            config[key] = value
        elif config[key] != value:
            raise UserError(f"--resume: the run has {flag} {config[key]}, so it cannot be {value}")
    if config["world_size"] != world_size():
        raise UserError(
            f"--resume: the run was started with {config['world_size']} processes and must "
            f"continue with as many, got {world_size()}"
        )
    return run, config


def of_run(run: RunFolder, asked_by: str) -> dict[str, Any]:
    """The configuration of an earlier run.

    Raises:
        UserError: If it lacks anything that this program writes.
    """
    config = run.read_json("config.json")
    missing = sorted({*DEFAULTS, "world_size", "data", "versions"} - config.keys())
    if missing:
        raise UserError(
            f"{asked_by}: {run.path}/config.json is not of this program: no {missing[0]}"
        )
    return config


def _with_parsed_arguments(given: dict[str, Any]) -> dict[str, Any]:
    parsed = {
        key: parse_arguments("--" + key.replace("_", "-"), given[key])
        for key in ("loss_args", "miner_args")
        if key in given
    }
    return {**given, **parsed}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
