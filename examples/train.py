"""Train an embedding for retrieval: `python examples/retrieval train` by a shorter name.

python examples/train.py            # digits, nothing to download
python examples/train.py --help
torchrun --nproc-per-node 2 examples/train.py --batch-size 64
"""

import sys

from retrieval.commands import run

if __name__ == "__main__":
    sys.exit(run("train", None, "train.py"))
