"""One process of torchrun that runs train.py several times: train_worker.py MARK RUNS.

RUNS is JSON, [[port, augmented, arguments], ...]. Every run makes a process group of its own, as if
it had been launched alone; only the imports are shared. Without a port it takes the store of
torchrun, which can be used once. The first run that fails ends them.

The second process dies in the middle of the second epoch of a run, and leaves the file MARK, with
which it lives on when torchrun starts all processes again. The mode of the wrapper around the
loss is a line of the file `modes` beside MARK, for each run and process.
"""

import json
import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    from retrieval import commands, network
    from retrieval.training import Training

    mark = Path(sys.argv[1])
    end_of_iteration = Training._end_of_iteration

    def end_or_die(self, trainer):
        end_of_iteration(self, trainer)
        now = trainer.epoch, trainer.iteration
        if now == (1, 0):
            loss = trainer.loss_funcs["metric_loss"]
            with mark.with_name("modes").open("a") as modes:
                print(getattr(loss, "module", loss).efficient, file=modes)
        if os.environ["RANK"] == "1" and now == (2, 5) and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    Training._end_of_iteration = end_or_die
    photographs = network.PHOTOGRAPHS
    for port, augmented, arguments in json.loads(sys.argv[2]):
        network.PHOTOGRAPHS = photographs if augmented else {"mode": photographs["mode"]}
        if port:
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
            os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(port)
        if code := commands.run("train", arguments, "train.py"):
            sys.exit(code)
