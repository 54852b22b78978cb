"""What a run is made of: the flags of the command line, their defaults, and an earlier run's."""

import argparse
import dataclasses
import json
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .arguments import (
    Parser,
    below_one,
    natural,
    not_negative_float,
    positive,
    positive_float,
    seed,
)
from .benchmark_sets import BENCHMARK_SETS
from .by_name import parse_arguments
from .config_file import MAPPINGS, read_config
from .data import (
    DATA_ROOT_VARIABLE,
    PML_DATASETS,
    READERS,
    TEST_FRACTION,
    RetrievalSplits,
    splits_of,
)
from .disk import plain_path
from .errors import UserError
from .image_list import OTHER_ROOT, ImageList
from .metrics import RECALL_AT
from .processes import DEVICES, say, world_size
from .run_folder import CHECKSUM, CONFIG, RunFolder, is_unfilled, taken
from .trunks import IMAGE_SIZES, LITE, SMALL

DEFAULTS: dict[str, Any] = {
    "dataset": "digits",
    "data_root": None,
    "test_fraction": None,
    "val_fraction": 0.2,
    "turned_classes": False,
    "skip_verify": False,
    "trunk": SMALL,
    "pretrained": False,
    "freeze_batchnorm": False,
    "image_size": None,
    "color_jitter": 0.4,
    "embedding_size": 128,
    "loss": "PNPLoss",
    "loss_args": None,
    "beside": None,
    "beside_args": None,
    "miner": None,
    "miner_args": {},
    "memory_size": 0,
    "batch_size": 64,
    "grad_cache": 0,
    "samples_per_class": 4,
    "epochs": 20,
    "patience": 10,
    "recall_at": list(RECALL_AT),
    "lr": 1e-3,
    "lr_milestones": [],
    "lr_gamma": 0.3,
    "lr_cosine": False,
    "warmup_epochs": 0,
    "loss_lr": None,
    "weight_decay": 0.0,
    "ema_decay": 0.0,
    "seed": 0,
    "amp": False,
    "device": "auto",
    "workers": 0,
    "threads": None,
}
# Settings that came later, as runs from before them had them.
EARLIER: dict[str, Any] = {
    "threads": None,
    "beside": None,
    "beside_args": {},
    "lr_cosine": False,
    "warmup_epochs": 0,
}
# What docs/retrieval.md says to start with.
PNP_ARGS = {"variant": "Ds", "anneal": 0.03}
# A starting point for a pretrained trunk; docs/training_example.md has a run with a larger --lr.
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
    "grocery160": {"image_size": 64},
    "folder": {"image_size": 64, "workers": 2},
    "csv": {"image_size": 64, "workers": 2},
    **{name: PAPER_TRUNK for name in (*PML_DATASETS, *BENCHMARK_SETS)},
}
# What config.json of a run holds beside the settings.
RECORDED = ("world_size", "versions", "data", "split", "pixel_ranges", CHECKSUM)
# What may differ when a run continues; everything else would make it another run.
RESUMABLE = ("epochs", "device", "workers", "threads", "data_root", "skip_verify", "grad_cache")


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The flags of a run; only what is typed gets into the namespace."""
    flags = Parser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        epilog=(
            "The test is on classes that are never trained on: those of the data set's own split,\n"
            "or of --dataset folder those in test/ beside train/. A folder without these is split\n"
            "by --test-fraction, and --seed draws the classes. If train/ and test/ hold the same\n"
            "classes, the test is closed-set: its images are searched among the test images of\n"
            "known classes.\n\n"
            "Validation data, by which the best epoch is chosen and training stops, come from\n"
            "the training classes only: with 20 classes or more whole classes are held out, with\n"
            "fewer, or if every class is trained on, some images of each. Which ones follows from\n"
            "--seed. With --val-fraction 0 there is none, and the last epoch is kept.\n\n"
            "Defaults marked * depend on the data set and are printed when training starts."
        ),
    )

    def add(group, flag, text, **kwargs):
        default = DEFAULTS.get(flag[2:].replace("-", "_"))
        if isinstance(default, list):
            default = " ".join(map(str, default))
        plain = default is None or default is False or default in ({}, "")
        shown = "" if plain else f" (default {default})"
        group.add_argument(flag, help=text + shown, **kwargs)

    switch = argparse.BooleanOptionalAction
    data = flags.add_argument_group("data")
    add(data, "--dataset", "data set", choices=list(READERS))
    add(
        data,
        "--data-root",
        f"its folder, or of csv its file; by default what ${DATA_ROOT_VARIABLE} names",
    )
    add(
        data,
        "--test-fraction",
        "share of the classes to test on, drawn by --seed, if the data set has no split of its own "
        f"(default {TEST_FRACTION}); 0 trains on every class of any data set, without a test",
        type=below_one,
    )
    add(
        data,
        "--val-fraction",
        "share of training data held out for validation; 0 for none, which keeps the last epoch",
        type=below_one,
    )
    add(data, "--skip-verify", "do not decode every image before training", action="store_true")
    add(
        data,
        "--turned-classes",
        "turned and mirrored copies as classes to train on *",
        action=switch,
    )
    add(data, "--image-size", "side of the input, in pixels *", type=positive)
    add(
        data,
        "--color-jitter",
        "how much brightness, contrast and saturation of training images vary, for a timm model",
        type=not_negative_float,
    )
    add(data, "--workers", "loader processes *; results depend on it if images vary", type=natural)

    model = flags.add_argument_group("model")
    add(model, "--trunk", f"{SMALL!r}, {', '.join(map(repr, LITE))} or a timm model *")
    add(
        model,
        "--pretrained",
        "start from weights of ImageNet; then defaults are those of fine-tuning *",
        action=switch,
    )
    add(model, "--freeze-batchnorm", "keep BatchNorm's statistics as they are *", action=switch)
    add(model, "--embedding-size", "length of an embedding *", type=positive)

    loss = flags.add_argument_group("loss")
    add(loss, "--loss", "a loss of pml_pnp.losses")
    add(loss, "--loss-args", "its arguments", nargs="+", metavar="NAME=VALUE")
    add(loss, "--beside", "another loss of pml_pnp.losses, that is added to it")
    add(loss, "--beside-args", "its arguments", nargs="+", metavar="NAME=VALUE")
    add(loss, "--miner", "a miner of pytorch_metric_learning.miners")
    add(loss, "--miner-args", "its arguments", nargs="+", metavar="NAME=VALUE")
    add(loss, "--memory-size", "embeddings in a CrossBatchMemory; 0 for none", type=natural)

    training = flags.add_argument_group("training")
    add(training, "--batch-size", "batch of all processes together *", type=positive)
    add(
        training,
        "--grad-cache",
        "largest number of images whose activations the trunk keeps; larger batches go through it "
        "in chunks, see docs/large_batches.md; 0 for no limit",
        type=natural,
    )
    add(training, "--samples-per-class", "images of each class in a batch", type=positive)
    add(training, "--epochs", "epochs at most *", type=positive)
    add(
        training,
        "--patience",
        "training stops after more epochs than this without improvement",
        type=natural,
    )
    add(
        training,
        "--recall-at",
        "k of the Recall@k that are measured, besides Recall@1",
        type=positive,
        nargs="+",
        metavar="K",
    )
    add(training, "--lr", "learning rate of Adam *", type=positive_float)
    add(
        training,
        "--lr-milestones",
        "epochs after which all learning rates are multiplied by --lr-gamma",
        type=positive,
        nargs="+",
        metavar="EPOCH",
    )
    add(training, "--lr-gamma", "see --lr-milestones", type=positive_float)
    add(
        training,
        "--lr-cosine",
        "all learning rates fall along a cosine, to 0 after the last epoch",
        action=switch,
    )
    add(
        training,
        "--warmup-epochs",
        "epochs in which all learning rates rise in proportion to the iteration",
        type=natural,
    )
    add(training, "--loss-lr", "that of the loss's parameters; as --lr", type=positive_float)
    add(training, "--weight-decay", "weight decay of Adam *", type=not_negative_float)
    add(
        training,
        "--ema-decay",
        "evaluate and keep an exponential moving average of the weights with this decay; 0 for "
        "none *",
        type=below_one,
    )
    add(training, "--seed", "seed of everything random", type=seed)
    add(training, "--amp", "trunk in mixed precision", action="store_true")
    add(training, "--device", DEVICES)
    add(
        training,
        "--threads",
        "CPU threads of each process (default: what OMP_NUM_THREADS or else torch says); where "
        "others use the cores, one may be faster; the number changes the last digits of results",
        type=positive,
    )

    run = flags.add_argument_group("run folder")
    add(
        run,
        "--config",
        "settings in YAML or JSON, such as config.json of a run; flags win",
        metavar="FILE",
    )
    add(run, "--output-dir", "where run folders are made (default runs)")
    add(run, "--name", "name of the run folder; must be new")
    add(
        run,
        "--resume-if-exists",
        "continue the run of this --name if it exists, and start it otherwise: for the command "
        "line of a scheduler or of torchrun --max-restarts, which is the same each time",
        action="store_true",
    )
    add(
        run,
        "--resume",
        "run folder to continue, with its own configuration; --epochs may be "
        "raised, --device, --workers, --threads and --grad-cache changed, after which the end may "
        "differ",
        metavar="FOLDER",
    )
    add(
        run,
        "--accept-changed-files",
        "continue although image files have changed since the run began",
        action="store_true",
    )
    add(run, "--report", "make report.html in it at the end (the default)", action=switch)
    return flags


def with_file(path: str, typed: dict[str, Any]) -> dict[str, Any]:
    """What a file sets, with what was typed in its place or, of arguments, added.

    Arguments of a loss or miner are those of the one that the file names.
    """
    typed = _with_parsed_arguments(typed)
    given = read_config(path, parser("", ""), DEFAULTS, RECORDED)
    for name in ("loss", "beside", "miner"):
        arguments = f"{name}_args"
        in_file = given.get(name, DEFAULTS[name])
        if typed.get(name, in_file) != in_file:
            given.pop(arguments, None)
        if arguments in typed:
            typed[arguments] = {**given.get(arguments, {}), **typed[arguments]}
    if "lr" in typed and given.get("loss_lr") == given.get("lr"):
        given.pop("loss_lr", None)  # a run records it although it is as --lr by default
    return {**given, **typed}


@dataclasses.dataclass
class Place:
    """Which run folder the flags mean."""

    resume: str | None = None
    resume_if_exists: bool = False
    name: str | None = None
    output_dir: str | None = None

    @classmethod
    def taken_from(cls, given: dict[str, Any]) -> "Place":
        """Take them out of what was typed; the rest is the configuration."""
        return cls(**{x.name: given.pop(x.name, x.default) for x in dataclasses.fields(cls)})

    @property
    def parent(self) -> Path:
        """Where run folders are made."""
        return Path(self.output_dir or "runs")

    @property
    def flag(self) -> str:
        """The flag by which an earlier run is continued."""
        return "--resume" if self.resume else "--resume-if-exists"

    def earlier_run(self) -> str | None:
        """The folder of the run to continue, if there is one."""
        if self.resume:
            if self != Place(resume=self.resume):
                raise UserError(
                    "--resume continues in the run's own folder; leave out --name, --output-dir "
                    "and --resume-if-exists"
                )
            return self.resume
        if self.name is not None and (
            self.name in ("", ".", "..") or Path(self.name).name != self.name
        ):
            raise UserError(f"--name: expected a folder name without separators, got {self.name!r}")
        if not self.resume_if_exists:
            return None
        if self.name is None:
            raise UserError("--resume-if-exists needs --name, which says what run it is")
        path = self.parent / self.name
        return str(path) if RunFolder.is_at(path) else None

    def check(self) -> None:
        """Find now what would prevent a new run."""
        path = self.parent / (self.name or "")
        if self.name and path.exists() and not (self.resume_if_exists and is_unfilled(path)):
            raise UserError(taken(path))


def configured(given: dict[str, Any]) -> dict[str, Any]:
    """The full configuration of a new run, from what was typed."""
    given = _with_parsed_arguments(given)
    dataset = given.get("dataset", DEFAULTS["dataset"])
    config = {**DEFAULTS, **DATASET_DEFAULTS[dataset], **given}
    if config["pretrained"]:
        config = {**config, **FINE_TUNING, **given}
    if config["trunk"] != DATASET_DEFAULTS[dataset].get("trunk", SMALL):
        # The data set's image size was meant for its own trunk.
        config["image_size"] = given.get("image_size") or IMAGE_SIZES.get(config["trunk"])
    for name in ("loss", "beside"):
        if config[f"{name}_args"] is None:
            config[f"{name}_args"] = PNP_ARGS if config[name] == "PNPLoss" else {}
    if config["loss_lr"] is None:
        config["loss_lr"] = config["lr"]
    config["world_size"] = world_size()
    config["versions"] = _versions()
    return config


def say_other_versions(config: dict[str, Any]) -> None:
    """Warn if a run goes on with other versions than it began with."""
    now = _versions()
    told = [
        f"{x} {was}, now {now.get(x)}" for x, was in config["versions"].items() if was != now.get(x)
    ]
    if told:
        say(f"warning: the run began with {'; '.join(told)}: results may differ")


def splits_of_run(run: RunFolder, config: dict[str, Any], data_root: str | None) -> RetrievalSplits:
    """The images of an earlier run, at their place or at another.

    Raises:
        UserError: If they are not there, or not the same ones; of other contents it is only said.
    """
    config = {**config, "data_root": data_root or config["data_root"]}
    try:
        splits = splits_of(config)
    except UserError as error:
        raise UserError(f"{error}; {OTHER_ROOT}") from error
    ImageList(splits, config).check(run, accept_changed_files=True)
    return splits


def absolute_root(config: dict[str, Any]) -> str | None:
    """Where the data are, to continue from another folder and without the variable."""
    root = config["data_root"] or os.environ.get(DATA_ROOT_VARIABLE)
    if not root or config["dataset"] == "digits":
        return None
    return plain_path(os.path.join(os.getcwd(), root))


def resumed(
    path: str, given: dict[str, Any], asked_by: str = "--resume"
) -> tuple[RunFolder, dict[str, Any]]:
    """An earlier run and its configuration; what is typed must not contradict it."""
    try:
        run = RunFolder.existing(path)
        config = of_run(run)
    except UserError as error:
        raise UserError(f"{asked_by}: {error}") from error
    for key, value in _with_parsed_arguments(given).items():
        flag = "--" + key.replace("_", "-")
        if key == "epochs" and value < config[key]:
            raise UserError(
                f"{asked_by}: {flag} can only be raised from {config[key]}, got {value}"
            )
        if key in RESUMABLE:
            config[key] = value
        elif config[key] != value:
            raise UserError(
                f"{asked_by}: the run has {flag} {config[key]}, so it cannot be {value}"
            )
    if config["world_size"] != world_size():
        raise UserError(
            f"{asked_by}: the run was started with {config['world_size']} processes and must "
            f"continue with as many, got {world_size()}"
        )
    return run, config


def of_run(run: RunFolder) -> dict[str, Any]:
    """The configuration of an earlier run.

    Raises:
        UserError: If it lacks anything that this program writes.
    """
    config = {**EARLIER, **run.read_config()}
    file = run.path / CONFIG
    other = sorted({"dataset", "loss", "world_size", "data", "versions"} - config.keys())
    if other:
        raise UserError(f"{file} is not of this program: no {other[0]}")
    later = [key for key in DEFAULTS if key not in config]
    if later:
        defaults = {**DEFAULTS, **DATASET_DEFAULTS.get(config["dataset"], {})}
        values = ", ".join(f'"{key}": {json.dumps(defaults[key])}' for key in later)
        raise UserError(
            f"{file} has no {', '.join(later)}, so an earlier version made this run; "
            f"start a new one with the same settings by --config {file}, or add to the file the "
            f'values with which this one was made and remove its line "{CHECKSUM}", if there is '
            f"one; the present defaults are {values}"
        )
    return config


def _with_parsed_arguments(given: dict[str, Any]) -> dict[str, Any]:
    parsed = {
        key: parse_arguments("--" + key.replace("_", "-"), given[key])
        for key in MAPPINGS
        if isinstance(given.get(key), list)
    }
    return {**given, **parsed}


def _versions() -> dict[str, str | None]:
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        **{x: _version(x) for x in ("pytorch-metric-learning", "pml_pnp")},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
