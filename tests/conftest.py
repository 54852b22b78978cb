"""Device and dtypes of the run, as in PML's own suite: TEST_DEVICE=cuda TEST_DTYPES=float16."""

import os
import random

import numpy as np
import pytest
import torch

DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cpu"))
DTYPES = [
    getattr(torch, name)
    for name in os.environ.get("TEST_DTYPES", "float16,bfloat16,float32,float64").split(",")
]
# Relative tolerance of a loss against the float64 reference: a few units in the last place of the
# result for the half precisions, since everything before it is computed in float32.
RTOL = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-4, torch.float64: 1e-10}


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
