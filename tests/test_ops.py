"""Kernels against each other, and what they cost, counted in work instead of seconds."""

import os
import subprocess
import sys
import weakref
from types import SimpleNamespace
from unittest import mock

import pytest
import reference
import torch
from helpers import VARIANTS, WHY_NO_TRITON, value_and_grad, version_of
from torch.utils._python_dispatch import TorchDispatchMode

from pml_pnp import PNPLoss
from pml_pnp.functional import pnp_loss
from pml_pnp.ops import dispatch, eager, product, similarity
from pml_pnp.ops.settings import Settings
from pml_pnp.pairs import Relation


class Work(TorchDispatchMode):
    """Elements that operations write, number of operations, and bytes alive at a time.

    Views are operations, but write nothing.
    """

    def __init__(self):
        super().__init__()
        self.elements = self.calls = self.alive = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements += 0 if func.is_view else tensor.numel()
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key, size):
        self.known.discard(key)
        self.alive -= size


def cost(loss_func, *args):
    with Work() as counted:
        loss_func(*args).backward()
    return counted


def work(n, per_class=4, **kwargs):
    x = torch.randn(n, 16, requires_grad=True)
    y = torch.arange(n) // per_class
    loss_func = PNPLoss(**kwargs)
    loss_func(x, y).backward()  # what is kept from call to call
    return cost(loss_func, x, y)


WORK = {"default": {}, "callable variant": {"variant": torch.log1p}, "chunks": {"chunk_size": 64}}


@pytest.mark.parametrize("kwargs", WORK.values(), ids=WORK)
def test_work_grows_with_the_square(kwargs, monkeypatch):
    monkeypatch.setattr(product, "CPU_TILE", 128)  # both sizes in parts
    small, large = work(256, **kwargs), work(1024, **kwargs)
    assert small.elements < large.elements <= 16.5 * small.elements  # of cubic cost: 64 times


def test_work_is_a_few_passes_over_the_sigmoids():
    n, per_class = 1024, 32
    assert work(n, per_class).elements <= 5 * n * n * per_class


def test_a_small_batch_takes_few_operations():
    assert work(32).calls <= 95


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks that do not count beside small matrices."""
    monkeypatch.setattr(eager, "CPU_BLOCK", 2**14)


def test_the_gradient_takes_the_place_of_the_similarities(small_blocks):
    """However many positives a query has; given similarities are left, and it lies beside them."""
    n = 1024
    for per_class in (4, 64):
        assert n * n * 4 <= work(n, per_class).peak <= 1.4 * n * n * 4
        s, labels = torch.randn(n, n, requires_grad=True), torch.arange(n) // per_class
        peak = cost(lambda s, y: pnp_loss(s, y, variant="Dq")[0].sum(), s, labels).peak
        assert 2 * n * n * 4 <= peak <= 2.4 * n * n * 4


def test_a_kernel_for_gpus_makes_one_more_matrix(small_blocks, monkeypatch):
    """That of the gradient; the similarities are freed before the gradient is multiplied."""

    def kernel(s, *args, overwrite):
        return eager.losses_and_gradient(s, *args)

    monkeypatch.setattr(dispatch, "kernel_for", lambda s: kernel)
    n = 1024
    assert 2 * n * n * 4 <= work(n).peak <= 2.15 * n * n * 4
    assert work(n, chunk_size=n // 4).peak <= 0.7 * n * n * 4


def test_backward_only_scales_the_gradient():
    n = 256
    s, labels = torch.randn(n, n, requires_grad=True), torch.arange(n) // 4
    losses, _ = pnp_loss(s, labels)
    with Work() as counted:
        losses.sum().backward()
    assert counted.elements <= 1.1 * n * n


def test_memory_of_lean_mode_grows_with_the_batch_not_its_square(small_blocks):
    small, large = work(256, chunk_size=16), work(1024, chunk_size=16)
    assert large.peak <= 4.2 * small.peak and large.peak < 1024**2 * 4 / 4


def test_memory_of_many_references_is_bounded(small_blocks, monkeypatch):
    n, m = 64, 4096
    x, y = torch.randn(n, 4, requires_grad=True), torch.arange(n) // 4
    references = torch.randn(m, 4), torch.arange(m) // 4
    peaks = []
    for entries in (product.REFERENCES_BLOCK, 8 * m):
        monkeypatch.setattr(product, "REFERENCES_BLOCK", entries)
        peaks.append(cost(PNPLoss(), x, y, None, *references).peak)
    assert peaks[1] < n * m * 4 / 2 < n * m * 4 <= peaks[0]


def test_lean_mode_does_not_hold_the_masks_of_a_tuple(small_blocks):
    n = 1024
    x, y = torch.randn(n, 16, requires_grad=True), torch.arange(n) // 4
    a = torch.arange(n)
    pairs = a, a ^ 1, a, (a + 8) % n
    peaks = [cost(PNPLoss(chunk_size=size), x, y, pairs).peak for size in (None, 16)]
    assert peaks[1] < n * n / 2 < peaks[0]  # of a mask alone: n * n


@pytest.mark.parametrize("positives", [[2, 5], [5]], ids=["two", "the nearest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("share", [0.97, 1.03])
def test_value_at_the_widest_range_of_similarities(dtype, share, positives):
    """At either side of the limit beyond which an exponential alone would not fit the dtype.

    The rank of the nearest is near zero, and keeps its relative accuracy.
    """
    anneal = 1 / (share * eager.LARGEST_RANGE[dtype])
    row = torch.tensor([0.0, 0.49, 0.5, 0.51, 0.52, 1.0], dtype=dtype)
    is_positive = torch.tensor([[i in positives for i in range(6)]])
    masks = {"positive_mask": is_positive, "negative_mask": ~is_positive}
    losses, _ = pnp_loss(row.unsqueeze(0), **masks, anneal=anneal, include_self=False)
    negatives = {*range(6)} - {*positives}
    want = reference.pnp_losses(
        [row.tolist()], [{*positives}], [negatives], [1.0], anneal=anneal, include_self=False
    )[0]
    assert want < 1e-30 or len(positives) == 2
    assert losses.item() == pytest.approx(want, rel=1e-4 if dtype == torch.float32 else 1e-11)


def test_no_gradient_is_made_that_nobody_can_ask_for():
    s, labels = torch.randn(64, 64, requires_grad=True), torch.arange(64) // 4
    pnp_loss(s, labels)  # what is kept from call to call
    with torch.no_grad(), Work() as without:
        pnp_loss(s, labels)
    with Work() as with_gradient:
        pnp_loss(s, labels)
    assert with_gradient.elements - without.elements >= 64 * 64 * 5  # sigmoid's, and the gradient


def test_a_default_device_changes_nothing():
    s, labels = torch.randn(8, 8), torch.arange(8) // 2
    want = pnp_loss(s, labels)[0]
    with torch.device("meta"):
        assert torch.equal(pnp_loss(s, labels)[0], want)


def test_what_does_not_count_is_zero_whatever_stands_there():
    s, labels = torch.randn(5, 5), torch.tensor([0, 0, 1, 1, 2])
    s[4] = float("nan")
    s.requires_grad_()
    losses, counted = pnp_loss(s, labels)
    assert losses.isfinite().all() and not counted[4]
    assert torch.autograd.grad(losses[:4].sum(), s)[0][:4].isfinite().all()


def test_the_custom_operation_passes_pytorchs_own_checks():
    labels = torch.tensor([0, 0, 1, 1, 1, 2])
    relation = Relation.from_labels(labels, labels, torch.arange(6))
    settings = Settings(10.0, "Ds", 1.0, 2.0, True)
    args = (torch.randn(6, 6), None, *relation, *settings)
    torch.library.opcheck(similarity._losses_and_gradient, args)


# --- Triton, interpreted where there is no GPU

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@pytest.fixture
def triton_kernel(monkeypatch):
    if WHY_NO_TRITON:
        pytest.skip(WHY_NO_TRITON)
    from pml_pnp.ops import triton as triton_kernel

    monkeypatch.setenv(dispatch.KERNEL_VARIABLE, "triton")
    if not CUDA:
        monkeypatch.setattr(triton_kernel, "BLOCK_M", 8)
    return triton_kernel


def assert_as_the_plain_kernel(inputs, **kwargs):
    """Losses and gradients by Triton in float32, and by the plain kernel in float64."""
    cotangent = torch.randn(len(inputs["similarity"]))
    results = []
    for dtype in (torch.float32, torch.float64):  # Triton takes float32 alone
        given = {k: x.detach().to(DEVICE, dtype).requires_grad_() for k, x in inputs.items()}
        losses, _ = pnp_loss(**given, **kwargs)
        grads = torch.autograd.grad(losses, list(given.values()), cotangent.to(losses))
        results.append([losses.detach(), *grads])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("variant", "is_inverted", "include_self"),
    [*((variant, True, True) for variant in VARIANTS), ("Dq", False, True), ("Ib", True, False)],
)
def test_triton_equals_the_plain_kernel(triton_kernel, variant, is_inverted, include_self):
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 0, 0, 3]).to(DEVICE)
    kwargs = {"variant": variant, "alpha": 4, "b": 3, "anneal": 0.1, "is_inverted": is_inverted}
    kwargs |= {"labels": labels, "include_self": include_self}
    assert_as_the_plain_kernel({"similarity": 0.2 * torch.randn(9, 9).T}, **kwargs)


@pytest.mark.parametrize("by", ["labels", "references", "masks"])
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 19), (5, 8)])
def test_triton_with_references_and_masks(triton_kernel, n, m, include_self, by):
    m = n if by == "labels" else m
    args = {"labels": torch.randint(0, 3, (n,)).to(DEVICE)}
    if by == "references":
        args["ref_labels"] = torch.randint(1, 4, (m,)).to(DEVICE)
    if by == "masks":  # and some are both
        args = {f"{x}_mask": torch.rand(n, m) < 0.4 for x in ("positive", "negative")}
    args |= {"variant": "Ds", "anneal": 0.1, "include_self": include_self}
    inputs = {"similarity": 0.2 * torch.randn(n, m)}
    if include_self:
        inputs["self_similarity"] = 0.2 * torch.randn(n)
    assert_as_the_plain_kernel(inputs, **args)


@pytest.mark.parametrize("by", ["labels", "references", "masks"])
@pytest.mark.parametrize("include_self", [True, False])
def test_triton_overwrites_a_large_matrix_by_the_same_gradient(
    triton_kernel, monkeypatch, include_self, by
):
    s = (0.2 * torch.randn(7, 11)).to(DEVICE)
    labels, references = (torch.randint(0, 3, (n,)).to(DEVICE) for n in s.shape)
    queries = torch.arange(7).to(DEVICE)
    if by == "labels":  # the queries are the first of the references
        relation = Relation.from_labels(references[:7], references, queries)
    elif by == "references":
        relation = Relation.from_labels(labels, references, None)
    else:  # and some are both
        relation = Relation.from_masks(*(torch.rand(2, *s.shape) < 0.4).to(DEVICE))
    own = (0.2 * torch.randn(7)).to(DEVICE) if by != "labels" and include_self else None
    args = own, relation, Settings(10.0, "Ds", 1.0, 1.0, include_self), True
    want = triton_kernel.losses_and_gradient(s, *args)
    for entries, is_large in ((77, False), (76, True), (22, True), (1, True)):
        monkeypatch.setattr(triton_kernel, "GRADIENT_BLOCK", entries)
        given = s.clone()
        got = triton_kernel.losses_and_gradient(given, *args, overwrite=True)
        assert all(map(torch.equal, got, want))
        assert (got[1].data_ptr() == given.data_ptr()) is is_large


def test_triton_makes_one_matrix_for_a_large_batch(triton_kernel, monkeypatch):
    n = 256 if not CUDA else 16384
    monkeypatch.setattr(triton_kernel, "BLOCK_M", 256)
    monkeypatch.setattr(triton_kernel, "GRADIENT_BLOCK", n * n // 16)
    monkeypatch.setattr(product, "CPU_TILE", n // 8)
    x, y = torch.randn(n, 4, device=DEVICE), (torch.arange(n) // 4).to(DEVICE)
    assert n * n * 4 <= cost(PNPLoss(), x.requires_grad_(), y).peak <= 1.3 * n * n * 4


def test_triton_keeps_its_accuracy_for_tiny_ranks(triton_kernel):
    s = torch.tensor([[1.0, 1.0, 0.2, 0.0]] * 2).to(DEVICE)
    labels = torch.tensor([0, 0]).to(DEVICE), torch.tensor([0, 0, 1, 1]).to(DEVICE)
    for variant in VARIANTS:
        kwargs = {"variant": variant, "include_self": False, "anneal": 0.05}
        got, want = (pnp_loss(x, *labels, **kwargs)[0] for x in (s, s.double()))
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0)


def test_triton_computes_a_training_step(triton_kernel, monkeypatch):
    x, y = torch.randn(8, 4, device=DEVICE), (torch.arange(8) // 4).to(DEVICE)
    for kwargs in ({}, {"chunk_size": 3}):
        results = []
        for kernel in ("triton", "eager"):
            monkeypatch.setenv(dispatch.KERNEL_VARIABLE, kernel)
            results.append(value_and_grad(PNPLoss(variant="Dq", **kwargs), x, y))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_a_triton_that_does_not_work_is_replaced_with_a_warning(triton_kernel, monkeypatch):
    broken = mock.Mock(side_effect=RuntimeError("no compiler"))
    monkeypatch.setattr(triton_kernel, "losses_and_gradient", broken)
    monkeypatch.setenv(dispatch.KERNEL_VARIABLE, "auto")
    dispatch._triton_works.cache_clear()
    try:
        with pytest.warns(UserWarning, match="plain PyTorch is used: no compiler"):
            assert not dispatch._triton_works(torch.device(DEVICE))
        assert not dispatch._triton_works(torch.device(DEVICE))  # tried once
    finally:
        dispatch._triton_works.cache_clear()
    s = torch.eye(4, device=DEVICE)
    assert dispatch.kernel_for(s.cpu()) is eager.losses_and_gradient


@pytest.mark.parametrize(
    ("choice", "device", "dtype", "works", "is_triton"),
    [
        ("auto", "cpu", torch.float32, True, False),
        ("auto", "cuda", torch.float32, True, True),
        ("auto", "cuda", torch.float32, False, False),
        ("auto", "cuda", torch.float64, True, False),
        ("eager", "cuda", torch.float32, True, False),
        ("triton", "cpu", torch.float32, False, True),
        ("triton", "cpu", torch.float64, True, False),
    ],
)
def test_which_kernel_is_chosen(
    triton_kernel, monkeypatch, choice, device, dtype, works, is_triton
):
    monkeypatch.setenv(dispatch.KERNEL_VARIABLE, choice)
    monkeypatch.setattr(dispatch, "_triton_works", lambda device: works)
    s = SimpleNamespace(dtype=dtype, device=torch.device(device))  # also where no GPU is
    module = triton_kernel if is_triton else eager
    assert dispatch.kernel_for(s) is module.losses_and_gradient


def test_unknown_kernel_is_named(monkeypatch):
    monkeypatch.setenv(dispatch.KERNEL_VARIABLE, "cuda")
    with pytest.raises(ValueError, match="PML_PNP_KERNEL must be auto, eager or triton, got 'cuda"):
        pnp_loss(torch.eye(4), torch.tensor([0, 0, 1, 1]))


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pml_pnp.ops.triton import _query

pointers = {"columns": "*i64", "start": "*i64", "number": "*i64", "place": "*i32"}
pointers |= {"not_negative": "*i8", "query_column": "*i64"}
numbers = {"s_stride": "i32", "m": "i32", "scale": "fp32", "alpha": "fp32"}
floats = ("s", "self_similarity", "losses", "grad_s", "grad_self")
targets = GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)
cases = ("Ib", (0, 0, 1, 1, 1)), ("Dq", (1, 1, 0, 0, 1)), ("Iu", (0, 1, 0, 0, 0))
for target in targets:
    for variant, flags in cases:
        names = ("HAS_MASK", "HAS_SELF", "LISTED", "WITH_QUERY", "WITH_GRADIENT")
        constants = dict(zip(names, map(bool, flags)), VARIANT=variant, BLOCK_M=1024, BLOCK_P=4)
        signature = {name: "*fp32" for name in floats} | pointers | numbers | {"b": "fp32"}
        signature = {name: signature.get(name, "constexpr") for name in _query.arg_names}
        compile(ASTSource(_query, signature, constants), target=target)
"""


def test_triton_compiles_for_gpus_that_are_not_here():
    pytest.importorskip("triton", reason="Triton is not installed")
    if version_of("triton") < (3, 5):
        pytest.skip("this Triton compiles by other arguments, or for AMD only where ROCm is")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", COMPILE], check=True, env=environment)


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_on_a_gpu_does_not_wait_for_it_and_is_repeatable(variant):
    x = torch.randn(384, 64, device="cuda", requires_grad=True)
    y = torch.arange(384, device="cuda") // 4
    loss_func = PNPLoss(variant=variant)
    loss_func(x, y).backward()  # compiles
    grads = []
    for _ in range(3):
        x.grad = None
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss_func(x, y).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])
