"""Trunks and their transforms; Recall@k."""

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
    assert 'pip install -c constraints-images.txt ".[images]"' in err
    assert "--trunk small" in err


@pytest.mark.parametrize("sizes", [[30, 30, 30], [3, 7, 2], [200, 5]], ids=str)
def test_recall_at_k_is_the_share_of_queries_with_a_match_in_the_first_k(sizes):
    from retrieval.metrics import METRICS, RetrievalAccuracy

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    embeddings = torch.randn(len(labels), 4, generator=generator)
    calculator = RetrievalAccuracy(device=torch.device("cpu"))
    got = calculator.get_accuracy(embeddings, labels)
    distances = torch.cdist(embeddings, embeddings).fill_diagonal_(torch.inf)
    matches = labels[distances.argsort(dim=1)[:, :-1]] == labels[:, None]
    assert got.keys() == METRICS.keys()
    for k, name in ((1, "precision_at_1"), (10, "recall_at_10"), (100, "recall_at_100")):
        assert got[name] == pytest.approx(matches[:, :k].any(1).double().mean().item(), abs=1e-6)
    hits = matches.double().cumsum(1)
    r = labels.bincount()[labels] - 1
    position = torch.arange(1, len(labels))
    within = position <= r[:, None]
    expected = (hits / position * matches * within).sum(1) / r
    assert got["mean_average_precision_at_r"] == pytest.approx(expected.mean().item(), abs=1e-6)


@pytest.mark.parametrize("at_once", [1, 700, 5_000])
def test_metrics_of_some_queries_at_a_time_are_those_of_all(monkeypatch, at_once):
    from retrieval import metrics

    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([7] * 40 + [3] + [5] * 2 + [9] * 57)[torch.randperm(100)]
    embeddings = torch.randn(100, 4, generator=generator)
    recall_at = (1, 5, 20)

    def measure():
        calculator = metrics.RetrievalAccuracy(recall_at, device=torch.device("cpu"))
        sizes, knn = [], calculator.knn_func

        def search(query, k, *args):
            sizes.append(len(query) * k)
            return knn(query, k, *args)

        calculator.knn_func = search
        others = (embeddings[:30] + 0.1, labels[:30])
        return (
            [
                calculator.get_accuracy(embeddings, labels),
                calculator.get_accuracy(embeddings, labels, *others),
                calculator.get_accuracy(embeddings, labels, embeddings, labels, True),
            ],
            sizes,
        )

    expected, whole = measure()
    monkeypatch.setattr(metrics, "NEIGHBOURS_AT_ONCE", at_once)
    got, sizes = measure()
    assert len(sizes) > len(whole) == 3
    assert max(sizes) <= max(at_once, 57)  # one query at least
    for one, other in zip(expected, got, strict=True):
        assert one.keys() == metrics.metric_names(recall_at).keys()
        assert one == pytest.approx(other, abs=1e-6)


def test_metrics_without_any_match_are_no_number():
    from retrieval.metrics import RetrievalAccuracy

    calculator = RetrievalAccuracy((10,), device=torch.device("cpu"))
    got = calculator.get_accuracy(torch.randn(9, 4), torch.arange(9))
    assert all(np.isnan(x) for x in got.values())


def test_learning_rates_fall_at_the_milestones(main, quick, tmp_path):
    arguments = ["--epochs", 3, "--lr", 0.01, "--loss-lr", 0.1, "--loss", "ProxyAnchorLoss"]
    arguments += ["--lr-milestones", 1, 2, "--lr-gamma", 0.5, "--output-dir", tmp_path]
    assert main(*quick, *arguments, "--name", "run") == 0
    shared = torch.load(tmp_path / "run" / "checkpoints" / "last.pt")["shared"]
    rates = {k: v["param_groups"][0]["lr"] for k, v in shared["optimizers"].items()}
    assert rates == pytest.approx(
        {
            "trunk_optimizer": 0.0025,
            "embedder_optimizer": 0.0025,
            "metric_loss_optimizer": 0.025,
        }
    )


def test_fine_tuning_defaults_follow_from_pretrained():
    from retrieval.configuration import configured

    tuned = configured({"dataset": "folder", "trunk": "resnet18", "pretrained": True})
    assert (tuned["lr"], tuned["freeze_batchnorm"], tuned["batch_size"]) == (1e-5, True, 112)
    typed = {"dataset": "folder", "trunk": "resnet18", "pretrained": True, "lr": 0.1}
    assert configured(typed)["lr"] == 0.1
    scratch = configured({"dataset": "CUB", "pretrained": False})
    assert (scratch["lr"], scratch["freeze_batchnorm"]) == (1e-3, False)
    assert configured({"dataset": "CUB"})["lr"] == 1e-5
