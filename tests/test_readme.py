"""The Python code of the README runs and prints what it says."""

import doctest
import re
import subprocess
import sys
from pathlib import Path

import pml_pnp

README = Path(__file__).parents[1] / "README.md"


def python_blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_code_of_the_readme_runs():
    """Block after block in one session, as a reader would."""
    text = "\n".join(python_blocks())
    example = doctest.DocTestParser().get_doctest(text, {}, "README.md", str(README), 0)
    assert len(example.examples) > 15
    report = []
    try:
        runner = doctest.DocTestRunner()
        runner.run(example, out=report.append)
        assert runner.failures == 0, "".join(report)
    finally:
        pml_pnp.unregister()


def test_the_readme_names_every_variant_with_its_equation():
    from pml_pnp.variants import VARIANTS

    text = README.read_text(encoding="utf-8")
    for name, variant in VARIANTS.items():
        assert re.search(rf'^\| `"{name}"`.*\| {variant.equation} \|', text, flags=re.MULTILINE)


def test_the_readme_names_only_files_that_exist():
    text = README.read_text(encoding="utf-8")
    paths = set(re.findall(r"\b(?:examples|benchmarks|tests|pml_pnp)/[\w./-]+\.\w+", text))
    assert paths and all((README.parent / path).exists() for path in paths)


def test_the_figures_of_the_readme_are_those_of_the_committed_rows():
    report = README.parent / "benchmarks" / "report.py"
    subprocess.run([sys.executable, str(report), "--check"], check=True)
