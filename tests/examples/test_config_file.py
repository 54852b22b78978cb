"""Settings from a file: checked like flags, which win."""

import json
import os

import pytest
from retrieval.configuration import absolute_root, configured, parser, with_file


@pytest.fixture
def read(tmp_path):
    """What is given by a file with this text and by these flags."""

    def given(text, *flags, name="settings.yaml"):
        file = tmp_path / name
        file.write_text(text if isinstance(text, str) else json.dumps(text))
        typed = vars(parser("train.py", "").parse_args([*map(str, flags)]))
        return with_file(str(file), typed)

    return given


def test_yaml_and_json_say_the_same(read):
    settings = {"dataset": "folder", "pretrained": True, "amp": False, "epochs": 3, "lr": 0.01}
    settings |= {"recall_at": [5, 50], "lr_milestones": []}
    settings |= {"loss_args": {"variant": "Dq", "alpha": 4}}
    text = """
        dataset: folder
        pretrained: true
        amp: false
        epochs: 3
        lr: 1e-2  # a string to YAML
        recall-at: [5, 50]
        lr_milestones: []
        loss_args: {variant: Dq, alpha: 4}
    """
    assert read(text) == read(settings, name="settings.json") == settings


def test_flags_win_and_null_is_the_default(read):
    given = read("epochs: 3\nlr: 0.1\npretrained: true", "--epochs", 5, "--no-pretrained")
    assert given == {"epochs": 5, "lr": 0.1, "pretrained": False}
    assert read("miner: null\nloss_args: null\nimage_size: null") == {}
    assert configured(read("image_size: null"))["image_size"] == 8


# The rate of the loss in a file with lr 0.1, flags, and the rate of the loss in the end.
LOSS_RATES = [(0.1, "--lr 0.5", 0.5), (0.1, "--lr 0.5 --loss-lr 0.1", 0.1), (0.1, "", 0.1)]
LOSS_RATES += [(0.2, "--lr 0.5", 0.2)]


@pytest.mark.parametrize(("rate", "flags", "expected"), LOSS_RATES)
def test_learning_rate_of_the_loss_follows_a_flag_unless_it_is_its_own(read, rate, flags, expected):
    assert configured(read(f"lr: 0.1\nloss_lr: {rate}", *flags.split()))["loss_lr"] == expected


LOSS = "loss_args: {variant: Dq, alpha: 4}"
MINER = "miner: MultiSimilarityMiner\nminer_args: {epsilon: 0.2}"
BESIDE = "beside: CircleLoss\nbeside_args: {m: 0.3}"
# The text of a file, flags, and the arguments of the loss, miner or loss beside, if any.
ARGUMENTS = [
    (LOSS, "", {"variant": "Dq", "alpha": 4}),
    ("loss_args: {anneal: 1e-2}", "", {"anneal": 0.01}),  # a string to YAML
    (LOSS, "--loss-args alpha=8", {"variant": "Dq", "alpha": 8}),
    (LOSS, "--loss PNPLoss", {"variant": "Dq", "alpha": 4}),
    (LOSS, "--loss ContrastiveLoss", None),
    (LOSS, "--loss ProxyAnchorLoss --loss-args alpha=16", {"alpha": 16}),
    (MINER, "", {"epsilon": 0.2}),
    (MINER, "--miner UniformHistogramMiner", None),
    (BESIDE, "--beside-args gamma=64", {"m": 0.3, "gamma": 64}),
    (BESIDE, "--beside SupConLoss", None),
]


@pytest.mark.parametrize(("text", "flags", "expected"), ARGUMENTS)
def test_arguments_of_flags_are_added_to_those_of_the_same_loss(read, text, flags, expected):
    given = read(text, *flags.split())
    found = [value for name, value in given.items() if name.endswith("_args")]
    assert found == ([] if expected is None else [expected])


@pytest.mark.parametrize(
    ("root", "expected"),
    [("data", "{0}/data"), ("../data", "{0.parent}/data"), ("/data", "/data"), ("~/x", "{1}/x")],
)
def test_data_root_starts_from_the_folder_of_the_file(read, tmp_path, root, expected):
    expected = expected.format(tmp_path, os.path.expanduser("~"))
    assert read(f"data_root: {root}")["data_root"] == expected
    assert read(f"data_root: {root}", "--data-root", "typed")["data_root"] == "typed"


def test_data_root_beside_a_linked_folder_is_what_the_system_finds(read, tmp_path):
    (tmp_path / "real" / "settings").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real/settings")
    expected = os.path.realpath(tmp_path / "real" / "data")
    assert read("data_root: ../data", name="link/file.yaml")["data_root"] == expected
    typed = {"dataset": "folder", "data_root": f"{tmp_path}/link/../data"}
    assert absolute_root(typed) == expected


# The text of a file -> what the message says after the file's name.
MISTAKES = {
    "bach_size: 3": "unknown setting 'bach_size'; expected for instance batch_size",
    "zzz: 3": "unknown setting 'zzz'; expected one of dataset, data_root,",
    "output_dir: here": "output_dir is no setting; give --output-dir on the command line",
    "lr: fast": "lr: expected a positive number, got 'fast'",
    "lr: true": "lr: expected a positive number, got 'True'",
    "lr: [1, 2]": "lr: expected one value, got [1, 2]",
    "epochs: 1.5": "epochs: expected a positive integer, got '1.5'",
    "pretrained: 1": "pretrained: expected true or false, got 1",
    "trunk: 50": "trunk: expected text, got 50",
    "dataset: mnist": "dataset: invalid choice: 'mnist' (choose from 'digits'",
    "recall_at: 5": "recall_at: expected a list, got 5",
    "recall_at: [5, a]": "recall_at: expected a positive integer, got 'a'",
    "loss_args: [alpha=4]": "loss_args: expected names and values, got ['alpha=4']",
    "- lr": "expected names and values, got ['lr']",
    "": "expected names and values, got None",
    "lr: [": "cannot be read: while parsing",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistake_is_one_line_that_names_the_file(refused, tmp_path, text):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    error = refused("--config", file)
    assert error.startswith(f"train.py: error: --config {file}: {MISTAKES[text]}"), error


def test_file_that_is_absent_or_no_json_or_beside_resume_is_named(refused, tmp_path):
    (tmp_path / "broken.json").write_text("{")
    for name in ("absent.yaml", "broken.json"):
        assert f"{name}: cannot be read: " in refused("--config", tmp_path / name)
    error = refused("--resume", tmp_path, "--config", tmp_path / "settings.yaml")
    assert "as it is configured; leave out --config" in error


def test_a_batch_from_a_file_is_not_made_smaller(refused, tmp_path):
    (tmp_path / "settings.yaml").write_text("batch_size: 800\nturned_classes: false")
    error = refused("--config", tmp_path / "settings.yaml")
    assert "fill a batch of at most 20" in error


def test_a_run_is_repeated_from_its_own_configuration(main, trained, tmp_path, strict_json):
    trained("--loss-args", "variant=Dq", "alpha=2", name="first")
    again = ["--config", tmp_path / "first" / "config.json", "--name", "again"]
    assert main("--output-dir", tmp_path, *again) == 0
    for file in ("config.json", "metrics.json"):
        first, again = (strict_json(tmp_path / x / file) for x in ("first", "again"))
        assert {**first, "seconds": 0} == {**again, "seconds": 0}
