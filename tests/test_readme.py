"""The Python code of README and docs runs and prints what it says; their figures are measured."""

import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pml_pnp

README = Path(__file__).parents[1] / "README.md"
DOCS = sorted((README.parent / "docs").glob("*.md"))
TABLES = [README.parent / "examples" / "powerful_benchmarker" / "results_table.py"]
BENCHMARKER = README.parent / "docs" / "powerful_benchmarker.md"
PERFORMANCE = README.parent / "docs" / "performance.md"
PAGES = pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)


@PAGES
def test_the_code_of_a_page_runs(page):
    """Block after block in one session, as a reader would."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = "\n".join(block for block in blocks if block.startswith(">>>"))
    example = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    assert len(example.examples) > (10 if page == README else -1)
    report = []
    try:
        runner = doctest.DocTestRunner()
        runner.run(example, out=report.append)
        assert runner.failures == 0, "".join(report)
    finally:
        pml_pnp.unregister()


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").split()) <= 1200


@PAGES
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8"))
    assert all((page.parent / link).exists() for link in links)


def test_the_readme_names_every_variant_with_its_equation():
    from pml_pnp.variants import VARIANTS

    text = README.read_text(encoding="utf-8")
    for name, variant in VARIANTS.items():
        assert re.search(rf'^\| `"{name}"`.*\| {variant.equation} \|', text, flags=re.MULTILINE)


@PAGES
def test_a_page_names_only_files_that_exist(page):
    text = page.read_text(encoding="utf-8")
    paths = set(re.findall(r"\b(?:examples|benchmarks|tests|docs|pml_pnp)/[\w./-]+\.\w+", text))
    assert all((README.parent / path).exists() for path in paths)


REPORT = README.parent / "benchmarks" / "report.py"


def test_the_figures_of_the_pages_are_those_of_the_committed_rows():
    subprocess.run([sys.executable, str(REPORT), "--check"], check=True)


@pytest.mark.parametrize(
    ("page", "changed", "said"),
    [
        (README, ("| **PNPLoss** |", "| PNPLoss |"), "README.md is not what"),
        (PERFORMANCE, ("| SupAP |", "| Sup |"), "docs/performance.md is not what"),
        (BENCHMARKER, ("| with_pnp |", "| best |"), "docs/powerful_benchmarker.md is not what"),
        (BENCHMARKER, ("<!-- retrieval", "<!-- lost"), "no page holds <!-- retrieval"),
    ],
)
def test_a_page_that_says_something_else_is_noticed(page, changed, said, tmp_path):
    for path in (REPORT, README, *DOCS, *REPORT.parent.rglob("*.csv"), *TABLES):
        copy = tmp_path / path.relative_to(README.parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    copy = tmp_path / page.relative_to(README.parent)
    text = copy.read_text(encoding="utf-8")
    assert changed[0] in text
    copy.write_text(text.replace(*changed), encoding="utf-8")
    report = tmp_path / REPORT.relative_to(README.parent)
    run = subprocess.run([sys.executable, report, "--check"], capture_output=True, text=True)
    assert run.returncode == 1 and said in run.stderr
