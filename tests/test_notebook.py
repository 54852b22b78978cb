"""The notebook runs from its first cell to its last, and training makes retrieval better."""

import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebook needs nbclient and ipykernel")
pytest.importorskip("ipykernel", reason="the notebook needs nbclient and ipykernel")
nbclient = pytest.importorskip("nbclient", reason="the notebook needs nbclient and ipykernel")

NOTEBOOK = Path(__file__).parents[1] / "examples" / "MetricLossOnly_and_CrossBatchMemory.ipynb"
CHECK = """
for (before, after) in (alone, with_memory):
    assert after["MAP@R"] > before["MAP@R"], (before, after)
assert embeddings.grad.abs().sum() > 0
"""


def test_notebook_runs_and_training_helps(monkeypatch):
    root = str(NOTEBOOK.parents[1])
    monkeypatch.setenv("PYTHONPATH", root)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # committed without output
    notebook.cells.append(nbformat.v4.new_code_cell(CHECK))
    # The kernel of this Python, whatever kernels are installed.
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3")
    client.create_kernel_manager()
    client.km.kernel_spec.argv[0] = sys.executable
    client.execute()
