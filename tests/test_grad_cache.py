"""GradCache against the plain model on the whole batch."""

import copy
import pickle
import weakref
from collections import OrderedDict, UserDict, namedtuple

import numpy as np
import pytest
import torch
from helpers import DEVICE, IS_TORCH_2_4
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pml_pnp import GradCache, PNPLoss


def conv_net():
    """No layer mixes examples."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 5),
    ).to(DEVICE, torch.float64)


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


@pytest.mark.parametrize("chunk_size", [1, 4, 22, 23, 64])
def test_value_and_gradients_are_those_of_the_whole_batch(chunk_size):
    model, x = conv_net(), images().requires_grad_()
    expected = model(x)
    result = GradCache(model, chunk_size)(x)
    torch.testing.assert_close(result, expected)
    wanted = gradients(model, expected, x)
    assert all(g.abs().max() > 1e-3 for g in wanted)
    torch.testing.assert_close(gradients(model, result, x), wanted)


@pytest.mark.parametrize("loss_func", [PNPLoss(variant="Ds", anneal=0.3), nn.MSELoss()], ids=str)
def test_a_loss_and_an_optimizer_take_the_same_steps(loss_func):
    models = [conv_net()]
    models.append(GradCache(copy.deepcopy(models[0]), 6))
    batches = [images() for _ in range(3)]
    labels = torch.arange(23, device=DEVICE) // 3
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for x in batches:
            optimizer.zero_grad()
            z = model(x)
            loss = loss_func(z, labels if isinstance(loss_func, PNPLoss) else torch.ones_like(z))
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(models[1].state_dict(), models[0].state_dict())


def test_only_one_chunk_of_activations_is_alive_at_a_time():
    class Activations:
        now = most = 0

        def __call__(self, module, args, output):
            self.now += len(output)
            self.most = max(self.most, self.now)
            weakref.finalize(output.untyped_storage(), self.forget, len(output))

        def forget(self, rows):
            self.now -= rows

    most = {}
    for chunk_size in (8, 64):
        model, activations = conv_net(), Activations()
        model[0].register_forward_hook(activations)
        GradCache(model, chunk_size)(images(64)).square().sum().backward()
        most[chunk_size] = activations.most
    assert most == {8: 8, 64: 64}


def test_an_output_that_is_a_view_does_not_keep_its_base_alive():
    class FirstToken(nn.Module):
        def forward(self, x):
            hidden = x @ x.new_ones(3, 100)
            alive.append(hidden.untyped_storage().nbytes())
            weakref.finalize(hidden.untyped_storage(), alive.remove, alive[-1])
            most.append(len(alive))
            return hidden[:, 0]

    alive, most = [], []
    x = torch.randn(12, 7, 3, requires_grad=True)
    z = GradCache(FirstToken(), 4)(x)
    assert most == [1, 1, 1]
    torch.testing.assert_close(z, x.sum(2)[:, :1].expand(12, 100))


@pytest.mark.parametrize(
    ("n", "chunk_size", "sizes"), [(65, 64, [32, 33]), (12, 4, [4] * 3), (4, 4, [4]), (3, 9, [3])]
)
def test_chunks_are_of_nearly_equal_size(n, chunk_size, sizes):
    model = conv_net()
    seen = rows_seen(model)
    z = GradCache(model, chunk_size)(images(n))
    assert seen == sizes
    z.sum().backward()
    assert seen == sizes + (sizes[::-1] if len(sizes) > 1 else [])  # a single chunk is kept


def test_an_empty_batch_is_one_call_of_the_model():
    model = conv_net()
    seen = rows_seen(model)
    z = GradCache(model, 4)(images(0))
    assert z.shape == (0, 5) and seen == [0]
    z.sum().backward()


def test_random_masks_are_the_same_in_both_passes():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 4, bias=False)).to(DEVICE)
    x = torch.randn(20, 6, device=DEVICE)
    z = GradCache(model, 3)(x)
    c = torch.randn_like(z)
    (z * c).sum().backward()
    # Linear in the weights: what the second pass saw times the weights is what the first gave.
    torch.testing.assert_close((model[1].weight * model[1].weight.grad).sum(), (z * c).sum())


def test_the_second_pass_leaves_the_random_state_alone():
    model = GradCache(nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5)), 3)
    z = model(torch.randn(20, 6))
    before = torch.get_rng_state()
    z.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_backward_twice():
    model, x = batchnorm_net(), images()
    z = GradCache(model, 6)(x)
    state = copy.deepcopy(model.state_dict())
    z.square().sum().backward(retain_graph=True)
    first = [p.grad.clone() for p in model.parameters()]
    z.square().sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], [2 * g for g in first])
    torch.testing.assert_close(model.state_dict(), state)


def test_second_derivatives():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    cached = GradCache(model, 2)
    assert torch.autograd.gradcheck(cached, x)
    assert torch.autograd.gradgradcheck(cached, x)


def test_frozen_parts_get_no_gradient():
    model, x = conv_net(), images()
    model[0].requires_grad_(False)
    expected = gradients(model, model(x))
    torch.testing.assert_close(gradients(model, GradCache(model, 6)(x)), expected)
    model.requires_grad_(False)
    seen = rows_seen(model)
    assert not GradCache(model, 6)(x).requires_grad
    assert seen == [5, 6, 6, 6]
    x.requires_grad_()
    (once,), (plain,) = (gradients(model, m(x), x) for m in (GradCache(model, 23), model))
    # On a GPU the gradients of a convolution differ from call to call.
    tolerance = 0 if DEVICE.type == "cpu" else 1e-12
    torch.testing.assert_close(once, plain, rtol=tolerance, atol=tolerance)
    result, expected = (gradients(model, m(x), x) for m in (GradCache(model, 6), model))
    torch.testing.assert_close(result, expected)


def test_weights_that_are_no_parameters_get_gradients():
    model, x = nn.Sequential(nn.Tanh()), torch.randn(8, 3)
    weight = torch.randn(3, 2, requires_grad=True)
    model.register_forward_pre_hook(lambda _, args: (args[0] @ weight,))
    seen = rows_seen(model)
    GradCache(model, 4)(x).sum().backward()
    assert seen == [4, 4, 4, 4]
    expected = torch.autograd.grad(torch.tanh(x @ weight).sum(), weight)[0]
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_batch_is_embedded_once_in_chunks(context):
    model, x = conv_net().eval(), images()
    seen = rows_seen(model)
    with context():
        z = GradCache(model, 6)(x)
    assert seen == [5, 6, 6, 6] and not z.requires_grad
    torch.testing.assert_close(z, model(x).detach())


# --- what a forward pass leaves behind, and what may happen before the second one


def in_turn(model, x, chunks):
    """The plain model on one chunk after the other."""
    return torch.cat([model(chunk) for chunk in x.chunk(chunks)])


def test_batchnorm_is_as_if_called_on_the_chunks_in_turn():
    model, x = batchnorm_net(), images(24)
    plain = copy.deepcopy(model)
    for _ in range(2):
        z, expected = GradCache(model, 6)(x), in_turn(plain, x, 4)
        torch.testing.assert_close(z, expected)
        torch.testing.assert_close(gradients(model, z), gradients(plain, expected))
    torch.testing.assert_close(model.state_dict(), plain.state_dict())
    assert model[1].num_batches_tracked == 8
    before = copy.deepcopy(model.state_dict())
    GradCache(model, 6).eval()(x).sum().backward()
    torch.testing.assert_close(model.state_dict(), before)


def test_a_buffer_that_the_output_depends_on_is_what_it_was_for_the_chunk():
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4)).double()
    plain, x = copy.deepcopy(model), torch.randn(12, 6, dtype=torch.float64)
    z, expected = GradCache(model, 4)(x), in_turn(plain, x, 3)
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(gradients(model, z), gradients(plain, expected))
    torch.testing.assert_close(model.state_dict(), plain.state_dict())


class Counting(nn.Module):
    """Multiplies by a buffer that each call replaces by another tensor."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return self.weight * self.calls * x


def test_a_buffer_that_is_replaced():
    model, x = Counting(), torch.ones(6, 2)
    z = GradCache(model, 2)(x)
    assert torch.equal(z[:, 0], torch.tensor([1.0, 1, 2, 2, 3, 3]))
    z.sum().backward()
    assert model.calls == 3 and model.weight.grad == 24


class Sharing(nn.Module):
    """Two parts count into one buffer, and multiply by it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.register_buffer("calls", torch.zeros(()))
        self.part = nn.Module()
        self.part.register_buffer("calls", self.calls)

    def forward(self, x):
        self.calls += 1
        self.part.calls += 1
        return self.weight * self.calls * x


def test_a_buffer_that_two_modules_share():
    model, x = Sharing(), torch.ones(6, 2)
    z = GradCache(model, 2)(x)
    assert torch.equal(z[:, 0], torch.tensor([2.0, 2, 4, 4, 6, 6]))
    z.sum().backward()
    assert model.calls is model.part.calls and model.calls == 6 and model.weight.grad == 48


def test_the_mode_of_the_model_may_change_before_backward():
    model, x = batchnorm_net(), images(24)
    expected = gradients(model, GradCache(model, 6)(x))
    z = GradCache(model, 6)(x)
    model.eval()
    torch.testing.assert_close(gradients(model, z), expected)
    assert not any(m.training for m in model.modules())


def test_a_parameter_that_changes_before_backward_is_an_error():
    model = conv_net()
    z = GradCache(model, 6)(images())
    with torch.no_grad():
        model[5].weight.add_(1)
    with pytest.raises(RuntimeError, match="a parameter of Sequential has changed since"):
        z.sum().backward()


def test_a_parameter_that_the_forward_pass_renormalizes():
    model = nn.Embedding(10, 4, max_norm=0.5)
    x = torch.arange(10)
    z = GradCache(model, 3)(x)
    z.square().sum().backward()
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


# --- precision


def smooth_net():
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(64, 5), nn.Tanh()
    return nn.Sequential(*layers).to(DEVICE, torch.float64)


def errors_of_gradients(model, exact, x, *chunk_sizes, **autocast):
    """Largest relative error over the parameters, for each chunk size."""
    wanted, errors = gradients(exact, exact(x), cotangent=1), []
    for chunk_size in chunk_sizes:
        with torch.autocast(DEVICE.type, **autocast):
            z = GradCache(model, chunk_size)(x.to(model[0].weight.dtype))
        pairs = zip(gradients(model, z, cotangent=1), wanted, strict=True)
        errors.append(max(float((g - w).norm() / w.norm()) for g, w in pairs))
    return errors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_is_as_accurate_as_on_the_whole_batch(dtype):
    exact = smooth_net()
    model = copy.deepcopy(exact).float()
    whole, chunks = errors_of_gradients(model, exact, images(256), 256, 2, dtype=dtype)
    assert 1e-5 < chunks < 1.5 * whole


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_model_in_lower_precision_is_as_accurate_as_on_the_whole_batch(dtype):
    exact = smooth_net()
    model = copy.deepcopy(exact).to(dtype)
    whole, chunks = errors_of_gradients(model, exact, images(24), 24, 6, enabled=False)
    assert 1e-9 < chunks < 2 * whole


def test_grad_scaler_takes_the_same_steps():
    models, x = [conv_net().float()], images().float()
    models.append(GradCache(copy.deepcopy(models[0]), 6))
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**6)
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast(DEVICE.type, dtype=torch.float16):
                z = model(x)
            scaler.scale(z.float().square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)


# --- forms of inputs and outputs


class Encoder(nn.Module):
    """Takes tokens and mask as Hugging Face's models do, and returns any form."""

    def __init__(self, form=lambda hidden, mask: hidden[:, 0]):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.form = form
        self.kinds = []

    def forward(self, input_ids, attention_mask=None, *, scale=1.0, name=None):
        if not isinstance(input_ids, torch.Tensor):
            self.kinds.append(type(input_ids))
            input_ids, attention_mask = input_ids["input_ids"], input_ids["attention_mask"]
        assert name in (None, "a")
        hidden = self.embedding(input_ids) * attention_mask.unsqueeze(2) * scale
        return self.form(hidden, attention_mask)


def tokens(n=10):
    return {
        "input_ids": torch.randint(0, 11, (n, 5)),
        "attention_mask": (torch.rand(n, 5) < 0.7).float(),
    }


class BatchEncoding(UserDict):
    """As Hugging Face's: a UserDict with attributes of its own."""

    def __init__(self, data):
        super().__init__(data)
        self.encodings = "kept"


CALLS = {
    "positional": lambda model, batch: model(batch["input_ids"], batch["attention_mask"]),
    "keywords": lambda model, batch: model(**batch),
    "mixed": lambda model, batch: model(batch["input_ids"], attention_mask=batch["attention_mask"]),
    "dict": lambda model, batch: model(batch),
    "UserDict": lambda model, batch: model(BatchEncoding(batch)),
    "others": lambda model, batch: model(**batch, scale=torch.tensor(2.0), name="a"),
}


@pytest.mark.parametrize("call", CALLS)
def test_forms_of_inputs(call):
    model, batch = Encoder(), tokens()
    expected, result = (CALLS[call](m, batch) for m in (model, GradCache(model, 3)))
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(gradients(model, result), gradients(model, expected))
    assert len(batch["input_ids"]) == 10
    assert set(model.kinds) <= {dict, BatchEncoding}


def test_nested_inputs_and_attributes_of_a_mapping():
    class Model(nn.Linear):
        def forward(self, views, extra):
            assert extra.encodings == "kept" and extra["more"][1] == "text"
            return super().forward(views[0]) + super().forward(views[1]) + extra["more"][0]

    model, views = Model(3, 2), (torch.randn(7, 3), torch.randn(7, 3))
    extra = BatchEncoding({"more": [torch.randn(7, 1), "text"]})
    expected, result = (m(views, extra) for m in (model, GradCache(model, 2)))
    torch.testing.assert_close(result, expected)


Pair = namedtuple("Pair", "hidden mask")


class ModelOutput(OrderedDict):
    """As Hugging Face's: an OrderedDict whose entries are attributes too."""

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        object.__setattr__(self, key, value)


def model_output(hidden, mask):
    output = ModelOutput()
    output["hidden"], output["mask"] = hidden, mask
    return output


FORMS = {
    "tuple": lambda h, m: (h, m),
    "list": lambda h, m: [h, m],
    "namedtuple": Pair,
    "dict": lambda h, m: {"hidden": h, "mask": m},
    "ModelOutput": model_output,
    "nested": lambda h, m: {"states": (h, [m, h]), "nothing": None, "version": 3},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_outputs(form):
    model, batch = Encoder(FORMS[form]), tokens()
    expected, result = (m(**batch) for m in (model, GradCache(model, 3)))
    assert type(result) is type(expected)
    torch.testing.assert_close(result, expected)
    if form == "ModelOutput":
        torch.testing.assert_close(result.hidden, expected.hidden)
    if form == "nested":
        hidden = [output["states"][1][1] for output in (result, expected)]
    else:
        hidden = [next(iter(o.values() if isinstance(o, dict) else o)) for o in (result, expected)]
    torch.testing.assert_close(*(gradients(model, h) for h in hidden))


def test_hugging_face():
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=11, intermediate_size=16, **size)
    model = transformers.BertModel(config).double().eval()
    batch = transformers.BatchEncoding(tokens())
    expected, result = (m(**batch, output_hidden_states=True) for m in (model, GradCache(model, 3)))
    assert type(result) is type(expected) and len(result.hidden_states) == 3
    torch.testing.assert_close(result.hidden_states, expected.hidden_states)
    pooled = (gradients(model, output.pooler_output) for output in (result, expected))
    torch.testing.assert_close(*pooled)


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


def test_checkpoints_are_interchangeable():
    model = Net()
    cached = GradCache(Net(), 6)
    assert list(cached.state_dict()) == list(model.state_dict())
    assert cached.state_dict()._metadata == model.state_dict()._metadata
    assert str(cached.load_state_dict(model.state_dict())) == "<All keys matched successfully>"
    torch.testing.assert_close(cached.state_dict(), model.state_dict())
    model.load_state_dict(GradCache(Net(), 6).state_dict())
    with pytest.raises(RuntimeError, match='Missing key.*"head.weight", "head.bias"'):
        cached.load_state_dict(model.body.state_dict())


def test_checkpoints_are_interchangeable_inside_of_another_module():
    plain, cached = (nn.Sequential(m, nn.Linear(2, 2)) for m in (Net(), GradCache(Net(), 6)))
    assert list(cached.state_dict()) == list(plain.state_dict())
    cached.load_state_dict(plain.state_dict())
    torch.testing.assert_close(cached.state_dict(), plain.state_dict())
    assert [n for n, _ in cached.named_parameters()] == [n for n, _ in plain.named_parameters()]
    state = plain.state_dict()
    del state["0.head.bias"]
    with pytest.raises(RuntimeError, match="Missing key"):
        cached.load_state_dict(state)


def test_names_are_those_of_the_model():
    model = Net()
    cached = GradCache(model, 6)
    for names in ("named_parameters", "named_buffers"):
        got, want = (getattr(m, names)() for m in (cached, model))
        assert [(n, id(p)) for n, p in got] == [(n, id(p)) for n, p in want]
    assert {n for n, _ in cached.named_modules()} == {n for n, _ in model.named_modules()}
    assert [*cached.modules()] == [cached, *model.modules()]
    assert cached.get_parameter("head.weight") is model.head.weight
    assert cached.get_submodule("body.1") is model.body[1]


def test_attributes_are_those_of_the_model():
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


def test_modes_devices_and_dtypes_reach_the_model():
    model = Net()
    cached = GradCache(model, 6).eval()
    assert not any(m.training for m in model.modules())
    cached.train()
    assert all(m.training for m in model.modules())
    assert cached.float().head.weight.dtype == torch.float32
    assert cached.apply(lambda m: m.requires_grad_(False)) is cached
    assert not any(p.requires_grad for p in model.parameters())
    assert "chunk_size=6" in repr(cached)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(copied):
    cached, x = GradCache(Net(), 6), images(12)
    other = copied(cached)
    assert other.chunk_size == 6 and other.module is not cached.module
    torch.testing.assert_close(other(x), cached(x))
    other(x).sum().backward()
    assert other.head.weight.grad is not None and cached.head.weight.grad is None


def test_averaged_model():
    cached = GradCache(Net(), 6)
    average = AveragedModel(cached, use_buffers=True)
    average.update_parameters(cached)
    torch.testing.assert_close(average.module.state_dict(), cached.state_dict())


def test_a_wrapper_in_a_wrapper():
    model, x = conv_net(), images()
    result = GradCache(GradCache(model, 3), 9)(x)
    torch.testing.assert_close(gradients(model, result), gradients(model, model(x)))


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


@pytest.mark.skipif(IS_TORCH_2_4, reason="torch 2.4 cannot compile with GradCache")
@pytest.mark.parametrize("compiled", ["inner", "outer"])
def test_torch_compile(compiled):
    torch._dynamo.reset()
    model, x = batchnorm_net(), images(24)
    plain = copy.deepcopy(model)
    if compiled == "inner":
        cached = GradCache(torch.compile(model, backend="aot_eager"), 6)
    else:
        cached = torch.compile(GradCache(model, 6), backend="aot_eager")
    for _ in range(2):
        z, expected = cached(x), in_turn(plain, x, 4)
        torch.testing.assert_close(z, expected)
        torch.testing.assert_close(gradients(model, z), gradients(plain, expected))
    torch.testing.assert_close(model.state_dict(), plain.state_dict())


# --- errors


@pytest.mark.parametrize("chunk_size", [0, -3])
def test_a_chunk_size_below_one_is_refused(chunk_size):
    with pytest.raises(ValueError, match=f"chunk_size must be a positive .*, got {chunk_size}"):
        GradCache(conv_net(), chunk_size)


@pytest.mark.parametrize("chunk_size", [2.0, True, None, "8"])
def test_a_chunk_size_that_is_no_integer_is_refused(chunk_size):
    with pytest.raises(TypeError, match=f"chunk_size must be a positive integer.*{chunk_size!r}"):
        GradCache(conv_net(), chunk_size)


def test_an_integer_of_numpy_is_taken():
    assert GradCache(conv_net(), np.int64(8)).chunk_size == 8


def test_a_model_that_is_no_module_is_refused():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got function"):
        GradCache(conv_net, 8)


@pytest.mark.parametrize(
    ("args", "came"), [((), "no argument"), (("a", torch.tensor(1.0)), "str, Tensor")]
)
def test_no_tensor_argument(args, came):
    with pytest.raises(TypeError, match=f"at least one tensor with a row per example.*got {came}"):
        GradCache(nn.Identity(), 8)(*args)


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
    form, message = CHANGING[case]
    calls = []

    def counted(hidden, mask):
        calls.append(1)
        return form(len(calls), hidden)

    with pytest.raises(ValueError, match=message):
        GradCache(Encoder(counted), 4)(**tokens(12))
