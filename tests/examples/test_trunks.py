"""Trunks and their transforms, and the defaults that follow from a trunk."""

import sys

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
    assert 'pip install ".[images]"' in err
    assert "--trunk small" in err


def test_timm_trunk_trains_with_frozen_batchnorm(main, tmp_path, strict_json):
    from retrieval.errors import UserError
    from retrieval.trunks import import_timm

    try:
        import_timm("resnet10t")
    except UserError as error:
        pytest.skip(str(error))
    arguments = ["--trunk", "resnet10t", "--freeze-batchnorm", "--image-size", 32]
    arguments += ["--no-turned-classes", "--batch-size", 48, "--samples-per-class", 12]
    assert main("--output-dir", tmp_path, "--name", "run", "--epochs", 1, *arguments) == 0
    assert strict_json(tmp_path / "run" / "metrics.json")["epochs_trained"] == 1
    assert main("--trunk", "no_such_model") == 2


def test_fine_tuning_defaults_follow_from_pretrained():
    from retrieval.configuration import configured

    tuned = configured({"dataset": "folder", "trunk": "resnet18", "pretrained": True})
    assert (tuned["lr"], tuned["freeze_batchnorm"], tuned["batch_size"]) == (1e-5, True, 112)
    typed = {"dataset": "folder", "trunk": "resnet18", "pretrained": True, "lr": 0.1}
    assert configured(typed)["lr"] == 0.1
    scratch = configured({"dataset": "CUB", "pretrained": False})
    assert (scratch["lr"], scratch["freeze_batchnorm"]) == (1e-3, False)
    assert configured({"dataset": "CUB"})["lr"] == 1e-5
