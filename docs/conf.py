"""The documentation site, made from the files as they are in the repository.

`bash .ci/site` builds it: Sphinx with the repository's root as source, so that every link of a page
leads to the same place here and in the repository. The README is its first page.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from pygments.lexers.special import TextLexer  # noqa: E402
from sphinx.highlighting import lexers  # noqa: E402

import pml_pnp  # noqa: E402

lexers["mermaid"] = TextLexer()  # a picture in the repository, its text on the site

project = "pml_pnp"
author = "the pml_pnp authors"
copyright = f"2026, {author}"
release = pml_pnp.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "docs/*/*.md", "docs/api.rst"]
exclude_patterns = ["docs/upstream"]

# The navigation. A page that is in neither list gives a warning, which fails the build.
PAGES = {
    "Use": ["loss", "coming_from", "large_batches", "distributed", "limits", "api"],
    "Results": ["retrieval", "performance", "paper_experiments"],
    "Examples": ["training_example", "powerful_benchmarker"],
}
PROJECT = ["CHANGELOG", "CONTRIBUTING", "SECURITY"]


def toctree(pages, *options):
    """A list of pages that only the navigation shows."""
    return "\n".join(["", "```{toctree}", ":hidden:", *options, "", *pages, "```", ""])


def add_navigation(app, docname, source):
    """Add what GitHub would show as code to the pages that lead to others."""
    if docname == root_doc:
        for caption, pages in PAGES.items():
            source[0] += toctree([f"docs/{page}" for page in pages], f":caption: {caption}")
        source[0] += toctree(PROJECT, ":caption: Project")
    parts = sorted((ROOT / docname).glob("*.md"))
    if parts:
        source[0] += toctree([f"{Path(docname).name}/{part.stem}" for part in parts])


def setup(app):
    """Called by Sphinx."""
    app.connect("source-read", add_navigation)


myst_heading_anchors = 6
# Docstrings have Markdown's single backticks for code.
default_role = "literal"
napoleon_custom_sections = [
    ("Call with", "params_style"),
    "Batch statistics",
    "Memory",
    ("Saving", "notes_style"),
    "Shapes",
    "Source",
    "Statistics",
]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"pml_pnp {release}"
# The first page of the site is README.html; this one leads there.
html_extra_path = ["site"]
