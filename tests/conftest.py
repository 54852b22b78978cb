import os
import random
import subprocess
import sys
from pathlib import Path

# Each of several processes of pytest-xdist, and what it starts, gets its share of the cores.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = os.cpu_count() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

import numpy as np
import pytest
import torch
from helpers import DEVICE, DTYPES, free_port

from pml_pnp.ops import eager

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture(params=["ratios", "one by one"])
def sigmoids(request, monkeypatch):
    """Sigmoids in either way, whatever the size of the batch."""
    monkeypatch.setattr(eager, "FEW_SIGMOIDS", 0)
    if request.param == "one by one":
        monkeypatch.setattr(eager, "LARGEST_RANGE", dict.fromkeys(eager.LARGEST_RANGE, -1.0))


@pytest.fixture(autouse=True)
def _seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """What each of two gloo ranks found, by the name of the module in tests that says how."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    environment = {
        **os.environ,
        **{"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": "2"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
    }
    command = [sys.executable, str(Path(__file__).with_name("rank.py")), str(folder)]
    processes = [subprocess.Popen(command, env={**environment, "RANK": str(r)}) for r in range(2)]
    try:
        assert [process.wait(timeout=600) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
