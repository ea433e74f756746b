"""Autocast that a forward switches off where it is off anyway is traced, and checked in calls."""

import contextlib

import pytest
import torch
from helpers.around import Around, assert_same_gradients, input_gradient
from helpers.domains import refused
from helpers.switching import BLOCKS, AllOff, Off, switching
from torch import nn
from torch.amp import autocast

from lightning_da3 import (
    AdapterConfig,
    ConversionWarning,
    DA3Config,
    DA3Error,
    MemoryConfig,
    convert,
)

CONFIG = DA3Config(
    gate=None, adapter=AdapterConfig(4, min_stride=1), memory=MemoryConfig(exact=True)
)
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def products(x):
    x = x.float()
    return torch.matmul(x, x.transpose(-1, -2)) / 8


def by_a_block(x):
    with torch.autocast("cpu", enabled=False):
        return products(x)


def by_the_device(x):
    with torch.autocast(device_type=x.device.type, enabled=False):
        return products(x)


def by_another_name(x):
    with autocast(x.device.type, enabled=False):
        return products(x)


@torch.autocast("cpu", enabled=False)
def by_a_decorator(x):
    return products(x)


def in_another(x):
    with torch.autocast("cpu", enabled=False), torch.autocast("cpu", enabled=False):
        return products(x)


def if_it_is_on(x):
    off = torch.is_autocast_enabled(x.device.type)
    with torch.autocast("cpu", enabled=False) if off else contextlib.nullcontext():
        return products(x)


def in_its_type(x):
    if torch.is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    return torch.matmul(x, x.transpose(-1, -2)) / 8


SWITCHES = [by_a_block, by_the_device, by_another_name, by_a_decorator, in_another]
ASKS = [if_it_is_on, in_its_type]


def under_autocast(network, x):
    with torch.autocast("cpu", torch.bfloat16):
        return network(x)


def stays_python(model):
    return [*model.plan.python, *model.plan.functions]


def seed(function):
    torch.manual_seed(0)
    return Around(function).eval()


@pytest.mark.parametrize("function", SWITCHES + ASKS)
def test_it_is_a_graph_where_autocast_is_off(function):
    network = seed(function)
    model = convert(network, CONFIG, X, verify=False)
    assert not stays_python(model)
    torch.testing.assert_close(model(X), network(X), rtol=1e-4, atol=1e-5)
    assert_same_gradients(function)


@pytest.mark.parametrize("function", SWITCHES + ASKS)
def test_under_autocast_it_does_what_the_original_does(function):
    network = seed(function)
    model = convert(network, CONFIG, X, verify=False)
    with pytest.warns(ConversionWarning, match="traced once more.*autocast"):
        got = under_autocast(model, X)
    want = under_autocast(network, X)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
    got, want = (
        input_gradient(lambda x, net=net: under_autocast(net, x).float(), X)
        for net in (model, network)
    )
    assert (got - want).norm() < 0.03 * want.norm()
    torch.testing.assert_close(model(X), network(X), rtol=1e-4, atol=1e-5)  # and again without


def test_what_the_function_computes_with_under_autocast():
    kinds = []

    def noted(x):
        y = by_a_block(x)
        kinds.append((x.dtype, y.dtype))
        return y

    network = seed(noted)
    with torch.autocast("cpu", torch.bfloat16):
        model = convert(network, CONFIG, X, verify=False)  # no warning: it was traced like this
    kinds.clear()
    under_autocast(model, X), under_autocast(network, X)
    assert kinds == [(torch.bfloat16, torch.float32)] * 2


def of_another_device(x):
    with torch.autocast("cuda", enabled=False):
        return torch.matmul(x, x.transpose(-1, -2)) / 8


def test_autocast_of_another_device_changes_nothing():
    network = seed(of_another_device)
    model = convert(network, CONFIG, X, verify=False)
    assert not model.plan.functions
    got, want = under_autocast(model, X), under_autocast(network, X)  # no warning
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


def switched_on(x):
    with torch.autocast("cpu", torch.bfloat16):
        return torch.matmul(x, x.transpose(-1, -2)).float() / 8


def off_within_on(x):
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.matmul(x, x.transpose(-1, -2))
        with torch.autocast("cpu", enabled=False):
            return torch.matmul(y.float(), x).float() / 64


def off_and_without_gradients(x):
    with torch.autocast("cpu", enabled=False), torch.no_grad():
        scale = x.abs().mean((2, 3), keepdim=True)
    return x / (1 + scale)


@pytest.mark.parametrize("function", [switched_on, off_within_on, off_and_without_gradients])
def test_what_changes_something_stays_python(function):
    network = seed(function)
    model = convert(network, CONFIG, X, verify=False)
    assert stays_python(model)
    torch.testing.assert_close(model(X), network(X), rtol=1e-3, atol=1e-3)
    assert_same_gradients(function, codes=0.1, rounding=0.02)


class Raises(nn.Module):
    def forward(self, x):
        with contextlib.suppress(ValueError), torch.autocast("cpu", enabled=False):
            raise ValueError
        return x * 2


def test_a_block_that_is_left_by_an_error():
    network = seed(Raises())
    model = convert(network, CONFIG, X, verify=False)
    assert not stays_python(model)
    torch.testing.assert_close(model(X), network(X), rtol=1e-4, atol=1e-5)


# --- with a domain --------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        with torch.autocast(x.device.type, enabled=False):
            q, k, v = q.float(), k.float(), v.float()
            y = torch.softmax(q @ k.transpose(-1, -2) / 4, -1) @ v
        return self.proj(y.to(x.dtype))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), Attention()
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 5)
        self.blocks = nn.Sequential(Block(), Block(), Block())

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.blocks(x).mean(1))


def step(model, on):
    """Gradients of one training step, by name."""
    with torch.autocast("cpu", torch.bfloat16, enabled=on):
        loss = model(X).float().square().sum()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


@pytest.mark.filterwarnings("ignore:.*traced once more")
def test_a_domain_learns_alike_with_autocast_and_without():
    torch.manual_seed(0)
    network = Tokens().eval()
    model = convert(network, CONFIG, X, verify=False)
    assert not model.plan.python
    model.add_domain("a", 3)
    model.set_domain("a")
    model.train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    without, within = step(model, on=False), step(model, on=True)
    assert without.keys() == within.keys()
    for name, gradient in without.items():
        assert (within[name] - gradient).norm() < 0.1 * gradient.norm() + 1e-3, name


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.conv, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.function(self.conv(x)).mean((2, 3)))


def test_what_a_function_leaves_in_a_list_that_it_closes_over_is_left_in_every_call():
    seen = []

    def function(x):
        with torch.autocast("cpu", enabled=False):
            y = x.float().relu()
        seen.append(y.dtype)
        return y

    x = torch.randn(2, 3, 8, 8)
    model = convert(Calls(function).eval())
    assert all(type(dtype) is torch.dtype for dtype in seen)  # and nothing of the trace
    seen.clear()
    model(x), model(x)
    assert seen == [torch.float32] * 2


@pytest.mark.filterwarnings("ignore:.*traced once more")
@pytest.mark.parametrize("block", [Off, AllOff])
def test_adapters_act_where_their_blocks_become_python(block):
    """Of such blocks every layer is a graph of its own, in which its host is found again."""
    model = convert(switching(block), CONFIG, X, verify=False)
    assert not model.plan.python
    model.add_domain("a", 5)
    model.set_domain("a")
    with torch.no_grad():
        fresh = model(X)
        for parameter in model.domain("a").adapters.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        learned = model(X)
    assert (learned - fresh).norm() > fresh.norm()
    torch.testing.assert_close(under_autocast(model, X).float(), learned, rtol=0.1, atol=0.1)
    without, within = step(model.train(), on=False), step(model, on=True)
    for name, gradient in without.items():
        assert (within[name] - gradient).norm() < 0.2 * gradient.norm() + 1e-3, name


@pytest.mark.parametrize("block", BLOCKS)
def test_branches_that_autocast_keeps_from_being_skipped_do_not_run_unheard(block):
    network = switching(block)
    model = convert(network, CONFIG, X, verify=False)
    model.add_domain("a", 5)
    model.set_domain("a")
    with torch.autocast("cpu", torch.bfloat16):  # the network is traced as it was before
        model.skip("a", ["blocks.1"])
    del network.blocks[1]
    network.fc = model.domain("a").head
    torch.testing.assert_close(model(X), network(X), rtol=1e-4, atol=1e-5)
    said = pytest.warns(ConversionWarning, match="traced once more")
    with said, refused(DA3Error, "['blocks.1'] of Switching cannot be skipped", "stays Python"):
        under_autocast(model, X)
