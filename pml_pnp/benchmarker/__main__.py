r"""powerful-benchmarker's command line, with this PNPLoss.

    python -m pml_pnp.benchmarker --experiment_name trial \
        --config_loss_and_miners "[default, with_pnp]"

All of its own flags are taken, and:

    --seed N    seed everything random at the start of each run (powerful-benchmarker seeds nothing)
"""

import sys

from pml_pnp.benchmarker.checkpoints import DamagedCheckpoint
from pml_pnp.benchmarker.command_line import UnknownConfig, main
from pml_pnp.benchmarker.requirements import MissingPackage

if __name__ == "__main__":
    try:
        main()
    except (DamagedCheckpoint, MissingPackage, UnknownConfig) as error:
        sys.exit(f"python -m pml_pnp.benchmarker: error: {error}")
