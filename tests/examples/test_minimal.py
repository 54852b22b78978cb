"""examples/minimal.py runs, and its embedding retrieves better than an untrained one."""

import re
import runpy
from pathlib import Path

MINIMAL = Path(__file__).parents[2] / "examples" / "minimal.py"


def test_training_improves_retrieval(capsys):
    runpy.run_path(str(MINIMAL), run_name="__main__")
    untrained, trained = (float(x) for x in re.findall(r"MAP@R ([\d.]+)", capsys.readouterr().out))
    assert untrained < 0.6 and trained > untrained + 0.2


def test_it_is_short():
    assert len(MINIMAL.read_text().splitlines()) <= 40
