"""Train an embedding for open-set retrieval and evaluate it on classes it has never seen.

    python train.py                                             # digits, nothing to download
    python train.py --dataset omniglot --data-root DATA
    python train.py --loss ProxyAnchorLoss --loss-args alpha=16 --loss-lr 0.1
    python train.py --config retrieval/configs/online_products.yaml --data-root DATA
    python train.py --resume runs/digits-PNPLoss-Ds-1
    python train.py --name mine --resume-if-exists              # start it, or continue it
    torchrun --nproc-per-node 2 train.py --batch-size 64

The parts are those of pytorch-metric-learning: trainer, sampler, tester, accuracy calculator and
logging hooks. The loss is any of `pml_pnp.losses`.
"""

import argparse
import json
import textwrap
import time
import warnings
from typing import Any

import torch

from . import configuration, processes, report, screen
from .by_name import TRIAL_CLASSES, try_out
from .configuration import (
    DEFAULTS,
    Place,
    absolute_root,
    configured,
    resumed,
    say_other_versions,
    splits_of_run,
    with_file,
)
from .data import RetrievalSplits, splits_of
from .errors import UserError, require
from .image_list import ImageList
from .metrics import PRIMARY_METRIC, table
from .network import build
from .processes import find_device, on_rank_zero, say, world_size
from .progress import harm, still_rising
from .run_folder import CONFIG, METRICS, RunFolder, RunLock
from .seeding import seed_everything
from .training import Training, build_loss_and_miner, build_trainer, check_complete
from .trunks import IMAGE_SIZES, SMALL, SMALLEST_IMAGE, Trunk, check_installed, has_batchnorm

INDENTED = {"initial_indent": "  ", "subsequent_indent": "  ", "break_long_words": False}
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
    place = Place.taken_from(given)
    with_report = given.pop("report", True)
    accept_changed_files = given.pop("accept_changed_files", False)
    if place.resume and "config" in given:
        raise UserError("--resume continues a run as it is configured; leave out --config")
    typed_root = "data_root" in given
    if "config" in given:
        given = with_file(given.pop("config"), given)
    earlier = place.earlier_run()
    run, config = resumed(earlier, given, place.flag) if earlier else (None, configured(given))
    if typed_root and config["dataset"] == "digits":
        raise UserError(
            "--data-root: digits are part of scikit-learn and read from no folder; to train on the "
            "images there add --dataset folder or, if it is a table, --dataset csv"
        )
    require({**NEEDS, **(report.NEEDS if with_report else {})})
    device = find_device(config["device"])
    _set_threads(config)
    _check_before_data(config)
    if not run:
        place.check()
    processes.start(device)
    with RunLock() as lock:
        if run:
            on_rank_zero(lambda: _take(lock, run))
        checkpoint = _checkpoint_of(run) if run else None
        if run and (metrics := run.read_metrics(config)):
            say(f"{run.path} is finished; nothing to train", "")
            # It may have been removed since it was damaged.
            on_rank_zero(lambda: (run.path / CONFIG).exists() or run.write_json(CONFIG, config))
            _show(metrics)
            if with_report and on_rank_zero(lambda: _report_is_due(run)):
                try:
                    splits = splits_of_run(run, config, None)
                except UserError as error:  # in every process
                    say(f"warning: the report could not be made: {error}")
                else:
                    on_rank_zero(lambda: _report(run, config, splits, device))
            return 0
        check_complete(checkpoint)  # before the settings of the run change
        if run:
            run.check_can_continue(checkpoint)
            say_other_versions(config)
        seed_everything(config["seed"])
        # A checkpoint brings weights of its own.
        trunk = build({**config, "pretrained": config["pretrained"] and checkpoint is None})
        _fit_batchnorm(config, given, trunk)
        splits = splits_of(config)
        config["data_root"] = absolute_root(config)
        images = ImageList(splits, config)
        if run:
            on_rank_zero(lambda: images.check(run, accept_changed_files))
        _record_data(config, given if not run else config, splits)
        _set_transforms(splits, trunk)
        trainer = build_trainer(config, splits, trunk, device)
        run = on_rank_zero(lambda: run or _new_run(lock, place, config, images))
        on_rank_zero(lambda: _write_settings(run, config, splits, images))
        _announce(run, config, splits, device)

        training = Training(trainer, splits, run, config)
        training.start_or_continue(checkpoint)
        training.train()
        on_rank_zero(lambda: _finish(training, run, config, time.perf_counter() - begun))
        if with_report:
            on_rank_zero(lambda: _report(run, config, splits, device))
    return 0


def _checkpoint_of(run: RunFolder) -> dict[str, Any] | None:
    """The checkpoint to continue from, the same in every process."""
    checkpoint = run.load_checkpoint()
    epoch = checkpoint and checkpoint.get("epoch")
    if (first := on_rank_zero(lambda: epoch)) != epoch:
        raise UserError(
            f"{run.path}: a process reads the checkpoint of epoch {epoch}, the first one of {first}"
        )
    return checkpoint


# --- checks ---------------------------------------------------------------------------------


def _check_before_data(config: dict[str, Any]) -> None:
    """Find what is wrong with the configuration alone, before any data is read."""
    for name in ("beside", "miner"):
        if config[f"{name}_args"] and not config[name]:
            raise UserError(f"--{name}-args needs --{name}")
    if config["pretrained"] and config["trunk"] == SMALL:
        raise UserError(f"--pretrained: the trunk {SMALL!r} has no pretrained weights")
    check_installed(config["trunk"], config["pretrained"])
    if config["trunk"] in IMAGE_SIZES and config["image_size"] < SMALLEST_IMAGE:
        raise UserError(
            f"--image-size: expected at least {SMALLEST_IMAGE}, got {config['image_size']}"
        )
    if config["lr_cosine"] and config["lr_milestones"]:
        raise UserError("--lr-cosine: learning rates fall by it or by --lr-milestones, not by both")
    if config["warmup_epochs"] >= config["epochs"]:
        raise UserError(
            f"--warmup-epochs: expected fewer than the {config['epochs']} of --epochs, "
            f"got {config['warmup_epochs']}"
        )
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
            f"--batch-size: expected a multiple of {unit} ({config['samples_per_class']} samples "
            f"per class{_in_processes()}), got {config['batch_size']}"
        )
    try:
        json.dumps(config, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"arguments of losses and miner: expected values that JSON can hold ({error})"
        ) from error
    loss, miner = build_loss_and_miner({**config, "memory_size": 0}, TRIAL_CLASSES)
    size, per_class = config["embedding_size"], config["samples_per_class"]
    try_out(loss, miner, size, per_class, beside_is_mined=config["memory_size"] == 0)
    build_loss_and_miner(config, TRIAL_CLASSES)


def _fit_batchnorm(config: dict[str, Any], given: dict[str, Any], trunk: Trunk) -> None:
    """Switch a default off where there is no BatchNorm to freeze; refuse one that was typed."""
    if config["freeze_batchnorm"] and not has_batchnorm(trunk.module):
        if given.get("freeze_batchnorm"):
            raise UserError(f"--freeze-batchnorm: the trunk {config['trunk']!r} has no BatchNorm")
        config["freeze_batchnorm"] = False


def _fit_batch(config: dict[str, Any], given: dict[str, Any], splits: RetrievalSplits) -> None:
    """Shrink a default batch to what the classes can fill; refuse one that was typed."""
    largest = splits.train.num_classes * config["samples_per_class"]
    largest -= largest % (world_size() * config["samples_per_class"])
    if splits.train.num_classes < 2 * world_size():
        raise UserError(
            f"expected at least 2 training classes for each of {world_size()} processes, got "
            f"{splits.train.num_classes}; start fewer processes"
        )
    if config["batch_size"] <= largest:
        return
    if "batch_size" in given or "samples_per_class" in given:
        raise UserError(
            f"--batch-size: {splits.train.num_classes} training classes of "
            f"{config['samples_per_class']} samples fill a batch of at most {largest}"
            f"{_in_processes()}, got {config['batch_size']}"
        )
    config["batch_size"] = largest


def _in_processes() -> str:
    return f" in {world_size()} processes" if world_size() > 1 else ""


def _set_threads(config: dict[str, Any]) -> None:
    """Threads of this process, for torch and faiss, each of which has its own."""
    import faiss

    config["threads"] = config["threads"] or torch.get_num_threads()
    torch.set_num_threads(config["threads"])
    faiss.omp_set_num_threads(config["threads"])


# --- parts of a run -------------------------------------------------------------------------


def _set_transforms(splits: RetrievalSplits, trunk: Trunk) -> None:
    splits.train.transform = trunk.train_transform
    splits.val.transform = splits.test.transform = trunk.eval_transform


def _record_data(config: dict[str, Any], given: dict[str, Any], splits: RetrievalSplits) -> None:
    """Fit the configuration to the data, of which it then tells."""
    _fit_batch(config, given, splits)
    config["data"] = splits.summary()
    config["split"] = splits.split_kind
    config["pixel_ranges"] = splits.pixel_ranges


def _new_run(lock: RunLock, place: Place, config: dict[str, Any], images: ImageList) -> RunFolder:
    images.read()  # what is wrong with them is said before a name is taken
    losses = config["loss"], config["loss_args"].get("variant"), config["beside"]
    stem = "-".join(map(str, filter(None, (config["dataset"], *losses))))
    run = RunFolder.create(place.parent, place.name, stem, place.resume_if_exists)
    _take(lock, run)
    return run


def _take(lock: RunLock, run: RunFolder) -> None:
    lock.take(run)
    screen.log_to(run.log)
    run.remove_incomplete()


def _write_settings(
    run: RunFolder, config: dict[str, Any], splits: RetrievalSplits, images: ImageList
) -> None:
    run.write_json(CONFIG, config)
    images.write(run)
    header = ("class", "split", "images", "decided by")
    run.write_table("classes.csv", header, splits.class_rows())
    run.write_table("skipped.csv", ("name", "reason"), [(x.name, x.reason) for x in splits.skipped])


def _announce(
    run: RunFolder, config: dict[str, Any], splits: RetrievalSplits, device: torch.device
) -> None:
    shown = {k: v for k, v in config.items() if k in DEFAULTS}
    say(
        f"run folder: {run.path}",
        f"device: {device}, processes: {world_size()}, threads of each: {config['threads']} "
        "(--threads; their number changes the last digits of results)",
        "settings:",
        *textwrap.wrap(", ".join(f"{k}={v}" for k, v in shown.items()), 100, **INDENTED),
        *(
            f"{name}: {x['images']} images of {x['classes']} classes"
            for name, x in splits.summary().items()
        ),
        f"split: {splits.split_kind}",
        f"validation: {splits.val_kind}",
        "",
    )


def _finish(training: Training, run: RunFolder, config: dict[str, Any], seconds: float) -> None:
    trained = training.test_best()
    training.close()
    state = training.state
    tested = {"untrained": state["untrained"], "trained": trained} if trained else {}
    metrics = {
        "dataset": config["dataset"],
        "split": training.splits.split_kind,
        "closed_set": training.splits.closed_set,
        "test_classes": training.splits.test.num_classes,
        **tested,
        "validation": state["best"]["metrics"],
        "primary_metric": PRIMARY_METRIC,
        "best_epoch": state["best"]["epoch"],
        "epochs_trained": state["epoch"],
        "stopped_early": state["stopped_early"],
        "seconds": {"training": state["seconds"], "this_process": seconds},
    }
    run.write_json(METRICS, metrics)
    _show(metrics)
    for lines in (still_rising(metrics), harm(metrics, config), [f"written to {run.path}"]):
        say(*(lines and ["", *lines]))


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


def _report_is_due(run: RunFolder) -> bool:
    """Whether the process was killed before its report, or between an earlier one and its own."""
    page = run.path / report.FILE
    metrics = run.path / METRICS
    return not page.exists() or page.stat().st_mtime_ns < metrics.stat().st_mtime_ns


def _show(metrics: dict[str, Any]) -> None:
    if "trained" in metrics:
        which = "known classes, closed set" if metrics["closed_set"] else "unseen classes"
        title = f"{metrics['dataset']}, {metrics['test_classes']} {which}"
        say("", table(title, {x: metrics[x] for x in ("untrained", "trained")}))
    elif metrics["validation"]:
        title = f"{metrics['dataset']}, {metrics['split']}"
        say("", table(title, {"validation": metrics["validation"]}))
    chosen = f"the best of {metrics['epochs_trained']}"
    if not metrics["validation"]:
        chosen = "the last one; there was no validation"
    say(f"weights of epoch {metrics['best_epoch']}, {chosen}")
