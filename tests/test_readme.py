"""README.md and docs/: code runs and prints what it says, links and commands lead somewhere."""

import doctest
import importlib.util
import inspect
import itertools
import pydoc
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import BUILT_IN, needs_built_in
from pytorch_metric_learning import losses as pml_losses

import pml_pnp
from pml_pnp.variants import VARIANTS

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "README.md",
    *sorted(page for page in DOCS.rglob("*.md") if page.parent.name != "upstream"),
]
PICTURE = ROOT / ".ci" / "picture"
REPORT = ROOT / "benchmarks" / "report.py"
NEEDS_FAISS = {"large_batches.md"}  # PML's testers do
NEEDS_OTHERS = {"coming_from.md"}  # PNPLoss and SmoothAPLoss of PML, which PML 2.0 lacks


def read(page):
    return page.read_text(encoding="utf-8")


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", read(page), flags=re.DOTALL)


def copy(paths, folder):
    for path in paths:
        copied = folder / path.relative_to(ROOT)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes(path.read_bytes())


def each(pages):
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.name)


@each([page for page in PAGES if ">>>" in read(page)])
def test_the_code_of_a_page_runs(page):
    """Block after block in one session, as a reader would."""
    if page.name in NEEDS_FAISS:
        pytest.importorskip("faiss")
    if page.name in NEEDS_OTHERS and not hasattr(pml_losses, "SmoothAPLoss"):
        pytest.skip("this PML has no SmoothAPLoss")
    text = "\n".join(block for block in blocks(page, "python") if ">>>" in block)
    example = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    assert len(example.examples) == len(re.findall(r"^>>> (?!#)", read(page), flags=re.MULTILINE))
    report = []
    try:
        found = doctest.DocTestRunner().run(example, out=report.append)
        assert found.failed == 0, "".join(report)
    finally:
        pml_pnp.unregister()


@each([page for page in PAGES if any(">>>" not in block for block in blocks(page, "python"))])
def test_other_code_of_a_page_can_be_compiled(page):
    for block in blocks(page, "python"):
        if ">>>" not in block:
            compile(block, page.name, "exec")


def test_the_readme_is_short_and_leads_to_every_page():
    assert len(read(README).split()) <= 1200
    assert all(f"](docs/{page.name})" in read(README) for page in DOCS.glob("*.md"))


@each([README, DOCS / "loss.md"])
def test_a_page_names_every_variant_with_its_equation(page):
    for name, variant in VARIANTS.items():
        equation = variant.equation or ""  # the cell stays empty: | |
        row = rf'^\| `"{name}"`.*\| {equation} ?\|'
        assert re.search(row, read(page), flags=re.MULTILINE), f"{page.name} lacks {row}"


@each(PAGES)
def test_a_page_names_only_files_that_exist(page):
    folders = "examples|benchmarks|tests|docs|pml_pnp"
    paths = set(re.findall(rf"\b(?:{folders})/[\w./-]+\.\w+", read(page)))
    assert all((ROOT / path).exists() for path in paths)


def test_the_picture_of_the_package_is_that_of_its_imports(tmp_path):
    copy([PICTURE, ROOT / "CONTRIBUTING.md", *(ROOT / "pml_pnp").rglob("*.py")], tmp_path)
    command = [sys.executable, tmp_path / PICTURE.relative_to(ROOT), "--check"]
    subprocess.run(command, check=True)
    with (tmp_path / "pml_pnp" / "pairs.py").open("a") as file:
        file.write("from pml_pnp import precision\n")
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1 and "not that of the imports" in run.stderr


def test_the_application_says_what_each_of_its_modules_is_for():
    folder = ROOT / "examples" / "retrieval"
    named = set(re.findall(r"`([a-z_]+)", read(folder / "__init__.py")))
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}
    assert modules <= named


def anchor(heading):
    return re.sub(r"[^\w\s-]", "", heading.lower()).replace(" ", "-")


@each(PAGES)
def test_links_of_a_page_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", read(page))
    for link in (x for x in links if "://" not in x):
        name, _, fragment = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if fragment:
            headings = re.findall(r"^#+ (.*)$", read(target), flags=re.MULTILINE)
            assert fragment in map(anchor, headings), link


@each([page for page in PAGES if blocks(page, "bash")])
def test_scripts_and_modules_of_the_commands_exist(page):
    found = []
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            found += [ROOT / word for word in words if word.endswith(".py")]
            found += [ROOT / script for tool, script in itertools.pairwise(words) if tool == "bash"]
            for flag, module in itertools.pairwise(words):
                if flag == "-m" and module.startswith("pml_pnp"):
                    assert importlib.util.find_spec(f"{module}.__main__"), module
    assert all(path.exists() for path in found), found


def public_objects():
    """What a user may import, of this package's own."""
    for module in (pml_pnp, pml_pnp.losses, pml_pnp.functional, pml_pnp.distributed):
        for name in getattr(module, "__all__", vars(module)):
            found = getattr(module, name)
            own = ("pml_pnp",) if hasattr(module, "__all__") else (module.__name__,)
            if callable(found) and found.__module__.startswith(own):
                yield found


def test_the_reference_has_every_public_class_and_function():
    named = re.findall(r"^\.\. auto\w+:: (\S+)$", read(DOCS / "api.rst"), flags=re.MULTILINE)
    documented = [pydoc.locate(name) for name in named]
    assert None not in documented
    assert [x for x in public_objects() if x not in documented and x.__name__[0] != "_"] == []


def test_every_public_module_has_examples_that_run_as_doctests():
    modules = {x.__module__ for x in public_objects()} | {"pml_pnp.losses"}
    for module in map(importlib.import_module, modules):
        assert any(test.examples for test in doctest.DocTestFinder().find(module)), module


@needs_built_in
def test_the_entry_for_the_documentation_of_pml_describes_its_signature():
    entry = read(DOCS / "upstream" / "losses.md")
    parameters = list(inspect.signature(BUILT_IN).parameters.values())
    arguments = ", ".join(str(x).replace("'", '"') for x in parameters)
    assert f"losses.PNPLoss({arguments})" in entry
    assert re.findall(r"^\* \*\*(\w+)\*\*:", entry, flags=re.MULTILINE) == [
        x.name for x in parameters if x.name != "kwargs"
    ]
    assert all(f'| ```"{name}"``` |' in entry for name in BUILT_IN.VARIANTS)
    images = re.findall(r"\((imgs/\S+)\)", entry)
    assert images and all((DOCS / "upstream" / image).exists() for image in images)


@pytest.mark.usefixtures("report")  # which needs pandas
def test_the_generated_parts_are_what_the_committed_rows_say():
    subprocess.run([sys.executable, str(REPORT), "--check"], check=True)


@pytest.mark.parametrize(
    ("page", "old", "new", "said"),
    [
        ("README.md", "| **PNPLoss** |", "| PNPLoss |", "README.md is not what"),
        ("docs/powerful_benchmarker.md", "<!-- retrieval", "<!-- lost", "no page holds <!-- ret"),
    ],
)
def test_a_page_that_says_something_else_is_noticed(
    page, old, new, said, tmp_path, report, monkeypatch
):
    copy([README, *DOCS.glob("*.md")], tmp_path)
    text = read(tmp_path / page)
    assert old in text
    (tmp_path / page).write_text(text.replace(old, new), encoding="utf-8")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", [str(REPORT), "--check"])
    with pytest.raises(SystemExit, match=said):
        report.main()
