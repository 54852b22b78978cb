"""What one setting does: temperature, batch, others, coarse labels. None sees the test classes.

`temperature`: a grid of temperatures, and ones taken from the batch, by MAP@R on `validation`; for
PNPLoss also how many sigmoids are saturated and how large the gradient is, in `signal.csv`.
`batch`: more classes or more examples per class in a batch, by MAP@R on `validation`.
`settings`: the other arguments of PNPLoss, the size of a memory, the dtype of the embeddings and a
temperature that falls, one at a time, at the temperature 0.05, by MAP@R on `validation`.
`coarse`: train with coarse labels on three quarters of the examples of `fit`, and find the fine
labels of the others. What fine labels to train with reach, and no training, stand beside it.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import study_rows as rows
import torch
import tqdm
from candidates import (
    PROBED,
    Params,
    TemperatureOfBatch,
    objective,
    similarities,
    std_of_negatives,
)
from fitting import Outcome, run
from study import UNTRAINED, Study, measure_untrained
from study_data import DataSet, Part
from torch import Tensor, nn
from torch.nn.functional import normalize

from pml_pnp import losses

SEEDS = 3
FIRST_SEED = 101  # not those of the tuning or of the final runs
TEMPERATURES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
SHARES = (0.125, 0.25, 0.375, 0.5, 1.0)
BATCHES = ((7, 4), (14, 4), (28, 4), (56, 4), (14, 2), (14, 8), (14, 16))
SETTINGS_AT = 0.05  # the temperature of what varies something else
COARSE_LOSSES = (
    ("PNP-O", {"anneal": 0.05}),
    ("PNP-Iu", {"anneal": 0.05}),
    ("PNP-Ib", {"anneal": 0.05}),
    ("PNP-Ds", {"anneal": 0.05}),
    ("PNP-Dq", {"anneal": 0.05}),
    ("PNP-Dq", {"anneal": 0.05, "alpha": 4.0}),
    ("SmoothAP", {"temperature": 0.05}),
    ("MultiSimilarity", {}),
    ("SupCon", {}),
)
SIGNAL_FILE = "signal"
# |t| / temperature beyond which the slope of the sigmoid is below a hundredth of its largest.
SATURATED = 2 * float(np.arccosh(10))


@dataclasses.dataclass(frozen=True)
class Probe:
    """A candidate at one setting.

    Attributes:
        loss: the candidate.
        setting: tells it from others of the same candidate.
        params: what differs from the candidate's defaults.
        data: what it runs on.
        parts: () -> what to train on, what to measure on.
        measured_on: what the latter is, for the row.
    """

    loss: str
    setting: str
    params: Params
    data: DataSet
    parts: Callable[[], tuple[Part, Part]]
    measured_on: str


def run_probes(study: Study, stage: str, seeds: int = SEEDS) -> None:
    """Run the probes of a stage that have no row yet."""
    done = rows.done(study.rows(stage))
    wanted = {*study.losses, *PROBED, UNTRAINED}
    todo = [
        (seed, probe)
        for seed in range(FIRST_SEED, FIRST_SEED + seeds)
        for probe in PROBES[stage](study)
        if (stage, probe.loss, probe.setting, str(seed)) not in done and probe.loss in wanted
    ]
    for seed, probe in tqdm.tqdm(todo, desc=f"{study.data.name} {stage}"):
        params, outcome, measurements = _run(study, probe, seed)
        row = rows.row_of(
            probe.data,
            stage,
            probe.loss,
            probe.setting,
            seed,
            probe.measured_on,
            params,
            outcome,
            study.device,
        )
        rows.add(study.path, row)
        if stage == "temperature":
            same = ("dataset", "loss", "setting", "seed", "machine", "torch", "date", "command")
            for measurement in measurements:
                rows.add(
                    study.path.with_name(f"{SIGNAL_FILE}.csv"),
                    {**{k: row[k] for k in same}, **measurement},
                )


def _run(study: Study, probe: Probe, seed: int) -> tuple[Params, Outcome, list[dict[str, str]]]:
    train, measured = probe.parts()
    if probe.loss == UNTRAINED:
        return {}, measure_untrained(probe.data, measured, seed), []
    params = {**study.defaults(probe.loss), **probe.params}
    signal = Signal(probe.data.steps)

    def make(classes: int) -> nn.Module:
        signal.objective = objective(probe.loss, params, classes)
        return signal.objective

    outcome = run(
        probe.data,
        train,
        measured,
        make,
        params["learning_rate"],
        params.get("proxy_learning_rate", 0.0),
        seed,
        signal,
    )
    return params, outcome, signal.measurements


# --- what is probed ---------------------------------------------------------------------------


def temperature(study: Study) -> Iterator[Probe]:
    """Fixed temperatures, and shares of the spread of the negatives of a batch."""
    graded = (
        ("PNP-O", "anneal", {}),
        ("PNP-Ds", "anneal", {}),
        ("PNP-Dq", "anneal", {"alpha": 1.0}),
        ("PNP-Dq", "anneal", {"alpha": 4.0}),
        ("SmoothAP", "temperature", {}),
    )
    for loss, name, params in graded:
        label = "alpha 4, " if params.get("alpha") == 4.0 else ""
        for value in TEMPERATURES:
            yield _held_out(study, loss, f"{label}{value}", {**params, name: value})
    for loss in ("PNP-Ds auto 1/2", "PNP-Dq auto 1/2"):
        for share in SHARES:
            yield _held_out(study, loss, f"{share}", {"share": share})


def batch(study: Study) -> Iterator[Probe]:
    """Batches of other shapes, at the same number of steps."""
    fit = len(study.part("fit").classes)
    for loss, params in (
        ("PNP-O", {"anneal": 0.05}),
        ("PNP-Ds", {"anneal": 0.05}),
        ("SmoothAP", {}),
        ("MultiSimilarity", {}),
        ("SupCon", {}),
    ):
        for classes, examples in (*BATCHES, *study.data.large_batches):
            if classes <= fit:
                data = dataclasses.replace(
                    study.data, classes_per_batch=classes, examples_per_class=examples
                )
                setting = f"{classes} x {examples}"
                yield _held_out(study, loss, setting, params, data)


def settings(study: Study) -> Iterator[Probe]:
    """One argument at a time."""
    one_at_a_time = (
        ("PNP-Ds", "include_self", (True, False)),
        ("PNP-Dq", "alpha", (0.5, 1.0, 2.0, 4.0, 8.0)),
        ("PNP-Ib", "b", (0.5, 2.0, 8.0)),
        ("PNP-Ds, memory", "memory_size", (512, 1024, 2048, 4096)),
        ("PNP-Ds, rounded", "dtype", ("bfloat16", "float16")),
    )
    for loss, name, values in one_at_a_time:
        for value in values:
            params = {"anneal": SETTINGS_AT, name: value}
            yield _held_out(study, loss, f"{name} {value}", params)
    for first, last in ((0.2, 0.05), (0.2, 0.02), (0.1, 0.01), (0.02, 0.2)):
        params = {"first": first, "last": last, "steps": study.data.steps}
        yield _held_out(study, "PNP-Ds, falling temperature", f"{first} to {last}", params)


def coarse(study: Study) -> Iterator[Probe]:
    """Coarse labels to train with, fine ones to measure with."""
    number = len(study.part("fit").coarse.unique())
    size = study.data.classes_per_batch * study.data.examples_per_class
    classes = min(number, 10)
    data = dataclasses.replace(
        study.data, classes_per_batch=classes, examples_per_class=size // classes
    )
    split = coarse_and_fine(study.part("fit"))
    for loss, params in COARSE_LOSSES:
        setting = ", ".join(f"{k} {v:g}" for k, v in params.items())
        yield Probe(loss, setting, params, data, lambda: split, "held-out examples")
    fine_split = coarse_and_fine(study.part("fit"), fine=True)
    for loss, params in (("PNP-Ds", {"anneal": 0.05}), ("SupCon", {}), (UNTRAINED, {})):
        setting = "" if loss == UNTRAINED else "fine labels"
        yield Probe(loss, setting, params, study.data, lambda: fine_split, "held-out examples")


PROBES: dict[str, Callable[[Study], Iterable[Probe]]] = {
    "temperature": temperature,
    "batch": batch,
    "settings": settings,
    "coarse": coarse,
}


def _held_out(study, loss, setting, params, data=None) -> Probe:
    return Probe(
        loss,
        setting,
        params,
        data or study.data,
        lambda: (study.part("fit"), study.part("validation")),
        "validation",
    )


def coarse_and_fine(part: Part, fine: bool = False) -> tuple[Part, Part]:
    """Three of four examples of every class, with coarse labels; the others, with fine ones.

    With `fine`, all have fine ones.
    """
    order = torch.argsort(part.labels, stable=True)
    labels = part.labels[order]
    within = torch.arange(len(labels), device=labels.device) - torch.searchsorted(labels, labels)
    first, second = order[within % 4 != 3], order[within % 4 == 3]
    held_out = Part(part.inputs[second], part.labels[second], part.classes, part.coarse[second])
    if fine:
        labels = part.labels[first]
        return Part(part.inputs[first], labels, part.classes, part.coarse[first]), held_out
    names, numbers = part.coarse[first].unique(return_inverse=True)
    classes = tuple(str(x) for x in names.tolist())
    return Part(part.inputs[first], numbers, classes, part.coarse[first]), held_out


# --- the signal that a loss gives ---------------------------------------------------------------


class Signal:
    """Measures what PNPLoss and its gradient look like, at the first, middle and last step.

    Args:
        steps: of the run.

    Attributes:
        objective: the loss; to be set before the first step.
        measurements: what was found.
    """

    def __init__(self, steps: int):
        self.objective: nn.Module | None = None
        self.at = {0: "first", steps // 2: "middle", steps - 1: "last"}
        self.measurements: list[dict[str, str]] = []

    def __call__(self, step: int, embeddings: Tensor, labels: Tensor) -> None:
        """Look at a batch; training is not touched."""
        module = self.objective
        loss = module.loss if isinstance(module, TemperatureOfBatch) else module
        if step not in self.at or not isinstance(loss, losses.PNPLoss):
            return
        x = normalize(embeddings.detach()).requires_grad_()
        (gradient,) = torch.autograd.grad(module(x, labels), x)
        self.measurements.append(
            {
                "step": self.at[step],
                "anneal": f"{loss.anneal:.5g}",
                "saturated": f"{saturated_share(x, labels, loss.anneal):.5f}",
                "gradient_norm": f"{gradient.norm().item():.5g}",
                "std_of_negatives": f"{std_of_negatives(x, labels):.5g}",
            }
        )


@torch.no_grad()
def saturated_share(embeddings: Tensor, labels: Tensor, temperature: float) -> float:
    """Share of the sigmoids of (query, positive, negative) whose slope is almost zero.

    Without those of the query as its own positive.
    """
    s, positives, negatives = similarities(embeddings, labels)
    query, positive = positives.nonzero(as_tuple=True)
    t = (s[query] - s[query, positive][:, None]).abs() / temperature
    return (t > SATURATED)[negatives[query]].float().mean().item()
