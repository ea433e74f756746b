"""What Python does and a graph cannot hold is done: in a function or module that is one node."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.around import Around, assert_written
from torch import nn

from lightning_da3 import AdapterConfig, DA3Config, convert

CONFIG = DA3Config(gate=None, adapter=AdapterConfig(hidden_channels=4, min_stride=1))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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
    assert_written(function, CONFIG)


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


class OfWeights(nn.Module):
    """It caches what follows from its weights, by device, or from its input."""

    def __init__(self, *, of_input):
        super().__init__()
        self.layer, self.bias = nn.Conv2d(8, 8, 1), nn.Parameter(torch.randn(8))
        self.cache, self.of_input = {}, of_input

    def forward(self, x):
        if str(x.device) not in self.cache:
            table = self.bias.sin()
            self.cache[str(x.device)] = table * x.mean() if self.of_input else table
        return self.layer(x) + self.cache[str(x.device)][:, None, None]


@pytest.mark.parametrize("of_input", [False, True])
def test_a_cache_of_what_follows_from_weights_is_a_graph(of_input):
    network, x = Around(OfWeights(of_input=of_input)).eval(), torch.randn(2, 3, 16, 16)
    model = convert(network, CONFIG, verify=False)
    assert [path for path, _ in model.plan.python] == (["function"] if of_input else [])
    assert not network.function.cache
    for _ in range(2):
        torch.testing.assert_close(model(x), network(x), rtol=1e-4, atol=1e-5)


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
