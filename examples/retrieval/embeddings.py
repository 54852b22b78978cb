"""Embeddings of many images, and their picture in the plane."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import tqdm
from torch.utils.data import DataLoader, Dataset

from .data import LabelledImages, Sample
from .errors import UserError
from .image_tree import Skipped
from .metrics import BATCH_SIZE
from .prepare import Prepare
from .processes import rank

# Fewer points than this have no neighbourhoods for UMAP to keep.
FEWEST_FOR_UMAP = 20
UMAP_NEIGHBOURS = 15


def embed(
    network: torch.nn.Module,
    images: Dataset,
    batch_size: int,
    device: torch.device | str = "cpu",
    normalize: bool = True,
    workers: int = 0,
    description: str = "embedding",
    unreadable: Callable[[int, str], None] | None = None,
) -> torch.Tensor:
    """Embed images in batches, with a progress bar.

    Args:
        network: Maps `(batch, channels, size, size)` to `(batch, d)`; it is put in eval mode.
        images: Tensors of one size, or tuples that start with them.
        batch_size: How many images go through the network at a time.
        device: Where the network computes; it is moved there.
        normalize: Scale each embedding to length 1.
        workers: Loader processes; 0 loads in this one.
        description: What stands before the bar.
        unreadable: Called with the number of an image that cannot be read, and the reason.

    Returns:
        `(N, d)`, float32, on the CPU, in the order of the images that can be read.

    Raises:
        UserError: If an image cannot be read and there is no `unreadable`, or the embeddings are
            not finite.
    """
    network = network.to(device).eval()
    batches = DataLoader(_Readable(images), batch_size, num_workers=workers, collate_fn=list)
    embeddings, number = [], 0
    with torch.inference_mode():
        for batch in tqdm.tqdm(batches, desc=description, disable=None if rank() == 0 else True):
            for i, image in enumerate(batch, number):
                if isinstance(image, UserError):
                    if unreadable is None:
                        raise image
                    unreadable(i, str(image))
            number += len(batch)
            read = [image for image in batch if not isinstance(image, UserError)]
            if read:
                embeddings.append(network(torch.stack(read).to(device)).float().cpu())
    if not embeddings:
        return torch.empty(0, 0)
    joined = torch.cat(embeddings)
    if not joined.isfinite().all():
        raise UserError("the embeddings are not finite; the weights have diverged")
    return torch.nn.functional.normalize(joined) if normalize else joined


def embed_samples(
    network: torch.nn.Module,
    transform: Prepare,
    samples: Sequence[Sample],
    device: torch.device | str,
    workers: int = 0,
    skipped: list[Skipped] | None = None,
) -> tuple[torch.Tensor, list[int]]:
    """Embed images as a network was trained to see them.

    Args:
        network: See `embed`.
        transform: What its images need.
        samples: The images.
        device: See `embed`.
        workers: See `embed`.
        skipped: Those that cannot be read are left out and appended; without it they are an error.

    Returns:
        `(n, d)`, of length 1, and the numbers of these `n` samples.

    Raises:
        UserError: See `embed`.
    """
    classes = sorted({x.label for x in samples})
    images = LabelledImages(samples, classes, transform, transform.ranges)
    missing: dict[int, str] = {}
    unreadable = None if skipped is None else missing.__setitem__
    embeddings = embed(network, images, BATCH_SIZE, device, workers=workers, unreadable=unreadable)
    if skipped is not None:
        skipped += [Skipped(samples[i].name, reason) for i, reason in missing.items()]
    return embeddings, [i for i in range(len(samples)) if i not in missing]


class _Readable(Dataset):
    """Images, and in place of those that cannot be read the errors."""

    def __init__(self, images: Dataset):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> torch.Tensor | UserError:
        try:
            image = self.images[i]
        except UserError as error:
            return error
        return image[0] if isinstance(image, list | tuple) else image


def to_plane(embeddings: torch.Tensor) -> tuple[np.ndarray, str]:
    """Points in the plane, and the method: UMAP where it is installed, otherwise PCA."""
    points = embeddings.numpy()
    if len(points) >= FEWEST_FOR_UMAP:
        try:
            from umap import UMAP
        except ImportError:
            pass
        else:
            reducer = UMAP(UMAP_NEIGHBOURS, metric="cosine", random_state=0, n_jobs=1)
            return reducer.fit_transform(points), "UMAP"
    from sklearn.decomposition import PCA

    plane = np.zeros((len(points), 2), dtype=np.float32)
    dimensions = min(2, *points.shape)
    plane[:, :dimensions] = PCA(dimensions, random_state=0).fit_transform(points)
    return plane, "PCA"
