"""Trunks and their transforms, and the defaults that follow from a trunk."""

import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.mark.parametrize(("size", "mode"), [(8, "L"), (28, "L"), (64, "RGB"), (41, "RGB")])
def test_small_trunk_takes_what_its_transforms_make(size, mode):
    from retrieval.trunks import SmallTransform, build_trunk

    trunk = build_trunk(
        "small", False, size, SmallTransform(size, mode, 0.8, warp=True, mirror=True)
    )
    for transform in (trunk.train_transform, trunk.eval_transform):
        for source in ("RGB", "L", "1", "P", "RGBA"):
            pixels = transform(Image.new("RGB", (50, 70), "white").convert(source))
            assert pixels.shape == (1 if mode == "L" else 3, size, size)
            assert pixels.dtype == torch.float32
            assert -1 <= pixels.min() and pixels.max() <= 1
    assert trunk.module.eval()(pixels[None]).shape == (1, trunk.num_features)


def test_evaluation_takes_the_same_centred_square_every_time():
    from retrieval.trunks import SmallTransform

    pixels = np.zeros((10, 30), np.uint8)
    pixels[:, 10:20] = 255
    made = [SmallTransform(10, "L")(Image.fromarray(pixels)) for _ in range(2)]
    assert (made[0] == 1).all()
    assert torch.equal(*made)


@pytest.mark.parametrize("augment", [{"crop": 0.8}, {"warp": True}], ids=str)
def test_training_images_vary(augment):
    from retrieval.trunks import SmallTransform

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 30), dtype=np.uint8))
    made = [SmallTransform(16, "L", **augment)(noise) for _ in range(2)]
    assert not torch.equal(*made)


def test_a_warped_image_stays_in_its_place_on_average():
    from retrieval.trunks import SmallTransform

    pixels = np.zeros((32, 32), np.uint8)
    pixels[12:20, 12:20] = 255
    warp = SmallTransform(32, "L", warp=True)
    mean = sum((warp(Image.fromarray(pixels)) + 1) / 2 for _ in range(400))[0] / 400
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    for axis in (rows, columns):
        assert (axis * mean).sum() / mean.sum() == pytest.approx(15.5, abs=0.5)
    assert mean.sum() == pytest.approx(64, rel=0.1)


def test_without_timm_the_message_says_what_to_install(main, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert main("--trunk", "resnet18") == 2
    err = capsys.readouterr().err
    assert 'pip install -c constraints-images.txt ".[images]"' in err
    assert "--trunk small" in err


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

    def create_transform(input_size, mean, std, is_training=False, color_jitter=None):
        def transform(image):
            pixels = np.asarray(image.resize(input_size[1:]), dtype=np.float32) / 255
            return torch.from_numpy(pixels).permute(2, 0, 1)

        return transform

    fake.create_model = create_model
    data.resolve_model_data_config = lambda model: {
        "input_size": (3, 224, 224),
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
    }
    data.create_transform = create_transform
    monkeypatch.setitem(sys.modules, "timm", fake)
    monkeypatch.setitem(sys.modules, "timm.data", data)
    return fake


def timm_trunk(name, image_size=None, pretrained=False):
    from retrieval.trunks import SmallTransform, build_trunk

    return build_trunk(name, pretrained, image_size, SmallTransform(64, "RGB"))


@pytest.mark.parametrize(("name", "width"), [("vit", 6), ("resnet", 5)])
@pytest.mark.parametrize("size", [None, 32, 96])
def test_model_takes_images_of_the_size_that_was_asked_for(timm, name, width, size):
    trunk = timm_trunk(name, size, pretrained=True)
    if name == "resnet":
        assert not trunk.module.norm.running_mean.any()
    pixels = trunk.eval_transform(Image.new("L", (50, 70)))
    assert pixels.shape == (3, size or 224, size or 224)
    assert trunk.module(pixels[None].expand(2, -1, -1, -1)).shape == (2, width)
    assert trunk.num_features == width
    assert trunk.module.training
    assert all(made[:3] == (name, True, 0) for made in timm.made)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--trunk vit --image-size 40", "for images of 40 pixels: image size must be divisible"),
        ("--trunk resnet --image-size 3", "--image-size: the trunk 'resnet' cannot take images of"),
        ("--trunk detector", "'detector' makes the shape (5, 56, 56)"),
        ("--trunk unknown", "could not make the trunk 'unknown': Unknown model (unknown)"),
        ("--trunk unknown --image-size 32", "for images of 32 pixels: Unknown model (unknown)"),
        ("--trunk vit --freeze-batchnorm", "--freeze-batchnorm: the trunk 'vit' has no BatchNorm"),
    ],
)
def test_trunk_that_cannot_be_used_is_refused_before_the_run(
    timm, main, capsys, tmp_path, arguments, message
):
    assert main(*arguments.split(), "--output-dir", tmp_path / "runs") == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("name", "frozen"), [("vit", False), ("resnet", True)])
def test_fine_tuning_freezes_batchnorm_where_there_is_any(
    timm, main, tmp_path, quick, strict_json, capsys, name, frozen
):
    run = ["--output-dir", tmp_path, "--name", name, "--epochs", 1, "--image-size", 16]
    assert main(*quick, *run, "--trunk", name, "--pretrained") == 0
    assert strict_json(tmp_path / name / "config.json")["freeze_batchnorm"] is frozen
    # It is said before, since a download may take long; a checkpoint brings weights of its own.
    said = f"pretrained weights of {name}: from timm's cache, or downloaded now\n"
    assert said in capsys.readouterr().out
    timm.made.clear()
    assert main("--resume", tmp_path / name, "--epochs", 2, "--no-report") == 0
    assert said not in capsys.readouterr().out and {x[1] for x in timm.made} == {False}


def test_trained_transformer_of_another_size_is_loaded(timm, main, tmp_path, quick):
    from retrieval.network import load_best

    run = ["--output-dir", tmp_path, "--name", "vit", "--epochs", 1, "--image-size", 16]
    assert main(*quick, *run, "--trunk", "vit") == 0
    model, transform = load_best(tmp_path / "vit")
    assert model(transform(Image.new("L", (9, 9)))[None]).shape == (1, 128)


def test_fine_tuning_defaults_follow_from_pretrained():
    from retrieval.configuration import configured

    tuned = configured({"dataset": "folder", "trunk": "resnet18", "pretrained": True})
    assert (tuned["lr"], tuned["freeze_batchnorm"], tuned["batch_size"]) == (1e-5, True, 112)
    typed = {"dataset": "folder", "trunk": "resnet18", "pretrained": True, "lr": 0.1}
    assert configured(typed)["lr"] == 0.1
    scratch = configured({"dataset": "CUB", "pretrained": False})
    assert (scratch["lr"], scratch["freeze_batchnorm"]) == (1e-3, False)
    assert configured({"dataset": "CUB"})["lr"] == 1e-5
