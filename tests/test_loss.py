"""The rules of the loss in PML, each a promise to someone who writes losses.PNPLoss(...)."""

import copy
import gc
import inspect
import io
import pickle
import shutil
import weakref

import helpers
import pytest
import torch
from helpers import (
    RTOL,
    VARIANTS,
    VARIANTS_OF_THE_PAPER,
    batch,
    distance_matrix,
    expected_losses,
    expected_mean,
    value_and_grad,
)
from pytorch_metric_learning import distances, reducers, regularizers
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

from pml_pnp import PNPLoss, losses
from pml_pnp.functional import pnp_loss

BUILT_IN = getattr(pml_losses, "PNPLoss", None)
# torch 2.4 breaks the graph where it is asked about autocast; versions between were not tried.
TRACES_PML = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
needs_built_in = pytest.mark.skipif(BUILT_IN is None, reason="this PML has no PNPLoss of its own")


# --- rule 1: the query is its own positive, queries without another positive do not count


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_value_is_the_formula(variant, include_self, dtype, device):
    x, y = batch(dtype=dtype, device=device)
    kwargs = {"variant": variant, "alpha": 4, "b": 3, "include_self": include_self}
    loss = PNPLoss(**kwargs)(x, y)
    assert loss.dtype == dtype and loss.device == x.device
    assert loss.item() == pytest.approx(expected_mean(x, y, **kwargs), rel=RTOL[dtype])


def test_queries_without_a_second_positive_give_no_element(device):
    x, y = batch(device=device)
    out = PNPLoss(reducer=reducers.DoNothingReducer())(x, y)["loss"]
    expected = expected_losses(x, y)
    assert out["reduction_type"] == "element"
    assert out["indices"].tolist() == sorted(expected) and 0 not in expected
    assert out["losses"].tolist() == pytest.approx(
        [expected[a] for a in sorted(expected)], rel=1e-4
    )


def test_include_self_false_leaves_the_query_out():
    x = torch.tensor([[1.0, 0], [0.6, 0.8], [0.99, 0.1]], dtype=torch.float64)
    y = torch.tensor([0, 0, 1])
    with_self, without = (PNPLoss(anneal=0.1, include_self=i)(x, y).item() for i in (True, False))
    assert without == pytest.approx(expected_mean(x, y, anneal=0.1, include_self=False))
    assert with_self < without  # the query stands before the negatives, its mate behind


# --- rule 2: drop-in for PML's built-in


@needs_built_in
def test_signature_begins_like_the_built_in():
    built_in = list(inspect.signature(BUILT_IN).parameters.values())[:-1]
    assert list(inspect.signature(PNPLoss).parameters.values())[: len(built_in)] == built_in


@needs_built_in
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("variant", VARIANTS_OF_THE_PAPER)
@pytest.mark.parametrize("kwargs", [{}, {"alpha": 4, "b": 0.7, "anneal": 0.02}], ids=str)
def test_value_and_gradient_equal_the_built_in(variant, kwargs, dtype, device):
    x, y = batch(n=40, dtype=dtype, device=device)
    ours = value_and_grad(PNPLoss(variant=variant, **kwargs), x, y)
    theirs = value_and_grad(BUILT_IN(variant=variant, **kwargs), x, y)
    assert theirs[1].abs().max() > 1e-3
    tolerance = {"rtol": 1e-3, "atol": 1e-5} if dtype == torch.float32 else {}
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@needs_built_in
def test_defaults_equal_the_built_in(device):
    x, y = batch(device=device)
    torch.testing.assert_close(PNPLoss()(x, y), BUILT_IN()(x, y))


def test_order_of_the_batch_does_not_matter(device):
    x, y = batch(dtype=torch.float64, device=device)
    order = torch.randperm(len(x), device=device)
    torch.testing.assert_close(
        PNPLoss(variant="Dq")(x, y), PNPLoss(variant="Dq")(x[order], y[order])
    )


# --- rule 3: tuples


def all_triplets(y):
    return lmu.get_all_triplets_indices(y)


@pytest.mark.parametrize(
    "make", [lmu.get_all_pairs_indices, all_triplets], ids=["pairs", "triplets"]
)
def test_tuple_of_everything_equals_no_tuple(make, device):
    x, y = batch(dtype=torch.float64, device=device)
    for got, want in zip(
        value_and_grad(PNPLoss(variant="Iu"), x, y, make(y)),
        value_and_grad(PNPLoss(variant="Iu"), x, y),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_repeated_pairs_count_once(device):
    x, y = batch(device=device)
    once = lmu.get_all_pairs_indices(y)
    twice = tuple(torch.cat([i, i.flip(0)]) for i in once)
    torch.testing.assert_close(PNPLoss()(x, y, twice), PNPLoss()(x, y, once), rtol=0, atol=0)


def test_tuple_alone_is_enough(device):
    x, y = batch(device=device)
    indices = tuple(i[::2] for i in lmu.get_all_pairs_indices(y))
    torch.testing.assert_close(PNPLoss()(x, indices_tuple=indices), PNPLoss()(x, y, indices))


@pytest.mark.parametrize("kind", ["pairs", "triplets"])
def test_tuple_defines_positives_and_negatives(kind, dtype, device):
    x, y = batch(dtype=dtype, device=device)
    if kind == "pairs":
        a1, p, a2, q = lmu.get_all_pairs_indices(y.cpu())
        keep1 = torch.randperm(len(a1))[: len(a1) // 2]
        keep2 = torch.randperm(len(a2))[: len(a2) // 2]
        indices = a1[keep1], p[keep1], a2[keep2], q[keep2]
    else:
        a, p, q = all_triplets(y.cpu())
        keep = torch.randperm(len(a))[:30]
        indices = a[keep], p[keep], q[keep]
    loss = PNPLoss(variant="Ds")(x, y, indices)
    expected = expected_mean(x, tuple_=indices, variant="Ds")
    assert loss.item() == pytest.approx(expected, rel=RTOL[dtype])


def test_a_query_paired_with_itself_is_no_positive_and_no_negative(device):
    x = torch.randn(3, 4, device=device)
    positive = tuple(torch.tensor(i) for i in ([0, 1], [0, 1], [0, 0], [1, 2]))
    out = PNPLoss(reducer=reducers.DoNothingReducer(), anneal=1)(x, indices_tuple=positive)
    assert out["loss"]["losses"] == 0 and out["loss"]["indices"] is None
    with_self, without = (
        PNPLoss(anneal=1)(x, indices_tuple=tuple(torch.tensor(i) for i in pairs))
        for pairs in (([0], [1], [0, 0], [0, 2]), ([0], [1], [0], [2]))
    )
    assert torch.equal(with_self, without)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.uint8])
def test_indices_may_be_of_any_integer_type(index_dtype, device):
    x, y = batch(device=device)
    indices = lmu.get_all_pairs_indices(y)
    small = tuple(i.to(index_dtype) for i in indices)
    torch.testing.assert_close(PNPLoss()(x, y, small), PNPLoss()(x, y, indices))


# --- rule 5: references


def test_references_that_are_the_batch_give_the_plain_value(device):
    x, y = batch(dtype=torch.float64, device=device)
    ref, ref_y = x.clone(), y.clone()
    indices = lmu.get_all_pairs_indices(y, ref_y)
    indices = lmu.remove_self_comparisons(
        indices, torch.arange(len(x), device=device), len(ref), ref_is_subset=False
    )
    plain = PNPLoss(variant="Dq")(x, y)
    torch.testing.assert_close(PNPLoss(variant="Dq")(x, y, indices, ref, ref_y), plain)


def test_the_batch_itself_given_as_references_is_the_plain_call(device):
    x, y = batch(device=device)
    torch.testing.assert_close(PNPLoss()(x, y, ref_emb=x, ref_labels=y), PNPLoss()(x, y))


def test_the_batch_with_other_labels_is_a_set_of_references(device):
    """As in PML, where a row then is a positive of itself; SelfSupervisedLoss counts on it."""
    x, y = batch(device=device)
    want = PNPLoss(variant="Ds")(x, y, ref_emb=x.clone(), ref_labels=y.clone())
    got = PNPLoss(variant="Ds")(x, y, ref_emb=x, ref_labels=y.clone())
    torch.testing.assert_close(got, want)
    assert got != PNPLoss(variant="Ds")(x, y)


def test_self_similarity_is_cut_into_blocks(monkeypatch, device):
    x, y = batch(dtype=torch.float64, device=device)
    ref, ref_y = batch(n=9, dtype=torch.float64, device=device)
    distance = distances.DotProductSimilarity(normalize_embeddings=False)
    loss_func = PNPLoss(distance=distance, anneal=0.3)
    whole = value_and_grad(loss_func, x, y, None, ref, ref_y)
    monkeypatch.setattr("pml_pnp.distances.SELF_SIMILARITY_BLOCK", 5)
    for got, want in zip(value_and_grad(loss_func, x, y, None, ref, ref_y), whole, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("include_self", [True, False])
def test_references_are_ranked_and_the_query_itself_is_its_own_positive(
    include_self, dtype, device
):
    x, y = batch(dtype=dtype, device=device)
    ref, ref_y = batch(n=33, dtype=dtype, device=device)
    kwargs = {"variant": "Ds", "include_self": include_self}
    loss = PNPLoss(**kwargs)(x, y, ref_emb=ref, ref_labels=ref_y)
    expected = expected_mean(x, y, ref_emb=ref, ref_labels=ref_y, **kwargs)
    assert loss.item() == pytest.approx(expected, rel=RTOL[dtype])


def test_references_work_with_a_tuple_and_no_labels(device):
    x, ref = torch.randn(2, 4, device=device), torch.randn(5, 4, device=device)
    triplets = tuple(torch.tensor(i) for i in ([0, 0, 1], [0, 1, 4], [2, 3, 0]))
    loss = PNPLoss()(x, indices_tuple=triplets, ref_emb=ref)
    assert loss.item() == pytest.approx(expected_mean(x, ref_emb=ref, tuple_=triplets), rel=1e-4)


def test_gradients_flow_to_references_that_ask_for_them():
    x, y = batch(n=6, d=3, dtype=torch.float64)
    ref, ref_y = batch(n=5, d=3, dtype=torch.float64)
    distance = distances.DotProductSimilarity(normalize_embeddings=False)
    loss_func = PNPLoss(anneal=0.2, reducer=reducers.SumReducer(), distance=distance)

    def call(x, ref):
        return loss_func(x, y, ref_emb=ref, ref_labels=ref_y)

    assert torch.autograd.gradcheck(call, (x.requires_grad_(), ref.requires_grad_()))


# --- rule 6: distances


class Manhattan(torch.nn.Module):
    """A user's own distance, without any base class."""

    is_inverted = False

    def forward(self, query_emb, ref_emb=None):
        return torch.cdist(query_emb, query_emb if ref_emb is None else ref_emb, p=1)


class Bilinear(distances.BaseDistance):
    """A user's own similarity that is not symmetric and learns."""

    def __init__(self):
        super().__init__(is_inverted=True)
        self.weight = torch.nn.Parameter(torch.eye(8) + 0.1 * torch.randn(8, 8))

    def compute_mat(self, query_emb, ref_emb):
        return query_emb @ self.weight.to(query_emb) @ ref_emb.T


DISTANCES = {
    "cosine": distances.CosineSimilarity,
    "dot": lambda: distances.DotProductSimilarity(normalize_embeddings=False),
    "lp": distances.LpDistance,
    "lp squared, not normalized": lambda: distances.LpDistance(normalize_embeddings=False, power=2),
    "l1": lambda: distances.LpDistance(p=1, normalize_embeddings=False),
    "snr": distances.SNRDistance,
    "batched cosine": lambda: distances.BatchedDistance(distances.CosineSimilarity(), batch_size=5),
    "batched lp": lambda: distances.BatchedDistance(distances.LpDistance(), batch_size=7),
    "user's own": Manhattan,
    "user's own, learning": Bilinear,
}


def test_every_distance_of_pml_is_tried():
    ours = {type(make()) for make in DISTANCES.values()}
    theirs = {c for n, c in vars(distances).items() if inspect.isclass(c) and n != "BaseDistance"}
    assert theirs <= ours


@pytest.mark.parametrize("with_references", [False, True], ids=["batch", "references"])
@pytest.mark.parametrize("name", DISTANCES)
def test_distance_decides_the_ranking(name, with_references, dtype, device):
    distance = DISTANCES[name]().to(device)
    x, y = batch(dtype=dtype, device=device)
    ref, ref_y = batch(n=13, dtype=dtype, device=device) if with_references else (None, None)
    loss = PNPLoss(distance=distance, anneal=0.1, variant="Ds")(x, y, ref_emb=ref, ref_labels=ref_y)
    s, own = distance_matrix(distance, x, ref), distance_matrix(distance, x).diagonal()
    losses = helpers.reference.pnp_losses(
        s.tolist(),
        *helpers.sets_from_labels(y, ref_y),
        own.tolist(),
        k=1 if distance.is_inverted else -1,
        anneal=0.1,
        variant="Ds",
    )
    assert loss.item() == pytest.approx(sum(losses.values()) / len(losses), rel=RTOL[dtype])


@pytest.mark.parametrize("name", DISTANCES)
def test_gradient_goes_through_the_distance(name):
    distance = DISTANCES[name]().double()
    x, y = batch(n=7, classes=2, dtype=torch.float64)
    loss_func = PNPLoss(distance=distance, anneal=0.3, variant="Iu")
    assert torch.autograd.gradcheck(lambda x: loss_func(x, y), x.requires_grad_())


def test_batched_distance_equals_the_distance_and_keeps_the_users_iter_fn():
    x, y = batch()
    calls = []
    batched = distances.BatchedDistance(
        distances.LpDistance(), lambda *args: calls.append(args), batch_size=5
    )
    iter_fn = batched.iter_fn
    torch.testing.assert_close(
        PNPLoss(distance=batched)(x, y), PNPLoss(distance=distances.LpDistance())(x, y)
    )
    assert batched.iter_fn is iter_fn and not calls


def test_distance_of_half_precision_is_raised_to_float32():
    class Half(distances.CosineSimilarity):
        def compute_mat(self, query_emb, ref_emb):
            return super().compute_mat(query_emb, ref_emb).half()

    x, y = torch.randn(1024, 8), torch.arange(1024) // 4
    loss = PNPLoss(distance=Half())(x, y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, PNPLoss()(x, y), rtol=1e-2, atol=0)


def test_nan_labels_are_in_no_class():
    x, y = batch(n=12)
    labels = y.float()
    labels[4:7] = float("nan")
    lone = y.clone()
    lone[4:7] = torch.arange(100, 103)
    torch.testing.assert_close(PNPLoss()(x, labels), PNPLoss()(x, lone))
    ref, ref_y = batch(n=9)
    ref_labels = ref_y.double()
    ref_labels[2] = float("nan")
    got = PNPLoss()(x, labels, None, ref, ref_labels)
    torch.testing.assert_close(
        got, PNPLoss()(x, lone, None, ref, ref_y.masked_fill(ref_labels.isnan(), -1))
    )


def test_a_subclass_with_parts_of_its_own_gets_them_as_pml_has_them():
    class Own(PNPLoss):
        def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
            if indices_tuple is not None:
                lmu.convert_to_pairs(indices_tuple, labels, ref_labels)
            parts = super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
            assert parts["loss"]["reduction_type"] == "element"
            return parts

    x, y = batch()
    torch.testing.assert_close(Own()(x, y), PNPLoss()(x, y))
    assert losses.CrossBatchMemory(Own(), 8, memory_size=40)(x, y).isfinite()


def test_distance_of_wrong_shape_or_kind_is_named():
    class Wrong(torch.nn.Module):
        is_inverted = True

        def forward(self, query_emb, ref_emb=None):
            return query_emb

    x, y = batch(n=24, d=8)
    with pytest.raises(
        ValueError, match=r"distance must return a matrix of shape \(24, 24\), got \(24, 8\)"
    ):
        PNPLoss(distance=Wrong())(x, y)
    for result, kind in ((3, "int"), (torch.ones(24, 24).long(), "torch.int64")):
        distance = distances.CosineSimilarity()
        distance.forward = lambda *args, result=result: result
        with pytest.raises(TypeError, match=f"distance must return a floating .*, got {kind}"):
            PNPLoss(distance=distance)(x, y)
    with pytest.raises(TypeError, match="distance must .* is_inverted, got Identity"):
        PNPLoss(distance=torch.nn.Identity())


# --- rule 8: precision


def relative_error(grad, variant, x, y):
    """Of a gradient, against the same embeddings in float64."""
    want = value_and_grad(PNPLoss(variant=variant, alpha=4), x.double(), y)[1]
    return (grad.double() - want).norm() / want.norm()


# float64 itself is tested by gradcheck and against the built-in.
GRADIENT_ERROR = {torch.float16: 1e-3, torch.bfloat16: 5e-3, torch.float32: 1e-4}


@pytest.mark.parametrize("low", GRADIENT_ERROR, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_is_as_good_as_the_dtype(variant, low, device):
    x, y = batch(dtype=low, device=device)
    _, grad = value_and_grad(PNPLoss(variant=variant, alpha=4), x, y)
    assert grad.dtype == low and relative_error(grad, variant, x, y) < GRADIENT_ERROR[low]


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_computes_and_returns_float32(variant, low, device):
    x, y = batch(dtype=low, device=device)
    x.requires_grad_()
    with torch.autocast(device.type, dtype=low):
        loss = PNPLoss(variant=variant, alpha=4)(x, y)
    loss.backward()
    assert loss.dtype == torch.float32 and x.grad.dtype == low
    expected = expected_mean(x.detach(), y, variant=variant, alpha=4)
    assert loss.item() == pytest.approx(expected, rel=RTOL[torch.float32])
    assert relative_error(x.grad, variant, x.detach(), y) < GRADIENT_ERROR[low]


@pytest.mark.parametrize("regularized", [False, True])
@pytest.mark.parametrize("ranked", [False, True])
def test_result_is_float32_under_autocast_whatever_is_in_the_batch(ranked, regularized, device):
    x, y = batch(dtype=torch.bfloat16, device=device)
    y = y if ranked else torch.arange(len(x))
    regularizer = regularizers.LpRegularizer() if regularized else None
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert PNPLoss(embedding_regularizer=regularizer)(x, y).dtype == torch.float32


def test_reducers_work_on_float32_elements(device):
    """A sum of 512 float16 losses would overflow before it is divided."""
    x = torch.randn(512, 8, dtype=torch.float16, device=device)
    y = torch.arange(512, device=device) // 4
    divided = PNPLoss(variant="Iu", reducer=reducers.DivisorReducer())(x, y)
    assert divided.isfinite() and divided == PNPLoss(variant="Iu")(x, y)


def test_autocast_keeps_float64(device):
    x, y = batch(dtype=torch.float64, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = PNPLoss()(x, y)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, PNPLoss()(x, y))


@pytest.mark.parametrize("variant", VARIANTS)
def test_far_apart_and_coinciding_embeddings_have_finite_gradients(variant, dtype, device):
    x = torch.tensor([[1.0, 0], [-1, 0], [1, 0], [0, 1], [0, 0]], dtype=dtype, device=device)
    y = torch.tensor([0, 0, 1, 1, 1], device=device)
    if dtype == torch.float16:
        x[4] = 0.01  # the slope of a normalized vector of length 0 is 1e12, beyond float16
    value, grad = value_and_grad(PNPLoss(variant=variant), x, y)
    assert value.isfinite() and grad.isfinite().all()


def test_references_of_another_dtype(device):
    x, y = batch(dtype=torch.float16, device=device)
    ref, ref_y = batch(n=9, dtype=torch.float32, device=device)
    loss = PNPLoss()(x, y, ref_emb=ref, ref_labels=ref_y)
    assert loss.dtype == torch.float16
    expected = expected_mean(x, y, ref_emb=ref, ref_labels=ref_y)
    assert loss.item() == pytest.approx(expected, rel=2e-3)


# --- rule 4 and the edges: nothing to rank


EDGES = {
    "one class": (torch.randn(4, 3), torch.zeros(4, dtype=torch.long), None),
    "lone examples": (torch.randn(4, 3), torch.arange(4), None),
    "batch of one": (torch.randn(1, 3), torch.zeros(1, dtype=torch.long), None),
    "empty batch": (torch.randn(0, 3), torch.zeros(0, dtype=torch.long), None),
    "empty triplets": (torch.randn(4, 3), torch.arange(4) // 2, 3),
    "empty pairs": (torch.randn(4, 3), torch.arange(4) // 2, 4),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", EDGES)
def test_nothing_to_rank_is_zero_connected_to_the_graph(case, variant, dtype, device):
    x, y, length = EDGES[case]
    x, y = x.to(device, dtype), y.to(device)
    indices = (
        None if length is None else tuple(torch.tensor([], device=device) for _ in range(length))
    )
    value, grad = value_and_grad(PNPLoss(variant=variant), x, y, indices)
    assert value == 0 and value.dtype == dtype
    assert grad.shape == x.shape and grad.eq(0).all()


@pytest.mark.parametrize("name", DISTANCES)
def test_an_empty_batch_is_zero_with_every_distance(name):
    value, grad = value_and_grad(
        PNPLoss(distance=DISTANCES[name]()), torch.zeros(0, 8), torch.zeros(0, dtype=torch.long)
    )
    assert value == 0 and grad.shape == (0, 8)


def test_zero_is_connected_to_references_too(device):
    x, y = batch(device=device)
    ref = torch.randn(9, 8, device=device, requires_grad=True)
    loss = PNPLoss()(x, y, ref_emb=ref, ref_labels=torch.full((9,), 99))
    loss.backward()
    assert loss == 0 and ref.grad.eq(0).all()


def test_no_references_is_zero():
    x, y = batch()
    value, grad = value_and_grad(
        PNPLoss(), x, y, None, torch.zeros(0, 8), torch.zeros(0, dtype=torch.long)
    )
    assert value == 0 and grad.eq(0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("distance", ["cosine", "dot", "lp", "lp squared, not normalized", "snr"])
@pytest.mark.parametrize("labels", ["mixed", "one class", "lone examples"])
def test_a_broken_embedding_gives_nan(labels, distance, bad):
    x, y = batch(n=6)
    y = {"mixed": y, "one class": y * 0, "lone examples": torch.arange(6)}[labels]
    x[3, 1] = bad
    assert PNPLoss(distance=DISTANCES[distance](), variant="Dq")(x, y).isnan()


def test_large_finite_embeddings_are_not_broken(device):
    x, y = batch(device=device)
    assert PNPLoss(distance=DISTANCES["l1"]())(x.sign() * 1e37, y).isfinite()


def test_a_broken_reference_gives_nan():
    x, y = batch()
    ref, ref_y = batch(n=9)
    ref[2] = float("inf")
    # Without a check, infinitely far would only mean ranked last.
    distance = DISTANCES["lp squared, not normalized"]()
    for labels in (y, y * 0 + 99):  # also when no query has a positive
        assert PNPLoss(distance=distance)(x, labels, ref_emb=ref, ref_labels=ref_y).isnan()


# --- rule 10: determinism


@pytest.mark.parametrize("kind", ["labels", "tuple", "references"])
def test_same_input_same_bits(kind, device):
    x, y = batch(n=64, device=device)
    ref, ref_y = batch(n=80, device=device)
    args = {
        "labels": (y,),
        "tuple": (y, all_triplets(y)),
        "references": (y, None, ref, ref_y),
    }[kind]
    first = value_and_grad(PNPLoss(variant="Dq"), x, *args)
    for _ in range(3):
        for got, want in zip(value_and_grad(PNPLoss(variant="Dq"), x, *args), first, strict=True):
            assert torch.equal(got, want)


# --- callable variants


def test_a_callable_variant_is_any_f(device):
    x, y = batch(dtype=torch.float64, device=device)
    for name, f in {"Ds": torch.log1p, "O": lambda r: r}.items():
        for got, want in zip(
            value_and_grad(PNPLoss(variant=f), x, y),
            value_and_grad(PNPLoss(variant=name), x, y),
            strict=True,
        ):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("f", "error", "message"),
    [
        (lambda r: r.sum(), ValueError, r"one value per entry: expected shape .*, got \(\)"),
        (lambda r: r.sum(dim=1, keepdim=True), ValueError, "one value per entry"),
        (lambda r: 1.0, TypeError, "variant must return a tensor, got float"),
    ],
)
def test_a_callable_that_does_not_return_one_value_per_entry_is_named(f, error, message):
    with pytest.raises(error, match=message):
        PNPLoss(variant=f)(*batch())


class Scale(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, r):
        return self.weight * r


def test_a_module_as_variant_is_part_of_the_loss():
    loss_func = PNPLoss(variant=Scale())
    assert [name for name, _ in loss_func.named_parameters()] == ["variant.weight"]
    x, y = batch()
    loss_func(x, y).backward()
    expected = PNPLoss()(x, y)
    torch.testing.assert_close(loss_func.variant.weight.grad, expected)


# --- lean mode


def stepwise(loss_func, *args, **kwargs):
    """Value, and gradients of what takes part, of a call."""
    value = loss_func(*args, **kwargs)
    inputs = [t for t in (*args, *kwargs.values()) if getattr(t, "requires_grad", False)]
    inputs += loss_func.parameters()
    return value.detach(), *torch.autograd.grad(value, inputs)


SCALE = Scale()  # a variant with a parameter
LEAN = {
    "labels": lambda x, y, ref, ref_y: (x, y),
    "references": lambda x, y, ref, ref_y: (x, y, None, ref, ref_y),
    "pairs": lambda x, y, ref, ref_y: (x, None, lmu.get_all_pairs_indices(y)),
    "triplets": lambda x, y, ref, ref_y: (x, y, all_triplets(y)),
    "pairs of references": lambda x, y, ref, ref_y: (
        x,
        None,
        lmu.get_all_pairs_indices(y, ref_y),
        ref,
    ),
}


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("variant", ["Dq", torch.log1p, SCALE], ids=str)
@pytest.mark.parametrize("kind", LEAN)
@pytest.mark.parametrize("name", DISTANCES)
def test_lean_mode_has_the_same_values_and_gradients(name, kind, variant, include_self, device):
    distance = DISTANCES[name]().to(device, torch.float64)
    x, y = batch(dtype=torch.float64, device=device)
    ref, ref_y = batch(n=13, dtype=torch.float64, device=device)
    args = LEAN[kind](x.requires_grad_(), y, ref.requires_grad_(), ref_y)
    variant = copy.deepcopy(variant).double() if variant == SCALE else variant
    kwargs = {"distance": distance, "variant": variant, "include_self": include_self}
    whole = stepwise(PNPLoss(anneal=0.1, **kwargs), *args)
    for chunk_size in (1, 7, 23):
        lean = stepwise(PNPLoss(anneal=0.1, chunk_size=chunk_size, **kwargs), *args)
        for got, want in zip(lean, whole, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


def test_lean_mode_counts_the_same_statistics():
    x, y = batch()
    stats = []
    for chunk_size in (None, 5):
        loss_func = PNPLoss(collect_stats=True, chunk_size=chunk_size)
        loss_func(x.requires_grad_(), y).backward()
        stats.append(recorded(loss_func, "_record_these_stats"))
    assert stats[0] == stats[1] and stats[0]["negatives_before_positive"] > 0


def test_lean_mode_takes_every_reducer_and_the_memory():
    x, y = batch(n=16)
    for make in (reducers.MeanReducer, reducers.SumReducer, reducers.DivisorReducer):
        torch.testing.assert_close(
            value_and_grad(PNPLoss(reducer=make(), chunk_size=5), x, y),
            value_and_grad(PNPLoss(reducer=make()), x, y),
        )
    results = []
    for chunk_size in (None, 5):
        memory = losses.CrossBatchMemory(PNPLoss(chunk_size=chunk_size), 8, memory_size=40)
        memory(x, y)
        results.append(value_and_grad(memory, x + 0.1, y))
    torch.testing.assert_close(*results)


def test_lean_mode_is_differentiable_twice():
    x, y = batch(n=7, d=3, classes=2, dtype=torch.float64)
    for distance in (distances.CosineSimilarity(), distances.SNRDistance()):
        loss_func = PNPLoss(variant="Iu", anneal=0.3, chunk_size=3, distance=distance)
        assert torch.autograd.gradgradcheck(lambda x, f=loss_func: f(x, y), x.requires_grad_())


def test_lean_mode_without_gradient():
    x, y = batch()
    with torch.no_grad():
        torch.testing.assert_close(PNPLoss(chunk_size=5)(x, y), PNPLoss()(x, y))
    assert not PNPLoss(chunk_size=5)(x, y).requires_grad


def test_lack_of_memory_names_the_matrix_and_the_way_out():
    n = 2**23
    x, y = torch.zeros(n, 1), torch.zeros(n)
    with pytest.raises(RuntimeError) as raised:
        PNPLoss()(x, y)  # 256 TiB, more than can be addressed
    (note,) = raised.value.__notes__
    assert f"similarities of {n} queries and {n} references" in note and "chunk_size" in note


def test_lean_mode_looks_at_what_was_given_not_at_what_became_of_it():
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
def test_lean_mode_refuses_embeddings_that_were_changed(distance, message):
    x, y = batch()
    embeddings = x.requires_grad_() * 1
    loss = PNPLoss(chunk_size=5, distance=distance)(embeddings, y)
    embeddings.detach().mul_(2)
    with pytest.raises(RuntimeError, match=message):
        loss.backward()


@pytest.mark.parametrize("distance", [distances.CosineSimilarity(), distances.SNRDistance()])
def test_lean_mode_second_derivative_is_of_what_was_given(distance):
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


def test_lean_mode_under_compile_breaks_the_graph_and_no_more():
    x, y = batch()
    x.requires_grad_()
    loss_func = PNPLoss(chunk_size=7)
    torch._dynamo.reset()
    try:
        got = torch.autograd.grad(torch.compile(loss_func, backend="aot_eager")(x, y), x)
    finally:
        torch._dynamo.reset()
    torch.testing.assert_close(got, torch.autograd.grad(PNPLoss()(x, y), x))


# --- backward more than once


@pytest.mark.parametrize(
    "distance", [distances.CosineSimilarity(), distances.DotProductSimilarity()]
)
@pytest.mark.parametrize("with_references", [False, True])
def test_what_is_overwritten_is_made_again(distance, with_references):
    """The gradient takes the place of the similarities; later ones must not notice."""
    x, y = batch(dtype=torch.float64)
    refs, ref_labels = batch(n=30, dtype=torch.float64) if with_references else (None, None)
    x.requires_grad_()
    loss = PNPLoss(variant="Iu", anneal=0.2, distance=distance)(x, y, None, refs, ref_labels)
    first, again = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    graph = torch.autograd.grad(loss, x, create_graph=True)[0]
    assert torch.equal(first, again)
    torch.testing.assert_close(graph, first)

    def call(x):
        return PNPLoss(variant="Iu", anneal=0.2, distance=distance)(x, y, None, refs, ref_labels)

    assert torch.autograd.gradgradcheck(call, x)


def test_only_a_second_derivative_refuses_references_that_were_changed():
    x, y = batch()
    refs = batch()[0]
    loss = PNPLoss()(x.requires_grad_(), y, None, refs, y)
    (want,) = torch.autograd.grad(loss, x, retain_graph=True)
    refs.mul_(2)  # a memory may move on
    assert torch.equal(torch.autograd.grad(loss, x, retain_graph=True)[0], want)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_backward_is_as_accurate_under_autocast(chunk_size):
    x, y = batch()
    x.requires_grad_()
    loss_func = PNPLoss(variant="Ds", anneal=0.1, chunk_size=chunk_size)
    (want,) = torch.autograd.grad(loss_func(x, y), x, create_graph=True)
    second = torch.autograd.grad(want.square().sum(), x)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_func(x, y)
        for _ in range(2):
            torch.testing.assert_close(torch.autograd.grad(loss, x, retain_graph=True)[0], want)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(grad, want)
    torch.testing.assert_close(torch.autograd.grad(grad.square().sum(), x), second)


def test_second_derivatives_under_autocast_with_references():
    x, y = batch()
    refs, ref_labels = batch()
    x.requires_grad_()
    loss_func = PNPLoss(variant="Ds", anneal=0.1)
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = loss_func(x, y, None, refs, ref_labels)
            (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        grads.append(torch.autograd.grad(grad.square().sum(), x)[0])
    torch.testing.assert_close(*grads, rtol=0.05, atol=0.02 * grads[0].abs().max().item())


@pytest.mark.parametrize("variant", ["Dq", torch.log1p])
def test_references_may_come_from_inference_mode(variant):
    x, y = batch()
    with torch.inference_mode():
        refs = batch()[0] * 1
    got = value_and_grad(PNPLoss(variant=variant), x, y, None, refs, y)
    torch.testing.assert_close(
        got, value_and_grad(PNPLoss(variant=variant), x, y, None, refs.clone(), y)
    )


@pytest.mark.parametrize("with_references", [False, True])
def test_a_loss_that_is_kept_does_not_keep_the_batch(with_references):
    x, y = batch()
    refs = (x + 0.1, y) if with_references else (None, None)
    given = [t for t in (x, refs[0]) if t is not None]
    embeddings = x.requires_grad_() * 2
    given.append(embeddings)
    loss = PNPLoss()(embeddings, y, None, *refs)
    loss.backward()
    watched = [weakref.ref(t) for t in given[1:]]  # the graph leads to the first, a leaf
    del x, refs, given, embeddings
    gc.collect()
    assert loss.grad_fn is not None and all(ref() is None for ref in watched)


@pytest.mark.parametrize("wanted", ["embeddings", "references", "both"])
def test_second_derivative_for_some_of_the_inputs(wanted):
    (x, y), (ref, ref_y) = batch(n=8, dtype=torch.float64), batch(n=9, dtype=torch.float64)
    x.requires_grad_(wanted != "references")
    ref.requires_grad_(wanted != "embeddings")
    inputs = [t for t in (x, ref) if t.requires_grad]
    loss = PNPLoss(anneal=0.2, variant="Iu")(x, y, None, ref, ref_y)
    whole = torch.autograd.grad(loss, inputs, create_graph=True)
    torch.testing.assert_close(whole, torch.autograd.grad(
        PNPLoss(anneal=0.2, variant="Iu")(x, y, None, ref, ref_y), inputs))  # fmt: skip
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(whole[0].square().sum(), inputs))


def test_functional_gradient_with_a_constant_self_similarity():
    s, y, ref_y = torch.randn(4, 5), torch.arange(4) % 2, torch.arange(5) % 2

    def call(s, own):
        return pnp_loss(s, y, ref_y, self_similarity=own, anneal=0.5)[0].sum()

    own = torch.ones(4)
    want = torch.autograd.functional.jacobian(call, (s, own))
    torch.testing.assert_close(torch.func.grad(call)(s, own), want[0])
    torch.testing.assert_close(torch.func.grad(call, argnums=1)(s, own), want[1])


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_backward_may_run_again(chunk_size, device):
    x, y = batch(device=device)
    loss = PNPLoss(variant="Ds", chunk_size=chunk_size)(x.requires_grad_(), y)
    first = torch.autograd.grad(loss, x, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(2 * loss, x, retain_graph=True)[0], 2 * first[0])
    assert torch.equal(torch.autograd.grad(loss, x)[0], first[0])


@needs_built_in
def test_second_derivative_equals_that_of_the_built_in():
    x, y = batch(n=12, d=4, classes=3, dtype=torch.float64)
    x.requires_grad_()
    got, want = (
        torch.autograd.grad(
            torch.autograd.grad(loss_func(x, y), x, create_graph=True)[0].square().sum(), x
        )[0]
        for loss_func in (PNPLoss(anneal=0.2), BUILT_IN(anneal=0.2))
    )
    assert want.abs().max() > 1e-3
    torch.testing.assert_close(got, want)


# --- what PML records


def recorded(loss_func, kind):
    return {name: getattr(loss_func, name) for name in getattr(loss_func, kind, [])}


def test_hyperparameters_are_recorded():
    loss_func = PNPLoss(b=3, alpha=4, anneal=0.02, variant="Dq", include_self=False)
    assert recorded(loss_func, "_record_these") == {
        "b": 3,
        "alpha": 4,
        "anneal": 0.02,
        "variant": "Dq",
        "include_self": False,
    }
    for variant, name in ((torch.log1p, "log1p"), (Scale(), "Scale")):
        loss_func = PNPLoss(variant=variant)
        assert recorded(loss_func, "_record_these")["variant_name"] == name


def test_statistics_are_recorded_when_asked_for():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, -0.8]])
    y = torch.tensor([0, 0, 1, 2])
    loss_func = PNPLoss(collect_stats=True)
    loss_func(x, y)
    # Query 0 finds 2 before 1; query 1 finds 2 before 0. Nothing else has a positive.
    assert recorded(loss_func, "_record_these_stats") == {
        "negatives_before_positive": 1,
        "positives_behind_negatives": 1,
    }
    # Query 0 finds nothing before 2, 1 finds 0 and 2 before 3, 2 finds 1 before 0, 3 nothing.
    loss_func(x, torch.tensor([0, 1, 0, 1]))
    assert loss_func.negatives_before_positive == 3 / 4
    assert loss_func.positives_behind_negatives == 2 / 4
    loss_func(x, torch.arange(4))
    assert loss_func.negatives_before_positive == loss_func.positives_behind_negatives == 0


def test_statistics_do_not_change_the_loss_and_are_off_by_default():
    x, y = batch()
    loss_func = PNPLoss()
    assert not hasattr(loss_func, "negatives_before_positive")
    for got, want in zip(
        value_and_grad(PNPLoss(collect_stats=True), x, y),
        value_and_grad(loss_func, x, y),
        strict=True,
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["references", "tuple"])
def test_statistics_look_at_what_is_ranked(kind, device):
    x, y = batch(n=6, classes=2, device=device)
    ref, ref_y = batch(n=40, classes=2, device=device)
    if kind == "references":
        args, sets = (None, ref, ref_y), helpers.sets_from_labels(y, ref_y)
    else:
        indices = tuple(i[::3] for i in lmu.get_all_pairs_indices(y, ref_y))
        args, sets = (indices, ref), helpers.sets_from_tuple(indices, 6)
    loss_func = PNPLoss(collect_stats=True)
    loss_func(x, y if kind == "references" else None, *args)
    s = helpers.cosine_matrix(x, ref)
    before = [
        sum(s[a, n] > s[a, p] for n in negatives).item()
        for a, (positives, negatives) in enumerate(zip(*sets, strict=True))
        for p in positives
    ]
    assert loss_func.negatives_before_positive == pytest.approx(sum(before) / len(before))
    share = sum(count > 0 for count in before) / len(before)
    assert loss_func.positives_behind_negatives == pytest.approx(share)


def test_statistics_follow_the_distance():
    x, y = batch()
    stats = []
    for distance in (distances.CosineSimilarity(), distances.LpDistance()):
        loss_func = PNPLoss(distance=distance, collect_stats=True)
        loss_func(x, y)
        stats.append(recorded(loss_func, "_record_these_stats"))
    assert stats[0] == stats[1] and stats[0]["negatives_before_positive"] > 0


# --- it is a PML loss and a torch module


def test_it_is_a_pml_loss_with_pmls_defaults():
    loss_func = PNPLoss()
    assert isinstance(loss_func, pml_losses.BaseMetricLossFunction)
    assert type(loss_func.distance) is distances.CosineSimilarity
    assert type(loss_func.reducer) is reducers.MeanReducer


def test_embedding_regularizer_is_added(device):
    x, y = batch(device=device)
    plain = PNPLoss()(x, y)
    loss_func = PNPLoss(
        embedding_regularizer=regularizers.LpRegularizer(), embedding_reg_weight=0.5
    )
    regularizer = regularizers.LpRegularizer()(x) * 0.5
    torch.testing.assert_close(loss_func(x, y), plain + regularizer)


def test_labels_may_be_on_another_device_or_of_another_dtype(device):
    x, y = batch(device=device)
    want = PNPLoss()(x, y)
    for labels in (y.cpu(), y.float(), y.int()):
        assert torch.equal(PNPLoss()(x, labels), want)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("variant", ["Dq", torch.log1p, Scale()], ids=str)
def test_copies_compute_the_same(clone, variant):
    x, y = batch()
    loss_func = PNPLoss(variant=variant, distance=distances.LpDistance(), anneal=0.03)
    assert torch.equal(clone(loss_func)(x, y), loss_func(x, y))


def test_state_dict_round_trip():
    assert PNPLoss().state_dict() == {}
    source, target = PNPLoss(variant=Scale()), PNPLoss(variant=Scale())
    with torch.no_grad():
        source.variant.weight.fill_(5)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))
    assert target.variant.weight.item() == 5


def test_hyperparameters_may_be_scheduled():
    x, y = batch()
    loss_func = PNPLoss(anneal=0.1)
    loss_func.anneal = 0.02
    assert torch.equal(loss_func(x, y), PNPLoss(anneal=0.02)(x, y))
    loss_func.anneal = 0
    with pytest.raises(ValueError, match="anneal must be a positive finite number, got 0"):
        loss_func(x, y)


def test_a_subclass_may_change_the_distance():
    class Euclidean(PNPLoss):
        def get_default_distance(self):
            return distances.LpDistance()

    x, y = batch()
    assert torch.equal(Euclidean()(x, y), PNPLoss(distance=distances.LpDistance())(x, y))


def test_embeddings_are_left_alone(device):
    x, y = batch(device=device)
    x0, y0 = x.clone(), y.clone()
    PNPLoss()(x, y)
    assert torch.equal(x, x0) and torch.equal(y, y0)


def test_no_grad_and_inference_mode(device):
    x, y = batch(device=device)
    want = PNPLoss()(x, y)
    with torch.no_grad():
        assert torch.equal(PNPLoss()(x, y), want)
    with torch.inference_mode():
        assert torch.equal(PNPLoss()(x.clone(), y), want)


def test_second_order_gradient():
    x, y = batch(n=6, d=3, classes=2, dtype=torch.float64)
    loss_func = PNPLoss(anneal=0.3, variant="Ds")
    assert torch.autograd.gradgradcheck(lambda x: loss_func(x, y), x.requires_grad_())


def test_functional_gradient():
    x, y = batch()
    loss_func = PNPLoss(variant="Dq")
    got = torch.func.grad(lambda x: loss_func(x, y))(x)
    torch.testing.assert_close(got, value_and_grad(loss_func, x, y)[1])


@pytest.mark.parametrize("variant", ["Dq", torch.log1p], ids=["Dq", "callable"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training_step_equals_the_eager_one(backend, variant):
    if backend == "inductor" and not any(map(shutil.which, ["c++", "g++", "clang++", "cl"])):
        pytest.skip("inductor needs a C++ compiler")
    model = torch.nn.Linear(8, 4)
    x, y = batch()
    loss_func = PNPLoss(variant=variant, alpha=4)

    def step(x, y):
        return loss_func(model(x), y)

    def run(step):
        model.zero_grad()
        loss = step(x, y)
        loss.backward()
        return loss.detach(), model.weight.grad.clone()

    eager = run(step)
    torch._dynamo.reset()
    try:
        whole = variant == "Dq" and TRACES_PML
        compiled = torch.compile(step, backend=backend, fullgraph=whole)
        for got, want in zip(run(compiled), eager, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("distance", [distances.LpDistance, distances.DotProductSimilarity])
def test_compiled_with_references_equals_the_eager_one(distance):
    (x, y), (ref, ref_y) = batch(), batch(n=9)
    x.requires_grad_()
    loss_func = PNPLoss(distance=distance(), anneal=0.1, variant="Ib")
    torch._dynamo.reset()
    try:
        compiled = torch.compile(loss_func, backend="aot_eager", fullgraph=TRACES_PML)
        got = torch.autograd.grad(compiled(x, y, None, ref, ref_y), x)
    finally:
        torch._dynamo.reset()
    torch.testing.assert_close(got, torch.autograd.grad(loss_func(x, y, None, ref, ref_y), x))


def test_pmls_global_collect_stats_is_honoured(monkeypatch):
    monkeypatch.setattr(c_f, "COLLECT_STATS", True)
    assert hasattr(PNPLoss(), "negatives_before_positive")
