"""train.py under torchrun, whose second process dies once: dying_worker.py MARK ARGUMENTS.

It dies in the middle of the second epoch, and leaves the file MARK, with which it lives on next
time.
"""

import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    from retrieval import commands
    from retrieval.training import Training

    mark = Path(sys.argv[1])
    end_of_iteration = Training._end_of_iteration

    def end_or_die(self, trainer):
        end_of_iteration(self, trainer)
        now = trainer.epoch, trainer.iteration
        if os.environ["RANK"] == "1" and now == (2, 5) and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    Training._end_of_iteration = end_or_die
    sys.exit(commands.run("train", sys.argv[2:], "train.py"))
