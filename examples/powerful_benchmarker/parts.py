"""What the configs name that neither powerful-benchmarker nor pytorch-metric-learning has."""

import functools
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from retrieval.data import READERS, Sample, with_turned_classes  # noqa: E402
from retrieval.trunks import SmallConvNet  # noqa: E402


class LabelledImages(Dataset):
    """All images of a data set, as powerful-benchmarker takes them; its split manager splits.

    Args:
        root: folder of the data.
        transform: of PIL images.
        download: whether to download; nothing here does.
    """

    name: str

    def __init__(self, root, transform=None, download=False, **kwargs):
        self.transform = transform
        self.images, self.labels = _read(self.name, str(root), **kwargs)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict:
        image = self.images[i]
        return {
            "data": image if self.transform is None else self.transform(image),
            "label": self.labels[i],
        }


class Digits(LabelledImages):
    """The 8 x 8 digits of scikit-learn; with `turned_classes`, turned ones are classes as well."""

    name = "digits"

    def __init__(self, root, transform=None, download=False, turned_classes=True):
        super().__init__(root, transform, download, turned_classes=turned_classes)


class Omniglot(LabelledImages):
    """Handwritten characters; those of the alphabets to train on come first."""

    name = "omniglot"


@functools.lru_cache
def _read(
    name: str, root: str, turned_classes: bool = False
) -> tuple[list[Image.Image], np.ndarray]:
    train, test = READERS[name](None if name == "digits" else root, [])
    if turned_classes:
        train, test = with_turned_classes(train), with_turned_classes(test)
    classes: dict[str, int] = {}
    for part in (train, test):  # those to train on get the lower numbers
        for label in sorted({s.label for s in part}):
            classes.setdefault(label, len(classes))
    samples: list[Sample] = train + test
    images = [s.open().convert("L") for s in samples]
    return images, np.array([classes[s.label] for s in samples])


class SmallTrunk(torch.nn.Module):
    """A small convolutional net for small grey images, (N, 1, size, size) to (N, 256)."""

    # Read by powerful-benchmarker's transform factory.
    mean, std, input_space, input_range = [0.5], [0.5], "L", [0, 1]

    def __init__(self):
        super().__init__()
        self.features = SmallConvNet(1, (32, 64))
        self.fc = torch.nn.Linear(self.features.num_features, 1)  # where the embedder goes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features of images."""
        return self.fc(self.features(x))


DATASETS = {cls.name: cls for cls in (Digits, Omniglot)}
PARTS = [*(("dataset", cls) for cls in DATASETS.values()), ("model", SmallTrunk)]
