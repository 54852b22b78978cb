"""Overlays by bare name, and flags."""

import importlib.util
import logging
import re
import sys
import types
from pathlib import Path

import pytest
import yaml

from pml_pnp import PNPLoss
from pml_pnp.benchmarker import command_line


def test_overlays_are_found_by_bare_name_after_the_users_own(tmp_path):
    folder = tmp_path / "config_loss_and_miners"
    folder.mkdir()
    wanted = str(folder / "with_pnp.yaml")
    packaged = command_line._packaged(wanted)
    assert packaged == str(command_line.CONFIGS / "config_loss_and_miners" / "with_pnp.yaml")
    (folder / "with_pnp.yaml").touch()
    assert command_line._packaged(wanted) == wanted
    with pytest.raises(command_line.UnknownConfig, match="no x.yaml in .* with_pnp, with_pnp_bay"):
        command_line._packaged(str(folder / "x.yaml"))


def test_overlays_name_arguments_of_the_loss():
    overlays = sorted(command_line.CONFIGS.glob("*/*.yaml"))
    assert [path.stem for path in overlays] == ["with_pnp", "with_pnp_bayes_opt"]
    for path in overlays:
        overlay = yaml.safe_load(path.read_text())["loss_funcs"]["metric_loss~OVERRIDE~"]
        (arguments,) = overlay.values()
        arguments = {name.partition("~")[0]: value for name, value in arguments.items()}
        for end in (0, 1):  # of what is searched
            PNPLoss(**{k: v[end] if isinstance(v, list) else v for k, v in arguments.items()})


EXPERIMENT = ["--experiment_name", "x"]
# Flags, and what is read of them.
READ = [
    ("", {"dataset_root": "datasets", "root_experiment_folder": "experiments"}),
    ("--reproductions 0", {"reproductions": 0}),
    ("--reproductions 3", {"reproductions": 3}),
    ("--reproductions 2,5", {"reproductions": [2, 5]}),
    ("--resume_training latest", {"resume_training": "latest"}),
    ("--resume_training best", {"resume_training": "best"}),
    ("--evaluat", {"evaluate": False}),  # an abbreviation is none
]


@pytest.mark.parametrize(("flags", "expected"), READ)
def test_flags_are_read(flags, expected):
    args, _ = command_line._parser().parse_known_args([*EXPERIMENT, *flags.split()])
    assert vars(args).items() >= expected.items()


WRONG = ["--reproductions a", "--reproductions -1", "--reproductions 1,2,3"]
WRONG += ["--resume_training first", "--seed -1", "--seed x"]


@pytest.mark.parametrize("flag", WRONG)
def test_a_wrong_value_is_refused(flag, capsys):
    with pytest.raises(SystemExit):
        command_line.main([*EXPERIMENT, *flag.split()])
    assert f"error: argument {flag.split()[0]}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--sed 0", "unknown flag --sed: did you mean --seed?"),
        ("--num_epoch_train 5", "flag --num_epoch_train: did you mean --num_epochs_train?"),
        ("--config_modles [default]", "--config_modles: did you mean --config_models?"),
        ("--evaluat", "unknown flag --evaluat: did you mean --evaluate?"),
        ("--xyzzy", "unknown flag --xyzzy"),
        ("--models~OVERIDE~ {}", "--models~OVERIDE~: expected ~OVERRIDE~, ~APPLY~N, "),
        ("--patience=5", "--patience=5: powerful-benchmarker reads a space, as in --patience 5"),
    ],
)
def test_an_unknown_flag_is_refused_with_the_nearest(words, message, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        command_line.check_flags(["--models", "{}", *words.split()], ["config_models", "my_own"])
    assert message in capsys.readouterr().err


def test_keys_of_configs_and_what_is_read_of_them_are_flags():
    words = "--my_own -1 --tester~APPLY~2 {a: 1} --models~OVERRIDE~ {} --patience~INT_BAYESIAN~ [1]"
    words += " --layers_to_extract~DELETE~ --my_list [1, 2]"
    flags = command_line.check_flags(words.split(), ["my_own", "my_list~SWAP~1"])
    assert flags == ["my_own", "tester", "models", "patience", "layers_to_extract", "my_list"]


def test_what_powerful_benchmarker_reads_is_listed():
    """Every attribute that its code takes from the merged configs and flags."""
    package = importlib.util.find_spec("powerful_benchmarker")
    if package is None or package.origin is None:
        pytest.skip("powerful-benchmarker is not installed")
    source = "".join(p.read_text() for p in Path(package.origin).parent.rglob("*.py"))
    read = set(re.findall(r"\bargs\.([a-z]\w+)\b(?!\()", source))
    made = {"dict_of_yamls", "experiment_folder", "place_to_save_configs", "config_foldernames"}
    taken = {x.dest for x in command_line._parser()._actions}
    assert read - made - taken == set(command_line.READ_BY_PB)


@pytest.fixture
def runner(monkeypatch):
    """In the place of powerful-benchmarker's; `seen` lists what it is prepared and given."""
    fake = types.SimpleNamespace(seen=[])
    fake.register = lambda kind, part: fake.seen.append((kind, part))
    monkeypatch.setattr(command_line, "prepare", fake.seen.append)
    monkeypatch.setattr(command_line, "register", lambda runner: None)
    monkeypatch.setattr(command_line, "build_runner", lambda *args: fake)
    return fake


def test_the_command_line_of_the_process_is_left_as_it_was(runner, caplog):
    caplog.set_level(logging.WARNING)  # and back again after the test

    def run():
        runner.seen.append(list(sys.argv[1:]))
        assert logging.getLogger().level == logging.INFO  # what powerful-benchmarker does
        raise RuntimeError("stopped")

    runner.run = run
    before = list(sys.argv)
    argv = ["--experiment_name", "x y", "--bayes_opt_iters", "3", "--losses", "{A: {b: 1}}"]
    with pytest.raises(RuntimeError, match="stopped"):
        command_line.main(argv, parts=[("dataset", dict)])
    words = [*argv[:-1], "{A:", "{b:", "1}}"]  # as if it had not been quoted
    assert sys.argv == before and runner.seen == [True, ("dataset", dict), words]


def test_a_folder_that_is_taken_is_an_error(runner):
    runner.run = sys.exit  # as powerful-benchmarker does
    with pytest.raises(SystemExit, match="experiment_name is in experiments: continue it with"):
        command_line.main(["--experiment_name", "x"])
