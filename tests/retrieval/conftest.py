"""Shared by the tests of the retrieval study: a data set of its own."""

import dataclasses

import pytest
import torch

pytest.importorskip("optuna", reason="the retrieval study needs optuna: pip install '.[study]'")

import networks  # noqa: E402
import study_data  # noqa: E402
from study import Study  # noqa: E402

CLASSES = {"fit": range(0, 12), "validation": range(12, 16), "test": range(16, 22)}


class Reads:
    """Reads the parts of a tiny data set, and remembers which."""

    def __init__(self):
        self.parts = []

    def __call__(self, part, data_root):
        self.parts.append(part)
        both = [*CLASSES["fit"], *CLASSES["validation"]]
        chosen = both if part == "training" else list(CLASSES[part])
        generator = torch.Generator().manual_seed(0)
        centres = torch.randn(22, 16, generator=generator)[chosen]
        labels = torch.arange(len(chosen)).repeat_interleave(8)
        inputs = centres[labels] + torch.randn(len(labels), 16, generator=generator)
        return study_data.Part(inputs, labels, tuple(map(str, chosen)), labels // 2)


@pytest.fixture
def tiny():
    """A data set of 22 classes in 16 dimensions; `tiny.read.parts` says what was read."""
    return study_data.DataSet(
        "tiny",
        Reads(),
        lambda inputs: torch.nn.Linear(16, networks.EMBEDDING_SIZE),
        torch.nn.Identity,
        lambda inputs, generator: inputs + 0.1 * torch.randn(inputs.shape, generator=generator),
        classes_per_batch=6,
        steps=3,
        about="Tiny",
    )


@pytest.fixture
def shorter(tiny):
    """The same with one step."""
    return dataclasses.replace(tiny, steps=1)


@pytest.fixture
def study_of(shorter, tmp_path):
    """Make a study of some losses, of which the last is never tuned, on this data set."""

    def make(names=("PNP-Ds", "ProxyAnchor", "PNP-Ds at .05"), folder="results", data=shorter):
        return Study(data, None, tmp_path / folder, tmp_path / f"{folder}.db", names)

    return make
