"""The experiments of the paper, on small data sets in the layout of each, split files included."""

import benchmark_trees as trees
import numpy as np
import pytest
import torch
from benchmark_trees import CONFIGS, IMAGES, TEST, TRAIN
from retrieval.configuration import configured, with_file
from retrieval.data import load_splits, splits_of
from retrieval.errors import UserError
from retrieval.network import load_best

# What makes the experiment small; everything else is as configured.
SMALL = ["--trunk", "small", "--no-pretrained", "--image-size", 16, "--embedding-size", 8]
SMALL += ["--batch-size", 8, "--samples-per-class", 2, "--epochs", 2, "--workers", 0]


# How it is written, the name of the data set, the k of Recall@k, and the classes of its parts.
SETS = {
    "online_products": (trees.write_products, "StanfordOnlineProducts", (10, 100, 1000), {}),
    "inaturalist": (trees.write_inaturalist, "INaturalist2018", (4, 16, 32), {}),
    "vehicle_id": (trees.write_vehicles, "VehicleID", (5,), {"small": 2, "medium": 3, "large": 4}),
}


def test_every_configuration_is_tested():
    assert {x.stem for x in CONFIGS.glob("*.yaml")} == set(SETS)


@pytest.mark.parametrize("name", SETS)
def test_configurations_say_what_the_paper_does(name):
    config = configured(with_file(str(CONFIGS / f"{name}.yaml"), {}))
    _, dataset, recall_at, _ = SETS[name]
    expected = {"dataset": dataset, "recall_at": [1, *recall_at]}
    expected |= {"trunk": "resnet50.tv_in1k", "pretrained": True, "freeze_batchnorm": True}
    expected |= {"image_size": None, "color_jitter": 0}  # the size is the trunk's own
    expected |= {"embedding_size": 512, "batch_size": 384, "samples_per_class": 4}
    expected |= {"loss": "PNPLoss", "loss_args": {"variant": "Dq", "alpha": 4, "anneal": 0.01}}
    expected |= {"lr": 1e-5, "weight_decay": 4e-4, "epochs": 400, "patience": 400}
    expected |= {"lr_milestones": [120, 220, 250, 280], "lr_gamma": 0.3}
    assert {k: config[k] for k in expected} == expected


@pytest.mark.parametrize("name", SETS)
def test_experiment_from_data_to_metrics(main, tmp_path, capsys, strict_json, name):
    write, _, recall_at, parts = SETS[name]
    write(tmp_path / "data")
    arguments = ["--config", CONFIGS / f"{name}.yaml", "--data-root", tmp_path / "data", *SMALL]
    arguments += ["--grad-cache", 3, "--output-dir", tmp_path, "--name", "run"]
    assert main(*arguments) == 0
    out = capsys.readouterr().out
    metrics, config = (strict_json(tmp_path / "run" / x) for x in ("metrics.json", "config.json"))
    keys = ["mean_average_precision_at_r", "precision_at_1", "r_precision"]
    keys += [f"recall_at_{k}" for k in recall_at]
    keys += [f"{part}/{key}" for part in parts for key in keys]
    assert list(metrics["trained"]) == list(metrics["untrained"]) == keys
    assert all(f"Recall@{k} " in out for k in recall_at)
    assert all(f"{part}: Recall@5" in out for part in parts)
    assert metrics["test_classes"] == len(TEST)
    assert (tmp_path / "run" / "report.html").is_file()
    samples = splits_of(config).test.samples
    with torch.no_grad():
        model, transform = load_best(str(tmp_path / "run"))
        embeddings = model(torch.stack([transform(s.open()) for s in samples])).double()
    for part, classes in {"test": len(TEST), **parts}.items():
        assert config["data"][part] == {"images": classes * IMAGES, "classes": classes}
        recall = recall_by_hand(embeddings, [s.label for s in samples], classes)
        prefix = "" if part == "test" else f"{part}/"
        assert metrics["trained"][f"{prefix}precision_at_1"] == pytest.approx(recall(1))
        for k in recall_at:
            assert metrics["trained"][f"{prefix}recall_at_{k}"] == pytest.approx(recall(k))


def recall_by_hand(embeddings, labels, classes):
    """Recall@k of the first classes."""
    first = np.isin(labels, sorted(set(labels))[:classes])
    embeddings = torch.nn.functional.normalize(embeddings[first])
    similarity = (embeddings @ embeddings.T).fill_diagonal_(-2)
    labels = np.array(labels)[first]
    matches = labels[similarity.argsort(descending=True)[:, :-1].numpy()] == labels[:, None]
    return lambda k: matches[:, :k].any(axis=1).mean()


@pytest.fixture
def load(tmp_path):
    """Write a data set, change it by a function, and read it, also from below tmp_path."""

    def read(name, change=lambda: None, below="."):
        SETS[name][0](tmp_path)
        change()
        return load_splits(SETS[name][1], str(tmp_path / below), 0.2, 0)

    return read


BELOW = {"online_products": "Stanford_Online_Products", "vehicle_id": "VehicleID_V1.0"}


@pytest.mark.parametrize(("name", "below"), [*dict.fromkeys(SETS, ".").items(), *BELOW.items()])
def test_splits_are_those_of_the_files_in_the_folder_or_its_parent(load, name, below):
    splits = load(name, below=below)
    summary = splits.summary()
    trained = [summary[x] for x in ("train", "val")]
    assert sum(x["images"] for x in trained) == len(TRAIN) * IMAGES
    assert {x["classes"] for x in trained} == {len(TRAIN)}
    assert len(splits.test) == len(TEST) * IMAGES
    assert not {s.label for s in splits.train.samples} & {s.label for s in splits.test.samples}


PRODUCTS, VEHICLES = "Stanford_Online_Products", "VehicleID_V1.0"
LISTS = "Inat_dataset_splits"
# Of a data set what is taken away, and what the message says of it.
MISSING = [
    ("online_products", PRODUCTS, "no Ebay_train.txt in it, nor in its folder Stanford_Online"),
    ("online_products", f"{PRODUCTS}/Ebay_train.txt", "lacks Ebay_train.txt; expected Stanford_"),
    ("online_products", f"{PRODUCTS}/Ebay_test.txt", "lacks Ebay_test.txt; expected Stanford_"),
    ("online_products", f"{PRODUCTS}/bicycle_final", r"10 of 20 images .* the first is .*_0.JPG"),
    ("online_products", f"{PRODUCTS}/bicycle_final/111085122872_3.JPG", "1 of 20 .*2872_3.JPG"),
    ("inaturalist", LISTS, f"no {LISTS}/Inaturalist_train_set1.txt in it"),
    ("inaturalist", f"{LISTS}/Inaturalist_test_set1.txt", r"lacks \S*/Inaturalist_test_set1.txt;"),
    ("inaturalist", "train_val2018", r"20 of 20 images .* the first is \S*2018/Aves/7471/\S*.jpg"),
    ("vehicle_id", f"{VEHICLES}/train_test_split", "no train_test_split/train_list.txt in it"),
    ("vehicle_id", f"{VEHICLES}/train_test_split/test_list_1600.txt", r"lacks \S*/test_list_1600"),
    ("vehicle_id", f"{VEHICLES}/image", r"20 of 20 images .* the first is \S*/image/0000100.jpg"),
]


@pytest.mark.parametrize(("name", "absent", "message"), MISSING)
def test_missing_file_is_named(load, tmp_path, name, absent, message):
    with pytest.raises(UserError, match=message):
        load(name, lambda: (tmp_path / absent).rename(tmp_path / "away"))


# A file, how its lines are changed, and what the message says.
BROKEN = [
    (f"{PRODUCTS}/Ebay_test.txt", lambda x: [*x, "7 3 1"], "path in line 22, got"),
    (f"{PRODUCTS}/Ebay_train.txt", lambda x: x[1:], "the header .* in line 1"),
    (f"{VEHICLES}/train_test_split/train_list.txt", lambda x: [*x, "12"], "line 21, got"),
]


@pytest.mark.parametrize(("file", "change", "expected"), BROKEN)
def test_broken_line_is_named(load, tmp_path, file, change, expected):
    def rewrite():
        lines = (tmp_path / file).read_text().splitlines()
        (tmp_path / file).write_text("\n".join(change(lines)) + "\n")

    with pytest.raises(UserError, match=rf"{file}: expected .*{expected}"):
        load("vehicle_id" if "Vehicle" in file else "online_products", rewrite)
