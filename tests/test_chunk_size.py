"""`chunk_size`: fewer queries at a time, and the same values, gradients, records and errors."""

import pytest
import torch
from helpers import DISTANCES, Scale, batch, recorded
from pytorch_metric_learning import distances
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

from pml_pnp import PNPLoss
from pml_pnp.ops.recompute import Recomputed

pairs = lmu.get_all_pairs_indices
CALLS = {
    "labels": lambda x, y, ref, ref_y: (x, y),
    "references": lambda x, y, ref, ref_y: (x, y, None, ref, ref_y),
    "pairs": lambda x, y, ref, ref_y: (x, None, pairs(y)),
    "triplets": lambda x, y, ref, ref_y: (x, y, lmu.get_all_triplets_indices(y)),
    "pairs of references": lambda x, y, ref, ref_y: (x, None, pairs(y, ref_y), ref),
}


def stepwise(loss_func, args, twice):
    """Loss, gradients of embeddings, references and parameters, `twice` also second derivatives."""
    inputs = [x for x in args if getattr(x, "requires_grad", False)] + [*loss_func.parameters()]
    loss = loss_func(*args)
    stats = recorded(loss_func, "_record_these_stats")
    grads = torch.autograd.grad(loss, inputs, retain_graph=True)
    found = [loss.detach(), *grads]
    if twice:
        graph = torch.autograd.grad(loss, inputs, create_graph=True)
        total = sum(grad.square().sum() for grad in graph)
        found += [*graph, *torch.autograd.grad(total, inputs)]
    assert recorded(loss_func, "_record_these_stats") == stats  # backward computes chunks again
    return found, stats


@pytest.mark.parametrize(("include_self", "collect_stats"), [(True, False), (False, True)])
@pytest.mark.parametrize("name", ["cosine", "lp", "snr", "user's own, learning"])
@pytest.mark.parametrize("kind", CALLS)
def test_chunks_give_what_the_whole_batch_gives(kind, name, include_self, collect_stats, device):
    """Also statistics, second derivatives, and gradients of parameters of distance and variant."""
    x, y = batch(n=12, dtype=torch.float64, device=device)
    ref, ref_y = batch(n=13, dtype=torch.float64, device=device)
    args = CALLS[kind](x.requires_grad_(), y, ref.requires_grad_(), ref_y)
    loss_func = PNPLoss(
        distance=DISTANCES[name](), variant=Scale() if collect_stats else "Ds", anneal=0.3,
        include_self=include_self, collect_stats=collect_stats,
    ).to(device, torch.float64)  # fmt: skip
    whole, stats = stepwise(loss_func, args, twice=name != "lp")
    loss_func.chunk_size = 5
    got, got_stats = stepwise(loss_func, args, twice=name != "lp")
    assert all(x.abs().max() > 1e-6 for x in whole)
    torch.testing.assert_close(got, whole, rtol=1e-7, atol=1e-9)
    assert (stats.get("negatives_before_positive", 0) > 0) is collect_stats
    assert got_stats == stats


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


@pytest.mark.parametrize("kind", ["labels", "pairs"])
@pytest.mark.parametrize("distance", [distances.CosineSimilarity(), distances.SNRDistance()])
def test_derivatives_are_those_of_what_was_given_whatever_becomes_of_it(distance, kind):
    grads = []
    x, y = batch(n=8, dtype=torch.float64)
    given = (y,) if kind == "labels" else pairs(y)
    args = given if kind == "labels" else (None, given)
    for overwrite in (False, True):
        loss_func = PNPLoss(variant="Iu", anneal=0.2, chunk_size=3, distance=distance)
        loss = loss_func(x.requires_grad_(), *args)
        for tensor in given if overwrite else ():
            tensor.zero_()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        grads += [grad, *torch.autograd.grad(grad.square().sum(), x)]
    torch.testing.assert_close(grads[2:], grads[:2])


@pytest.mark.parametrize("distance", ["lp", "cosine", "dot"])
def test_embeddings_changed_before_backward_are_an_error(distance):
    x, y = batch()
    embeddings = x.requires_grad_() * 1
    loss = PNPLoss(chunk_size=5, distance=DISTANCES[distance]())(embeddings, y)
    embeddings.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_distance_that_cannot_be_copied_is_named():
    x, y = batch()
    distance = DISTANCES["lp"]()
    distance.scale = torch.ones(1, requires_grad=True) * 2  # no leaf
    with pytest.raises(TypeError, match="with a chunk_size, .* and LpDistance cannot be copied: "):
        PNPLoss(chunk_size=5, distance=distance)(x.requires_grad_(), y)


def test_lack_of_memory_names_the_matrix_and_chunk_size():
    n = 2**22
    x, y = torch.zeros(n, 1, dtype=torch.float64), torch.zeros(n)
    with pytest.raises(RuntimeError) as raised:
        PNPLoss()(x, y)  # 128 TiB, more than can be addressed
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
