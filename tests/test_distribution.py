"""The files of sdist and wheel, which .ci/dist makes; every place names the same version."""

import os
import re
import tarfile
import zipfile
from pathlib import Path

import pytest

import pml_pnp

ROOT = Path(__file__).parents[1]
VERSION = pml_pnp.__version__
# Other endings, such as those that an editor or Python leaves there, do not belong to the package.
ENDINGS = (".py", ".txt", ".yaml", "py.typed")


@pytest.fixture
def dist():
    if "PML_PNP_DIST" not in os.environ:
        pytest.skip(".ci/dist sets PML_PNP_DIST")
    return Path(os.environ["PML_PNP_DIST"])


@pytest.fixture
def package():
    paths = (ROOT / "pml_pnp").rglob("*")
    return {str(x.relative_to(ROOT)) for x in paths if x.name.endswith(ENDINGS)}


def test_the_wheel_holds_the_package_and_no_more(dist, package):
    with zipfile.ZipFile(dist / f"pml_pnp-{VERSION}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
    info = f"pml_pnp-{VERSION}.dist-info/"
    about = ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE", "top_level.txt")
    assert names == package | {info + name for name in about}


def test_the_sdist_holds_what_builds_the_package_and_no_more(dist, package):
    with tarfile.open(dist / f"pml_pnp-{VERSION}.tar.gz") as sdist:
        paths = [Path(x.name) for x in sdist if x.isfile()]
    names = {str(Path(*path.parts[1:])) for path in paths if "pml_pnp.egg-info" not in path.parts}
    about = ("CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md")
    assert names == package | {*about, "pyproject.toml", "setup.cfg"}


def test_the_tests_run_with_the_wheel(dist):
    assert Path(pml_pnp.__file__).parent != ROOT / "pml_pnp"


def test_changelog_and_citation_name_the_version():
    changelog, citation = ((ROOT / x).read_text() for x in ("CHANGELOG.md", "CITATION.cff"))
    assert re.search(r"^## \[(.+?)\]", changelog, flags=re.MULTILINE)[1] == VERSION
    assert re.search(r"^version: (.+)$", citation, flags=re.MULTILINE)[1] == VERSION
