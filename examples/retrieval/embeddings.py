"""Embed images with the network of a run, in batches, with a progress bar."""

from collections.abc import Callable, Sequence

import torch
import tqdm
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Dataset

from .data import Sample
from .errors import UserError
from .image_tree import Skipped
from .trunks import Transform

BATCH_SIZE = 128


class _Tensors(Dataset):
    """Images as tensors with their places; what cannot be read, with the reason."""

    def __init__(self, samples: Sequence[Sample], transform: Transform):
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[int, torch.Tensor | str]:
        try:
            return i, self.transform(self.samples[i].open())
        except UserError as error:
            return i, str(error)


def embed(
    network: Callable[[torch.Tensor], torch.Tensor],
    samples: Sequence[Sample],
    transform: Transform,
    device: torch.device | None = None,
    workers: int = 0,
    skipped: list[Skipped] | None = None,
) -> tuple[torch.Tensor, list[int]]:
    """Embed what can be read of some images.

    Args:
        network: From `(batch, channels, size, size)` to `(batch, d)`, on `device`, in eval mode.
        samples: The images.
        transform: From an image to what the network takes.
        device: Where the network is; the CPU by default.
        workers: Processes that read images.
        skipped: Takes those that cannot be read.

    Returns:
        `(n, d)` in float32 on the CPU, each of length 1, and which `n` of the samples they are of.

    Raises:
        UserError: If an image cannot be read and there is no `skipped`, or an embedding is not
            finite.
    """
    loader = DataLoader(
        _Tensors(samples, transform), BATCH_SIZE, num_workers=workers, collate_fn=list
    )
    found, places = [], []
    with (
        torch.inference_mode(),
        tqdm.tqdm(total=len(samples), desc="embedding", disable=None) as bar,
    ):
        for batch in loader:
            bar.update(len(batch))
            for i, reason in batch:
                if isinstance(reason, str):
                    if skipped is None:
                        raise UserError(reason)
                    skipped.append(Skipped(samples[i].name, reason))
            read = [(i, image) for i, image in batch if not isinstance(image, str)]
            if read:
                places += [i for i, _ in read]
                images = torch.stack([image for _, image in read]).to(device)
                found.append(normalize(network(images).float()).cpu())
    embeddings = torch.cat(found) if found else torch.empty(0, 0)
    if not embeddings.isfinite().all():
        raise UserError("the embeddings are not finite; the weights have diverged")
    return embeddings, places
