"""What a run says of itself: a line after each epoch, and what to try at its end."""

from typing import Any

from .configuration import PNP_ARGS
from .metrics import PRIMARY_METRIC


class Progress:
    """The mean loss of an epoch, its time, and how much is left."""

    def __init__(self, epochs: int):
        self.epochs = epochs
        self.losses: list[float] = []

    def add(self, loss: float) -> None:
        """Count the loss of an iteration."""
        self.losses.append(loss)

    def end_epoch(self) -> float:
        """The mean loss since the last call."""
        mean = sum(self.losses) / len(self.losses)
        self.losses.clear()
        return mean

    def line(
        self,
        state: dict[str, Any],
        loss: float,
        validation: dict[str, float] | None,
        seconds: float,
    ) -> str:
        """The line of the epoch that has just ended.

        Args:
            state: That of the run, this epoch included.
            loss: Mean of the training loss.
            validation: Metrics of this epoch, if there is a validation.
            seconds: How long it took, with its evaluation.
        """
        epoch, best = state["epoch"], state["best"]
        parts = [f"epoch {epoch} of {self.epochs}: training loss {loss:.4f}"]
        if validation:
            parts.append(f"validation MAP@R {validation[PRIMARY_METRIC]:.4f}")
            parts.append(f"best {best['metrics'][PRIMARY_METRIC]:.4f} in epoch {best['epoch']}")
        parts.append(duration(seconds))
        if state["stopped_early"]:
            parts.append(f"stopped, for lack of improvement since epoch {best['epoch']}")
        elif epoch < self.epochs:
            left = state["seconds"] / epoch * (self.epochs - epoch)
            parts.append(f"at most about {duration(left)} left")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """`5.2 s`, `3 min 20 s` or `2 h 5 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"


def still_rising(metrics: dict[str, Any]) -> list[str]:
    """What to say where the last epoch was the best by validation, and nothing elsewhere."""
    last = metrics["epochs_trained"]
    if not metrics["validation"] or not metrics["best_epoch"] == last > 1:
        return []
    return [
        f"Validation was still rising in the last epoch: more than {last} epochs may give a "
        "better result (--epochs)."
    ]


def harm(metrics: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """What to say where training made retrieval worse, and nothing elsewhere."""
    if "trained" not in metrics:
        return []
    before, after = (metrics[x][PRIMARY_METRIC] for x in ("untrained", "trained"))
    if before is None or after is None or after >= before:
        return []
    tries = ["more classes to train on", "a smaller --lr"]
    if config["ema_decay"] == 0:
        tries.append("--ema-decay 0.997")
    if config["dataset"] == "digits" and not config["turned_classes"]:
        tries.append("--turned-classes")
    if config["memory_size"]:
        tries.append("--memory-size 0")
    if config["loss"] != "PNPLoss" or not PNP_ARGS.items() <= config["loss_args"].items():
        arguments = " ".join(f"{name}={value}" for name, value in PNP_ARGS.items())
        tries.append(f"--loss PNPLoss --loss-args {arguments}")
    which = "known" if metrics["closed_set"] else "unseen"
    return [
        f"Training made retrieval of {which} classes worse: MAP@R fell from {before:.4f} to "
        f"{after:.4f}.",
        f"What may help: {'; '.join(tries)}. See docs/training_example.md and docs/retrieval.md.",
    ]
