"""`pml_pnp.losses`, `register`/`unregister`, and what a bare import does not do."""

import inspect
import json
import logging
import subprocess
import sys

import pytest
import torch
from helpers import value_and_grad
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning.utils import distributed as pml_distributed

import pml_pnp
from pml_pnp import losses

PMLMemory, PMLViews = pml_losses.CrossBatchMemory, pml_losses.SelfSupervisedLoss


def snapshot():
    """Every attribute of two modules of PML and of two wrapper classes, by identity."""
    owners = pml_losses, pml_distributed, PMLMemory, PMLViews
    ignored = "__warningregistry__"
    return [{k: id(v) for k, v in vars(owner).items() if k != ignored} for owner in owners]


@pytest.fixture
def registered():
    before = snapshot()
    pml_pnp.register()
    yield
    pml_pnp.unregister()
    assert snapshot() == before


def test_every_public_name_of_pml_is_in_the_namespace():
    theirs = {name: value for name, value in vars(pml_losses).items() if not name.startswith("_")}
    for name, value in theirs.items():
        if name not in ("PNPLoss", "CrossBatchMemory", "SelfSupervisedLoss"):
            assert getattr(losses, name) is value
    assert losses.PNPLoss is pml_pnp.PNPLoss
    assert set(losses.__all__) == {*theirs, "PNPLoss"}


@pytest.mark.parametrize("name", ["CrossBatchMemory", "SelfSupervisedLoss"])
def test_the_wrappers_differ_from_pmls_in_one_name_only(name):
    ours, theirs = getattr(losses, name), getattr(pml_losses, name)
    assert issubclass(ours, theirs)
    known = theirs.supported_losses()
    assert ours.supported_losses()[: len(known) + 1] == [*known, "PNPLoss"]
    assert inspect.signature(ours) == inspect.signature(theirs)


@pytest.mark.parametrize(("earlier", "size"), [(PMLMemory, [4]), (PMLViews, [])])
def test_register_changes_what_was_imported_from_pml_before(registered, earlier, size):
    x, y = torch.randn(6, 4), torch.arange(6) // 2
    assert earlier(pml_losses.PNPLoss(), *size)(x, y if size else x + 0.1).isfinite()
    with pytest.raises(Exception, match="not supported for MultipleLosses"):
        earlier(pml_losses.MultipleLosses([pml_losses.PNPLoss()]), *size)


def test_register_puts_loss_and_wrappers_in_pmls_place(registered):
    """A batch of one row has no positive, and a sum is taken."""
    assert pml_losses.PNPLoss is pml_pnp.PNPLoss
    x, y = torch.randn(6, 4), torch.arange(6) // 2
    memory = pml_losses.CrossBatchMemory(pml_losses.PNPLoss(), 4, 16)
    assert memory(x, y) > 0
    value, grad = value_and_grad(memory, x[:1], y[:1] + 9)
    assert value == 0 and grad.eq(0).all()
    both = pml_losses.MultipleLosses([pml_losses.PNPLoss(), pml_losses.ContrastiveLoss()])
    expected = pml_losses.PNPLoss()(x, y) + pml_losses.ContrastiveLoss()(x, y)
    torch.testing.assert_close(pml_losses.CrossBatchMemory(both, 4, 16)(x, y), expected)
    with pytest.warns(UserWarning, match="used in a non-distributed setting"):
        torch.testing.assert_close(pml_distributed.DistributedLossWrapper(both)(x, y), expected)
    assert pml_losses.SelfSupervisedLoss(both)(x, x + 0.1).isfinite()
    assert pml_distributed.DistributedMinerWrapper is pml_pnp.distributed.DistributedMinerWrapper


@pytest.mark.parametrize("had_one", [True, False])
def test_unregister_leaves_what_pml_had(had_one, monkeypatch):
    if not had_one:
        monkeypatch.delattr(pml_losses, "PNPLoss", raising=False)
    before = snapshot()
    pml_pnp.unregister()  # without a register it does nothing
    assert snapshot() == before
    for _ in range(2):
        pml_pnp.register()
        assert pml_losses.PNPLoss is pml_pnp.PNPLoss
        pml_pnp.unregister()
        assert snapshot() == before


def test_registration_is_logged_by_pmls_logger(caplog):
    with caplog.at_level(logging.INFO, logger="PML"):
        pml_pnp.register()
        before = snapshot()
        pml_pnp.register()
        assert snapshot() == before
        pml_pnp.unregister()
        pml_pnp.unregister()
    assert [(r.name, r.getMessage().split(":")[0]) for r in caplog.records] == [
        ("PML", "pml_pnp registered"),
        ("PML", "pml_pnp unregistered"),
    ]


# What a fresh process finds, step by step; every step imports more than the one before.
STEPS = """
import json, sys

def loaded(*names):
    return sorted(set(names) & set(sys.modules))

found = {}
import pml_pnp
found["import"] = loaded("torch", "pytorch_metric_learning", "pml_pnp.loss")

import torch
from pml_pnp.functional import pnp_loss
pnp_loss(torch.eye(4), torch.tensor([0, 0, 1, 1]))
found["functional"] = loaded("pytorch_metric_learning")

from pytorch_metric_learning import losses as pml
owners = pml, pml.CrossBatchMemory, pml.SelfSupervisedLoss
before = [dict(vars(owner)) for owner in owners]
from pml_pnp import GradCache, PNPLoss, functional, losses, register, unregister
losses.CrossBatchMemory(losses.PNPLoss(), 4)(torch.randn(4, 4), torch.arange(4) // 2)
found["unchanged"] = before == [dict(vars(owner)) for owner in owners]

register()
heavy = "torchvision", "timm", "triton", "tensorboard", "record_keeper", "faiss", "torch._dynamo"
found["heavy"] = loaded(*heavy)

for name in list(sys.modules):
    if name.partition(".")[0] in ("pml_pnp", "pytorch_metric_learning"):
        del sys.modules[name]
sys.modules["pytorch_metric_learning"] = None  # an import of it is an error
from pml_pnp import GradCache
found["GradCache"] = GradCache(torch.nn.Linear(2, 2), 1)(torch.ones(3, 2)).shape
print(json.dumps(found))
"""


def test_what_is_imported_and_changed_step_by_step():
    output = subprocess.run([sys.executable, "-c", STEPS], check=True, stdout=subprocess.PIPE)
    assert json.loads(output.stdout) == {
        "import": [],
        "functional": [],
        "unchanged": True,
        "heavy": [],
        "GradCache": [3, 2],
    }


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'pml_pnp' has no attribute 'PNPLos'"):
        pml_pnp.PNPLos  # noqa: B018
    assert set(pml_pnp.__all__) <= set(dir(pml_pnp))
