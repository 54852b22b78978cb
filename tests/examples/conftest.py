"""Shared by the tests of the examples: the scripts run as a user runs them."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.hookimpl(tryfirst=True)  # before the markers that the command line asks for are looked at
def pytest_collection_modifyitems(items):
    """Mark what is in this folder."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker("application")


@pytest.fixture(autouse=True)
def no_data_root(monkeypatch):
    """Unset the variable that names the data folder, so that a test decides itself."""
    monkeypatch.delenv("PML_PNP_DATA", raising=False)


@pytest.fixture(scope="session")
def environment():
    """Environment for a subprocess that imports the package from the source tree."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


@pytest.fixture(scope="session")
def python(environment):
    """Run Python in a process of its own."""

    def run(*arguments, **options):
        usual = {"env": environment, "capture_output": True, "text": True, "timeout": 900}
        return subprocess.run([sys.executable, *map(str, arguments)], **{**usual, **options})

    return run


@pytest.fixture(scope="session")
def main():
    """Call train.py's main in this process; returns the exit code."""
    from retrieval import commands

    return lambda *arguments: commands.run("train", [str(x) for x in arguments], "train.py")


@pytest.fixture(scope="session")
def digits(once):
    """24 images of each digit, one folder per class."""
    from sklearn.datasets import load_digits

    def write(root):
        digits = load_digits()
        for label in range(10):
            (root / str(label)).mkdir()
            for i, pixels in enumerate(digits.images[digits.target == label][:24]):
                image = Image.fromarray((pixels * 255 / 16).astype(np.uint8))
                image.save(root / str(label) / f"{i:02d}.png")

    return once("digits", write)


@pytest.fixture(scope="session")
def quick(digits):
    """Arguments that make an epoch of 12 iterations on them last a moment."""
    data = ["--dataset", "folder", "--data-root", digits, "--image-size", 8, "--workers", 0]
    return [*data, "--ema-decay", 0.9, "--batch-size", 8, "--samples-per-class", 2, "--no-report"]


@pytest.fixture
def trained(main, quick, tmp_path):
    """Train for an epoch, or as further arguments say, the last of two counting; the run folder."""

    def train(*arguments, name="run"):
        new = ["--output-dir", tmp_path, "--name", name, "--epochs", 1]
        assert main(*quick, *new, *arguments) == 0
        return tmp_path / name

    return train


@pytest.fixture
def command():
    """Call any command in this process; returns the exit code."""
    from retrieval import commands

    return lambda *arguments: commands.main([str(x) for x in arguments])


@pytest.fixture
def refused(main, capsys):
    """Call what must end in one line and exit code 2; returns the line."""

    def call(*arguments, by=main):
        capsys.readouterr()
        assert by(*arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    return call


@pytest.fixture(scope="session")
def one_epoch(main, quick, once):
    """A finished run of one epoch, which no test changes."""

    def train(folder):
        assert main("--output-dir", folder, "--name", "run", "--epochs", 1, *quick) == 0

    return once("one epoch", train) / "run"


@pytest.fixture
def run(one_epoch, tmp_path):
    """A finished run of one epoch, a copy for every test."""
    return shutil.copytree(one_epoch, tmp_path / "run")


@pytest.fixture
def limited():
    """Run with a limit of the size of files, at which the system refuses as with a full disk."""
    resource = pytest.importorskip("resource")

    @contextlib.contextmanager
    def limit(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


class Transformer(torch.nn.Module):
    """As timm's: made for one size of image, without BatchNorm."""

    def __init__(self, img_size=224):
        super().__init__()
        if img_size % 16:
            raise ValueError("image size must be divisible by patch size")
        self.size = img_size
        self.patches = torch.nn.Conv2d(3, 6, 16, 16)

    def forward(self, x):
        assert x.shape[2:] == (self.size, self.size), "input size doesn't match the model"
        return self.patches(x).mean((2, 3))


class ResNet(torch.nn.Module):
    """Takes any size of image from 4 pixels on; has BatchNorm, and more features than it says."""

    num_features = 3

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 5, 4, 4)
        self.norm = torch.nn.BatchNorm2d(5)

    def forward(self, x):
        return self.norm(self.layer(x)).mean((2, 3))


class Detector(ResNet):
    """Makes maps instead of features."""

    def forward(self, x):
        return self.layer(x)


@pytest.fixture
def timm(monkeypatch):
    """A timm with the three models above; `made` lists the arguments they were made with."""
    models = {"vit": Transformer, "resnet": ResNet, "detector": Detector}
    fake, data = types.ModuleType("timm"), types.ModuleType("timm.data")
    fake.made, fake.data = [], data

    def create_model(name, pretrained, num_classes, **kwargs):
        if name not in models:
            raise RuntimeError(f"Unknown model ({name})")
        fake.made.append((name, pretrained, num_classes, kwargs))
        return models[name](**kwargs)

    def create_transform(input_size, **others):
        def transform(image):
            pixels = np.asarray(image.resize(input_size[1:]), dtype=np.float32) / 255
            return torch.from_numpy(pixels).permute(2, 0, 1)

        return transform

    fake.create_model = create_model
    config = {"input_size": (3, 224, 224), "interpolation": "bicubic", "crop_pct": 0.875}
    config |= {"crop_mode": "center", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    data.resolve_model_data_config = lambda model: config
    data.create_transform = create_transform
    monkeypatch.setitem(sys.modules, "timm", fake)
    monkeypatch.setitem(sys.modules, "timm.data", data)
    return fake


@pytest.fixture
def run_of_timm(timm, trained):
    """A finished run of one epoch with the second of these."""
    return trained("--trunk", "resnet", "--image-size", 16, name="run of timm")


@pytest.fixture(scope="session")
def curves():
    """The TensorBoard scalars of a run: {name: [(step, value), ...]}."""

    def read(run):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (file,) = (run / "tensorboard").iterdir()
        events = EventAccumulator(str(file)).Reload()
        return {
            name: [(x.step, x.value) for x in events.Scalars(name)]
            for name in events.Tags()["scalars"]
        }

    return read


@pytest.fixture(scope="session")
def strict_json():
    """Read JSON of a run, refusing NaN and Infinity."""

    def refuse(constant):
        raise ValueError(f"not strict JSON: {constant}")

    def read(path):
        content = json.loads(Path(path).read_text(), parse_constant=refuse)
        content.pop("crc32", None)  # without which it can be changed and written again
        return content

    return read
