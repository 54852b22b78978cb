r"""powerful-benchmarker with this example's data sets, trunk and configs.

    python run.py --experiment_name trial --config_loss_and_miners [default, with_pnp]
    python run.py --experiment_name trial --resume_training latest
    python run.py --experiment_name search --bayes_opt_iters 3 \
        --config_loss_and_miners [default, with_pnp_bayes_opt]

Flags are those of `python -m pml_pnp.benchmarker`.
"""

import sys
from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"


def run(argv: list[str]) -> None:
    """Run one command line of powerful-benchmarker."""
    from parts import PARTS

    from pml_pnp.benchmarker.command_line import main

    main(["--root_config_folder", str(CONFIGS), *argv], PARTS)


if __name__ == "__main__":
    from pml_pnp.benchmarker.requirements import MissingPackage

    try:
        run(sys.argv[1:])
    except MissingPackage as error:
        sys.exit(f"run.py: error: {error}")
