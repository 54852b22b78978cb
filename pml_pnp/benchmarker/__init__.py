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

from pml_pnp.benchmarker.requirements import MissingPackage, check_imports, check_installed

__all__ = ["MissingPackage", "prepare", "register"]


def prepare(bayes_opt: bool = False) -> None:
    """Make pb 0.9.33 importable and runnable in this process; before pb is imported.

    With PML 0.9 nothing of PML is touched. A second call does nothing.

    Args:
        bayes_opt: also what pb's BayesOptRunner needs, Ax.

    Raises:
        MissingPackage: something is not installed, or does not import; the message gives the line
            that installs it. An ImportError.
    """
    check_installed(bayes_opt)
    from pml_pnp.benchmarker import adapters

    with check_imports(bayes_opt):
        adapters.apply(bayes_opt)


def register(runner) -> None:
    """Let configs of a pb runner name this PNPLoss, ahead of PML's own, and adapted parts of PML 2.

    Args:
        runner: a SingleExperimentRunner or BayesOptRunner of pb, in a process that was prepared.
    """
    from pml_pnp.benchmarker import adapters, checkpoints
    from pml_pnp.loss import PNPLoss

    runner.register("loss", PNPLoss)
    for module_type, part in adapters.replacements():
        runner.register(module_type, part)
    for api_parser in checkpoints.api_parsers():
        runner.register("api_parser", api_parser)
