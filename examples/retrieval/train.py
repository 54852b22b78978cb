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
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from . import configuration, processes, report
from .by_name import TRIAL_CLASSES, try_out
from .configuration import DEFAULTS, absolute_root, configured, resumed
from .data import RetrievalSplits, splits_of
from .errors import UserError, require
from .metrics import PRIMARY_METRIC, table
from .network import build
from .processes import find_device, on_rank_zero, say, world_size
from .run_folder import RunFolder
from .seeding import seed_everything
from .training import Training, build_loss_and_miner, build_trainer
from .trunks import SMALL, Trunk, import_timm

NEEDS = {"faiss": "faiss-cpu", "record_keeper": "record-keeper", "tensorboard": "tensorboard"}


def parser(prog: str) -> argparse.ArgumentParser:
    """The command line."""
    return configuration.parser(prog, __doc__)


def run(args: argparse.Namespace) -> int:
    """Train as the flags say; returns the exit code."""
    begun = time.perf_counter()
    # PML's trainer formats the loss into its progress bar; not for the user to mend.
    warnings.filterwarnings("ignore", "Converting a tensor with requires_grad=True to a scalar")
    given = dict(vars(args))
    resume, name, output_dir = (given.pop(k, None) for k in ("resume", "name", "output_dir"))
    with_report = given.pop("report", True)
    run, config = resumed(resume, given) if resume else (None, configured(given))
    if resume and (name or output_dir):
        raise UserError(
            "--resume continues in the run's own folder; leave out --name, --output-dir"
        )
    require({**NEEDS, **(report.NEEDS if with_report else {})})
    device = find_device(config["device"])
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

    splits = splits_of(config)
    _fit_batch(config, given if not resume else config, splits)
    config["data"] = splits.summary()
    config["data_root"] = absolute_root(config)
    if run:
        _check_same_data(run, config)
    seed_everything(config["seed"])
    trunk = build(config)
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
    if with_report:
        on_rank_zero(lambda: _report(run, config, splits, device))
    return 0


# --- checks ---------------------------------------------------------------------------------


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


# --- parts of a run -------------------------------------------------------------------------


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


def _report(
    run: RunFolder, config: dict[str, Any], splits: RetrievalSplits, device: torch.device
) -> None:
    try:
        path = report.make(run, config, splits, device)
    except Exception as error:  # the run is finished and saved, whatever becomes of its report
        say(
            f"warning: the report could not be made: {type(error).__name__}: {error}",
            f"make it with python examples/retrieval report {run.path}",
        )
    else:
        say(f"report: {path}")


def _show(metrics: dict[str, Any]) -> None:
    title = f"{metrics['dataset']}, {metrics['test_classes']} unseen classes"
    say("", table(metrics["untrained"], metrics["trained"], title))
    say(f"weights of epoch {metrics['best_epoch']}, the best of {metrics['epochs_trained']}")
