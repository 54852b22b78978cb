"""Embeddings of many images, and their picture in the plane."""

import numpy as np
import torch
import tqdm
from torch.utils.data import DataLoader, Dataset

from .errors import UserError
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

    Returns:
        `(N, d)`, float32, on the CPU, in the order of the images.

    Raises:
        UserError: If an image cannot be read, or the embeddings are not finite.
    """
    network = network.to(device).eval()
    batches = DataLoader(images, batch_size, num_workers=workers)
    embeddings = []
    with torch.inference_mode():
        for batch in tqdm.tqdm(batches, desc=description, disable=rank() > 0):
            batch = batch[0] if isinstance(batch, list | tuple) else batch
            embeddings.append(network(batch.to(device)).float().cpu())
    joined = torch.cat(embeddings)
    if not joined.isfinite().all():
        raise UserError("the embeddings are not finite; the weights have diverged")
    return torch.nn.functional.normalize(joined) if normalize else joined


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
