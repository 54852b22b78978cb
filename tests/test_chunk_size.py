"""`chunk_size`: fewer queries at a time, and the same values, gradients, records and errors."""

import copy

import pytest
import torch
from helpers import DISTANCES, Scale, batch, recorded
from pytorch_metric_learning import distances
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

from pml_pnp import PNPLoss, losses
from pml_pnp.ops.recompute import Recomputed


def stepwise(loss_func, *args, **kwargs):
    """Value, and gradients of what takes part, of a call."""
    value = loss_func(*args, **kwargs)
    inputs = [t for t in (*args, *kwargs.values()) if getattr(t, "requires_grad", False)]
    inputs += loss_func.parameters()
    return value.detach(), *torch.autograd.grad(value, inputs)


SCALE = Scale()  # a variant with a parameter


CALLS = {
    "labels": lambda x, y, ref, ref_y: (x, y),
    "references": lambda x, y, ref, ref_y: (x, y, None, ref, ref_y),
    "pairs": lambda x, y, ref, ref_y: (x, None, lmu.get_all_pairs_indices(y)),
    "triplets": lambda x, y, ref, ref_y: (x, y, lmu.get_all_triplets_indices(y)),
    "pairs of references": lambda x, y, ref, ref_y: (
        x,
        None,
        lmu.get_all_pairs_indices(y, ref_y),
        ref,
    ),
}


# What has parameters; tests/test_properties.py has chunks with every other distance and variant.
CASES = [
    (name, kind, variant, include_self)
    for name, variant in (("cosine", SCALE), ("lp", SCALE), ("user's own, learning", "Dq"))
    for kind in CALLS
    for include_self in (True, False)
]


@pytest.mark.parametrize(
    ("name", "kind", "variant", "include_self"), CASES, ids=lambda x: getattr(x, "__name__", str(x))
)
def test_chunks_give_the_values_and_gradients_of_the_whole_batch(
    name, kind, variant, include_self, device
):
    distance = DISTANCES[name]().to(device, torch.float64)
    x, y = batch(n=12, dtype=torch.float64, device=device)
    ref, ref_y = batch(n=13, dtype=torch.float64, device=device)
    args = CALLS[kind](x.requires_grad_(), y, ref.requires_grad_(), ref_y)
    variant = copy.deepcopy(variant).double() if variant == SCALE else variant
    kwargs = {"distance": distance, "variant": variant, "include_self": include_self}
    whole = stepwise(PNPLoss(anneal=0.1, **kwargs), *args)
    for chunk_size in (1, 5, 11):
        chunks = stepwise(PNPLoss(anneal=0.1, chunk_size=chunk_size, **kwargs), *args)
        for got, want in zip(chunks, whole, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("distance", [distances.CosineSimilarity(), distances.LpDistance()])
@pytest.mark.parametrize("kind", CALLS)
def test_chunks_record_the_statistics_of_the_whole_batch(kind, distance):
    """Once, although backward computes chunks again."""
    x, y = batch()
    args = CALLS[kind](x.requires_grad_(), y, *batch(n=13))
    stats = []
    for chunk_size in (None, 5):
        loss_func = PNPLoss(collect_stats=True, chunk_size=chunk_size, distance=distance)
        loss = loss_func(*args)
        before = recorded(loss_func, "_record_these_stats")
        loss.backward()
        stats += [before, recorded(loss_func, "_record_these_stats")]
    assert stats[0]["negatives_before_positive"] > 0
    assert stats == 4 * stats[:1]


def test_chunks_without_a_gradient():
    x, y = batch()
    with torch.no_grad():
        torch.testing.assert_close(PNPLoss(chunk_size=5)(x, y), PNPLoss()(x, y))
    assert not PNPLoss(chunk_size=5)(x, y).requires_grad


@pytest.mark.parametrize("distance", [distances.CosineSimilarity(), distances.SNRDistance()])
def test_chunks_are_differentiable_twice(distance):
    x, y = batch(n=7, d=3, classes=2, dtype=torch.float64)
    loss_func = PNPLoss(variant="Iu", anneal=0.3, chunk_size=3, distance=distance)
    assert torch.autograd.gradgradcheck(lambda x: loss_func(x, y), x.requires_grad_())


class Cooling(torch.nn.Module):
    """A similarity that grows with every call, by a buffer."""

    is_inverted = True

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0, dtype=torch.float64))

    def forward(self, x, y=None):
        self.scale.mul_(1.1)
        return self.scale * (x @ (x if y is None else y).T)


def test_every_backward_begins_with_the_buffers_of_the_call():
    x, y = batch(n=12, dtype=torch.float64)
    distance = Cooling()
    loss = PNPLoss(anneal=0.3, chunk_size=5, distance=distance)(x.requires_grad_(), y)
    after_the_call = distance.scale.clone()
    first, second, third = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(3))
    assert first.abs().max() > 1e-3
    assert torch.equal(second, first) and torch.equal(third, first)
    assert torch.equal(distance.scale, after_the_call)


@pytest.mark.parametrize("collect_stats", [False, True])
@pytest.mark.parametrize("name", ["cosine", "dot", "snr", "user's own, learning"])
@pytest.mark.parametrize("kind", CALLS)
def test_create_graph_with_chunks(kind, name, collect_stats):
    """First and second derivatives, of embeddings, references and parameters of the distance."""
    x, y = batch(n=12, dtype=torch.float64)
    ref, ref_y = batch(n=13, dtype=torch.float64)
    args = CALLS[kind](x.requires_grad_(), y, ref.requires_grad_(), ref_y)
    distance = DISTANCES[name]().double()
    inputs = [t for t in args if getattr(t, "requires_grad", False)] + [*distance.parameters()]
    results = []
    for chunk_size in (None, 5):
        loss_func = PNPLoss(
            anneal=0.3,
            variant="Ds",
            distance=distance,
            chunk_size=chunk_size,
            collect_stats=collect_stats,
        )
        grads = torch.autograd.grad(loss_func(*args), inputs, create_graph=True)
        total = sum(grad.square().sum() for grad in grads)
        results.append([*grads, *torch.autograd.grad(total, inputs)])
        stats = recorded(loss_func, "_record_these_stats")
        assert (stats.get("negatives_before_positive", 0) > 0) is collect_stats
    assert all(grad.abs().max() > 1e-6 for grad in results[0])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("distance", [distances.CosineSimilarity(), distances.SNRDistance()])
def test_derivatives_are_those_of_the_labels_that_were_given(distance):
    grads = []
    x, y = batch(n=8, dtype=torch.float64)
    for overwrite in (False, True):
        loss = PNPLoss(variant="Iu", anneal=0.2, chunk_size=3, distance=distance)(
            x.requires_grad_(), y
        )
        if overwrite:
            y.zero_()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        grads += [grad, *torch.autograd.grad(grad.square().sum(), x)]
    torch.testing.assert_close(grads[2:], grads[:2])


def test_a_memory_and_labels_may_change_before_backward():
    """Two losses before one backward; meanwhile the memory moves on, and labels are overwritten."""
    grads = []
    for chunk_size in (None, 4):
        torch.manual_seed(0)
        memory = losses.CrossBatchMemory(PNPLoss(chunk_size=chunk_size), 8, memory_size=24)
        first, second = (batch(n=12)[0].requires_grad_() for _ in range(2))
        y = torch.arange(12) // 3
        memory(torch.randn(12, 8), y)
        total = memory(first, y) + memory(second, y)
        y.fill_(0)
        grads.append(torch.autograd.grad(total, (first, second)))
    torch.testing.assert_close(*grads)
    assert grads[0][0].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("distance", "message"),
    [
        (distances.LpDistance(), "modified by an inplace operation"),
        (distances.CosineSimilarity(), "modified by an inplace operation"),
        (distances.DotProductSimilarity(normalize_embeddings=False), "modified by an inplace"),
    ],
)
def test_embeddings_changed_before_backward_are_an_error(distance, message):
    x, y = batch()
    embeddings = x.requires_grad_() * 1
    loss = PNPLoss(chunk_size=5, distance=distance)(embeddings, y)
    embeddings.detach().mul_(2)
    with pytest.raises(RuntimeError, match=message):
        loss.backward()


def test_lack_of_memory_names_the_matrix_and_chunk_size():
    n = 2**23
    x, y = torch.zeros(n, 1), torch.zeros(n)
    with pytest.raises(RuntimeError) as raised:
        PNPLoss()(x, y)  # 256 TiB, more than can be addressed
    (note,) = raised.value.__notes__
    assert f"similarities of {n} queries and {n} references" in note and "chunk_size" in note


def test_only_the_losses_of_chunks_have_a_gradient(monkeypatch):
    x, y = batch()
    found, apply = [], Recomputed.apply

    def apply_and_keep(*args):
        found.extend(apply(*args))
        return tuple(found)

    monkeypatch.setattr(Recomputed, "apply", apply_and_keep)
    loss_func = PNPLoss(chunk_size=5, distance=distances.LpDistance(), collect_stats=True)
    loss_func(x.requires_grad_(), y)
    assert [result.requires_grad for result in found] == [True, False, False]
