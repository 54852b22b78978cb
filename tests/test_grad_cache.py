"""GradCache against the plain model on the whole batch."""

import copy
import inspect
import pickle
import random
import sys
import weakref
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import MutableMapping
from contextlib import nullcontext
from functools import partial
from itertools import count

import numpy as np
import pytest
import torch
from helpers import DEVICE, IS_TORCH_2_4
from torch import nn

from pml_pnp import GradCache, PNPLoss, passes


def conv_net():
    """No layer mixes examples."""
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(inplace=True)
    layers += nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 5)
    return nn.Sequential(*layers).to(DEVICE, torch.float64)


def images(n=23):
    return torch.randn(n, 2, 4, 4, dtype=torch.float64, device=DEVICE)


def batchnorm_net():
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)
    return nn.Sequential(*layers).to(DEVICE, torch.float64)


def rows_seen(model):
    """A list that grows by the number of rows of every call of a model."""
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return seen


def gradients(model, output, *inputs, cotangent=None):
    """Of a random linear function of the output, with respect to parameters and inputs."""
    if cotangent is None:
        torch.manual_seed(7)
        cotangent = torch.randn_like(output)
    wanted = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad((output * cotangent).sum(), [*wanted, *inputs], allow_unused=True)


# --- values, gradients, memory


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("n", "chunk_size", "sizes"),
    [
        *((23, 1, [1] * 23), (23, 22, [11, 12]), (65, 64, [32, 33]), (23, 4, [3, *[4] * 5])),
        *((4, 4, [4]), (3, 9, [3]), (0, 4, [0])),
    ],
)
def test_value_and_gradients_are_those_of_the_whole_batch(n, chunk_size, sizes, frozen):
    """Chunks are of nearly equal size; a single one is embedded once."""
    model, x = conv_net(), images(n).requires_grad_()
    model[0].requires_grad_(not frozen)
    expected = model(x)
    wanted = gradients(model, expected, x)
    assert n == 0 or all(g.abs().max() > 1e-3 for g in wanted)
    seen = rows_seen(model)
    result = GradCache(model, chunk_size)(x)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(gradients(model, result, x), wanted)
    assert seen == sizes + (sizes[::-1] if len(sizes) > 1 else [])


def test_mixed_precision_takes_the_same_steps():
    models = [conv_net().float()]
    models.append(GradCache(copy.deepcopy(models[0]), 6))
    batches = [images().float() for _ in range(3)]
    labels = torch.arange(23, device=DEVICE) // 3
    loss_func = PNPLoss(variant="Ds", anneal=0.3)
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**6)
        for x in batches:
            optimizer.zero_grad()
            with torch.autocast(DEVICE.type, torch.float16):
                loss = loss_func(model(x), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**6  # no step was skipped
    torch.testing.assert_close(*(m.state_dict() for m in models), rtol=2e-2, atol=2e-3)


class RowsAlive:
    """Rows of tensors that are still in memory, one number after each new tensor."""

    def __init__(self):
        self.now, self.seen = [], []

    def add(self, tensor):
        self.now.append(len(tensor))
        self.seen.append(sum(self.now))
        weakref.finalize(tensor.untyped_storage(), self.now.remove, len(tensor))


def test_only_one_chunk_of_activations_is_alive_at_a_time():
    for chunk_size in (8, 64):
        model, rows = conv_net(), RowsAlive()
        model[0].register_forward_hook(lambda _, args, output, rows=rows: rows.add(output))
        GradCache(model, chunk_size)(images(64)).square().sum().backward()
        assert max(rows.seen) == chunk_size


def test_an_output_that_is_a_view_does_not_keep_its_base_alive():
    class FirstToken(nn.Module):
        def forward(self, x):
            hidden = x @ x.new_ones(3, 100)
            rows.add(hidden)
            return hidden[:, 0]

    x, rows = torch.randn(12, 7, 3, requires_grad=True), RowsAlive()
    z = GradCache(FirstToken(), 4)(x)
    assert rows.seen == [4, 4, 4]
    torch.testing.assert_close(z, x.sum(2)[:, :1].expand(12, 100))


def test_second_derivatives():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    cached = GradCache(model, 2)
    assert torch.autograd.gradcheck(cached, x)
    assert torch.autograd.gradgradcheck(cached, x)


def test_weights_that_are_no_parameters_get_gradients():
    model, x = nn.Sequential(nn.Tanh()), torch.randn(8, 3)
    weight = torch.randn(3, 2, requires_grad=True)
    model.register_forward_pre_hook(lambda _, args: (args[0] @ weight,))
    seen = rows_seen(model)
    GradCache(model, 4)(x).sum().backward()
    assert seen == [4, 4, 4, 4]
    expected = torch.autograd.grad(torch.tanh(x @ weight).sum(), weight)[0]
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, nullcontext])
def test_without_gradients_the_batch_is_embedded_once_in_chunks(context):
    """Also if nothing requires them."""
    model, x = conv_net().eval().requires_grad_(context != nullcontext), images()
    seen = rows_seen(model)
    with context():
        z = GradCache(model, 6)(x)
    assert seen == [5, 6, 6, 6] and not z.requires_grad
    torch.testing.assert_close(z, model(x).detach())


# --- what a forward pass leaves behind, and what may happen before the second one


def in_turn(model, x, chunks):
    """The plain model on one chunk after the other."""
    return torch.cat([model(chunk) for chunk in x.chunk(chunks)])


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager")


WRAPPED = {
    "eager": lambda model: GradCache(model, 6),
    "twice": lambda model: GradCache(GradCache(model, 6), 12),
    "compiled inside": lambda model: GradCache(compiled(model), 6),
    "compiled outside": lambda model: compiled(GradCache(model, 6)),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_batchnorm_is_as_if_called_on_the_chunks_in_turn(name):
    if "compiled" in name and IS_TORCH_2_4:
        pytest.skip("torch 2.4 cannot compile with GradCache")
    model, x = batchnorm_net(), images(24)
    plain, cached = copy.deepcopy(model), WRAPPED[name](model)
    for _ in range(2):
        z, expected = cached(x), in_turn(plain, x, 4)
        torch.testing.assert_close(z, expected)
        torch.testing.assert_close(gradients(model, z), gradients(plain, expected))
    torch.testing.assert_close(model.state_dict(), plain.state_dict())
    assert model[1].num_batches_tracked == 8
    cached.eval()(x).sum().backward()
    torch.testing.assert_close(model.state_dict(), plain.state_dict())


class Stateful(nn.Module):
    """Multiplies what `state` makes of the module and its input by a weight."""

    def __init__(self, state):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))
        self.register_buffer("buffer", torch.zeros(3))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.norm = nn.BatchNorm1d(3)
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
        self.state = state
        self.calls, self.generator, self.numpy = 0, torch.Generator(), np.random.default_rng(0)
        self.double().to(DEVICE)
        self.register_buffer("shared", torch.zeros((), device=DEVICE))
        self.norm.register_buffer("shared", self.shared)  # a buffer of two modules

    def forward(self, x):
        return self.state(self, x) @ self.weight


def rows(n):
    return torch.randn(n, 3, dtype=torch.float64, device=DEVICE)


def count_calls(m, x):
    m.calls += 1
    return x * m.calls


def draw(draw_rows):
    """Multiply by one random number per row."""
    return lambda m, x: x * torch.as_tensor(draw_rows(m, len(x)), dtype=x.dtype).to(x)[:, None]


def update_in_place(name, through_data):
    def state(m, x):
        tensor = getattr(m, name)
        with torch.no_grad():
            (tensor.data if through_data else tensor).mul_(0.5).add_(x.mean(0))
        return x - getattr(m, name)

    return state


def grow(m, x):
    m.buffer.data = torch.cat([m.buffer, x.detach().mean(0)])
    return x - len(m.buffer) * m.buffer[-3:]


def replace_buffer(m, x):
    m.buffer = 0.5 * m.buffer + x.detach().mean(0)
    return x - m.buffer


def update_or_register(m, x):
    mean = x.detach().mean(0)
    if getattr(m, "late", None) is None:
        m.register_buffer("late", mean)
    return x - m.late.mul_(0.5).add_(mean)


def count_in_two_modules(m, x):
    m.shared += 1
    m.norm.shared += 1
    return x * m.shared.clone()  # which the next chunk changes


def checkpointed(m, x, use_reentrant=False):
    def part(x):
        return nn.functional.dropout(x * m.weight.sum(1), 0.3)

    return torch.utils.checkpoint.checkpoint(part, x, use_reentrant=use_reentrant)


def renormalize(m, x):
    """Batch Renormalization, without its bounds."""
    mean = m.norm.running_mean.clone()
    return m.norm(x) * x.detach().std() - mean


REPEATED = {
    "torch.random": draw(lambda m, n: torch.rand(n, device=DEVICE)),
    "random": draw(lambda m, n: [random.random() for _ in range(n)]),
    "numpy.random": draw(lambda m, n: np.random.rand(n)),
    "buffer": update_in_place("buffer", through_data=False),
    "buffer.data": update_in_place("buffer", through_data=True),
    "a longer buffer": grow,
    "another buffer": replace_buffer,
    "a buffer of two modules": count_in_two_modules,
    "a buffer that was not there": update_or_register,
    "frozen parameter.data": update_in_place("frozen", through_data=True),
    "statistics of BatchNorm": renormalize,
    "statistics that the first chunk skips": lambda m, x: m.norm(x) if x[0, 0] > 0 else 2 * x,
    "spectral normalization": lambda m, x: m.spectral(x),
    "checkpoint": checkpointed,
    "reentrant checkpoint": partial(checkpointed, use_reentrant=True),
}


@pytest.mark.parametrize("state", REPEATED)
def test_what_a_second_pass_repeats(state):
    """Also when the model has embedded another batch before the first of two backward passes."""

    def seed(number):
        random.seed(number), np.random.seed(number), torch.manual_seed(number)

    model = Stateful(REPEATED[state])
    plain = copy.deepcopy(model)
    batches = torch.randn(2, 12, 3, dtype=torch.float64, device=DEVICE)
    batches[:, ::4, 0] = torch.tensor([-1.0, 1.0, 1.0])  # the first rows of the chunks
    inputs = [batches.clone().requires_grad_() for _ in range(2)]
    results = []
    forwards = GradCache(model, 4), lambda x: in_turn(plain, x, 3)
    for forward, x in zip(forwards, inputs, strict=True):
        seed(0)
        results.append(torch.cat([forward(batch) for batch in x]))
    torch.testing.assert_close(*results)

    def backward(i):
        weight, x = (model, plain)[i].weight, inputs[i]
        weight.grad = x.grad = None
        results[i].square().sum().backward(retain_graph=True)
        return weight.grad, x.grad

    expected = backward(1)
    seed(1)
    for _ in range(2):
        torch.testing.assert_close(found := backward(0), expected)
    assert not torch.allclose(found[1], 0 * found[1])
    # A second pass leaves no trace.
    torch.testing.assert_close(model.state_dict(), plain.state_dict())
    drawn = random.random(), np.random.rand(), torch.rand(1, device=DEVICE).item()
    seed(1)
    assert drawn == (random.random(), np.random.rand(), torch.rand(1, device=DEVICE).item())


def test_numpy_is_not_loaded(monkeypatch):
    monkeypatch.delitem(sys.modules, "numpy.random")
    GradCache(conv_net(), 6)(images()).sum().backward()
    assert "numpy.random" not in sys.modules


NOTICED = {
    "torch.Generator": draw(lambda m, n: torch.rand(n, generator=m.generator)),
    "numpy.random.Generator": draw(lambda m, n: m.numpy.random(n)),
    "attribute": count_calls,
}


@pytest.mark.parametrize("state", NOTICED)
def test_what_a_second_pass_cannot_repeat_is_an_error(state):
    model = Stateful(NOTICED[state])
    z = GradCache(model, 4)(rows(12))
    message = "(?s)called Stateful again in the backward pass.* rows 8 to 11.*usual reasons are"
    with pytest.raises(RuntimeError, match=message):
        z.square().sum().backward()
    assert model.weight.grad is None  # nothing wrong was added to it


MODE = "(?s)Sequential again .* the training mode or settings"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: nn.init.zeros_(m[4].weight), "a parameter of Sequential has changed since"),
        (lambda m: m[4].weight.data.add_(0.1), MODE),
        (lambda m: m.eval(), MODE),
        (None, MODE),
    ],
    ids=["in place", "through .data", "mode", "functional_call"],
)
def test_what_changes_between_the_passes_is_an_error(change, message):
    model = batchnorm_net()
    given = {} if change else {name: 2 * p for name, p in model.named_parameters()}
    z = torch.func.functional_call(GradCache(model, 6), given, images(24))
    if change:
        change(model)
    with pytest.raises(RuntimeError, match=message):
        z.square().sum().backward()


AMOUNTS = {  # a relative difference that passes as rounding, and one that does not
    "float64": (torch.float64, None, 1e-9, 1e-6),
    "float32": (torch.float32, None, 1e-4, 5e-3 if DEVICE.type == "cpu" else 1e-1),  # TF32
    "float16": (torch.float16, None, 1e-2, 1e-1),
    "bfloat16": (torch.bfloat16, None, 2e-2, 3e-1),
    "autocast": (torch.float32, torch.bfloat16, 2e-2, 3e-1),
}


@pytest.mark.parametrize("case", AMOUNTS)
@pytest.mark.parametrize("refused", [False, True])
def test_rounding_is_no_difference(case, refused):
    """One of all elements differs; NaN, as an overflow gives it, equals itself."""
    dtype, autocast, *amounts = AMOUNTS[case]

    def rounded(_, args, z):
        z = z.float() if autocast else z
        amount = torch.zeros_like(z)
        amount[1, 2] = amounts[refused] * (next(calls) > 2)
        return z + z.detach().abs().mean() * amount + args[0].mean(1, keepdim=True)

    model, calls = nn.Linear(5, 4).to(DEVICE, dtype), count(1)
    model.register_forward_hook(rounded)
    x = torch.randn(8, 5, dtype=dtype, device=DEVICE)
    if not refused:
        x[0, 0] = float("nan")
    with torch.autocast(DEVICE.type, dtype=autocast, enabled=autocast is not None):
        z = GradCache(model, 4)(x)
    error = pytest.raises(RuntimeError, match="Mismatched elements: 1 / 16")
    with error if refused else nullcontext():
        z.sum().backward()


OTHERS = {  # outputs of the n-th call
    "without gradients": (
        lambda n, x, z: {"z": z, "target": x * n, "count": x.argmax(1)},
        r"output\['target'\]: Tensor-likes",
    ),
    "other keys": (
        lambda n, x, z: {"z" if n <= 2 else "z1": z},
        r"Expected \[\"output\['z'\]\"\], got .*'z1'",
    ),
    "shape": (lambda n, x, z: {"z": z if n <= 2 else z[:1]}, "shape"),
}


@pytest.mark.parametrize(("form", "message"), OTHERS.values(), ids=OTHERS)
def test_other_outputs_in_the_second_pass_are_an_error(form, message):
    model, calls = nn.Linear(3, 2), count(1)
    model.register_forward_hook(lambda _, args, z: form(next(calls), *args, z))
    z = GradCache(model, 4)(torch.randn(8, 3))["z"]
    with pytest.raises(RuntimeError, match=message):
        z.sum().backward()


def test_a_table_is_copied_only_if_it_changes(monkeypatch):
    monkeypatch.setattr(passes, "BYTES_COPIED", 4000)
    model = Stateful(lambda m, x: x + m.buffer)
    model.register_buffer("small", torch.zeros(100))
    model.register_buffer("table", torch.zeros(500, dtype=torch.float64))
    copied, clone = [], torch.Tensor.clone
    monkeypatch.setattr(
        torch.Tensor, "clone", lambda t, **kwargs: copied.append(t.numel()) or clone(t, **kwargs)
    )
    GradCache(model, 2)(rows(40)).sum().backward()
    assert copied.count(100) == 1 and copied.count(500) == 0


def test_deterministic_algorithms_have_to_repeat_every_bit():
    model = Stateful(lambda m, x: x + 1e-12 * count_calls(m, x))
    z = GradCache(model, 4)(rows(8))
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="returned something else"):
            z.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("size", [10, 500])
def test_a_large_buffer_that_changes_is_right_or_an_error(monkeypatch, size):
    monkeypatch.setattr(passes, "BYTES_COPIED", 4000)

    def state(m, x):
        m.buffer.mul_(0.5).add_(x.detach().mean())
        return x - m.buffer[:3]

    model = Stateful(state)
    model.buffer = torch.zeros(size, dtype=torch.float64, device=DEVICE)
    z = GradCache(model, 4)(rows(8))
    with pytest.raises(RuntimeError, match="rows 0 to 3") if size == 500 else nullcontext():
        z.sum().backward()


def keep_in_attributes(layer, _, y):
    layer.penalty, layer.by_name, layer.logged = y.square().sum(), {"mean": y.mean()}, y.detach()


def test_a_tensor_of_the_graph_in_an_attribute_gets_a_warning():
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(8, 3)
    model[0].register_forward_hook(keep_in_attributes)
    for _ in range(2):  # also if there was one before
        with pytest.warns(UserWarning, match=r"Sequential keeps .* \(0.penalty, 0.by_name\)"):
            GradCache(model, 4)(x)
    GradCache(model, 8)(x)
    with torch.no_grad():
        GradCache(model, 4)(x)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weights_that_hooks_compute_get_no_warning():
    for norm in (nn.utils.weight_norm, nn.utils.spectral_norm):
        model = nn.Sequential(norm(nn.Linear(3, 2)), nn.Tanh())
        GradCache(model, 4)(torch.randn(8, 3)).sum().backward()


def test_uninitialized_layers():
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.LazyLinear(2)).double()
    model[0].unused = nn.LazyBatchNorm1d()
    x = torch.randn(12, 3, dtype=torch.float64)
    z = GradCache(model, 4)(x)
    assert model[1].num_batches_tracked == 3
    del model[0].unused
    torch.testing.assert_close(gradients(model, z), gradients(model, in_turn(model, x, 3)))


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_torchscript_model_is_not_trained():
    model, x = torch.jit.script(nn.Linear(3, 4)), torch.randn(12, 3)
    with pytest.raises(TypeError, match="cannot train a TorchScript module"):
        GradCache(model, 5)(x)
    with torch.no_grad():
        torch.testing.assert_close(GradCache(model, 5)(x), model(x))
    frozen = torch.jit.script(nn.Linear(3, 4).requires_grad_(False))
    model = nn.Sequential(frozen, nn.Linear(4, 2))
    result, expected = (gradients(model, f(x)) for f in (GradCache(model, 5), model))
    torch.testing.assert_close(result, expected)


def test_a_parameter_that_the_forward_pass_renormalizes():
    model = nn.Embedding(10, 4, max_norm=0.5)
    GradCache(model, 3)(torch.arange(10)).square().sum().backward()
    torch.testing.assert_close(model.weight.grad, 2 * model.weight.detach())


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_model_that_changes_its_input_is_an_error(requires_grad):
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2))
    x = torch.randn(8, 3, requires_grad=requires_grad) * 1
    with pytest.raises(RuntimeError, match="Sequential changes its input in place"):
        GradCache(model, 4)(x)


def test_hooks_of_the_wrapper_run_once_a_batch():
    model, calls = conv_net(), []
    cached = GradCache(model, 6)
    cached.register_forward_hook(lambda _, args, output: calls.append(output.shape))
    cached.register_full_backward_hook(lambda _, grad_in, grad_out: calls.append(grad_out[0].shape))
    cached(images().requires_grad_()).sum().backward()
    assert calls == [(23, 5), (23, 5)]


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float32, torch.float16),
        (torch.float32, torch.bfloat16),
        *((dtype, None) for dtype in (torch.float16, torch.bfloat16, torch.float32)),
    ],
)
def test_lower_precision_is_as_accurate_as_on_the_whole_batch(dtype, autocast):
    """Largest relative error of a gradient."""
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(64, 5), nn.Tanh()
    exact, x = nn.Sequential(*layers).to(DEVICE, torch.float64), images(256)
    model = copy.deepcopy(exact).to(dtype)
    wanted, errors = gradients(exact, exact(x), cotangent=1), []
    for chunk_size in (256, 2 if autocast else 64):
        with torch.autocast(DEVICE.type, autocast, enabled=autocast is not None):
            z = GradCache(model, chunk_size)(x.to(dtype))
        pairs = zip(gradients(model, z, cotangent=1), wanted, strict=True)
        errors.append(max(float((g - w).norm() / w.norm()) for g, w in pairs))
    whole, chunks = errors
    assert (1e-5 if autocast else 1e-9) < chunks < (1.5 if autocast else 2) * whole


# --- forms of inputs and outputs


class Encoder(nn.Module):
    """Takes tokens and mask as Hugging Face's models do, and returns any form."""

    def __init__(self, form=lambda hidden, mask: hidden[:, 0]):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.form = form

    def forward(self, input_ids, attention_mask=None, *, scale=1.0, name=None):
        assert name in (None, "a")
        hidden = self.embedding(input_ids) * attention_mask.unsqueeze(2) * scale
        return self.form(hidden, attention_mask)


def tokens(n=10):
    return {
        "input_ids": torch.randint(0, 11, (n, 5)),
        "attention_mask": (torch.rand(n, 5) < 0.7).float(),
    }


@pytest.mark.parametrize("positional", [0, 1, 2])
@pytest.mark.parametrize("others", [{}, {"scale": torch.tensor(2.0), "name": "a"}])
def test_forms_of_inputs(positional, others):
    model, batch = Encoder(), tokens()
    args = [batch.pop(name) for name in list(batch)[:positional]]
    expected, result = (m(*args, **batch, **others) for m in (model, GradCache(model, 3)))
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(gradients(model, result), gradients(model, expected))


Pair = namedtuple("Pair", "hidden mask")


class BatchEncoding(UserDict):
    """As Hugging Face's: a UserDict with attributes of its own."""

    def __init__(self, **items):
        super().__init__(items)
        self.encodings = "kept"


class ModelOutput(OrderedDict):
    """As Hugging Face's: an OrderedDict whose entries are attributes too."""

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        object.__setattr__(self, key, value)


class AttrDict(dict):
    """Every item is an attribute too."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class WithAttributes(dict):
    """The items that it is made with are attributes too."""

    def __init__(self, **items):
        super().__init__(items)
        self.__dict__.update(items)


class Mapping(UserDict):
    """A shallow copy shares the items."""

    def __copy__(self):
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied


class Uncopied(UserDict):
    def __copy__(self):
        return self


FORMS = {
    "tuple": lambda h, m: (h, m),
    "list": lambda h, m: [h, m],
    "namedtuple": Pair,
    "dict": lambda h, m: {"hidden": h, "mask": m},
    "nested": lambda h, m: {"states": (h, [m, h]), "nothing": None, "version": 3},
    "BatchEncoding": lambda h, m: BatchEncoding(hidden=h, mask=m),
    "mapping": lambda h, m: Mapping(hidden=h, mask=m),
    "ModelOutput": lambda h, m: ModelOutput(hidden=h, mask=m),
    "AttrDict": lambda h, m: AttrDict(hidden=h, mask=m),
    "dict with attributes": lambda h, m: WithAttributes(hidden=h, mask=m),
}
WITH_ATTRIBUTES = "namedtuple", "ModelOutput", "AttrDict", "dict with attributes"


def first(form):
    """The first tensor."""
    while not isinstance(form, torch.Tensor):
        form = next(iter(form.values() if isinstance(form, MutableMapping) else form))
    return form


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_inputs_and_outputs(name):
    class Model(nn.Linear):
        def forward(self, given):
            assert type(given) is type(batch)
            assert name != "BatchEncoding" or given.encodings == "kept"
            hidden = given.hidden if name in WITH_ATTRIBUTES else first(given)
            return form(super().forward(hidden), 2 * hidden)

    form, model, x = FORMS[name], Model(3, 2), torch.randn(10, 3)
    batch = form(x, torch.ones(10, 5))
    result, expected = (m(batch) for m in (GradCache(model, 3), model))
    assert type(result) is type(expected)
    torch.testing.assert_close(result, expected)
    if name in WITH_ATTRIBUTES:
        torch.testing.assert_close(result.hidden, expected.hidden)
    torch.testing.assert_close(*(gradients(model, first(output)) for output in (result, expected)))
    assert first(batch) is x


def test_a_mapping_that_cannot_be_copied_is_refused():
    x = torch.randn(7, 3)
    batch = Uncopied(x=x)
    with pytest.raises(TypeError, match=r"copies with its items at args\[0\].*got Uncopied"):
        GradCache(nn.Identity(), 2)(batch)
    assert batch["x"] is x


# --- in the model's place


class Net(nn.Module):
    temperature = 3

    def __init__(self):
        super().__init__()
        self.body = batchnorm_net()
        self.head = nn.Linear(5, 2).to(DEVICE, torch.float64)

    def forward(self, x):
        return self.head(self.body(x))

    def embed(self, x):
        return self.body(x)


@pytest.mark.parametrize(
    "outer", [lambda m: m, lambda m: nn.Sequential(m, nn.Linear(2, 2))], ids=["alone", "inside"]
)
def test_checkpoints_are_interchangeable(outer):
    plain, cached = outer(Net()), outer(GradCache(Net(), 6))
    state = plain.state_dict()
    assert list(cached.state_dict()) == list(state)
    assert cached.state_dict()._metadata == state._metadata
    assert str(cached.load_state_dict(state)) == "<All keys matched successfully>"
    torch.testing.assert_close(cached.state_dict(), state)
    plain.load_state_dict(outer(GradCache(Net(), 6)).state_dict())


def test_keys_that_do_not_load_are_named_as_in_a_checkpoint():
    class Outer(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.module, self.a_module = wrap(wrap(nn.Linear(3, 2))), nn.Linear(3, 2)

    messages = []
    for wrap in (lambda model: model, lambda model: GradCache(model, 4)):
        outer = nn.ModuleDict({"net": Outer(wrap)})
        state = outer.state_dict()
        state["net.module.weight"] = state["net.a_module.weight"] = torch.zeros(3, 3)
        del state["net.module.bias"], state["net.a_module.bias"]
        state["net.module.other"] = state["net.other"] = torch.zeros(1)
        with pytest.raises(RuntimeError) as error:
            outer.load_state_dict(state)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert 'Missing key(s) in state_dict: "net.module.bias"' in messages[1]
    state = {"net.module.bias": torch.ones(2), "net.module.other": torch.zeros(1)}
    keys = outer.load_state_dict(state, strict=False)
    assert keys.missing_keys[0] == "net.module.weight"
    assert keys.unexpected_keys == ["net.module.other"]


@pytest.mark.skipif(IS_TORCH_2_4, reason="not tried with torch 2.4")
@pytest.mark.parametrize("outer", [lambda m: m, nn.Sequential], ids=["alone", "inside"])
@pytest.mark.parametrize("net", [Net, lambda: nn.Linear(4, 2)], ids=["net", "layer"])
def test_distributed_checkpoints_with_an_optimizer(outer, net):
    checkpoints = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    states = []
    for model in (outer(net()), outer(GradCache(net(), 4))):
        optimizer = torch.optim.Adam(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        for state in states:  # of the plain model
            new = {"model_state_dict": state[0], "optim_state_dict": state[1]}
            checkpoints.set_state_dict(model, optimizer, **copy.deepcopy(new))
        states.append(checkpoints.get_state_dict(model, optimizer))
    (expected, of_expected), (result, of_result) = states
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(of_result["state"], of_expected["state"])
    assert of_result["param_groups"] == of_expected["param_groups"]


def test_the_signature_is_that_of_the_model():
    """Hugging Face's Trainer drops the columns that it does not name."""
    model = Encoder()
    cached = GradCache(model, 3)
    assert inspect.signature(cached.forward) == inspect.signature(model.forward)
    assert list(inspect.signature(GradCache.forward).parameters) == ["self", "args", "kwargs"]
    forward = cached.forward
    cached.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)  # as Accelerate does
    batch = tokens()
    torch.testing.assert_close(cached(**batch), 2 * model(**batch))


def test_names_are_those_of_the_model():
    model = Net()
    cached = GradCache(model, 6)
    for plain, wrapped in ((model, cached), (nn.Sequential(model), nn.Sequential(cached))):
        for names in ("named_parameters", "named_buffers"):
            got, want = (getattr(m, names)() for m in (wrapped, plain))
            assert [(n, id(p)) for n, p in got] == [(n, id(p)) for n, p in want]
    assert {n for n, _ in cached.named_modules()} == {n for n, _ in model.named_modules()}
    assert [*cached.modules()] == [cached, *model.modules()]
    assert cached.get_parameter("head.weight") is model.head.weight
    assert cached.get_submodule("body.1") is model.body[1]


def test_attributes_modes_and_dtypes_are_those_of_the_model():
    model = Net()
    cached = GradCache(model, 6)
    assert cached.head is model.head and cached.temperature == 3 and cached.module is model
    assert cached.embed(images(2)).shape == (2, 5)
    cached.head = nn.Linear(5, 3).to(DEVICE, torch.float64)
    assert model.head is cached.head and cached(images(8)).shape == (8, 3)
    cached.temperature = 4
    assert model.temperature == 4
    cached.note = "mine"
    assert not hasattr(model, "note")
    cached.chunk_size = 2
    assert not hasattr(model, "chunk_size")
    with pytest.raises(AttributeError, match="'Net' object has no attribute 'nothing'"):
        cached.nothing  # noqa: B018
    assert cached.float().head.weight.dtype == torch.float32
    assert cached.apply(lambda m: m.requires_grad_(False)) is cached
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in cached.eval().module.modules())
    assert all(m.training for m in cached.train().module.modules())
    assert "chunk_size=2" in repr(cached)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(copied):
    cached, x = GradCache(Net(), 6), images(12)
    other = copied(cached)
    assert other.chunk_size == 6 and other.module is not cached.module
    torch.testing.assert_close(other(x), cached(x))
    other(x).sum().backward()
    assert other.head.weight.grad is not None and cached.head.weight.grad is None


def test_an_error_of_the_model_leaves_nothing_behind():
    """Code that keeps the error, as a notebook does, can go on."""
    calls = []

    class Broken(nn.Linear):
        def forward(self, x):
            calls.append(super().forward(x))
            raise RuntimeError("not enough memory")

    with pytest.raises(RuntimeError, match="not enough memory") as kept:
        GradCache(Broken(2, 2), 3)(torch.randn(9, 2))
    other = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    other(torch.randn(4, 2)).sum().backward()
    assert len(calls) == 1 and kept.value.__traceback__ is not None


@pytest.mark.parametrize(
    ("chunk_size", "error"),
    [(0, ValueError), (-3, ValueError), *((x, TypeError) for x in (2.0, True, None, "8"))],
)
def test_a_chunk_size_that_is_no_positive_integer_is_refused(chunk_size, error):
    with pytest.raises(error, match=f"chunk_size must be a positive integer.*{chunk_size!r}"):
        GradCache(conv_net(), chunk_size)
    assert GradCache(conv_net(), np.int64(8)).chunk_size == 8


def test_a_model_that_is_no_module_and_a_call_without_tensors_are_refused():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got function"):
        GradCache(conv_net, 8)
    for args, came in (((), "no argument"), (("a", torch.tensor(1.0)), "str, Tensor")):
        with pytest.raises(TypeError, match=f"at least one tensor with a row.*got {came}"):
            GradCache(nn.Identity(), 8)(*args)


ENTRIES = {
    "list": ([3] * 10, r"got list with 10 entries for 10 examples at args\[1\]"),
    "tuple": (("a",) * 10, "got tuple with 10"),
    "array": (np.ones((10, 2)), "got ndarray with 10"),
    "lists": ([[1, 2]] * 10, "got list with 10"),
    "nested": ({"a": (torch.ones(10), [None] * 10)}, r"got list.*at args\[1\]\['a'\]\[1\]"),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_an_entry_per_example_outside_of_tensors_is_refused(case):
    class Model(nn.Module):
        def forward(self, x, entries):
            seen.append(entries)
            return x

    entries, message = ENTRIES[case]
    seen, x = [], torch.ones(10, 2)
    with pytest.raises(TypeError, match=message):
        GradCache(Model(), 3)(x, entries)
    assert not seen
    GradCache(Model(), 10)(x, entries)  # in one call
    others = ([1, 2, 3], "0123456789", np.array(10), torch.tensor(2), {i: i for i in range(10)})
    GradCache(Model(), 3)(x, others)
    assert seen[0] is entries and seen[1:] == [others] * 4


def test_batch_sizes_that_differ():
    batch = {**tokens(), "attention_mask": torch.ones(8, 5)}
    with pytest.raises(ValueError, match=r"10 in kwargs\['input_ids'\], 8 in kwargs\['attention_"):
        GradCache(Encoder(), 3)(**batch)
    with pytest.raises(ValueError, match=r"10 in args\[0\], 8 in args\[1\]"):
        GradCache(Encoder(), 30)(*batch.values())


REFUSED = {
    "scalar": (lambda h, m: h.sum(), ValueError, r"got shape \(\) at output$"),
    "not batch first": (lambda h, m: (m, h.mT[0]), ValueError, r"\(6, 5\) at output\[1\]"),
    "object": (lambda h, m: {"cache": object()}, TypeError, r"got object at output\['cache'\]"),
}


@pytest.mark.parametrize("chunk_size", [4, 64])
@pytest.mark.parametrize("case", REFUSED)
def test_outputs_without_a_row_per_example_are_refused(case, chunk_size):
    form, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        GradCache(Encoder(form), chunk_size)(**tokens())


CHANGING = {
    "keys": (lambda i, h: {str(i): h}, "the same structure for every chunk, got dict with keys"),
    "length": (lambda i, h: (h,) * i, "got tuple of length 1 and tuple of length 2 at output"),
    "type": (lambda i, h: h if i == 1 else None, "got Tensor and NoneType at output"),
    "number": (lambda i, h: (h, i), r"the same for every chunk, got \(1, 2, 3\) at output\[1\]"),
}


@pytest.mark.parametrize("case", CHANGING)
def test_outputs_that_differ_from_chunk_to_chunk_are_refused(case):
    (form, message), calls = CHANGING[case], count(1)
    with pytest.raises(ValueError, match=message):
        GradCache(Encoder(lambda hidden, _: form(next(calls), hidden)), 4)(**tokens(12))
