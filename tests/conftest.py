import os
import random

import numpy as np
import pytest
import torch
from helpers import DEVICE, DTYPES

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
