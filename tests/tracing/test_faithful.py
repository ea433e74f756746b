"""What Python does and a graph cannot hold is done: in a function or module that is one node."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.around import Around, assert_same_gradients, input_gradient
from torch import nn

from lightning_da3 import AdapterConfig, DA3Config, InputError, convert

CONFIG = DA3Config(gate=None, adapter=AdapterConfig(hidden_channels=4, min_stride=1))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def assert_same(network, x, *, head="head", python=()):
    """The conversion computes the same, with and without gradients, and finds the head."""
    network = network.eval()
    model = convert(network, CONFIG, verify=False)
    assert model.plan.head == head
    assert [path for path, _ in model.plan.python] == list(python)
    want = network(x)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    return model


# --- in place, and memory that is shared ----------------------------------------------------------


def adds_to_itself(x):
    s = x
    x += 1.0
    return x.relu() + s


def scales_a_view(x):
    y = x.view(x.shape)
    y *= 0.5
    return x + y


def subtracts_through_a_slice(x):
    y = x[:, :4]
    y -= 1.0
    return x.relu()


def divides_a_sum(x):
    x = x + 1.0
    x /= 2.0
    return x


def writes_out(x):
    y = torch.empty_like(x)
    torch.add(x, 1.0, out=y)
    return y.relu() + x


def writes_into_its_argument(x):
    torch.mul(x, 2.0, out=x)
    return x


def assigns_a_part(x):
    y = x.clone()
    y[:, 0] = 0.0
    return y


def fills_a_mask(x):
    mask = torch.zeros(8, 1, 1)
    mask[:4] += 1.0
    return x * mask


def writes_into_a_constant(x):
    sums = torch.zeros(8)
    sums += x.detach().mean((0, 2, 3))
    return x * torch.sigmoid(sums)[:, None, None]


def through(method):
    def function(x):
        return getattr(x, method)().relu_() + x

    function.__name__ = method
    return function


def to_its_type(x):
    return x.type_as(x).relu_() + x


def off_dropout(x):
    return F.dropout(x, 0.5, training=False).relu_() + x


def halves_of_a_chunk(x):
    a, b = x.chunk(2, 1)
    a.relu_()
    return torch.cat([a, b], 1)


WRITES = [adds_to_itself, scales_a_view, subtracts_through_a_slice, divides_a_sum, writes_out]
WRITES += [writes_into_its_argument, assigns_a_part, fills_a_mask, writes_into_a_constant]
WRITES += [through(m) for m in ("contiguous", "float", "detach")]
WRITES += [to_its_type, off_dropout, halves_of_a_chunk]


@pytest.mark.parametrize("function", WRITES)
def test_what_is_written_in_place_is_written(function):
    with torch.no_grad():  # in eager PyTorch some of these write into what a gradient needs
        network = Around(function).eval()
        x = torch.randn(2, 3, 16, 16)
        want, model = network(x), convert(network, CONFIG, verify=False)
        assert model.plan.head == "head"
        for _ in range(2):
            torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)


# --- randomness -----------------------------------------------------------------------------------


def torch_noise(x):
    return x + torch.randn(8, 1, 1)


def helper():
    return torch.rand(8, 1, 1)


def noise_of_a_helper(x):
    return x * helper()


def uniform_in_place(x):
    return x + torch.empty(8, 1, 1).uniform_()


def numpy_noise(x):
    return x * float(np.random.rand())  # noqa: NPY002


def python_noise(x):
    return x * random.random()


def a_coin(x):
    return x if torch.rand(1).item() < 0.5 else -x


RANDOM = [torch_noise, noise_of_a_helper, uniform_in_place, numpy_noise, python_noise, a_coin]


@pytest.mark.parametrize("function", RANDOM)
def test_what_is_drawn_is_drawn_in_every_call(function):
    network, x = Around(function).eval(), torch.randn(1, 3, 16, 16)
    states = torch.get_rng_state(), random.getstate()
    model = convert(network, CONFIG, verify=False)
    assert torch.equal(torch.get_rng_state(), states[0])  # conversion draws nothing
    assert random.getstate() == states[1]

    def outputs(net):
        torch.manual_seed(3)
        np.random.seed(3)  # noqa: NPY002
        random.seed(3)
        with torch.no_grad():
            return torch.stack([net(x) for _ in range(9)])

    got, want = outputs(model), outputs(network)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert len({tuple(row.flatten().tolist()) for row in want}) > 1


# --- state ----------------------------------------------------------------------------------------


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.mean().item())
        return x * len(self.seen)


class Caches(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = None

    def forward(self, x):
        y = x if self.last is None else x + self.last
        self.last = x.detach()
        return y


class BuffersMove(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        self.mean.mul_(0.9).add_(x.detach().mean((0, 2, 3)), alpha=0.1)
        return x - self.mean[:, None, None]


@pytest.mark.parametrize("kind", [Counts, Remembers, Caches, BuffersMove])
def test_what_changes_from_call_to_call_changes(kind):
    network, x = Around(kind()).eval(), torch.randn(2, 3, 16, 16)
    model = convert(network, CONFIG, verify=False)
    assert model.plan.head == "head"
    assert [path for path, _ in model.plan.python] == ["function"]
    reason = dict(model.plan.python)["function"]
    assert "changes the attributes" in reason or "it writes into" in reason
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(x), network(x), rtol=1e-4, atol=1e-5)


KEPT = []


def keeps(x):
    KEPT.append(x)
    return x


def test_what_is_left_for_others_is_left():
    model = convert(Around(keeps).eval(), CONFIG, verify=False)
    KEPT.clear()
    model(torch.randn(1, 3, 16, 16))
    assert len(KEPT) == 1
    assert KEPT[0].shape == (1, 8, 8, 8)


# --- modes and functions of autograd --------------------------------------------------------------


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        del ctx
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        del ctx
        return -g


class Rounds(torch.autograd.Function):  # a straight-through estimator, without ctx in forward
    @staticmethod
    def forward(x):
        return x.round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        del ctx
        return g


reverse = Reverse.apply


def by_its_class(x):
    return Reverse.apply(x) * 0.5 + x


def by_a_name(x):
    return reverse(x) * 0.5


def in_a_helper(x):
    return by_a_name(x) * 0.5 + x


def without_gradients(x):
    with torch.no_grad():
        scale = x.mean((2, 3), keepdim=True)
    return x / (1 + scale.abs())


@torch.no_grad()
def decorated(x):
    return x.mean((2, 3), keepdim=True)


def calls_what_is_decorated(x):
    return x / (1 + decorated(x).abs())


def in_inference(x):
    with torch.inference_mode():
        scale = float(x.shape[1])
    return x * scale


FUNCTIONS = [Reverse.apply, by_its_class, by_a_name, in_a_helper, Rounds.apply]
FUNCTIONS += [without_gradients, calls_what_is_decorated, in_inference]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_are_cut_and_turned_where_the_user_does(function):
    network = Around(function).eval()
    assert convert(network, CONFIG, verify=False).plan.head == "head"
    # rounding is what its backward does not see: codes may change what is rounded
    assert_same_gradients(function, codes=0.05 if function is not Rounds.apply else 0.5)


def in_float32(x):
    with torch.autocast("cpu", enabled=False):
        return torch.matmul(x.float(), x.float().transpose(-1, -2))


def test_autocast_is_off_where_the_user_switches_it_off():
    kinds = []

    def noted(x):
        y = in_float32(x)
        kinds.append(y.dtype)
        return y

    network, x = Around(noted).eval(), torch.randn(2, 3, 16, 16)
    model = convert(network, CONFIG, verify=False)
    kinds.clear()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, want = model(x), network(x)
    assert kinds == [torch.float32] * 2
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


# --- hooks ----------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.b(F.gelu(self.a(self.norm(x))))


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


@pytest.mark.parametrize("where", ["blocks.2.a", "blocks.2.norm", "blocks.2", "blocks.1"])
def test_a_hook_runs_once_and_sees_a_graph(where):
    network, seen = Blocks(), []
    network.get_submodule(where).register_forward_hook(lambda m, i, y: seen.append(y))
    model = convert(network, CONFIG, verify=False)
    model.add_domain("d", 3)
    model.set_domain("d")
    model.train()
    seen.clear()
    y = model(torch.randn(2, 3, 16, 16))
    assert len(seen) == 1
    y.sum().backward()
    assert len(seen) == 1
    assert seen[0].requires_grad


def test_a_hook_that_changes_an_output_changes_it():
    network = Blocks().eval()
    network.blocks[1].register_forward_hook(lambda m, i, y: y * 2)
    assert_same(network, torch.randn(2, 3, 16, 16))


# --- decisions ------------------------------------------------------------------------------------


def by_rank(x):
    return x if x.ndim == 4 and len(x.shape) == 4 else x[None]


def by_channels(x):
    return x * 2 if x.shape[1] == 8 else x


def by_kind(x):
    return x if isinstance(x, torch.Tensor) else x[0]


def by_attribute(x):
    return x.tensors if hasattr(x, "tensors") else x


def over_channels(x):
    return torch.stack([x[:, i] * i for i in range(x.shape[1])], 1)


def by_type(x):
    return x if x.dtype == torch.float32 and not x.is_cuda else x.float()


def pads(x):
    rows = max(0, 8 - x.shape[2])
    return F.pad(x, (0, 0, 0, rows)) if rows > 0 else x


def ramp(x):
    return x + torch.arange(x.shape[-1], device=x.device, dtype=x.dtype) / x.shape[-1]


DECIDE = [by_rank, by_channels, by_kind, by_attribute, over_channels, by_type, pads, ramp]


@pytest.mark.parametrize("function", DECIDE)
def test_what_a_forward_asks_of_values_is_answered(function):
    model = assert_same(Around(function), torch.randn(2, 3, 16, 16))
    for size in ((1, 3, 8, 8), (3, 3, 18, 14)):  # not what was traced
        x = torch.randn(size)
        want = Around.forward(network_of(function, model), x)
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)


def network_of(function, model):
    """The network that `assert_same` converted."""
    del model
    torch.manual_seed(0)
    return Around(function).eval()


class Refuses(Around):
    def forward(self, x):
        if len(x) == 0:
            raise ValueError("no images")
        return super().forward(x.to(self.head.weight.dtype))


def test_a_decision_of_the_network_itself_is_checked_in_every_call():
    model = assert_same(Refuses(torch.relu), torch.randn(2, 3, 16, 16))
    with pytest.raises(InputError, match=r"decides on the sizes of its input \(`if len\(x\) == 0"):
        model(torch.empty(0, 3, 16, 16))


class Swallows(Around):
    def forward(self, x):
        x = self.body(self.stem(x))
        try:
            if x.sum() > 0:
                x = x * 2
        except TypeError:
            x = x * 3
        return self.head(x.mean((2, 3)))


def test_what_a_forward_catches_was_refused_all_the_same():
    network, x = Swallows(torch.relu).eval(), torch.randn(2, 3, 16, 16)
    model = convert(network, DA3Config(head=None), verify=False)
    assert "decides on the values" in dict(model.plan.python)[""]
    torch.testing.assert_close(model(x), network(x), rtol=1e-4, atol=1e-5)


class Odd(nn.Module):
    """It pads to an even size, as layers with windows do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 2, 2)

    def forward(self, x):
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


def test_a_module_that_cannot_be_a_graph_is_a_node_of_its_parent():
    network = Around(Odd()).eval()
    model = convert(network, CONFIG, verify=False)
    assert model.plan.head == "head"
    assert [part.path for part in model.plan.parts] == ["", "function.conv"]
    assert "decides on the size of its input" in dict(model.plan.python)["function"]
    assert {host.name for host in model.plan.hosts} >= {"function.conv"}
    for side in (16, 18):
        x = torch.randn(2, 3, side, side)
        torch.testing.assert_close(model(x), network(x), rtol=1e-4, atol=1e-5)
        got, want = input_gradient(model, x), input_gradient(network, x)
        assert (got - want).norm() / want.norm() < 0.05
