"""What code that was written for PML's losses does with one of them also works with this one."""

import copy
import inspect
import pickle
from concurrent.futures import ThreadPoolExecutor

import mpmath
import pytest
import torch
from helpers import BUILT_IN, VARIANTS, Category, Scale, batch, needs_built_in, value_and_grad
from pytorch_metric_learning import distances, reducers, regularizers
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch.nn.utils import parametrizations

from pml_pnp import PNPLoss, losses
from pml_pnp.checks import RANGES
from pml_pnp.functional import pnp_loss


@needs_built_in
def test_what_pmls_class_has_this_one_has():
    ours, theirs = PNPLoss(), BUILT_IN()
    assert PNPLoss.VARIANTS == BUILT_IN.VARIANTS
    signature = list(inspect.signature(BUILT_IN).parameters.values())[:-1]
    begin = list(inspect.signature(PNPLoss).parameters.values())[: len(signature)]
    # PML has no annotations.
    assert [x.replace(annotation=inspect.Parameter.empty) for x in begin] == signature
    public = {name for name in dir(theirs) if not name.startswith("_")} - {"sigmoid"}  # a helper
    assert public <= set(dir(ours))
    assert ours.state_dict() == theirs.state_dict() == {}
    assert repr(ours) == repr(theirs)
    assert list(inspect.signature(PNPLoss.forward).parameters) == list(
        inspect.signature(BUILT_IN.forward).parameters
    )
    assert ours.sub_loss_names() == theirs.sub_loss_names()
    ours.load_state_dict(theirs.state_dict())
    pickle.loads(pickle.dumps(ours))


@pytest.mark.parametrize("name", ["reducer", "embedding_regularizer"])
@pytest.mark.parametrize("make", [lambda cls: cls, lambda cls: cls.__name__], ids=["class", "name"])
def test_a_part_given_as_a_class_or_by_name_is_refused_at_once(name, make):
    part = {"reducer": reducers.MeanReducer, "embedding_regularizer": regularizers.LpRegularizer}
    with pytest.raises(TypeError, match=f"{name} must be an instance of .*{part[name].__name__}"):
        PNPLoss(**{name: make(part[name])})


class Thrice(reducers.MeanReducer):
    def element_reduction(self, losses, *args):
        return 3 * super().element_reduction(losses, *args)


def test_a_reducer_is_asked_for_the_mean_unless_it_is_pmls_own(monkeypatch):
    x, y = batch()
    want = PNPLoss()(x, y)
    torch.testing.assert_close(PNPLoss(reducer=Thrice())(x, y), 3 * want)
    monkeypatch.setattr(reducers.MeanReducer, "element_reduction", lambda self, losses, *_: 5.0)
    assert PNPLoss()(x, y) == 5.0


def test_embedding_regularizer_is_added(device):
    x, y = batch(device=device)
    regularizer = regularizers.LpRegularizer()
    loss_func = PNPLoss(embedding_regularizer=regularizer, embedding_reg_weight=0.5)
    torch.testing.assert_close(loss_func(x, y), PNPLoss()(x, y) + 0.5 * regularizer(x))


def test_a_subclass_may_change_the_distance():
    class Euclidean(PNPLoss):
        def get_default_distance(self):
            return distances.LpDistance()

    x, y = batch()
    assert torch.equal(Euclidean()(x, y), PNPLoss(distance=distances.LpDistance())(x, y))


def test_a_subclass_with_its_own_compute_loss_gets_pmls_arguments_and_elements():
    """Also in wrappers, and a subclass of it."""

    class Own(PNPLoss):
        def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
            if indices_tuple is not None:
                lmu.convert_to_pairs(indices_tuple, labels, ref_labels)
            parts = super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
            assert parts["loss"]["reduction_type"] == "element"
            return parts

    class Named(Own):
        pass

    x, y = batch()
    torch.testing.assert_close(Own()(x, y), PNPLoss()(x, y))
    assert losses.CrossBatchMemory(Named(), 8, memory_size=40)(x, y).isfinite()
    assert losses.SelfSupervisedLoss(Own())(x, x + 0.1).isfinite()


def test_a_module_as_variant_is_part_of_the_loss():
    loss_func = PNPLoss(variant=Scale())
    assert [name for name, _ in loss_func.named_parameters()] == ["variant.weight"]
    x, y = batch()
    loss_func(x, y).backward()
    expected = PNPLoss(variant="Ds")(x, y)
    torch.testing.assert_close(loss_func.variant.weight.grad, expected)


class Triple(distances.BatchedDistance):
    def forward(self, query_emb, ref_emb=None):
        self.iter_fn(3 * self.distance(query_emb, ref_emb), 0, len(query_emb))


class Returning(distances.BatchedDistance):
    def forward(self, query_emb, ref_emb=None):
        return 3 * self.distance(query_emb, ref_emb)


@pytest.mark.parametrize("cls", [Triple, Returning])
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_a_batched_distance_with_a_forward_of_its_own_is_called(cls, chunk_size):
    x, y = batch()
    loss = PNPLoss(distance=cls(distances.CosineSimilarity()), anneal=0.3, chunk_size=chunk_size)
    torch.testing.assert_close(loss(x, y), PNPLoss(anneal=0.1)(x, y))


# --- chunks compute with what they were given


class Weighted(distances.LpDistance):
    """A distance with a parameter, a buffer, and a number."""

    def __init__(self):
        super().__init__(normalize_embeddings=False)
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, 8))
        self.register_buffer("shift", torch.full((8,), 0.1))
        self.factor = 2.0

    def forward(self, query_emb, ref_emb=None):
        ref_emb = query_emb if ref_emb is None else ref_emb
        scaled = [x * self.weight.abs() + self.shift * x.square() for x in (query_emb, ref_emb)]
        return self.factor * super().forward(*scaled)


def step(change=lambda loss_func: None, chunk_size=5, **kwargs):
    """Gradients of a loss that is changed between its call and its backward."""
    torch.manual_seed(1)
    x, y = batch()
    x.requires_grad_()
    loss_func = PNPLoss(anneal=0.3, chunk_size=chunk_size, **kwargs)
    loss, inputs = loss_func(x, y), [x, *loss_func.parameters()]
    change(loss_func)
    return torch.autograd.grad(loss, inputs, allow_unused=True)


def double(parameter):
    with torch.no_grad():
        parameter.mul_(2)


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("which", ["distance", "variant"])
def test_a_parameter_changed_before_backward_is_an_error(which, chunk_size):
    kwargs = {"distance": Weighted(), "variant": Scale()}
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step(lambda loss_func: double(getattr(loss_func, which).weight), chunk_size, **kwargs)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: setattr(f.distance, "factor", 7.0),
        lambda f: setattr(f.distance, "p", 1),
        lambda f: setattr(f.distance, "power", 3),
        lambda f: f.distance.shift.mul_(9),
        lambda f: setattr(f.variant, "factor", 7.0),
        lambda f: setattr(f, "anneal", 5.0),
        lambda f: setattr(f, "include_self", False),
        lambda f: setattr(f, "chunk_size", 2),
        lambda f: setattr(f, "distance", distances.CosineSimilarity()),
    ],
)
def test_a_setting_changed_before_backward_changes_nothing(change):
    want = step(distance=Weighted(), variant=Scale())
    torch.testing.assert_close(step(change, distance=Weighted(), variant=Scale()), want)


@pytest.mark.parametrize("shared", [False, True])
def test_parameters_that_are_shared_unused_or_parametrized_count_once(shared):
    def grads(chunk_size):
        torch.manual_seed(0)
        distance, variant = Weighted(), Scale()
        if shared:
            distance.weight = variant.weight = torch.nn.Parameter(torch.ones(()))
        else:
            distance.unused = torch.nn.Parameter(torch.ones(2))
            variant.layer = parametrizations.weight_norm(torch.nn.Linear(8, 8))
            distance.maybe_normalize = lambda x, **_: variant.layer(x)
        return step(chunk_size=chunk_size, distance=distance, variant=variant)

    torch.testing.assert_close(grads(5), grads(None))


def test_a_variant_that_draws_numbers_draws_the_same_in_backward():
    x, y = batch(n=8, d=3, dtype=torch.float64)
    loss_func = PNPLoss(variant=torch.nn.Dropout(), anneal=0.3, chunk_size=3)

    def call(x):
        torch.manual_seed(3)
        return loss_func(x, y)

    assert torch.autograd.gradcheck(call, x.requires_grad_())
    loss = call(x)
    state = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("which", ["distance", "variant"])
def test_chunks_refuse_a_tensor_whose_gradient_they_would_lose(which):
    weight = torch.ones((), requires_grad=True)
    x, y = batch()
    distance = distances.CosineSimilarity()
    if which == "distance":
        distance.compute_mat = lambda q, r: weight * (q @ r.T)
    variant = (lambda r: weight * r) if which == "variant" else "Ds"
    loss_func = PNPLoss(distance=distance, variant=variant, anneal=0.3)
    assert torch.autograd.grad(loss_func(x.requires_grad_(), y), weight)[0] != 0
    loss_func.chunk_size = 5
    with pytest.raises(RuntimeError, match=r"another tensor of shape \(\) that requires a grad"):
        loss_func(x, y).backward()


CALLS = {
    "cosine": {},
    "chunks": {"chunk_size": 3},
    "callable": {"variant": torch.log1p},
    "another distance": {"distance": distances.SNRDistance()},
    "another distance, chunks": {"distance": distances.SNRDistance(), "chunk_size": 3},
    "another reducer": {"reducer": reducers.SumReducer()},
    "records": {"collect_stats": True},
}


@pytest.mark.parametrize("with_references", [False, True], ids=["batch", "references"])
@pytest.mark.parametrize("name", CALLS)
def test_vjp_and_grad_of_torch_func(name, with_references):
    (x, y), (ref, ref_y) = batch(n=8, dtype=torch.float64), batch(n=6, dtype=torch.float64)
    loss_func = PNPLoss(anneal=0.3, **CALLS[name])
    args = (y, None, ref, ref_y) if with_references else (y,)
    _, want = value_and_grad(loss_func, x, *args)
    value, vjp = torch.func.vjp(lambda x: loss_func(x, *args), x)
    torch.testing.assert_close(vjp(2 * torch.ones_like(value))[0], 2 * want)
    torch.testing.assert_close(torch.func.grad(lambda x: loss_func(x, *args))(x), want)
    copy.deepcopy(loss_func)
    pickle.dumps(loss_func)


@pytest.mark.parametrize("variant", ["Dq", torch.log1p], ids=["Dq", "callable"])
def test_vjp_of_the_functional(variant):
    """Also of one input where the other is a constant."""
    s, own, cotangent = torch.randn(4, 5), torch.ones(4), torch.randn(4)
    y, ref_y = torch.arange(4) % 2, torch.arange(5) % 2

    def call(s=s, own=own):
        return pnp_loss(s, y, ref_y, self_similarity=own, variant=variant, anneal=0.5)[0]

    want = torch.autograd.functional.vjp(call, (s, own), cotangent)[1]
    torch.testing.assert_close(torch.func.vjp(call, s, own)[1](cotangent), want)
    torch.testing.assert_close(torch.func.vjp(call, s)[1](cotangent), want[:1])
    torch.testing.assert_close(torch.func.vjp(lambda x: call(own=x), own)[1](cotangent), want[1:])


def test_second_derivative_where_one_input_is_made_of_the_other():
    s = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    y, ref_y = torch.arange(4) // 2, torch.arange(6) // 3

    def call(s):
        own = 1.5 * s[:, 0] + s.sum(dim=1)
        return pnp_loss(s, y, ref_y, self_similarity=own, variant="Iu", anneal=2)[0]

    assert torch.autograd.gradcheck(call, s) and torch.autograd.gradgradcheck(call, s)
    first = torch.autograd.grad(call(s).sum(), s)[0]
    torch.testing.assert_close(torch.autograd.grad(call(s).sum(), s, create_graph=True)[0], first)


@pytest.mark.parametrize("chunk_size", [None, 9])
def test_threads_that_share_a_loss_record_what_one_of_them_saw(chunk_size):
    loss_func = PNPLoss(collect_stats=True, chunk_size=chunk_size)
    batches = [batch(n=40 + 8 * i) for i in range(4)]

    def step(i):
        found = value_and_grad(loss_func, *batches[i % 4])
        return found, loss_func.negatives_before_positive

    alone = [step(i) for i in range(4)]
    records = {0, *(record for _, record in alone)}  # PML resets them to 0 as a call starts
    with ThreadPoolExecutor(4) as pool:
        for i, (found, record) in enumerate(pool.map(step, range(60))):
            torch.testing.assert_close(found, alone[i % 4][0], rtol=0, atol=0)
            assert record in records


def test_nothing_of_a_call_stays_on_the_loss_but_records():
    loss_func = PNPLoss(collect_stats=True, chunk_size=5)
    before = set(vars(loss_func))
    x, y = batch()
    loss_func(x.requires_grad_(), y).backward()
    records = {"negatives_before_positive", "positives_behind_negatives"}
    assert set(vars(loss_func)) - before <= records
    assert all(type(getattr(loss_func, name)) is float for name in records)


OUTSIDE = [("b", 1e160), ("b", 1e-35), ("anneal", 1e-40), ("anneal", 1e50), ("alpha", 1e39)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "value"), OUTSIDE)
def test_what_float32_cannot_hold_is_refused_with_its_range(name, value, dtype):
    x, y = batch(dtype=dtype)
    message = f"{name} must be from 1e-30 to 1e\\+30 to be computed in float32, got"
    with pytest.raises(ValueError, match=message):
        PNPLoss(**{name: value})(x, y)
    with pytest.raises(ValueError, match=message):
        pnp_loss(x @ x.T, y, **{name: value})
    PNPLoss(**{name: value})(x.double(), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("end", [-1, 1], ids=["smallest", "largest"])
@pytest.mark.parametrize(("name", "variant"), [("alpha", "Dq"), ("b", "Ib")])
def test_values_at_the_ends_of_the_range(name, variant, end, dtype):
    value = RANGES[dtype] ** end
    s = torch.tensor([[0.2, 0.1, 0.3]], dtype=dtype)
    kwargs = {"variant": variant, "include_self": False, "anneal": 0.1, name: value}
    s.requires_grad_()
    loss, _ = pnp_loss(s, torch.zeros(1), torch.tensor([0, 1, 1]), **kwargs)
    (grad,) = torch.autograd.grad(loss, s)
    with mpmath.workdps(700):
        a, n, m = (mpmath.mpf(x) for x in s[0].tolist())

        def exact(a):
            r = sum(1 / (1 + mpmath.exp((a - x) / mpmath.mpf(0.1))) for x in (n, m))
            v = mpmath.mpf(value)
            return 1 - (1 + r) ** -v if name == "alpha" else (v * r - mpmath.log(1 + v * r)) / v**2

        want, slope = exact(a), mpmath.diff(exact, a)
    rel = 1e-4 if dtype == torch.float32 else 1e-10
    assert loss.item() == pytest.approx(float(want), rel=rel, abs=0)
    assert grad[0, 0].item() == pytest.approx(float(slope), rel=rel, abs=1e-300)


@pytest.mark.parametrize("variant", [*VARIANTS, torch.log1p])
@pytest.mark.parametrize("end", [-1, 1])
def test_any_temperature_of_the_range_gives_finite_numbers(variant, end):
    loss_func = PNPLoss(variant=variant, anneal=RANGES[torch.float32] ** end)
    value, grad = value_and_grad(loss_func, *batch())
    assert value.isfinite() and grad.isfinite().all()


def category(x):
    return None if x is None else x.as_subclass(Category)


@pytest.mark.parametrize("kind", ["batch", "references", "tuple", "chunks"])
@pytest.mark.parametrize("which", ["embeddings", "labels", "all"])
def test_subclasses_of_tensors_are_taken_and_the_loss_is_a_plain_tensor(which, kind):
    (x, y), (ref, ref_y) = batch(), batch(n=9)
    triplet = tuple(torch.tensor(i) for i in ([0, 1], [2, 3], [4, 5]))
    args = {"references": (None, ref, ref_y), "tuple": (triplet,)}.get(kind, ())
    loss_func = PNPLoss(chunk_size=5 if kind == "chunks" else None)
    want = value_and_grad(loss_func, x, y, *args)
    v = x.clone().requires_grad_()
    given = category(v) if which != "labels" else v
    labels = category(y) if which != "embeddings" else y
    if which == "all":
        args = [tuple(map(category, a)) if isinstance(a, tuple) else category(a) for a in args]
    loss = loss_func(given, labels, *args)
    assert type(loss) is torch.Tensor
    torch.testing.assert_close((loss.detach(), torch.autograd.grad(loss, v)[0]), want)


def test_subclasses_in_the_functional():
    s, y = torch.randn(6, 6), torch.arange(6) // 2
    losses_, counted = pnp_loss(category(s), category(y))
    assert type(losses_) is torch.Tensor and torch.equal(losses_, pnp_loss(s, y)[0])
    same = y.unsqueeze(1) == y
    masks = {"positive_mask": same, "negative_mask": ~same, "self_similarity": s.diagonal()}
    want, _ = pnp_loss(s, **masks)
    got, _ = pnp_loss(category(s), **{name: category(x) for name, x in masks.items()})
    assert type(got) is torch.Tensor and torch.equal(got, want)


@pytest.mark.parametrize("kind", ["uint16", "float8_e4m3fn"])
@pytest.mark.parametrize("ref_kind", ["uint16", "int64", "float32"])
def test_labels_of_any_two_types_mean_the_same(kind, ref_kind):
    """Those of tests/test_properties.py are without float8."""
    (x, y), (ref, ref_y) = batch(), batch(n=9)
    want = PNPLoss()(x, y, None, ref, ref_y)
    y, ref_y = (t.float().to(getattr(torch, k)) for t, k in ((y, kind), (ref_y, ref_kind)))
    torch.testing.assert_close(PNPLoss()(x, y, None, ref, ref_y), want)
    s = torch.randn(24, 9)
    args = {"self_similarity": torch.randn(24)}
    torch.testing.assert_close(
        pnp_loss(s, y, ref_y, **args)[0], pnp_loss(s, y.float(), ref_y.float(), **args)[0]
    )


CLOSE = torch.tensor([2**24, 2**24 + 1, 2**24, 2**24 + 1])  # two classes, one in float32
LARGE = torch.tensor([2**64 - 1, 2**64 - 1, 5, 5], dtype=torch.uint64)
SIGNED = torch.tensor([-1, -1, 5, 5, 7])
OTHERS = torch.tensor([9, 9, 5, 5])  # which are equal to the same of SIGNED as LARGE


@pytest.mark.parametrize(
    ("labels", "same"),
    [
        ((CLOSE, CLOSE.double()), (CLOSE, CLOSE)),
        ((LARGE, LARGE), (OTHERS, OTHERS)),
        ((LARGE, SIGNED), (OTHERS, SIGNED)),
        ((SIGNED, LARGE), (SIGNED, OTHERS)),
    ],
    ids=["close", "large", "signed references", "signed queries"],
)
def test_integer_labels_that_another_type_cannot_hold_are_told_apart(labels, same):
    x, ref = (torch.randn(len(y), 3) for y in labels)
    got, want = (PNPLoss()(x, y, None, ref, ref_y) for y, ref_y in (labels, same))
    torch.testing.assert_close(got, want)
