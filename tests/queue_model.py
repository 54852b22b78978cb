"""What a CrossBatchMemory is to hold, and the loss it is to return, by the formula in float64."""

import oracle
import torch


class Queue:
    """The rows and labels of earlier batches; the newest replace the oldest."""

    def __init__(self, size, width=8):
        self.size, self.position, self.length = size, 0, 0
        self.rows = torch.zeros(size, width, dtype=torch.float64)
        self.labels = torch.zeros(size, dtype=torch.int64)

    def put(self, rows, labels):
        """Enqueue, and return where the rows are."""
        places = (self.position + torch.arange(len(rows))) % self.size
        self.rows[places] = rows.detach().double()
        self.labels[places] = labels
        self.length = min(self.size, self.length + len(rows))
        self.position = (self.position + len(rows)) % self.size
        return places

    def losses(self, distance, x, labels, places=None, pairs=None, **settings):
        """Losses of the counted queries x, whose copies are at `places`, and of more `pairs`."""
        references = self.rows[: self.length].clone()
        positive = labels.unsqueeze(1) == self.labels[: self.length]
        negative = ~positive
        if pairs is not None:
            a, p, *rest = pairs
            positive[a, p] = True
            negative[rest[0] if len(rest) == 2 else a, rest[-1]] = True
        if places is not None:
            positive[torch.arange(len(x)), places] = negative[torch.arange(len(x)), places] = False
        found, counted = oracle.pnp_losses(
            distance(x, references), positive, negative, distance(x, x).diagonal(),
            k=1 if distance.is_inverted else -1, **settings,
        )  # fmt: skip
        return found[counted]
