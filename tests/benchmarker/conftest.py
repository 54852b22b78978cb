import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "powerful_benchmarker"))


@pytest.fixture(autouse=True)
def _pmls_generator_is_restored(monkeypatch):
    from pytorch_metric_learning.utils import common_functions

    monkeypatch.setattr(common_functions, "NUMPY_RANDOM", common_functions.NUMPY_RANDOM)
