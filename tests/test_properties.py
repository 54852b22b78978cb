"""The loss for random input of every kind, against the formula in float64.

`python -m pytest tests/test_properties.py --hypothesis-profile=thorough` tries thousands of
examples of each property. An example draws small numbers and names, and a seed for the rest, so
that it is cheap and short to read.
"""

import contextlib
import os
from types import SimpleNamespace
from unittest import mock

import oracle
import torch
from helpers import DISTANCES, VARIANTS, WHY_NO_TRITON, masks_of
from hypothesis import event, given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import reducers

from pml_pnp import PNPLoss, distances
from pml_pnp.functional import pnp_loss
from pml_pnp.ops import dispatch, eager, product

EXAMPLES = settings.default.max_examples
SEEDS = st.integers(0, 2**32 - 1)
# Most batches are small; some lie on either side of every size at which the operations change.
SIZES = st.sampled_from([*range(13)] * 8 + [*range(13, 41)] + [127, 128, 129, 511, 512, 513, 600])
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# Relative error of a result of this dtype, beside that of the similarities.
EXACT = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1.1e-3, torch.bfloat16: 9e-3}
# Absolute error: below, numbers of the dtype, or those it was computed in, lose their digits.
TINY = {torch.float64: 1e-290, torch.float32: 1e-35, torch.float16: 6e-8, torch.bfloat16: 1e-35}


def assert_near(got, want, rtol, atol=0.0):
    """Compare with float64 values; what overflows the dtype of `got` may be infinite."""
    assert got.shape == want.shape
    largest, got, tiny = 0.99 * torch.finfo(got.dtype).max, got.double(), TINY[got.dtype]
    overflows = (want.abs() > largest) & (got.abs() > largest) & (got.sign() == want.sign())
    error, bound = (got - want).abs(), rtol * want.abs() + atol + tiny
    wrong = ~((error <= bound) | overflows)
    assert not wrong.any(), f"{got[wrong][:5]} instead of {want[wrong][:5]}, {error / bound}"


# --- what examples are made of

CALLABLES = {
    "O": lambda r: r * 1,
    "Iu": lambda r: (1 + r) * torch.log1p(r),
    "Ds": torch.log1p,
    "Dq": lambda r: -torch.expm1(-4 * torch.log1p(r)),
}


class Settings(SimpleNamespace):
    """Hyperparameters; if `is_callable`, the variant is given as a function."""

    def of_loss(self):
        kwargs = dict(vars(self))
        if kwargs.pop("is_callable"):
            kwargs["variant"] = CALLABLES.get(self.variant, self.variant)
        return kwargs

    def of_formula(self):
        kwargs = dict(vars(self))
        if kwargs.pop("is_callable") and self.variant == "Dq":
            kwargs["alpha"] = 4
        return kwargs

    def steepest(self, m):
        kwargs = self.of_formula()
        return oracle.steepest(self.variant, kwargs["alpha"], self.b, m) / self.anneal


SETTINGS = st.builds(
    Settings,
    variant=st.sampled_from(VARIANTS),
    is_callable=st.sampled_from([False, False, False, True]),
    alpha=st.sampled_from([0.5, 1, 4, 8]),
    b=st.sampled_from([0.3, 2, 10]),
    anneal=st.sampled_from([0.01, 0.1, 0.3, 1.0] * 3 + [10.0**e for e in range(-6, 7)]),
    include_self=st.booleans(),
)


class Inside(SimpleNamespace):
    """Sizes and ways of computing, on which no result depends."""

    @contextlib.contextmanager
    def patched(self, n, m, kernel="eager"):
        """Not so small that a large example has hundreds of blocks."""
        tile, entries = max(self.tile, n // 10), n * m // 10
        ranges = eager.LARGEST_RANGE if self.is_ratio else dict.fromkeys(eager.LARGEST_RANGE, -1.0)
        with (
            mock.patch.object(eager, "LARGEST_RANGE", ranges),
            mock.patch.object(eager, "CPU_BLOCK", max(self.block, entries)),
            mock.patch.object(distances, "SELF_SIMILARITY_BLOCK", tile),
            mock.patch.object(product, "CPU_TILE", tile),
            mock.patch.object(product, "REFERENCES_BLOCK", max(self.references, entries)),
            mock.patch.dict(os.environ, {dispatch.KERNEL_VARIABLE: kernel}),
        ):
            yield


INSIDE = st.builds(
    Inside,
    block=st.sampled_from([eager.CPU_BLOCK, 1, 30, 1000]),
    is_ratio=st.booleans(),
    tile=st.sampled_from([product.CPU_TILE, 1, 5]),
    references=st.sampled_from([product.REFERENCES_BLOCK, 1, 30]),
)


def _values():
    """Distinct labels of every dtype, extremes first."""
    values = {torch.bool: torch.tensor([True, False]), torch.uint8: torch.arange(256).byte()}
    for signed in (torch.int8, torch.int16, torch.int32, torch.int64):
        info = torch.iinfo(signed)
        few = [info.min, info.max, 0, -1, info.max - 1, info.min + 1, *range(1, 100)]
        values[signed] = torch.tensor(few, dtype=signed)
        unsigned = getattr(torch, "u" + str(signed).removeprefix("torch."))
        values.setdefault(unsigned, values[signed].view(unsigned))
    for floating in DTYPES:
        few = torch.tensor([-float("inf"), float("inf"), *range(-99, 100)], dtype=floating) / 2
        values[floating] = torch.cat([few, 1 + few.new_tensor([torch.finfo(floating).eps])])
    return values


VALUES = _values()


class Labels(SimpleNamespace):
    """Labels of n queries and m references."""

    def make(self, n, m, generator):
        """Labels, those of references, and which pairs (N, M) are equal; `m` None: the batch."""
        total = n + (m or 0)
        # A large batch of few classes takes hundreds of sigmoids for each similarity.
        classes = max(1, total // min(self.per_class, 1000 if total < 150 else 5))
        ids = torch.randint(0, classes, (total,), generator=generator)
        if self.equal_sizes:
            ids = torch.arange(total) % classes
        tables = [VALUES[self.dtype]] * 2
        if self.ref_dtype is not None and m is not None:  # values that both dtypes have
            small = torch.arange(2 if torch.bool in (self.dtype, self.ref_dtype) else 100)
            tables = [small.to(self.dtype), small.to(self.ref_dtype)]
        ids = ids % len(tables[0])
        ids = [ids[:n], ids[:n].clone() if m is None else ids[n:]]
        made = [_take(*x) for x in zip(tables, ids, strict=True)]
        for i, labels in enumerate(made):
            if self.with_nan and labels.is_floating_point():
                labels[1::3] = float("nan")
                ids[i][1::3] = -1 - i  # equal to nothing
        return *made, ids[0].unsqueeze(1) == ids[1]


def _take(table, ids):
    """table[ids], also for unsigned types, which cannot be indexed."""
    if table.is_floating_point() or table.dtype in (torch.bool, torch.uint8):
        return table[ids]
    signed = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[table.itemsize]
    return table.view(signed)[ids].view(table.dtype)


LABELS = st.builds(
    Labels,
    per_class=st.sampled_from([2, 4, 3, 1, 8, 30, 1000]),
    equal_sizes=st.booleans(),
    dtype=st.sampled_from([torch.int64, torch.int64, *VALUES]),
    ref_dtype=st.sampled_from([None, None, *VALUES]),
    with_nan=st.booleans(),
)


# --- the loss of a similarity matrix, which is given without rounding


MATRICES = st.builds(
    SimpleNamespace,
    n=SIZES,
    m=SIZES,
    by=st.sampled_from(["batch", "references", "masks"]),
    labels=LABELS,
    spread=st.sampled_from([0.3, 0.01, 1.0, 100.0, 1e15]),
    with_ties=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    is_inverted=st.booleans(),
    with_own=st.booleans(),
    settings=SETTINGS,
    inside=INSIDE,
    with_triton=st.sampled_from([False] * 9 + [True]),
    seed=SEEDS,
)


@settings(max_examples=EXAMPLES * 4)
@given(MATRICES)
def test_losses_and_gradients_of_a_matrix_are_the_formula(case):
    g = torch.Generator().manual_seed(case.seed)
    n, m = case.n, case.n if case.by == "batch" else case.m
    s = torch.randn(n, m, generator=g)
    if case.with_ties:
        s = s.round()
    s = (s * min(case.spread, 1e3 if case.dtype == torch.float16 else 1e15)).to(case.dtype)
    own, cotangent = s.new_empty(n), s.new_empty(n)
    for x in (own, cotangent):
        x.normal_(generator=g)
    own = own * min(case.spread, 1e3)
    if case.by == "masks":
        positive = torch.rand(n, m, generator=g) < 1 / min(case.labels.per_class, max(1, m / 4))
        negative = torch.rand(n, m, generator=g) < 0.6  # some are both, some neither
        args = {"positive_mask": positive, "negative_mask": negative}
    else:
        labels, ref_labels, positive = case.labels.make(n, None if case.by == "batch" else m, g)
        negative = ~positive
        args = {"labels": labels}
        if case.by == "batch":
            positive, negative = (x.clone().fill_diagonal_(False) for x in (positive, negative))
        else:
            args["ref_labels"] = ref_labels
    has_own = case.by != "batch" or case.with_own
    s.requires_grad_(), own.requires_grad_()
    wide, wide_own = (x.detach().double().requires_grad_() for x in (s, own))
    k = 1 if case.is_inverted else -1
    want, want_counted = oracle.pnp_losses(
        wide, positive, negative, wide_own if has_own else wide.diagonal(), k=k,
        **case.settings.of_formula(),
    )  # fmt: skip
    with_triton = case.with_triton and s.dtype != torch.float64 and s.numel() < 200
    with_triton = with_triton and not WHY_NO_TRITON
    with case.inside.patched(n, m, "triton" if with_triton else "eager"):
        losses_, counted = pnp_loss(
            s, **args, self_similarity=own if has_own else None, is_inverted=case.is_inverted,
            **case.settings.of_loss(),
        )  # fmt: skip
        of_s, of_own = torch.autograd.grad(losses_, (s, own), cotangent, materialize_grads=True)
    assert losses_.dtype == case.dtype and torch.equal(counted, want_counted)
    assert_near(losses_.detach(), want.detach(), EXACT[case.dtype])
    want_s, want_own = torch.autograd.grad(
        want, (wide, wide_own), cotangent.double(), materialize_grads=True
    )
    # A sigmoid near 1 has a derivative, y (1 - y), with the absolute error of y.
    eps = torch.finfo(torch.promote_types(case.dtype, torch.float32)).eps
    floor = 4 * eps * max(1, m) * case.settings.steepest(m) * cotangent.abs().double()
    row = want_s.abs().amax(dim=1, keepdim=True) if m else 0
    assert_near(of_s, want_s, EXACT[case.dtype], floor.unsqueeze(1) + EXACT[case.dtype] * row)
    if has_own and case.settings.include_self:
        assert_near(of_own, want_own, EXACT[case.dtype], floor)


# --- PNPLoss


class Tuple(SimpleNamespace):
    """`indices_tuple`: random indices, also repeated ones and pairs of a row with itself."""

    def make(self, n, m, generator):
        a, b = self.length, self.other_length
        sizes, lengths = ([n, m, n, m], [a, a, b, b]) if self.is_pairs else ([n, m, m], [a, a, a])
        if n * m == 0 or sum(lengths) == 0:
            return [torch.tensor([])] * len(sizes)  # float32, as some miners return it
        made = []
        for size, length, dtype in zip(sizes, lengths, self.dtypes, strict=False):
            fits = size - 1 <= torch.iinfo(dtype).max
            indices = torch.randint(0, size, (length,), generator=generator)
            made.append(indices.to(dtype if fits else torch.int64))
        if self.is_strided:
            made = [torch.stack([i, i], dim=1)[:, 0] for i in made]
        return tuple(made)


INDEX_DTYPES = [d for d in VALUES if not d.is_floating_point and d != torch.bool]
TUPLES = st.builds(
    Tuple,
    is_pairs=st.booleans(),
    length=st.sampled_from([5, 0, 1, 20, 100]),
    other_length=st.sampled_from([5, 0, 1, 20, 100]),
    dtypes=st.lists(st.sampled_from([torch.int64, *INDEX_DTYPES]), min_size=4, max_size=4),
    is_strided=st.booleans(),
    with_labels=st.booleans(),
)
# The shape of a leaf, and how embeddings (n, 8) are made of it.
LAYOUTS = {
    "contiguous": (lambda n: (n, 8), lambda x, n: x),
    "transposed": (lambda n: (8, n), lambda x, n: x.T),
    "strided": (lambda n: (n, 16), lambda x, n: x[:, ::2]),
    "expanded": (lambda n: (1, 8), lambda x, n: x.expand(n, -1)),
    "of a graph": (lambda n: (n, 8), lambda x, n: x * 2),
}
REDUCERS = {
    "mean": reducers.MeanReducer,
    "mean of elements": lambda: reducers.MeanReducer(collect_stats=True),
    "sum": reducers.SumReducer,
    "divisor": reducers.DivisorReducer,
    "per anchor": reducers.PerAnchorReducer,
    "nothing": reducers.DoNothingReducer,
}
PRODUCTS = "cosine", "batched cosine", "dot", "user's own, learning"


class Call(SimpleNamespace):
    """Arguments of a call, and of the loss."""

    def arguments(self):
        """Leaves, a function of leaves that makes the arguments of a call, and the two masks."""
        g = torch.Generator().manual_seed(self.seed)
        n, has_others = self.n, self.references == "others"
        m = self.m if has_others else n
        labels, ref_labels, equal = self.labels.make(n, m if has_others else None, g)
        shapes = LAYOUTS[self.layout][0](n), LAYOUTS[self.ref_layout][0](m)
        leaf, other = (self.scale * (torch.randn(s, generator=g) + 0.5) for s in shapes)
        rows = leaf.T if self.layout == "transposed" else leaf
        if self.rows == "equal":
            rows[1:2] = rows[:1].clone()
        elif self.distance != "snr":  # which divides by the variance of a row
            rows[:1] *= {"zero": 0.0, "tiny": 1e-30}.get(self.rows, 1)
        leaves = [leaf.to(self.dtype), other.to(self.ref_dtype or self.dtype)]
        if self.references == "reversed":
            flipped = torch.arange(n - 1, -1, -1)
            ref_labels, equal = _take(labels, flipped), equal[:, flipped]
        if self.references == "batch":
            ref_labels = labels
        indices = None
        if self.indices is not None:
            indices = self.indices.make(n, m, g)
            if not self.indices.with_labels:
                labels = ref_labels = None
        is_own = self.references in ("none", "batch") or (
            self.references == "batch with other labels" and labels is None
        )

        def make(leaf, other):
            x = LAYOUTS[self.layout][1](leaf, n)
            references = {
                "none": lambda: None,
                "reversed": lambda: x.flip(0),
                "others": lambda: LAYOUTS[self.ref_layout][1](other, m),
            }.get(self.references, lambda: x)()
            return x, labels, indices, references, ref_labels if references is not None else None

        masks = [equal, ~equal]
        if indices is not None:
            masks = masks_of((n, m), indices_tuple=[i.long() for i in indices])
        if is_own:
            masks = [mask.clone().fill_diagonal_(False) for mask in masks]
        return leaves, make, masks

    def loss_func(self):
        torch.default_generator.manual_seed(self.seed)
        return PNPLoss(
            distance=DISTANCES[self.distance](),
            reducer=REDUCERS[self.reducer](),
            chunk_size=self.chunk_size,
            collect_stats=self.collect_stats,
            **self.settings.of_loss(),
        )


CALLS = st.builds(
    Call,
    n=SIZES,
    m=SIZES,
    references=st.sampled_from(
        ["none"] * 4 + ["others"] * 3 + ["batch", "batch with other labels", "reversed"]
    ),
    ref_layout=st.sampled_from([*LAYOUTS]),
    ref_dtype=st.sampled_from([None, None, *DTYPES]),
    labels=LABELS,
    indices=st.one_of(st.none(), TUPLES),
    layout=st.sampled_from([*LAYOUTS]),
    dtype=st.sampled_from([torch.float64, *DTYPES]),
    scale=st.sampled_from([1.0, 0.01, 100.0]),
    rows=st.sampled_from(["random"] * 4 + ["equal", "zero", "tiny"]),
    distance=st.sampled_from(["cosine"] * 4 + ["dot"] * 2 + [*DISTANCES]),
    reducer=st.sampled_from(["mean"] * 4 + [*REDUCERS]),
    chunk_size=st.sampled_from([None, None, None, 1, 2, 5, 30, 128, 700]),
    collect_stats=st.booleans(),
    threads=st.sampled_from([1, 2]),
    settings=SETTINGS,
    inside=INSIDE,
    seed=SEEDS,
)


def rounding(name, s, x, z, eps):
    """Error of similarities that are computed with this epsilon, and how steep they are."""
    lengths = [v.norm(dim=1).clamp(min=1e-12) for v in (x, z)]
    steep = 2 / min([1.0, *(float(v.min()) for v in lengths if len(v))])
    longest = max([1.0, *(float(v.max()) for v in lengths if len(v))])
    largest = float(s.abs().max()) if s.numel() else 0
    error = 50 * eps * {"cosine": 1, "batched cosine": 1}.get(name, max(1.0, largest, longest**2))
    if name in ("lp", "batched lp", "lp squared, not normalized"):
        error += 1e-7 * max(1.0, largest)  # |x|^2 + |z|^2 - 2 x z cancels
    if name == "snr":
        return error * 100, steep * 100 * max(1.0, largest)
    return error, steep * longest * (1 if name in ("cosine", "batched cosine") else 4)


@settings(max_examples=EXAMPLES * 4)
@given(CALLS)
def test_value_and_gradients_of_the_loss_are_the_formula(case):
    leaves, make, (positive, negative) = case.arguments()
    name, dtype = case.distance, torch.promote_types(case.dtype, torch.float32)
    n, m = positive.shape
    is_product, eps = name in PRODUCTS, torch.finfo(dtype).eps
    if dtype != torch.float64 and not is_product and max(n, m) > 25:
        return  # torch.cdist then has half of the digits
    leaves = [x.requires_grad_() for x in leaves]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    loss_func = case.loss_func()
    distance = getattr(loss_func.distance, "distance", loss_func.distance)
    x, _, _, z, _ = make(*wide)
    s = distance(x, x if z is None else z)
    want, counted = oracle.pnp_losses(
        s, positive, negative, distance(x, x).diagonal(), k=1 if distance.is_inverted else -1,
        **case.settings.of_formula(),
    )  # fmt: skip
    want = want[counted]
    torch.set_num_threads(case.threads)
    with case.inside.patched(n, m):
        got = loss_func(*make(*leaves))
        cotangent = torch.rand(len(want), generator=torch.Generator().manual_seed(case.seed))
        if case.reducer == "nothing":
            got = got["loss"]["losses"]
            assert (len(want) == 0 and got == 0) or got.dtype == dtype
            got, want = (got * cotangent).sum(), (want * cotangent).sum()
        else:
            want = want.sum() if case.reducer == "sum" else want.sum() / max(1, len(want))
            assert got.dtype == case.dtype
        grads = torch.autograd.grad(got, leaves, allow_unused=True)
    torch.set_num_threads(1)
    assert got.isfinite()
    is_expanded = "expanded" in (case.layout, case.ref_layout)
    is_added_up = is_expanded or case.references in ("batch with other labels", "reversed")
    for g in grads:
        # A half overflows to infinity, and the sum of two of them is NaN.
        if g is not None and not (g.itemsize == 2 and is_added_up):
            assert not g.isnan().any()
    error, steep = rounding(name, s.detach(), x.detach(), (x if z is None else z).detach(), eps)
    relative = error / case.settings.anneal
    if relative > 0.02:
        event("too cold for this dtype")
        return
    assert_near(got.detach(), want.detach(), EXACT[got.dtype] + 3 * relative)
    if "lp" in name and (is_expanded or case.rows != "random"):
        return  # at a distance of zero it has no slope
    wanted = torch.autograd.grad(want, [s, *wide], allow_unused=True)
    of_s = wanted[0].abs() if wanted[0] is not None else torch.zeros(n, m)
    # What is added up in the gradient of a row, where it may cancel.
    added = max(float(of_s.sum(dim=i).max()) if n * m else 0.0 for i in (0, 1)) * steep
    added *= max(n, m) if is_expanded else 1
    floor = 32 * eps * case.settings.steepest(m) * max(n, m) ** 2 * steep
    for g, w, leaf in zip(grads, wanted[1:], leaves, strict=True):
        if w is None or g is None:
            assert (w is None or w.eq(0).all()) and (g is None or g.eq(0).all())
            continue
        # An expanded leaf adds up rows that are rounded to its own dtype.
        exact = EXACT[leaf.dtype] if is_expanded else EXACT[dtype]
        atol = (exact + 30 * relative) * added + floor
        assert_near(g, w, EXACT[leaf.dtype], atol)
