"""One process of torchrun that runs train.py several times: train_worker.py RUNS.

RUNS is JSON, [[port, augmented, arguments], ...]. Every run makes a process group of its own, as if
it had been launched alone; only the imports are shared. Without a port it takes the store of
torchrun, which can be used once. The first run that fails ends them.
"""

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    from retrieval import commands, network

    photographs = network.PHOTOGRAPHS
    for port, augmented, arguments in json.loads(sys.argv[1]):
        network.PHOTOGRAPHS = photographs if augmented else {"mode": photographs["mode"]}
        if port:
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
            os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(port)
        if code := commands.run("train", arguments, "train.py"):
            sys.exit(code)
