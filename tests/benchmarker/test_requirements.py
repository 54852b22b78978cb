"""What is said when something is missing, and the recipes that it names."""

import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from unittest import mock

import pytest

from pml_pnp import benchmarker
from pml_pnp.benchmarker import requirements

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "powerful_benchmarker"
RECIPES = ("current", "pinned")


def pins(path):
    """{package: version} of a requirements file."""
    lines = [x for x in path.read_text(encoding="utf-8").splitlines() if not x.startswith("#")]
    return dict(x.split("==") for x in lines if "==" in x)


@pytest.fixture
def everything_is_there(monkeypatch):
    found = set(requirements.MODULES) | {"ax"}
    known, version = {"powerful-benchmarker": "0.9.33"}, metadata.version
    monkeypatch.setattr(requirements, "is_there", found.__contains__)
    monkeypatch.setattr(requirements.metadata, "version", lambda x: known.get(x) or version(x))
    monkeypatch.setattr(requirements.importlib, "import_module", lambda name: None)
    return found


@pytest.mark.parametrize("module", [*requirements.MODULES, "ax"])
def test_the_first_missing_module_is_named_with_its_line(everything_is_there, module):
    requirements.check_installed(bayes_opt=True)
    everything_is_there.remove(module)
    with pytest.raises(requirements.MissingPackage, match=f"needs {module}, which") as raised:
        requirements.check_installed(bayes_opt=True)
    assert isinstance(raised.value, ImportError) and raised.value.name == module
    line = str(raised.value).splitlines()[-1]
    assert line.strip() == requirements.install_command(requirements.recipe(), bayes_opt=True)
    if module == "ax":
        requirements.check_installed(bayes_opt=False)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (lambda name: "0.0.1", "expected .* 0.9.33, .* got 0.0.1"),
        (mock.Mock(side_effect=metadata.PackageNotFoundError), "got one that is not installed"),
    ],
)
def test_another_release_is_refused(everything_is_there, monkeypatch, version, message):
    monkeypatch.setattr(requirements.metadata, "version", version)
    with pytest.raises(requirements.MissingPackage, match=message):
        requirements.check_installed(bayes_opt=False)


@pytest.mark.parametrize("bayes_opt", [False, True])
def test_what_is_there_but_lacks_something_is_told_with_the_line(monkeypatch, bayes_opt):
    imported = []
    monkeypatch.setattr(requirements.importlib, "import_module", imported.append)
    with requirements.check_imports(bayes_opt):
        pass
    assert any("bayes_opt" in name for name in imported) == bayes_opt
    error = ImportError("cannot import name 'assert_md5sum'", name="gdown")
    monkeypatch.setattr(requirements.importlib, "import_module", mock.Mock(side_effect=error))
    with pytest.raises(requirements.MissingPackage, match="does not import .*assert_md5sum") as e:
        with requirements.check_imports(bayes_opt):
            pass
    assert "pip install -r" in str(e.value) and e.value.name == "gdown"


@pytest.mark.parametrize("error", [RuntimeError("operator nms does not exist"), ImportError("no")])
def test_a_torchvision_that_does_not_import_is_told(everything_is_there, monkeypatch, error):
    monkeypatch.setattr(requirements.importlib, "import_module", mock.Mock(side_effect=error))
    with pytest.raises(requirements.MissingPackage, match="does not fit the installed torch") as e:
        requirements.check_installed(bayes_opt=False)
    assert str(error) in str(e.value) and "pip install --no-deps torchvision==" in str(e.value)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_line_names_files_that_pin_what_powerful_benchmarker_was_run_with(recipe):
    command = requirements.install_command(recipe, bayes_opt=True)
    files = [Path(x) for x in shlex.split(command) if x.endswith(".txt")]
    names = ("base", "no-deps", "bayes")
    assert sorted(files) == sorted(requirements.FOLDER / f"{recipe}-{x}.txt" for x in names)
    base, no_deps, bayes = (pins(requirements.FOLDER / f"{recipe}-{x}.txt") for x in names)
    assert no_deps["powerful-benchmarker"] == "0.9.33" and "ax-platform" in bayes
    assert no_deps["pytorch-metric-learning"].startswith("0." if recipe == "pinned" else "2.")
    assert not base.keys() & no_deps.keys()
    assert all(base[name] == bayes[name] for name in base.keys() & bayes.keys())


def test_the_current_recipe_agrees_with_the_constraints_of_the_suite():
    suite = pins(ROOT / "constraints.txt")
    files = [requirements.FOLDER / f"current-{x}.txt" for x in ("base", "no-deps")]
    recipe = {name: version for f in files for name, version in pins(f).items()}
    assert len(suite.keys() & recipe.keys()) > 8
    assert {n: v for n, v in recipe.items() if suite.get(n, v) != v} == {}


def test_importing_the_package_imports_neither_pml_nor_torch():
    code = "import sys, pml_pnp.benchmarker.command_line; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "pytorch_metric_learning", "powerful_benchmarker"} & {*run.stdout.split()}


def test_a_folder_of_the_name_of_a_package_is_not_one(tmp_path, monkeypatch):
    (tmp_path / "powerful_nothing").mkdir()
    (tmp_path / "powerful_module.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    names = ("powerful_nothing", "powerful_module", "powerful_absence", "torch")
    assert [requirements.is_there(name) for name in names] == [False, True, False, True]


@pytest.mark.skipif(requirements.is_there("powerful_benchmarker"), reason="nothing is missing here")
@pytest.mark.parametrize(
    "command",
    [
        ["-m", "pml_pnp.benchmarker", "--experiment_name", "x"],
        [str(EXAMPLE / "run.py"), "--experiment_name", "x"],
        [str(EXAMPLE / "benchmark.py")],
    ],
    ids=["module", "run.py", "benchmark.py"],
)
def test_without_powerful_benchmarker_a_command_says_how_to_install_it(command, tmp_path):
    with pytest.raises(benchmarker.MissingPackage):
        benchmarker.prepare()
    run = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert re.search(r'error: powerful-benchmarker needs \w+, .*\n +pip install -r ".*', run.stderr)
    assert not list(tmp_path.iterdir())
