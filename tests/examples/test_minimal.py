"""examples/minimal.py runs, and its embedding retrieves better than an untrained one."""

import re
import subprocess
import sys
from pathlib import Path

MINIMAL = Path(__file__).parents[2] / "examples" / "minimal.py"


def test_training_improves_retrieval(environment):
    process = subprocess.run(
        [sys.executable, MINIMAL], env=environment, capture_output=True, text=True, timeout=600
    )
    assert process.returncode == 0, process.stderr
    untrained, trained = (float(x) for x in re.findall(r"MAP@R ([\d.]+)", process.stdout))
    assert untrained < 0.6 and trained > untrained + 0.2


def test_it_is_short():
    assert len(MINIMAL.read_text().splitlines()) <= 40
