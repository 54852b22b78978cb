r"""PNPLoss in powerful-benchmarker 0.9.33 (pb), the metric-learning release.

    python -m pml_pnp.benchmarker --experiment_name trial \
        --config_loss_and_miners "[default, with_pnp]"

or, in a script that builds pb's runners itself:

    from pml_pnp import benchmarker

    benchmarker.prepare()                        # before pb is imported
    from powerful_benchmarker.runners.single_experiment_runner import SingleExperimentRunner

    runner = SingleExperimentRunner(...)
    benchmarker.register(runner)
    runner.run()

pb was written for pytorch-metric-learning (PML) 0.9.92. It runs with that, as it is, and with PML
2, for which `pml_pnp.benchmarker.adapters` has what it needs. The files in `requirements/` tell
what was installed for either. Nothing is patched, and pb is not imported, before `prepare` or
`register` is called.
"""

import logging

from pml_pnp.benchmarker.requirements import (
    MissingPackage,
    check_imports,
    check_installed,
    is_there,
)

__all__ = ["MissingPackage", "prepare", "register"]


def prepare(bayes_opt: bool | None = None) -> None:
    """Make pb 0.9.33 importable and runnable in this process; before pb is imported.

    With PML 0.9 nothing of PML is touched. A second call does nothing.

    Args:
        bayes_opt: also what pb's BayesOptRunner needs, Ax. By default where Ax is installed; if it
            does not import there, this is logged.

    Raises:
        MissingPackage: something is not installed, or does not import; the message gives the line
            that installs it. An ImportError.
    """
    _prepare(bool(bayes_opt))
    if bayes_opt is None and is_there("ax"):
        try:
            _prepare(True)
        except Exception as error:  # whatever a release of other years raises
            logging.warning("hyperparameter search is not prepared: %s", error)


def _prepare(bayes_opt: bool) -> None:
    check_installed(bayes_opt)
    from pml_pnp.benchmarker import adapters

    with check_imports(bayes_opt):
        adapters.apply(bayes_opt)


def register(runner) -> None:
    """Let configs of a pb runner name this PNPLoss, ahead of PML's own, and adapted parts.

    Args:
        runner: a SingleExperimentRunner or BayesOptRunner of pb, in a process that was prepared.
    """
    from pml_pnp.benchmarker import adapters
    from pml_pnp.loss import PNPLoss

    parts = [("loss", PNPLoss), *adapters.replacements(), *adapters.replacements_of_pb()]
    for module_type, part in parts:
        runner.register(module_type, part)
