"""The data sets and the trunk of the example."""

import os
from pathlib import Path

import numpy as np
import parts
import pytest
import torch

DATA = Path(os.environ.get("PML_PNP_DATA", "no data")) / "omniglot-small"


@pytest.mark.parametrize(("turned_classes", "classes"), [(True, 80), (False, 10)])
def test_digits_to_train_on_have_the_lower_labels(turned_classes, classes):
    data = parts.Digits("nowhere", turned_classes=turned_classes, transform=np.asarray)
    labels, counts = np.unique(data.labels, return_counts=True)
    assert labels.tolist() == list(range(classes)) and len(data) == counts.sum()
    train, test = map(len, parts.READERS["digits"](None, []))
    turns = 8 if turned_classes else 1
    assert train + test == 1797 and len(data) == 1797 * turns
    assert (data.labels < classes // 2).sum() == train * turns
    item = data[3]
    assert item["data"].shape == (8, 8) and item["label"] == data.labels[3]


@pytest.mark.skipif(not DATA.exists(), reason="PML_PNP_DATA does not hold omniglot-small")
def test_omniglot_has_136_classes_to_train_on_and_106_to_test():
    data = parts.Omniglot(DATA)
    assert len(np.unique(data.labels)) == 136 + 106
    text = (Path(parts.__file__).parent / "configs/config_dataset/omniglot.yaml").read_text()
    assert f"test_size: {106 / 242:.3f}" in text and "test_start_idx: 0.438" in text


def test_the_trunk_makes_an_embedding_of_each_image():
    trunk = parts.SmallTrunk()
    trunk.fc = torch.nn.Identity()  # as powerful-benchmarker does
    assert trunk(torch.randn(5, 1, 16, 16)).shape == (5, 256)
