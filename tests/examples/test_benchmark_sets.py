"""The experiments of the paper, on small data sets in the layout of each, split files included."""

import numpy as np
import pytest
import torch
from benchmark_trees import (
    CONFIGS,
    IMAGES,
    TEST,
    TRAIN,
    write_inaturalist,
    write_products,
    write_vehicles,
)
from retrieval.configuration import configured, resumed, with_file
from retrieval.data import load_splits
from retrieval.errors import UserError
from retrieval.network import load_best

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")
# What makes the experiment small; everything else is as configured.
SMALL = ["--trunk", "small", "--no-pretrained", "--image-size", 16, "--embedding-size", 8]
SMALL += ["--batch-size", 8, "--samples-per-class", 2, "--epochs", 2, "--workers", 0]


@pytest.fixture(autouse=True)
def no_data_root(monkeypatch):
    monkeypatch.delenv("PML_PNP_DATA", raising=False)


WRITE = {
    "online_products": write_products,
    "inaturalist": write_inaturalist,
    "vehicle_id": write_vehicles,
}
NAMES = {
    "online_products": "StanfordOnlineProducts",
    "inaturalist": "INaturalist2018",
    "vehicle_id": "VehicleID",
}
RECALL_AT = {"online_products": (10, 100, 1000), "inaturalist": (4, 16, 32), "vehicle_id": (5,)}
PARTS = {"vehicle_id": {"small": 2, "medium": 3, "large": 4}}


def test_every_configuration_is_tested():
    assert {x.stem for x in CONFIGS.glob("*.yaml")} == set(WRITE)


@pytest.mark.parametrize("name", WRITE)
def test_configurations_say_what_the_paper_does(name):
    config = configured(with_file(str(CONFIGS / f"{name}.yaml"), {}))
    expected = {
        "dataset": NAMES[name],
        "trunk": "resnet50.tv_in1k",
        "pretrained": True,
        "freeze_batchnorm": True,
        "image_size": None,  # the trunk's own
        "embedding_size": 512,
        "batch_size": 384,
        "samples_per_class": 4,
        "loss": "PNPLoss",
        "loss_args": {"variant": "Dq", "alpha": 4, "anneal": 0.01},
        "lr": 1e-5,
        "weight_decay": 4e-4,
        "epochs": 400,
        "patience": 400,
        "lr_milestones": [120, 220, 250, 280],
        "lr_gamma": 0.3,
        "color_jitter": 0,
        "recall_at": [1, *RECALL_AT[name]],
    }
    assert {k: config[k] for k in expected} == expected


@pytest.mark.parametrize("name", WRITE)
def test_experiment_from_data_to_metrics(main, tmp_path, capsys, strict_json, name):
    WRITE[name](tmp_path / "data")
    arguments = ["--config", CONFIGS / f"{name}.yaml", "--data-root", tmp_path / "data", *SMALL]
    arguments += ["--grad-cache", 3, "--output-dir", tmp_path, "--name", "run"]
    assert main(*arguments) == 0
    out = capsys.readouterr().out
    metrics = strict_json(tmp_path / "run" / "metrics.json")
    keys = ["mean_average_precision_at_r", "precision_at_1", "r_precision"]
    keys += [f"recall_at_{k}" for k in RECALL_AT[name]]
    parts = PARTS.get(name, {})
    keys += [f"{part}/{key}" for part in parts for key in keys]
    assert list(metrics["trained"]) == list(metrics["untrained"]) == keys
    for k in RECALL_AT[name]:
        assert f"Recall@{k} " in out
    assert metrics["test_classes"] == len(TEST)
    data = strict_json(tmp_path / "run" / "config.json")["data"]
    assert data["test"] == {"images": len(TEST) * IMAGES, "classes": len(TEST)}
    for part, classes in parts.items():
        assert data[part] == {"images": classes * IMAGES, "classes": classes}
        assert f"{part}: Recall@5" in out
    for prefix, classes in [("", len(TEST)), *((f"{x}/", n) for x, n in parts.items())]:
        recall = recall_by_hand(tmp_path / "run", classes)
        assert metrics["trained"][f"{prefix}precision_at_1"] == pytest.approx(recall(1))
        for k in RECALL_AT[name]:
            assert metrics["trained"][f"{prefix}recall_at_{k}"] == pytest.approx(recall(k))


def recall_by_hand(run, classes):
    """Recall@k of the first test classes, as the run's best weights have it."""
    _, config = resumed(str(run), {})
    splits = load_splits(config["dataset"], config["data_root"], config["val_fraction"], 0)
    model, transform = load_best(str(run))
    first = sorted({s.label for s in splits.test.samples})
    if config["dataset"] == "VehicleID":
        first = first[:classes]
    samples = [s for s in splits.test.samples if s.label in first]
    with torch.no_grad():
        embeddings = model(torch.stack([transform(s.open()) for s in samples])).double()
    embeddings = torch.nn.functional.normalize(embeddings)
    similarity = (embeddings @ embeddings.T).fill_diagonal_(-2)
    labels = np.array([s.label for s in samples])
    matches = labels[similarity.argsort(descending=True)[:, :-1].numpy()] == labels[:, None]
    return lambda k: matches[:, :k].any(axis=1).mean()


# --- layouts ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITE)
def test_splits_are_those_of_the_files(tmp_path, name):
    WRITE[name](tmp_path)
    splits = load_splits(NAMES[name], str(tmp_path), 0.2, 0)
    summary = splits.summary()
    trained = [summary[x] for x in ("train", "val")]
    assert sum(x["images"] for x in trained) == len(TRAIN) * IMAGES
    assert {x["classes"] for x in trained} == {len(TRAIN)}
    assert not {s.label for s in splits.train.samples} & {s.label for s in splits.test.samples}


@pytest.mark.parametrize("inside", [False, True], ids=["its parent", "itself"])
@pytest.mark.parametrize("name", ["online_products", "vehicle_id"])
def test_folder_may_be_named_itself_or_by_its_parent(tmp_path, name, inside):
    WRITE[name](tmp_path)
    (folder,) = tmp_path.iterdir()
    splits = load_splits(NAMES[name], str(folder if inside else tmp_path), 0.2, 0)
    assert len(splits.test) == len(TEST) * IMAGES


# What is taken away -> what the message says of it.
MISSING = {
    "online_products": {
        "Stanford_Online_Products": "no Ebay_train.txt in it, nor in its folder Stanford_Online",
        "Stanford_Online_Products/Ebay_train.txt": "lacks Ebay_train.txt; expected Stanford_Onl",
        "Stanford_Online_Products/Ebay_test.txt": "lacks Ebay_test.txt; expected Stanford_Onl",
        "Stanford_Online_Products/bicycle_final": r"10 of 20 images .* the first is .*_0.JPG",
        "Stanford_Online_Products/bicycle_final/111085122872_3.JPG": r"1 of 20 .*2872_3.JPG",
    },
    "inaturalist": {
        "Inat_dataset_splits": "no Inat_dataset_splits/Inaturalist_train_set1.txt in it",
        "Inat_dataset_splits/Inaturalist_test_set1.txt": r"lacks \S*/Inaturalist_test_set1.txt;",
        "train_val2018": r"20 of 20 images .*, the first is \S*train_val2018/Aves/7471/\S*.jpg",
    },
    "vehicle_id": {
        "VehicleID_V1.0/train_test_split": "no train_test_split/train_list.txt in it",
        "VehicleID_V1.0/train_test_split/test_list_1600.txt": r"lacks \S*/test_list_1600.txt",
        "VehicleID_V1.0/image": r"20 of 20 images .* the first is \S*/image/0000100.jpg",
    },
}


@pytest.mark.parametrize(
    ("name", "absent"), [(name, x) for name, absent in MISSING.items() for x in absent]
)
def test_missing_file_is_named(tmp_path, name, absent):
    WRITE[name](tmp_path)
    (tmp_path / absent).rename(tmp_path / "away")
    with pytest.raises(UserError, match=MISSING[name][absent]):
        load_splits(NAMES[name], str(tmp_path), 0.2, 0)


# File -> a line that it should not hold, and what the message says.
BROKEN = {
    "online_products": ("Stanford_Online_Products/Ebay_test.txt", "7 3 1", "super_class_id path"),
    "vehicle_id": ("VehicleID_V1.0/train_test_split/train_list.txt", "12", "IMAGE VEHICLE"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_line_is_named(tmp_path, name):
    WRITE[name](tmp_path)
    file, line, expected = BROKEN[name]
    text = (tmp_path / file).read_text()
    (tmp_path / file).write_text(text + line + "\n")
    number = text.count("\n") + 1
    with pytest.raises(UserError, match=rf"{file}: expected .*{expected} in line {number}, got"):
        load_splits(NAMES[name], str(tmp_path), 0.2, 0)


def test_products_without_their_header_are_refused(tmp_path):
    write_products(tmp_path)
    file = tmp_path / "Stanford_Online_Products" / "Ebay_train.txt"
    file.write_text(file.read_text().partition("\n")[2])
    with pytest.raises(UserError, match=r"Ebay_train.txt: expected the header .* in line 1"):
        load_splits("StanfordOnlineProducts", str(tmp_path), 0.2, 0)
