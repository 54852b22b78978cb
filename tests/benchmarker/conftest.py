import pytest

collect_ignore = ["own_script.py"]  # which runs when it is imported


@pytest.fixture(autouse=True)
def _pmls_generator_is_restored(monkeypatch):
    from pytorch_metric_learning.utils import common_functions

    monkeypatch.setattr(common_functions, "NUMPY_RANDOM", common_functions.NUMPY_RANDOM)
