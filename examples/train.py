"""Train an embedding for open-set retrieval and evaluate it on classes it has never seen.

    python train.py                                             # digits, nothing to download
    python train.py --dataset omniglot --data-root DATA
    python train.py --loss ProxyAnchorLoss --loss-args alpha=16 --loss-lr 0.1
    python train.py --resume runs/digits-PNPLoss-Ds-1
    torchrun --nproc-per-node 2 train.py --batch-size 64

The parts are those of pytorch-metric-learning: trainer, sampler, tester, accuracy calculator and
logging hooks. The loss is any of `pml_pnp.losses`.
"""

import argparse
import json
import os
import sys
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import processes
import torch
from by_name import TRIAL_CLASSES, parse_arguments, try_out
from errors import UserError
from processes import on_rank_zero, rank, say, world_size
from retrieval_data import DATA_ROOT_VARIABLE, PML_DATASETS, READERS, RetrievalSplits, load_splits
from retrieval_metrics import PRIMARY_METRIC, table
from run_folder import RunFolder
from training import Training, build_loss_and_miner, build_trainer, seed_everything
from trunks import SMALL, SmallTransform, Transform, Trunk, build_trunk, import_timm

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
# How the small trunk's training images vary, and whether they have colours.
CHARACTERS = {"mode": "L", "warp": True}
PHOTOGRAPHS = {"mode": "RGB", "crop": 0.8, "mirror": True}
SMALL_IMAGE_SIZE = 64
# What may differ when a run continues; everything else would make it another run.
RESUMABLE = ("epochs", "device", "workers", "data_root", "skip_verify", "grad_cache")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        return _run(_parser().parse_args(argv))
    except UserError as error:
        if rank() == 0 or not error.common or _is_from_loader(error):
            print(f"train.py: error: {_one_line(error)}", file=sys.stderr, flush=True)
        else:
            time.sleep(2)  # torchrun ends all processes with the first; let rank 0 speak before
        return 2
    except KeyboardInterrupt:
        say("interrupted; a run whose folder exists continues with --resume FOLDER")
        return 130
    finally:
        processes.stop()


def _is_from_loader(error: UserError) -> bool:
    return "Original Traceback" in str(error)  # of the loader process, before the message


def _one_line(error: UserError) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].partition("UserError: ")[2] if _is_from_loader(error) else " ".join(lines)


def _run(args: argparse.Namespace) -> int:
    begun = time.perf_counter()
    # PML's trainer formats the loss into its progress bar; not for the user to mend.
    warnings.filterwarnings("ignore", "Converting a tensor with requires_grad=True to a scalar")
    given = dict(vars(args))
    resume, name, output_dir = (given.pop(k, None) for k in ("resume", "name", "output_dir"))
    run, config = _resumed(resume, given) if resume else (None, _configured(given))
    if resume and (name or output_dir):
        raise UserError(
            "--resume continues in the run's own folder; leave out --name, --output-dir"
        )
    _check_installed()
    device = _device(config["device"])
    _check_before_data(config)
    output_dir = Path(output_dir or "runs")
    if not run:
        _check_name(output_dir, name)
    processes.start(device)
    checkpoint = run.load_checkpoint() if run else None
    if run and _is_finished(run, config):
        say(f"{run.path} is finished; nothing to do", "")
        _show(run.read_json("metrics.json"))
        return 0

    splits = load_splits(
        config["dataset"],
        config["data_root"],
        config["val_fraction"],
        config["seed"],
        config["turned_classes"],
        config["skip_verify"],
    )
    _fit_batch(config, given if not resume else config, splits)
    config["data"] = splits.summary()
    config["data_root"] = _absolute_root(config)
    if run:
        _check_same_data(run, config)
    seed_everything(config["seed"])
    trunk = _trunk(config)
    _set_transforms(splits, trunk)
    trainer = build_trainer(config, splits, trunk, device)
    run = on_rank_zero(lambda: run or _new_run(output_dir, name, config))
    on_rank_zero(lambda: run.write_json("config.json", config))
    on_rank_zero(lambda: _write_data(run, splits))
    _announce(run, config, splits, device)

    training = Training(trainer, splits, run, config)
    training.start_or_continue(checkpoint)
    training.train()
    on_rank_zero(lambda: _finish(training, run, config, time.perf_counter() - begun))
    return 0


# --- configuration --------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # only what the user types gets into the namespace
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
    data = parser.add_argument_group("data")
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

    model = parser.add_argument_group("model")
    add(model, "--trunk", f"{SMALL!r} or a timm model *")
    add(
        model,
        "--pretrained",
        "load timm's weights; then defaults are those of fine-tuning *",
        action=switch,
    )
    add(model, "--freeze-batchnorm", "keep BatchNorm's statistics as they are *", action=switch)
    add(model, "--embedding-size", "length of an embedding *", type=_positive)

    loss = parser.add_argument_group("loss")
    add(loss, "--loss", "a loss of pml_pnp.losses")
    add(loss, "--loss-args", "its arguments", nargs="+", metavar="NAME=VALUE")
    add(loss, "--miner", "a miner of pytorch_metric_learning.miners")
    add(loss, "--miner-args", "its arguments", nargs="+", metavar="NAME=VALUE")
    add(loss, "--memory-size", "embeddings in a CrossBatchMemory; 0 for none", type=_natural)

    training = parser.add_argument_group("training")
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

    run = parser.add_argument_group("run folder")
    add(run, "--output-dir", "where run folders are made (default runs)")
    add(run, "--name", "name of the run folder; must be new")
    add(
        run,
        "--resume",
        "run folder to continue, with its own configuration; --epochs may be "
        "raised, --device, --workers and --grad-cache changed, after which the end may differ",
        metavar="FOLDER",
    )
    return parser


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


def _configured(given: dict[str, Any]) -> dict[str, Any]:
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


def _absolute_root(config: dict[str, Any]) -> str | None:
    """Where the data are, to continue from another folder and without the variable."""
    root = config["data_root"] or os.environ.get(DATA_ROOT_VARIABLE)
    return os.path.abspath(root) if root and config["dataset"] != "digits" else None


def _default_loss_args(config: dict[str, Any]) -> dict[str, Any]:
    if config["loss"] != "PNPLoss":
        return {}
    return PAPER_PNP_ARGS if config["pretrained"] else PNP_ARGS


def _resumed(path: str, given: dict[str, Any]) -> tuple[RunFolder, dict[str, Any]]:
    """An earlier run and its configuration; what is typed must not contradict it."""
    run = RunFolder.existing(path)
    config = run.read_json("config.json")
    missing = sorted({*DEFAULTS, "world_size", "data"} - config.keys())
    if missing:
        raise UserError(f"--resume: {path}/config.json is not of this program: no {missing[0]}")
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


# --- checks ---------------------------------------------------------------------------------


def _check_installed() -> None:
    missing = []
    for module, package in (
        ("faiss", "faiss-cpu"),
        ("record_keeper", "record-keeper"),
        ("tensorboard", "tensorboard"),
    ):
        try:
            __import__(module)
        except ImportError:
            missing.append(package)
    if missing:
        raise UserError(f"missing packages; install them with pip install {' '.join(missing)}")


def _check_before_data(config: dict[str, Any]) -> None:
    """Find what is wrong with the configuration alone, before any data is read."""
    if config["miner_args"] and not config["miner"]:
        raise UserError("--miner-args needs --miner")
    if config["pretrained"] and config["trunk"] == SMALL:
        raise UserError(f"--pretrained: the trunk {SMALL!r} has no pretrained weights")
    if config["trunk"] != SMALL:
        import_timm(config["trunk"])
    elif config["image_size"] < 8:
        raise UserError(f"--image-size: expected at least 8, got {config['image_size']}")
    if config["samples_per_class"] < 2:
        raise UserError("--samples-per-class: expected at least 2, since one has no positive")
    if 0 < config["memory_size"] < config["batch_size"]:
        raise UserError(
            f"--memory-size: expected at least the batch size {config['batch_size']}, "
            f"got {config['memory_size']}"
        )
    unit = world_size() * config["samples_per_class"]
    if config["batch_size"] == unit:
        raise UserError(
            f"--samples-per-class: expected at least 2 classes in each process's batch, got 1, of "
            f"{config['samples_per_class']} samples, from --batch-size {config['batch_size']}"
        )
    if config["batch_size"] % unit:
        raise UserError(
            f"--batch-size: expected a multiple of {unit} ({world_size()} processes with "
            f"{config['samples_per_class']} samples per class), got {config['batch_size']}"
        )
    try:
        json.dumps(config, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"--loss-args, --miner-args: expected values that JSON can hold ({error})"
        ) from error
    loss, miner = build_loss_and_miner({**config, "memory_size": 0}, TRIAL_CLASSES)
    try_out(loss, miner, config["embedding_size"], config["samples_per_class"])
    build_loss_and_miner(config, TRIAL_CLASSES)


def _check_name(output_dir: Path, name: str | None) -> None:
    if name is None:
        return
    if name in ("", ".", "..") or Path(name).name != name:
        raise UserError(f"--name: expected a folder name without separators, got {name!r}")
    if (output_dir / name).exists():
        raise UserError(
            f"{output_dir / name} exists; take another --name, or continue it with "
            f"--resume {output_dir / name}"
        )


def _fit_batch(config: dict[str, Any], given: dict[str, Any], splits: RetrievalSplits) -> None:
    """Shrink a default batch to what the classes can fill; refuse one that was typed."""
    largest = splits.train.num_classes * config["samples_per_class"]
    largest -= largest % (world_size() * config["samples_per_class"])
    if config["batch_size"] <= largest:
        return
    if "batch_size" in given or "samples_per_class" in given:
        raise UserError(
            f"--batch-size: {splits.train.num_classes} training classes of "
            f"{config['samples_per_class']} samples fill a batch of at most {largest} in "
            f"{world_size()} processes, got {config['batch_size']}"
        )
    config["batch_size"] = largest


def _check_same_data(run: RunFolder, config: dict[str, Any]) -> None:
    before = run.read_json("config.json")["data"]
    if before != config["data"]:
        raise UserError(f"--resume: the data have changed: were {before}, are {config['data']}")


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and torch.backends.mps.is_available():
            name = "mps"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("expected auto, cpu, cuda, cuda:N or mps")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device: {name!r} cannot be used here: {reason}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


# --- parts of a run -------------------------------------------------------------------------


def _trunk(config: dict[str, Any]) -> Trunk:
    images = CHARACTERS if config["dataset"] in ("digits", "omniglot") else PHOTOGRAPHS
    small = SmallTransform(config["image_size"] or SMALL_IMAGE_SIZE, **images)
    return build_trunk(config["trunk"], config["pretrained"], config["image_size"], small)


def load_best(path: str) -> tuple[torch.nn.Module, Transform]:
    """The trained network of a run, in eval mode, and the transform that its images need.

    Args:
        path: A run folder.

    Returns:
        A module that maps `(batch, channels, size, size)` to `(batch, embedding size)`, on the
        CPU, and a function that makes a tensor of a PIL image.
    """
    run = RunFolder.existing(path, "load_best")
    config = {**run.read_json("config.json"), "pretrained": False}
    best = run.load_checkpoint("best.pt")
    if best is None:
        raise UserError(f"{path} holds no checkpoints/best.pt yet")
    trunk = _trunk(config)
    embedder = torch.nn.Linear(trunk.num_features, config["embedding_size"])
    trunk.module.load_state_dict(best["models"]["trunk"])
    embedder.load_state_dict(best["models"]["embedder"])
    return torch.nn.Sequential(trunk.module, embedder).eval(), trunk.eval_transform


def _set_transforms(splits: RetrievalSplits, trunk: Trunk) -> None:
    splits.train.transform = trunk.train_transform
    splits.val.transform = splits.test.transform = trunk.eval_transform


def _new_run(output_dir: Path, name: str | None, config: dict[str, Any]) -> RunFolder:
    variant = config["loss_args"].get("variant")
    stem = "-".join(map(str, filter(None, (config["dataset"], config["loss"], variant))))
    return RunFolder.create(output_dir, name, stem)


def _write_data(run: RunFolder, splits: RetrievalSplits) -> None:
    run.write_table("classes.csv", ("class", "split", "images"), splits.class_rows())
    run.write_table("skipped.csv", ("name", "reason"), [(x.name, x.reason) for x in splits.skipped])


def _announce(
    run: RunFolder, config: dict[str, Any], splits: RetrievalSplits, device: torch.device
) -> None:
    shown = {k: v for k, v in config.items() if k in DEFAULTS}
    say(
        f"run folder: {run.path}",
        f"device: {device}, processes: {world_size()}",
        "settings: " + ", ".join(f"{k}={v}" for k, v in shown.items()),
        *(
            f"{name}: {x['images']} images of {x['classes']} classes"
            for name, x in splits.summary().items()
        ),
        f"validation: {splits.val_kind}",
        "",
    )


def _is_finished(run: RunFolder, config: dict[str, Any]) -> bool:
    metrics = run.read_json("metrics.json")
    return metrics is not None and (
        metrics["stopped_early"] or metrics["epochs_trained"] >= config["epochs"]
    )


def _finish(training: Training, run: RunFolder, config: dict[str, Any], seconds: float) -> None:
    trained = training.test_best()
    training.close()
    state = training.state
    metrics = {
        "dataset": config["dataset"],
        "test_classes": training.splits.test.num_classes,
        "untrained": state["untrained"],
        "trained": trained,
        "validation": state["best"]["metrics"],
        "primary_metric": PRIMARY_METRIC,
        "best_epoch": state["best"]["epoch"],
        "epochs_trained": state["epoch"],
        "stopped_early": state["stopped_early"],
        "seconds": {"training": state["seconds"], "this_process": seconds},
    }
    run.write_json("metrics.json", metrics)
    _show(metrics)
    say("", f"written to {run.path}")


def _show(metrics: dict[str, Any]) -> None:
    title = f"{metrics['dataset']}, {metrics['test_classes']} unseen classes"
    say("", table(metrics["untrained"], metrics["trained"], title))
    say(f"weights of epoch {metrics['best_epoch']}, the best of {metrics['epochs_trained']}")


if __name__ == "__main__":
    sys.exit(main())
