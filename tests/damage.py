"""Files as a bad disk or a cut connection leaves them, and whether checkpoints are the same."""

import random

import torch
from torch.utils._pytree import tree_flatten


def damaged(content, number=100):
    """Versions of a file's bytes, each with one bit changed or cut short at a random place."""
    generator = random.Random(0)
    for i in range(number):
        place = generator.randrange(len(content))
        changed = bytes([content[place] ^ 1 << generator.randrange(8)])
        yield content[:place] + (changed + content[place + 1 :] if i % 4 else b"")


def same(first, second):
    """Whether two checkpoints are the same in every number and name."""
    (first, names), (second, other_names) = map(tree_flatten, (first, second))
    return names == other_names and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(first, second, strict=True)
    )


class Code:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")
