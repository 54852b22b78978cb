"""Settings from a file: checked like flags, which win."""

import json
import os

import pytest
from retrieval.configuration import configured, parser, with_file


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
    settings = {
        "dataset": "folder",
        "pretrained": True,
        "amp": False,
        "epochs": 3,
        "lr": 0.01,
        "recall_at": [5, 50],
        "lr_milestones": [],
        "loss_args": {"variant": "Dq", "alpha": 4},
    }
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


def test_flags_win(read):
    given = read("epochs: 3\nlr: 0.1\npretrained: true", "--epochs", 5, "--no-pretrained")
    assert given == {"epochs": 5, "lr": 0.1, "pretrained": False}


def test_arguments_of_flags_are_added_to_those_of_the_same_loss(read):
    text = "loss_args: {variant: Dq, alpha: 4, anneal: 1e-2}"
    assert read(text)["loss_args"] == {"variant": "Dq", "alpha": 4, "anneal": 0.01}
    given = read(text, "--loss-args", "alpha=8")
    assert given["loss_args"] == {"variant": "Dq", "alpha": 8, "anneal": 0.01}
    assert read(text, "--loss", "PNPLoss")["loss_args"]["alpha"] == 4
    assert "loss_args" not in read(text, "--loss", "ContrastiveLoss")
    given = read(text, "--loss", "ProxyAnchorLoss", "--loss-args", "alpha=16")
    assert given["loss_args"] == {"alpha": 16}
    text = "miner: MultiSimilarityMiner\nminer_args: {epsilon: 0.2}"
    assert read(text)["miner_args"] == {"epsilon": 0.2}
    assert "miner_args" not in read(text, "--miner", "UniformHistogramMiner")
    text = "beside: CircleLoss\nbeside_args: {m: 0.3}"
    assert read(text, "--beside-args", "gamma=64")["beside_args"] == {"m": 0.3, "gamma": 64}
    assert "beside_args" not in read(text, "--beside", "SupConLoss")


def test_null_is_the_default(read):
    assert read("miner: null\nloss_args: null\nimage_size: null") == {}
    assert configured(read("image_size: null"))["image_size"] == 8


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        ("data", "{folder}/data"),
        ("../data", "{above}/data"),
        ("/data", "/data"),
        ("~/x", "{home}/x"),
    ],
)
def test_data_root_starts_from_the_folder_of_the_file(read, tmp_path, root, expected):
    places = {"folder": tmp_path, "above": tmp_path.parent, "home": os.path.expanduser("~")}
    assert read(f"data_root: {root}")["data_root"] == expected.format(**places)
    assert read(f"data_root: {root}", "--data-root", "typed")["data_root"] == "typed"


# The text of a file -> what the message says after the file's name.
MISTAKES = {
    "bach_size: 3": "unknown setting 'bach_size'; expected for instance batch_size",
    "zzz: 3": "unknown setting 'zzz'; expected one of dataset, data_root,",
    "output_dir: here": "output_dir is no setting; give --output-dir on the command line",
    "report: false": "report is no setting; give --report on the command line",
    "resume: here": "resume is no setting; give --resume on the command line",
    "lr: fast": "lr: expected a positive number, got 'fast'",
    "lr: true": "lr: expected a positive number, got 'True'",
    "lr: [1, 2]": "lr: expected one value, got [1, 2]",
    "epochs: 1.5": "epochs: expected a positive integer, got '1.5'",
    "pretrained: 1": "pretrained: expected true or false, got 1",
    "amp: 'yes'": "amp: expected true or false, got 'yes'",
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
def test_mistake_is_one_line_that_names_the_file(main, capsys, tmp_path, text):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    assert main("--config", file) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"train.py: error: --config {file}: {MISTAKES[text]}"), err
    assert err.count("\n") == 1


def test_file_that_is_absent_or_no_json_is_named(main, capsys, tmp_path):
    assert main("--config", tmp_path / "absent.yaml") == 2
    assert "absent.yaml: cannot be read: " in capsys.readouterr().err
    (tmp_path / "broken.json").write_text("{")
    assert main("--config", tmp_path / "broken.json") == 2
    assert "broken.json: cannot be read: " in capsys.readouterr().err


def test_resume_has_a_configuration_of_its_own(main, capsys, tmp_path):
    assert main("--resume", tmp_path, "--config", tmp_path / "settings.yaml") == 2
    assert "as it is configured; leave out --config" in capsys.readouterr().err


def test_a_batch_from_a_file_is_not_made_smaller(main, capsys, tmp_path):
    (tmp_path / "settings.yaml").write_text("batch_size: 800\nturned_classes: false")
    assert main("--config", tmp_path / "settings.yaml") == 2
    assert "fill a batch of at most 20" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")
def test_a_run_is_repeated_from_its_own_configuration(main, quick, tmp_path, strict_json):
    arguments = ["--output-dir", tmp_path, "--epochs", 1, "--name"]
    assert main(*arguments, "first", *quick, "--loss-args", "variant=Dq", "alpha=2") == 0
    again = ["--config", tmp_path / "first" / "config.json", "--name", "again"]
    assert main("--output-dir", tmp_path, *again) == 0
    for file in ("config.json", "metrics.json"):
        first, again = (strict_json(tmp_path / x / file) for x in ("first", "again"))
        assert {**first, "seconds": 0} == {**again, "seconds": 0}
