"""train.py under torchrun, whose second process dies once: dying_worker.py MARK ARGUMENTS.

It dies at the end of the first epoch, and leaves the file MARK, with which it lives on next time.
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
    end_of_epoch = Training._end_of_epoch

    def end_or_die(self, trainer):
        keep_going = end_of_epoch(self, trainer)
        if os.environ["RANK"] == "1" and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return keep_going

    Training._end_of_epoch = end_or_die
    sys.exit(commands.run("train", sys.argv[2:], "train.py"))
