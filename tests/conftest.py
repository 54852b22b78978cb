import functools
import os
import random
import shutil
import subprocess
import sys

# Each of several processes of pytest-xdist, and what it starts, gets its share of the cores.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = os.cpu_count() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

import numpy as np
import pytest
import torch
from filelock import FileLock
from helpers import DEVICE, DTYPES
from hypothesis import HealthCheck, settings

from pml_pnp.ops import eager

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

# The properties of tests/test_properties.py and tests/test_stateful.py: the same few examples at
# every run, or with --hypothesis-profile=thorough many others, chosen by --hypothesis-seed.
# Neither writes a database of examples.
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "quick", max_examples=40, derandomize=True, database=None, deadline=None,
    suppress_health_check=SLOW,
)  # fmt: skip
settings.register_profile(
    "thorough", settings.get_profile("quick"), max_examples=4000, derandomize=False
)
settings.load_profile("quick")


def pytest_collection_modifyitems(config, items):
    """Leave out what takes very long, unless it is asked for."""
    if "kills" not in config.option.markexpr:
        kept = [x for x in items if "kills" not in x.keywords]
        config.hook.pytest_deselected(items=[x for x in items if "kills" in x.keywords])
        items[:] = kept


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture(params=["ratios", "one by one"])
def sigmoids(request, monkeypatch):
    """Sigmoids in either way."""
    if request.param == "one by one":
        monkeypatch.setattr(eager, "LARGEST_RANGE", dict.fromkeys(eager.LARGEST_RANGE, -1.0))


@pytest.fixture(autouse=True)
def _seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """`once(name, make)`: a folder that make(folder) fills, in one process of pytest-xdist."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def folder_of(name, make):
        folder, made = root / name, root / f"{name}.made"
        with FileLock(root / f"{name}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a make that failed
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def folder_of_ranks(once):
    """What rank_processes.py wrote."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    import rank_processes

    def start(folder):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, rank_processes.__file__, str(folder)]
        subprocess.run(command, check=True, timeout=900, env=environment)

    return once("ranks", start)


@pytest.fixture(scope="session")
def ranks(folder_of_ranks):
    """`ranks(module, world)`: what `results` of a module in tests found, in each gloo rank."""
    from rank_processes import file_of

    @functools.cache
    def found(module, world):
        files = (file_of(folder_of_ranks, module, world, rank) for rank in range(world))
        return [torch.load(file) for file in files]

    return found
