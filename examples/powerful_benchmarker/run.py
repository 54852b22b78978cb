r"""powerful-benchmarker with this example's data sets, trunk and configs.

    python run.py --experiment_name trial --config_loss_and_miners "[default, with_pnp]"
    python run.py --experiment_name trial --resume_training latest
    python run.py --experiment_name search --bayes_opt_iters 3 \
        --config_loss_and_miners "[default, with_pnp_bayes_opt]"

Flags are those of `python -m pml_pnp.benchmarker`.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from retrieval.errors import UserError  # noqa: E402

CONFIGS = Path(__file__).parent / "configs"


def run(argv: list[str]) -> None:
    """Run one command line of powerful-benchmarker."""
    from pml_pnp.benchmarker.command_line import main

    main(["--root_config_folder", str(CONFIGS), *argv], _parts())


def _parts() -> Iterator[tuple[str, type]]:
    """Import the parts, and with them torch, when everything that is needed has been found."""
    from parts import PARTS

    yield from PARTS


def explained(command: str, function: Callable[[], None]) -> None:
    """Call a function, and exit with a message if something it needs is not there."""
    from pml_pnp.benchmarker.checkpoints import DamagedCheckpoint
    from pml_pnp.benchmarker.command_line import UnknownConfig
    from pml_pnp.benchmarker.requirements import MissingPackage

    try:
        function()
    except (DamagedCheckpoint, MissingPackage, UnknownConfig, UserError) as error:
        sys.exit(f"{command}: error: {error}")


if __name__ == "__main__":
    explained("run.py", lambda: run(sys.argv[1:]))
