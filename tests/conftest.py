import functools
import gc
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

# Each of several processes of pytest-xdist, and what it starts, gets its share of the cores.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = os.cpu_count() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

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
    # One worker makes what the ranks found, and the other does not wait for it.
    items.sort(key=lambda item: "folder_of_ranks" not in getattr(item, "fixturenames", ()))


def pytest_ignore_collect(collection_path, config):
    """Do not import the tests of the application where all of them are left out."""
    examples = Path(__file__).parent / "examples"
    return (config.option.markexpr == "not application" and collection_path == examples) or None


def pytest_collectstart():
    """Import what pytest-xdist's own process, which collects nothing, does not need."""
    global eager, helpers, np, torch
    import helpers  # which chooses how Triton runs, before anything imports it
    import numpy as np
    import torch

    from pml_pnp.ops import eager


def pytest_collection_finish():
    """Let no later garbage collection go through what was imported."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.fixture
def device():
    return helpers.DEVICE


@pytest.fixture(params=os.environ.get("TEST_DTYPES", "float16,bfloat16,float32,float64").split(","))
def dtype(request):
    return getattr(torch, request.param)


@pytest.fixture(params=["ratios", "one by one"])
def sigmoids(request, monkeypatch):
    """Sigmoids in either way."""
    if request.param == "one by one":
        monkeypatch.setattr(eager, "LARGEST_RANGE", dict.fromkeys(eager.LARGEST_RANGE, -1.0))


@pytest.fixture(autouse=True)
def _seed():
    random.seed(0)
    np.random.seed(0)
    # torch.manual_seed keeps the stack for each kind of device that may be initialized later.
    (torch if torch.cuda.is_available() else torch.default_generator).manual_seed(0)


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


@pytest.fixture(scope="session")
def report():
    """benchmarks/report.py."""
    pytest.importorskip("pandas", reason="the report needs pandas: pip install '.[benchmarks]'")
    import report

    return report
