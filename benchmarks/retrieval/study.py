"""The runs of the study, stage by stage, each left out if it has a row.

`untrained`: the network before training, or the features that it is given, measured on `test`.
`untuned`: every candidate at its defaults, trained on all training classes, measured on `test`.
`tune`: optuna's trials, trained on `fit`, judged by MAP@R on `validation`; the first is the
default.
`tuned`: the best trial's setting, trained on all training classes, measured on `test`.
`longer`: the same with three times the steps.
`splits`: every candidate at its defaults on other splits of the classes; the seed of a run is that
of its split.

The seeds of `untuned` and `tuned` are the same, so that the runs of two losses are pairs.
"""

import copy
import dataclasses
import json
import time
import zlib
from collections.abc import Callable, Iterable
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import optuna
import study_rows as rows
import torch
import tqdm
from candidates import (
    CANDIDATES,
    PROXY_LEARNING_RATE,
    Params,
    candidate,
    objective,
)
from fitting import METRICS, Outcome, retrieval_metrics, run
from networks import embed
from optuna.distributions import BaseDistribution, FloatDistribution
from study_data import DataSet, Part, other_split

TRIALS = 20
RATE_RANGE = 10.0  # of the learning rates that are searched, over and under the untuned runs'
LONGER = 3  # times the steps
SEEDS = 10
SEED_OF_TRIALS = 0  # the final runs have 1, 2, ...
UNTRAINED = "untrained"  # a stage, and the name of its only row
TRIALS_AT_RANDOM = 8  # before TPE models what they found
OBJECTIVE = METRICS[0]
CPU = torch.device("cpu")


class Study:
    """The study of one data set.

    Args:
        data: the data set.
        data_root: where the data is.
        results: the folder of the CSV files.
        database: the SQLite file of optuna; made of the rows where it lacks them.
        losses: the candidates to run, all by default.
        device: where networks and losses are.
        rate_range: tuning searches from the untuned runs' learning rate over this to it times this.
    """

    def __init__(
        self,
        data: DataSet,
        data_root: str | None,
        results: Path,
        database: Path,
        losses: Iterable[str] | None = None,
        device: torch.device = CPU,
        rate_range: float = RATE_RANGE,
    ):
        self.data = data
        self.losses = list(CANDIDATES if losses is None else losses)
        self.path = rows.path_of(data.name, results)
        self.database = database
        self.device = device
        self.rate_range = rate_range
        self.part: Callable[[str], Part] = cache(partial(self._read, data_root))

    def _read(self, data_root: str | None, part: str) -> Part:
        return self.data.read(part, data_root).to(self.device)

    def rows(self, stage: str | None = None) -> list[rows.Row]:
        """The rows so far, of one stage or of all."""
        return [r for r in rows.read(self.path) if stage in (None, r["stage"])]

    def untrained(self) -> None:
        """Measure what retrieves without training."""
        if not self.rows(UNTRAINED):
            outcome = measure_untrained(self.data, self.part("test"))
            self.add(UNTRAINED, UNTRAINED, "", 1, "test", {}, outcome)

    def untuned(self, seeds: int = SEEDS) -> None:
        """Run the defaults of every candidate."""
        settings = {name: self.defaults(name) for name in self.losses}
        self._measure("untuned", settings, seeds)

    def splits(self, seeds: int = SEEDS) -> None:
        """Run the defaults of every candidate on other splits into training and test classes.

        Raises:
            SystemExit: a data set whose test has only some examples of its classes.
        """
        if not self.data.test_is_whole:
            raise SystemExit(
                f"--stages splits: {self.data.name} reads only some examples of its test classes, "
                "which would then be trained on"
            )

        @lru_cache(maxsize=1)  # the losses of a seed follow each other, and a split is a copy
        def parts(seed: int) -> tuple[Part, Part]:
            return other_split(self.part("training"), self.part("test"), seed)

        settings = {name: self.defaults(name) for name in self.losses}
        self._measure("splits", settings, seeds, parts)

    def tuned(self, seeds: int = SEEDS, trials: int = TRIALS) -> None:
        """Run the best setting of every loss whose trials are complete."""
        self._measure("tuned", self.best_settings(trials), seeds)

    def longer(self, seeds: int = SEEDS, trials: int = TRIALS) -> None:
        """Run the same settings with three times the steps."""
        longer = copy.copy(self)
        longer.data = dataclasses.replace(self.data, steps=LONGER * self.data.steps)
        longer._measure("longer", self.best_settings(trials), seeds)

    def best_settings(self, trials: int = TRIALS) -> dict[str, Params]:
        """The best trial of every loss that has so many."""
        best = {}
        of_trials = self.rows("tune")
        for name in self.losses:
            own = [r for r in of_trials if r["loss"] == name and int(r["setting"]) < trials]
            if CANDIDATES[name].tuned and len(own) == trials:
                best[name] = json.loads(max(own, key=lambda r: float(r[OBJECTIVE]))["parameters"])
        return best

    def tune(self, trials: int = TRIALS) -> None:
        """Run the trials that are missing, a loss after the other."""
        for name in self.losses:
            if CANDIDATES[name].tuned:
                self._tune(name, trials)

    def defaults(self, name: str) -> Params:
        """The parameters of a candidate's untuned runs."""
        params = {**candidate(name).defaults, "learning_rate": self.data.learning_rate}
        if "proxy_learning_rate" in candidate(name).space:
            params["proxy_learning_rate"] = PROXY_LEARNING_RATE
        return params

    def learning_rates(self) -> BaseDistribution:
        """What tuning searches."""
        usual = self.data.learning_rate
        return FloatDistribution(usual / self.rate_range, usual * self.rate_range, log=True)

    def _measure(
        self,
        stage: str,
        settings: dict[str, Params],
        seeds: int,
        parts: Callable[[int], tuple[Part, Part]] | None = None,
    ) -> None:
        """Run every setting with every seed, on the parts of that seed or on those of the data."""
        done = rows.done(self.rows(stage))
        todo = [
            (seed, name)
            for seed in range(1, seeds + 1)
            for name in settings
            if (stage, name, "", str(seed)) not in done
        ]
        for seed, name in tqdm.tqdm(todo, desc=f"{self.data.name} {stage}"):
            train, test = parts(seed) if parts else (self.part("training"), self.part("test"))
            outcome = self.fit(name, settings[name], seed, train, test)
            self.add(stage, name, "", seed, "test", settings[name], outcome)

    def fit(self, name: str, params: Params, seed: int, train: Part, measured: Part) -> Outcome:
        """One run of a candidate."""
        return run(
            self.data,
            train,
            measured,
            lambda classes: objective(name, params, classes),
            params["learning_rate"],
            params.get("proxy_learning_rate", PROXY_LEARNING_RATE),
            seed,
        )

    def add(self, stage, name, setting, seed, measured_on, params, outcome) -> dict[str, Any]:
        """Write the row of a run."""
        row = rows.row_of(
            self.data, stage, name, setting, seed, measured_on, params, outcome, self.device
        )
        rows.add(self.path, row)
        return row

    def _tune(self, name: str, trials: int) -> None:
        space = {**CANDIDATES[name].space, "learning_rate": self.learning_rates()}
        study = self._optuna_study(name, space)
        number = len(study.get_trials(states=[optuna.trial.TrialState.COMPLETE]))
        for trial_number in tqdm.trange(
            number, trials, desc=f"{self.data.name} tune {name}", initial=number, total=trials
        ):
            if trial_number == 0:
                study.enqueue_trial(self.defaults(name), skip_if_exists=True)
            # So that a resumed study draws what an uninterrupted one would have drawn.
            study.sampler = _sampler(name, trial_number)
            trial = study.ask(space)
            parts = self.part("fit"), self.part("validation")
            outcome = self.fit(name, trial.params, SEED_OF_TRIALS, *parts)
            setting = str(trial_number)
            row = self.add(
                "tune", name, setting, SEED_OF_TRIALS, "validation", trial.params, outcome
            )
            study.tell(trial, float(row[OBJECTIVE]))

    def _optuna_study(self, name: str, space) -> optuna.Study:
        """The study of a loss, with all trials that have a row."""
        self.database.parent.mkdir(parents=True, exist_ok=True)
        study = optuna.create_study(
            storage=f"sqlite:///{self.database}",
            study_name=f"{self.data.name}, {name}",
            direction="maximize",
            load_if_exists=True,
        )
        for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):  # killed
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        # Rows are written first: a kill between the two leaves a trial that the file lacks.
        known = len(study.get_trials(states=[optuna.trial.TrialState.COMPLETE]))
        of_loss = [r for r in self.rows("tune") if r["loss"] == name]
        for row in sorted(of_loss, key=lambda r: int(r["setting"]))[known:]:
            study.add_trial(
                optuna.trial.create_trial(
                    params=json.loads(row["parameters"]),
                    distributions=space,
                    value=float(row[OBJECTIVE]),
                )
            )
        return study


def measure_untrained(data: DataSet, measured: Part, seed: int = 1) -> Outcome:
    """What a network retrieves before training, or the features that it is given."""
    torch.manual_seed(seed)
    begin = time.process_time()
    network = data.untrained().to(measured.inputs.device)
    metrics = retrieval_metrics(embed(network, measured.inputs), measured.labels)
    return Outcome(metrics, 0.0, time.process_time() - begin)


def _sampler(name: str, trial: int) -> optuna.samplers.TPESampler:
    seed = zlib.crc32(f"{name} {trial}".encode())
    return optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=TRIALS_AT_RANDOM, multivariate=True
    )
