"""examples/minimal.py."""

import re
import runpy
from pathlib import Path

MINIMAL = Path(__file__).parents[2] / "examples" / "minimal.py"


def test_it_is_short_and_its_training_improves_retrieval(capsys):
    assert len(MINIMAL.read_text().splitlines()) <= 40
    runpy.run_path(str(MINIMAL), run_name="__main__")
    untrained, trained = (float(x) for x in re.findall(r"MAP@R ([\d.]+)", capsys.readouterr().out))
    assert untrained < 0.6 and trained > untrained + 0.2
