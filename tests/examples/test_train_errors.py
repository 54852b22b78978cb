"""Every mistake a user can make ends in one line and exit code 2."""

import json
import re
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest
from retrieval import commands, train
from retrieval.errors import UserError
from retrieval.network import load_best

EXAMPLES = Path(__file__).parents[2] / "examples"

# argv -> what the line must say
MISTAKES = {
    "--loss PNPLos": "--loss: unknown name 'PNPLos'; expected for instance PNPLoss",
    "--loss pnploss": "--loss: unknown name 'pnploss'; expected for instance PNPLoss",
    "--loss CrossBatchMemory": "--loss: unknown name 'CrossBatchMemory'",
    "--loss-args alpa=4": "--loss-args: PNPLoss has no argument alpa; it takes b=2, alpha=1",
    "--loss-args alpha": "--loss-args: expected name=value, got 'alpha'",
    "--loss-args anneal=-1": "--loss-args: PNPLoss: anneal must be",
    "--loss-args distance=Nearness": "no distance is called 'Nearness'",
    "--loss VICRegLoss": "--loss: VICRegLoss cannot be used here",
    "--loss ContrastiveLoss --loss-args pos_margin=x": "--loss: ContrastiveLoss cannot be used",
    "--beside TripletLoss": "--beside: unknown name 'TripletLoss'; expected for",
    "--beside-args margin=1": "--beside-args needs --beside",
    "--beside CircleLoss --beside-args n=1": "--beside-args: CircleLoss has no argument n",
    "--beside VICRegLoss": "--beside: VICRegLoss cannot be used here",
    "--miner MultiSimilarity": "expected for instance MultiSimilarityMiner",
    "--miner-args epsilon=0.1": "--miner-args needs --miner",
    "--miner TripletMarginMiner --miner-args margn=1": "TripletMarginMiner has no argument margn",
    "--memory-size 16": "--memory-size: expected at least the batch size",
    "--memory-size 999 --loss ProxyAnchorLoss": "--memory-size: CrossBatchMemory not supported",
    "--batch-size 30 --samples-per-class 4": "--batch-size: expected a multiple of 4 (4 samples "
    "per class), got 30",
    "--batch-size 999 --samples-per-class 3 --no-turned-classes": "fill a batch of at most 15, got",
    "--batch-size 16 --samples-per-class 16": "--samples-per-class: expected at least 2 classes",
    "--lr-cosine --lr-milestones 3": "fall by it or by --lr-milestones, not by both",
    "--warmup-epochs 20": "--warmup-epochs: expected fewer than the 20 of --epochs, got 20",
    "--samples-per-class 1": "--samples-per-class: expected at least 2",
    "--image-size 4": "--image-size: expected at least 8, got 4",
    "--trunk efficientnet_lite0 --image-size 4": "--image-size: expected at least 8, got 4",
    "--pretrained": "--pretrained: the trunk 'small' has no pretrained weights",
    "--device abacus": "--device: 'abacus' cannot be used here",
    "--device meta": "'meta' cannot be used here: expected auto, cpu, cuda, cuda:N or mps",
    "--loss TripletMarginLoss --loss-args margin=1e999": "expected values that JSON can hold",
    "--loss-args collect_stats={1}": "expected values that JSON can hold",
    "--resume nowhere": "--resume: no run in nowhere",
    "--resume nowhere --output-dir runs": "leave out --name, --output-dir and --resume-if-exists",
    "--resume-if-exists": "--resume-if-exists needs --name",
    "--name a/b": "--name: expected a folder name without separators, got 'a/b'",
    "--name ..": "--name: expected a folder name without separators, got '..'",
    "--test-fraction 0.3": "--test-fraction: digits has a split of its own here",
    "--data-root .": "--data-root: digits are part of scikit-learn and read from no folder; to "
    "train on the images there add --dataset folder or, if it is a table, --dataset csv",
    "--dataset omniglot": "omniglot needs --data-root, or the environment variable PML_PNP_DATA",
    "--dataset omniglot --data-root absent": "omniglot: the data root is not a folder: absent",
    "--dataset omniglot --data-root .": "omniglot not found in .: expected images_background",
    "--dataset grocery --data-root .": "grocery not found in .: expected grocery64.zip",
    "--dataset folder --data-root .": "folder: expected at least 4 class folders with images, 2 to "
    "train on and 2 to test on, got 0; --test-fraction 0 trains on every class, without a test",
}
ARGPARSE_MISTAKES = {
    "--dataset mnist": "invalid choice: 'mnist'",
    "--seed 99999999999999999999": "expected an integer from 0 to 2^62",
    "--lr 0": "expected a positive number, got '0'",
    "--lr nan": "expected a positive number, got 'nan'",
    "--epochs 0": "expected a positive integer, got '0'",
    "--epochs many": "expected a positive integer, got 'many'",
    "--val-fraction 1": "expected a number from 0 to below 1, got '1'",
    "--test-fraction 1": "expected a number from 0 to below 1, got '1'",
    "--patience -1": "expected an integer of 0 or more, got '-1'",
    "--weight-decay -1": "expected a number of 0 or more, got '-1'",
    "--ema-decay 1": "expected a number from 0 to below 1, got '1'",
    "--grad-cache -1": "expected an integer of 0 or more, got '-1'",
    "--threads 0": "expected a positive integer, got '0'",
    "--epoch 3": "unrecognized arguments: --epoch 3",
}


@pytest.mark.parametrize("argv", MISTAKES)
def test_mistake_ends_in_one_line(refused, tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    error = refused(*argv.split())
    assert error.startswith("train.py: error: ") and MISTAKES[argv] in error
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("argv", ARGPARSE_MISTAKES)
def test_mistyped_argument_is_named(main, capsys, argv):
    with pytest.raises(SystemExit, match="^2$"):
        main(*argv.split())
    err = capsys.readouterr().err
    assert err.startswith("train.py: error: ") and ARGPARSE_MISTAKES[argv] in err
    assert err.endswith("; train.py --help lists the flags\n") and err.count("\n") == 1


@pytest.mark.parametrize("name", ["report", "search", "export", "compare", "", "trian"])
def test_a_flag_that_no_command_has_is_one_line(command, capsys, name):
    with pytest.raises(SystemExit, match="^2$"):
        command(name, "run", "--no-such-flag")
    assert capsys.readouterr().err.count("\n") == 1


def test_script_exits_with_the_code_of_main(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--loss-args", "variant=Dz"])
    with pytest.raises(SystemExit, match="^2$"):
        runpy.run_path(str(EXAMPLES / "train.py"), run_name="__main__")
    assert capsys.readouterr().err.startswith("train.py: error: ")


# The commands that take a run, which is in the folder RUN.
COMMANDS = ["train --resume RUN", "report RUN", "export RUN", "search RUN RUN --index RUN"]


@pytest.mark.parametrize("words", [*COMMANDS, "compare RUN"])
def test_folder_without_a_run_or_of_another_program_is_refused(command, refused, tmp_path, words):
    arguments = words.replace("RUN", str(tmp_path)).split()
    assert f"no run in {tmp_path}" in refused(*arguments, by=command)
    with pytest.raises(UserError, match="^no run in"):
        load_best(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    error = refused(*arguments, by=command)
    assert "config.json is not of this program: no data" in error


@pytest.mark.parametrize("words", COMMANDS)
def test_run_of_an_earlier_version_is_told(
    run, main, command, refused, strict_json, tmp_path, words
):
    file = run / "config.json"
    config = strict_json(file)
    file.write_text(json.dumps({k: v for k, v in config.items() if k not in ("amp", "patience")}))
    error = refused(*words.replace("RUN", str(run)).split(), by=command)
    assert f"{file} has no patience, amp, so an earlier version made this run" in error
    assert f"start a new one with the same settings by --config {file}" in error
    assert 'and remove its line "crc32"' in error
    (values,) = re.findall(r"the present defaults are (.*)\n", error)
    if "--resume" in words:  # both ways out
        new = ["--output-dir", tmp_path, "--name", "new", "--epochs", 1, "--no-report"]
        assert main("--config", file, *new) == 0
        again = {**json.loads(file.read_text()), **json.loads("{" + values + "}")}
        assert again == config
        file.write_text(json.dumps(again))
        assert main("--resume", run) == 0


@pytest.mark.parametrize("common", [True, False])
def test_a_mistake_of_one_process_is_said_by_that_process(main, capsys, monkeypatch, common):
    error = UserError("a broken image", common)
    monkeypatch.setattr(train, "run", mock.Mock(side_effect=error))
    monkeypatch.setattr(commands, "rank", lambda: 1)
    monkeypatch.setattr(commands.time, "sleep", lambda seconds: None)
    assert main() == 2
    assert ("a broken image" in capsys.readouterr().err) is not common


@pytest.mark.parametrize("package", ["faiss", "record_keeper", "tensorboard", "jinja2"])
def test_missing_package_is_named(refused, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    error = refused()
    assert "missing packages; install them with pip install" in error
    assert package.replace("_", "-") in error
    error = refused("--no-report", "--device", "abacus")
    assert ("missing packages" in error) is (package != "jinja2")  # which makes the report


def test_help_explains_test_and_validation_and_lists_the_commands(command, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        command("--help")
    out = capsys.readouterr().out
    assert all(name in out for name in ("train", "report", "search", "export", "compare"))
    with pytest.raises(SystemExit, match="^0$"):
        command("train", "--help")
    out = " ".join(capsys.readouterr().out.split())
    for said in (
        "whole classes are held out",
        "split by --test-fraction, and --seed draws the classes",
        "the test is closed-set",
        "stops after more epochs than this without improvement",
        "the number changes the last digits of results",
    ):
        assert said in out
