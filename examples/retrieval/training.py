"""Everything that PML's trainer is made of, and what happens when an epoch ends."""

import json
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.trainers import MetricLossOnly
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pml_pnp import GradCache, PNPLoss
from pml_pnp.distributed import DistributedLossWrapper, DistributedMinerWrapper

from .by_name import build_loss, build_miner
from .data import RetrievalSplits
from .errors import UserError
from .metrics import build_tester, metric_names, metrics_of, readable
from .network import build_embedder
from .processes import (
    gather,
    launched_by_torchrun,
    on_rank_zero,
    parallel,
    rank,
    say,
    unwrap,
    world_size,
)
from .progress import Progress
from .records import Records
from .run_folder import CONFIG, RunFolder, own_state, restore, shared_state
from .seeding import seed_everything
from .trunks import Trunk

RECORDS_PER_EPOCH = 5


class RetrievalTrainer(MetricLossOnly):
    """MetricLossOnly whose trunk can run in mixed precision, and that can average its weights.

    The embedder and the loss stay in float32: a similarity rounded to bfloat16 is off by up to
    0.002, which a ranking loss then divides by a temperature of about 0.01.

    A loss that collects statistics does so in the iterations that are recorded, because for a large
    batch counting takes longer than the loss itself.
    """

    def __init__(self, *args, amp: bool = False, ema_decay: float = 0.0, **kwargs):
        super().__init__(*args, **kwargs)
        device_type = self.data_device.type
        self.autocast = torch.autocast(
            device_type,
            dtype=torch.float16 if device_type == "cuda" else torch.bfloat16,
            enabled=amp,
        )
        # bfloat16 has float32's range, so only float16 gradients need scaling.
        self.scaler = torch.amp.GradScaler(device_type, enabled=amp and device_type == "cuda")
        self.averages = {}
        if ema_decay:
            average = get_ema_multi_avg_fn(ema_decay)
            self.averages = {
                name: AveragedModel(unwrap(model), multi_avg_fn=average, use_buffers=True)
                for name, model in self.models.items()
            }
        self.record_every = max(1, self.iterations_per_epoch // RECORDS_PER_EPOCH)
        self.counting = [
            module
            for loss in self.loss_funcs.values()
            for module in loss.modules()
            if getattr(module, "collect_stats", False)
        ]

    @property
    def is_recorded(self) -> bool:
        """Whether the records get this iteration."""
        return self.iteration % self.record_every == 0

    @property
    def trained_models(self) -> dict[str, torch.nn.Module]:
        """What training yields: the averages of the weights if there are any, or the models."""
        if self.averages:
            return {name: average.module for name, average in self.averages.items()}
        return {name: unwrap(model) for name, model in self.models.items()}

    @property
    def batch_loss(self) -> float:
        """The loss of the batch of all processes, as one process would have it."""
        return float(self.losses["total_loss"].detach())

    def get_trunk_output(self, data: torch.Tensor) -> torch.Tensor:
        """The trunk's features, in float32."""
        with self.autocast:
            return super().get_trunk_output(data).float()

    def calculate_loss(self, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        """The loss of a batch, with statistics if this iteration is recorded."""
        for module in self.counting:
            module.collect_stats = self.is_recorded
        super().calculate_loss(batch)

    def backward(self) -> None:
        """Backward of the scaled loss."""
        self.scaler.scale(self.losses["total_loss"]).backward()

    def step_optimizers(self) -> None:
        """Step each optimizer unless its gradients overflowed, and update the averages."""
        for optimizer in self.optimizers.values():
            self.scaler.step(optimizer)
        self.scaler.update()
        for name, average in self.averages.items():
            average.update_parameters(unwrap(self.models[name]))


class PartOfBatches(MPerClassSampler):
    """What one process draws of each batch of all processes together; alone it draws all.

    Every process draws the same batches, if numpy is seeded alike, and takes the part that belongs
    to its rank.
    """

    def __iter__(self) -> Iterator[int]:
        """Indices of this process's part of one batch after the other."""
        drawn = list(super().__iter__())
        part = self.batch_size // world_size()
        for start in range(rank() * part, len(drawn), self.batch_size):
            yield from drawn[start : start + part]

    def __len__(self) -> int:
        """How many they are."""
        return super().__len__() // world_size()


def build_trainer(
    config: dict[str, Any], splits: RetrievalSplits, trunk: Trunk, device: torch.device
) -> RetrievalTrainer:
    """The trainer with models, loss, miner, optimizers and sampler as configured."""
    embedder = build_embedder(trunk, config)
    loss, miner = build_loss_and_miner(config, splits.train.num_classes)
    models = {
        "trunk": parallel(_in_chunks(trunk.module.to(device), config["grad_cache"]), device),
        "embedder": parallel(embedder.to(device), device),
    }
    mining = {}
    if miner is not None and config["memory_size"] == 0:
        if launched_by_torchrun():
            is_divided = any(isinstance(module, PNPLoss) for module in loss.modules())
            miner = DistributedMinerWrapper(miner, efficient=is_divided)
        mining = {"tuple_miner": miner}
    loss = loss.to(device)
    if launched_by_torchrun():
        loss = parallel(DistributedLossWrapper(loss, efficient="exact"), device)
    trained = {**models, "metric_loss": loss}
    optimizers = {
        f"{name}_optimizer": torch.optim.Adam(
            module.parameters(),
            lr=config["loss_lr"] if name == "metric_loss" else config["lr"],
            weight_decay=config["weight_decay"],
        )
        for name, module in trained.items()
        if any(True for _ in module.parameters())
    }
    iterations = max(1, len(splits.train) // config["batch_size"])
    schedulers = {
        f"{name.removesuffix('_optimizer')}_scheduler_by_iteration": LambdaLR(
            optimizer, lambda step: schedule(config, step / iterations, 1 / iterations)
        )
        for name, optimizer in optimizers.items()
        if config["lr_milestones"] or config["lr_cosine"] or config["warmup_epochs"]
    }
    # From here on every process augments in its own way; numpy draws the batch of all.
    seed_everything(config["seed"] + rank())
    np.random.seed(config["seed"] % 2**32)
    return RetrievalTrainer(
        models,
        optimizers,
        config["batch_size"] // world_size(),
        {"metric_loss": loss},
        splits.train,
        mining_funcs=mining,
        data_device=device,
        # As long as an epoch, so that each epoch begins with a new pass: a run that is resumed
        # there draws what the uninterrupted one would have drawn.
        sampler=PartOfBatches(
            splits.train.labels,
            config["samples_per_class"],
            config["batch_size"],
            iterations * config["batch_size"],
        ),
        iterations_per_epoch=iterations,
        lr_schedulers=schedulers,
        freeze_trunk_batchnorm=config["freeze_batchnorm"],
        dataloader_num_workers=config["workers"],
        amp=config["amp"],
        ema_decay=config["ema_decay"],
    )


def schedule(config: dict[str, Any], epochs: float, iteration: float) -> float:
    """What the learning rates are multiplied by.

    Args:
        config: The configuration of the run.
        epochs: How many have been trained.
        iteration: How much of an epoch the coming iteration is.
    """
    warmup = config["warmup_epochs"]
    if epochs < warmup:
        return (epochs + iteration) / warmup
    if config["lr_cosine"]:
        return (1 + math.cos(math.pi * (epochs - warmup) / (config["epochs"] - warmup))) / 2
    passed = sum(epochs >= x for x in config["lr_milestones"])
    return config["lr_gamma"] ** passed


def _follow_schedules(trainer: RetrievalTrainer) -> None:
    """Set the rates of the coming iteration, where a checkpoint has those of a shorter cosine."""
    for scheduler in trainer.lr_schedulers.values():
        factors = (factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas)
        for group, rate, factor in zip(
            scheduler.optimizer.param_groups, scheduler.base_lrs, factors, strict=True
        ):
            group["lr"] = rate * factor


def _in_chunks(trunk: torch.nn.Module, chunk_size: int) -> torch.nn.Module:
    return GradCache(trunk, chunk_size) if chunk_size else trunk


def build_loss_and_miner(
    config: dict[str, Any], num_classes: int
) -> tuple[torch.nn.Module, torch.nn.Module | None]:
    """The loss as configured, with its memory, and the miner."""
    miner = build_miner(config["miner"], config["miner_args"]) if config["miner"] else None
    loss = build_loss(
        config["loss"],
        config["loss_args"],
        num_classes,
        config["embedding_size"],
        config["memory_size"],
        miner,
        config["beside"],
        config["beside_args"],
    )
    return loss, miner


NO_STATE: dict[str, Any] = {
    "epoch": 0,
    "stopped_early": False,
    "seconds": 0.0,
    "untrained": None,
    "best": None,
}


def check_complete(checkpoint: dict[str, Any] | None) -> None:
    """Raise UserError unless a checkpoint has all that a run continues from."""
    if checkpoint is None:
        return
    if missing := {*NO_STATE, "records", "shared", "own"} - checkpoint.keys():
        raise UserError(
            "the checkpoint last.pt does not fit this program; another version of it may have "
            f"written it (no {min(missing)!r}). A new run with the same settings: --config "
            "config.json of this one"
        )


class Training:
    """A trainer with its records, evaluation, early stopping and checkpoints."""

    def __init__(
        self,
        trainer: RetrievalTrainer,
        splits: RetrievalSplits,
        run: RunFolder,
        config: dict[str, Any],
    ):
        self.trainer = trainer
        self.splits = splits
        self.run = run
        self.config = config
        self.tester = build_tester(trainer.data_device, config["workers"], config["recall_at"])
        self.progress = Progress(config["epochs"])
        self.always_zero = True  # every loss of this process so far
        self.state = dict(NO_STATE)

    def start_or_continue(self, checkpoint: dict[str, Any] | None) -> None:
        """Take the checkpoint's place, or evaluate the untrained net and save the first one."""
        epoch = 0
        if checkpoint is not None:
            self.state = {k: checkpoint[k] for k in self.state}
            epoch = self.state["epoch"]
            self.always_zero = epoch == 0  # unknown of what was trained before
            self._check_recorded()
            if self.state["best"]:  # a kill may have come before it was written
                on_rank_zero(lambda: self.run.save_best(self.state))
        on_rank_zero(lambda: self._open_records(checkpoint["records"] if checkpoint else {}))
        if checkpoint is None:
            self.state["untrained"] = on_rank_zero(self.test)
            self._save()
        else:
            restore(self.trainer, checkpoint["shared"], checkpoint["own"][rank()])
            trained_for = json.loads(checkpoint.get("config") or "{}").get("epochs")
            if trained_for != self.config["epochs"]:
                _follow_schedules(self.trainer)
            say(f"continues after epoch {epoch} of {self.config['epochs']}", "")

    def _check_recorded(self) -> None:
        best = self.state["best"] or {}
        recorded = self.state["untrained"] or best.get("metrics")
        missing = recorded and set(metric_names(self.config["recall_at"])) - recorded.keys()
        if missing:
            raise UserError(
                f"--resume: the run has not recorded {readable(min(missing))}, so its --recall-at "
                f"in {CONFIG} cannot be {self.config['recall_at']}"
            )

    def train(self) -> None:
        """Train until the last epoch or until validation no longer improves."""
        self.trainer.end_of_iteration_hook = self._end_of_iteration
        self.trainer.end_of_epoch_hook = self._end_of_epoch
        self.epoch_began = time.perf_counter()
        self.started = self.epoch_began - self.state["seconds"]
        if not self.state["stopped_early"] and self.state["epoch"] < self.config["epochs"]:
            self.trainer.train(self.state["epoch"] + 1, self.config["epochs"])

    def test(self) -> dict[str, float] | None:
        """Metrics of the test with the weights as they are, if there is one; on rank 0 only.

        Where the data set has several test sets, those of each follow, as `small/...`.
        """
        if not len(self.splits.test):
            return None
        # A tester of its own: the records hold only what may be looked at to choose an epoch.
        config = self.config
        tester = build_tester(
            self.trainer.data_device,
            config["workers"],
            config["recall_at"],
            self.splits.test.roles,
        )
        models = self.trainer.trained_models
        tests = self.splits.tests()
        tester.test(tests, 0, models["trunk"], models["embedder"])
        metrics = metrics_of(tester, "test")
        for part in list(tests)[1:]:
            metrics |= {f"{part}/{name}": x for name, x in metrics_of(tester, part).items()}
        return metrics

    def test_best(self) -> dict[str, float] | None:
        """Metrics of the test with the weights of the best epoch; on rank 0 only."""
        for name, model in self.trainer.trained_models.items():
            model.load_state_dict(self.state["best"]["models"][name])
        return self.test()

    def close(self) -> None:
        """Finish the records."""
        if rank() == 0:
            self.records.close()

    def _open_records(self, files: dict[str, torch.Tensor]) -> None:
        self.records = Records(self.run, self.tester, files)
        self.evaluate = self.records.evaluation(self.splits, self.config["patience"])

    def _end_of_iteration(self, trainer: RetrievalTrainer) -> None:
        loss = trainer.batch_loss
        self.always_zero = self.always_zero and loss == 0
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is no longer finite in epoch {trainer.epoch}, iteration "
                f"{trainer.iteration + 1}; try a smaller --lr"
            )
        self.progress.add(loss)
        if rank() == 0:
            self.records.add(trainer)

    def _end_of_epoch(self, trainer: RetrievalTrainer) -> bool:
        if self.always_zero:
            say(
                "warning: the loss has been zero since the first step, so nothing is learned; "
                "does every batch hold several classes, and images that are not alike?"
            )
        keep_going = on_rank_zero(lambda: self._evaluate(trainer))
        self.state["epoch"] = trainer.epoch
        self.state["stopped_early"] = not keep_going
        now = time.perf_counter()
        self.state["seconds"] = now - self.started
        self._say_epoch(now - self.epoch_began)
        self.epoch_began = now
        self._save()
        return keep_going

    def _say_epoch(self, seconds: float) -> None:
        loss = self.progress.end_epoch()
        if rank() == 0:
            validation = metrics_of(self.tester, "val") if len(self.splits.val) else None
            say(self.progress.line(self.state, loss, validation, seconds))

    def _evaluate(self, trainer: RetrievalTrainer) -> bool:
        """Validate, keep the weights if they are the best; returns whether to go on."""
        if not len(self.splits.val):
            self.records.save()
            self._keep_weights(trainer, None)
            return True
        models = trainer.models
        trainer.models = trainer.trained_models  # the hook evaluates these
        try:
            keep_going = self.evaluate(trainer)
        finally:
            trainer.models = models
        if self.records.best_epoch() == trainer.epoch:
            self._keep_weights(trainer, metrics_of(self.tester, "val"))
        return keep_going

    def _keep_weights(self, trainer: RetrievalTrainer, metrics: dict[str, float] | None) -> None:
        weights = {
            name: {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
            for name, model in trainer.trained_models.items()
        }
        if not all(bool(x.isfinite().all()) for model in weights.values() for x in model.values()):
            raise UserError(
                f"the weights are no longer finite after epoch {trainer.epoch}; try a smaller --lr"
            )
        self.state["best"] = {"epoch": trainer.epoch, "metrics": metrics, "models": weights}

    def _save(self) -> None:
        own = gather(own_state(self.trainer))
        on_rank_zero(
            lambda: self.run.save_checkpoint(
                {
                    **self.state,
                    "shared": shared_state(self.trainer),
                    "own": own,
                    "config": json.dumps(self.config),
                    "records": self.records.files(),
                }
            )
        )
