"""Squeeze and excitation as one op, against the same piece operation by operation."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.ops import FLOAT, kept_bytes, leaf, randn
from torch import nn

from lightning_da3 import DA3Config, MemoryConfig, convert
from lightning_da3.nn.activation import HardSigmoid, PiecewiseLinear, QuantizedGradActivation
from lightning_da3.nn.convolution import FrozenConv
from lightning_da3.nn.recomputed import ActivatedConv, Excitation, Recomputed
from lightning_da3.ops.activation import RELU
from lightning_da3.ops.recomputed import recomputed
from lightning_da3.ops.smooth import SMOOTH
from lightning_da3.planning.forms import FormFinder
from lightning_da3.planning.nodes import plan_nodes
from lightning_da3.planning.places import find_places
from lightning_da3.planning.plan import RecomputeRegion
from lightning_da3.tracing.tracer import Tracer

CHANNELS, HIDDEN = 48, 5


def layers(kind):
    """An activation, and the small network behind the means."""
    torch.manual_seed(0)
    first, last = (
        FrozenConv(nn.Conv2d(CHANNELS, HIDDEN, 1)),
        FrozenConv(nn.Conv2d(HIDDEN, CHANNELS, 1)),
    )
    if kind == "hardswish":
        return (
            QuantizedGradActivation(SMOOTH["hardswish"], inplace=True),
            first,
            (PiecewiseLinear(RELU, inplace=False), last, HardSigmoid()),
        )
    if kind == "none":
        return (
            None,
            first,
            (
                PiecewiseLinear(RELU, inplace=False),
                last,
                QuantizedGradActivation(SMOOTH["sigmoid"], False),
            ),
        )
    return (
        QuantizedGradActivation(SMOOTH[kind], inplace=True),
        first,
        (
            QuantizedGradActivation(SMOOTH["silu"], True),
            last,
            QuantizedGradActivation(SMOOTH["sigmoid"], inplace=False),
        ),
    )


def plain(kind, given):
    """The same in PyTorch's own operations."""
    activation, first, rest = given

    def forward(x):
        v = x if activation is None else activation.smooth.value(activation.smooth.settled(x))
        s = F.conv2d(v.mean((2, 3), keepdim=True), first.weight, first.bias)
        s = F.relu(s) if kind in ("hardswish", "none") else F.silu(s)
        last = next(layer for layer in rest if isinstance(layer, FrozenConv))
        s = F.conv2d(s, last.weight, last.bias)
        return v * (F.hardsigmoid(s) if kind == "hardswish" else torch.sigmoid(s))

    return forward


KINDS = ["silu", "gelu", "hardswish", "none"]


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "coded"])
@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_piece_computed_again(kind, last, exact):
    given = layers(kind)
    x = randn(2, CHANNELS, 6, 5).float()
    x = leaf(x.contiguous(memory_format=torch.channels_last) if last else x)
    factor = randn(2, CHANNELS, 6, 5, seed=1).float()
    ours, builtin = Excitation(*given), plain(kind, given)

    def alone(t):
        return ours(t * 1, exact=exact, codes=None)

    def piece(t):
        return recomputed(lambda s: (builtin(s),), t * 1, exact=exact)[0]

    torch.testing.assert_close(alone(x), builtin(x), rtol=1e-5, atol=1e-6)
    (got,), (want,), (true,) = (
        torch.autograd.grad(f(x), x, factor) for f in (alone, piece, builtin)
    )
    assert (got - want).norm() <= (1e-6 if exact else 3e-3) * want.norm()
    assert (got - true).norm() <= (1e-6 if exact else 2e-2) * true.norm()
    assert alone(x).stride() == x.stride()


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "coded"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_keeps_its_input_and_the_squeezed_numbers(kind, exact):
    given = layers(kind)
    x = leaf(randn(2, CHANNELS, 6, 6).float()) * 1
    frozen = [
        t for m in given[1:] for t in nn.ModuleList(m if isinstance(m, tuple) else [m]).parameters()
    ]
    kept = kept_bytes(lambda t: Excitation(*given)(t, exact=exact, codes=None), x, constants=frozen)
    groups = math.ceil(x.numel() / 216)  # the largest divisor of a sample up to 256
    codes = x.numel() * FLOAT if exact else x.numel() + groups * 2 * FLOAT
    decisions = x.numel() // 8 if kind == "hardswish" and not exact else 0
    assert kept == codes + 2 * HIDDEN * FLOAT + decisions


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_graph_it_keeps_nothing_and_may_write_where_it_was_allowed_to(kind):
    given = layers(kind)
    x = randn(2, CHANNELS, 6, 5).float()
    want = plain(kind, given)(x)
    mine = x.clone()
    with torch.no_grad():
        y = Excitation(*given)(mine, exact=False, codes=None)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-6)
    assert y.grad_fn is None
    # the activation alone, in place; without one, the input is not ours
    assert (y.data_ptr() == mine.data_ptr()) == (kind != "none")
    assert kind != "none" or torch.equal(mine, x)


@pytest.mark.parametrize("kind", ["silu", "none"])
def test_it_follows_autocast_and_half_precision(kind):
    given = layers(kind)
    x = randn(2, CHANNELS, 6, 5).to(torch.bfloat16)
    (want,) = torch.autograd.grad(plain(kind, given)(t := leaf(x.float())).sum(), t)
    t = leaf(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = Excitation(*given)(t * 1, exact=False, codes=None)
    assert y.dtype == torch.bfloat16
    (got,) = torch.autograd.grad(y.sum(), t)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() <= 0.02 * want.norm()


def test_a_hardswish_decides_as_before():
    """An element that the codes cannot tell from a jump has the slope that it had."""
    given = layers("hardswish")
    near = 3.0 + randn(1, CHANNELS, 1, 8).float() * 1e-3
    x = leaf(torch.cat((near, randn(1, CHANNELS, 1, 8, seed=1).float() * 8), dim=3))
    (got,) = torch.autograd.grad(Excitation(*given)(x * 1, exact=False, codes=None).sum(), x)
    (want,) = torch.autograd.grad(plain("hardswish", given)(x).sum(), x)
    assert (got - want).abs().max() <= 0.05  # the jump is half of a scale


def test_an_activated_convolution_decides_as_before():
    conv = FrozenConv(nn.Conv2d(8, CHANNELS, 1))
    nn.init.zeros_(conv.weight)
    conv.weight.data[:, :, 0, 0] = torch.eye(CHANNELS, 8)
    nn.init.zeros_(conv.bias)
    near = 3.0 + randn(1, 8, 1, 8).float() * 1e-3
    x = leaf(torch.cat((near, randn(1, 8, 1, 8, seed=1).float() * 8), dim=3))
    op = ActivatedConv(conv, QuantizedGradActivation(SMOOTH["hardswish"], inplace=True))
    kept = kept_bytes(
        lambda t: op(t * 1, exact=False, codes=None), x, constants=[conv.weight, conv.bias]
    )
    assert kept == x.numel() + 8 + CHANNELS * 16 // 8  # codes of one group, and decisions
    (got,) = torch.autograd.grad(op(x * 1, exact=False, codes=None).sum(), x)
    (want,) = torch.autograd.grad(F.hardswish(conv(x)).sum(), x)
    assert (got - want).abs().max() <= 0.1  # a jump is a half
    assert not torch.equal(got, want)


def test_an_empty_batch():
    x = leaf(torch.empty(0, CHANNELS, 6, 5))
    (grad,) = torch.autograd.grad(
        Excitation(*layers("silu"))(x * 1, exact=False, codes=None).sum(), x
    )
    assert grad.shape == x.shape


# --- in networks


class Block(nn.Module):
    """An inverted residual with an excitation as somebody wrote it."""

    def __init__(self, excite):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.first = nn.Conv2d(8, 8, 3, 2, 1)
        self.expand, self.deep = nn.Conv2d(8, 48, 1), nn.Conv2d(48, 48, 3, 1, 1, groups=48)
        self.fc1, self.fc2 = nn.Conv2d(48, 4, 1), nn.Conv2d(4, 48, 1)
        self.wide = nn.Conv2d(48, 48, 1, groups=2)
        self.act, self.pool = nn.SiLU(), nn.AdaptiveAvgPool2d(1)
        self.project, self.head = nn.Conv2d(48, 8, 1), nn.Linear(8, 4)
        self.excite = excite

    def forward(self, x):
        x = self.first(self.stem(x).relu()).relu()
        y = self.act(self.deep(self.act(self.expand(x))))
        x = x + self.project(self.excite(self, y))
        return self.head(x.mean((2, 3)))


def squeezed(m, y):
    return m.fc2(m.act(m.fc1(m.pool(y))))


EXCITE = {
    "module": lambda m, y: squeezed(m, y).sigmoid() * y,
    "mean": lambda m, y: y * m.fc2(F.relu(m.fc1(y.mean((2, 3), keepdim=True)))).sigmoid(),
    "torch.mean": lambda m, y: torch.mul(
        F.hardsigmoid(m.fc2(m.fc1(torch.mean(y, dim=(-2, -1), keepdim=True)))), y
    ),
    "one layer": lambda m, y: y * m.fc2(m.fc1(m.pool(y))).sigmoid(),
}
OTHERS = {
    "read twice": lambda m, y: squeezed(m, y).sigmoid() * y + y,
    "of others": lambda m, y: squeezed(m, y.relu()).sigmoid() * y,
    "no product": lambda m, y: y + squeezed(m, y).sigmoid(),
    "rows": lambda m, y: y * m.fc2(m.act(m.fc1(y.mean((3,), keepdim=True)))).sigmoid(),
    "groups": lambda m, y: y * m.wide(m.pool(y)).sigmoid(),
    "two cells": lambda m, y: (
        y * F.interpolate(m.fc2(m.fc1(F.adaptive_avg_pool2d(y, 2))), y.shape[2:])
    ),
    "of the mean": lambda m, y: y * squeezed(m, y).sigmoid() * m.pool(y),
}


def gradients_of(network, model, x):
    """dL/dx of the network, and of the converted one whose domain adds nothing."""

    def grad(m):
        t = leaf(x)
        return torch.autograd.grad(m(t).square().sum(), t)[0]

    return grad(model), grad(network)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "coded"])
@pytest.mark.parametrize("name", [*EXCITE, *OTHERS])
def test_what_networks_are_taken_for_it(name, exact):
    torch.manual_seed(0)
    network = Block({**EXCITE, **OTHERS}[name]).eval()
    model = convert(network, DA3Config(memory=MemoryConfig(exact=exact), gate=None))
    x = torch.randn(2, 3, 32, 32)
    got, want = gradients_of(network, model, x)
    assert (got - want).norm() <= (1e-5 if exact else 2e-2) * want.norm()
    pieces = [m for m in model.modules() if isinstance(m, Recomputed)]
    found = [m for m in pieces if isinstance(m.shortcut, Excitation)]
    assert len(found) == (name in EXCITE and not exact)  # exact pieces are longer


@pytest.mark.parametrize("read", ["", "inner", "scale"])
def test_a_region_of_which_others_read_more_is_a_graph(read):
    """A form with a backward of its own gives the last value alone."""

    class Piece(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.pool = nn.SiLU(), nn.AdaptiveAvgPool2d(1)
            self.first, self.bend, self.last = nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1)
            self.conv, self.silu = nn.Conv2d(3, 8, 1), nn.SiLU()

        def forward(self, x, image):
            v = self.act(x)
            scale = self.last(self.bend(self.first(self.pool(v))))
            inner = self.conv(image)
            return v * scale, self.silu(inner), {"inner": inner, "scale": scale}.get(read)

    module = Piece().eval()
    gm = torch.fx.GraphModule(module, Tracer().trace(module))
    x, image, *nodes, _ = (node.name for node in gm.graph.nodes)
    steps = tuple(plan_nodes(gm, find_places(gm), None, {}, {x, image, *nodes}))
    pair = tuple(name for name in nodes if name in ("conv", "silu"))
    rest = tuple(name for name in nodes if name not in pair)
    forms = FormFinder(gm, steps, exact=False)
    assert forms.form_of(RecomputeRegion(image, pair)) == (
        "graph" if read == "inner" else "activated convolution"
    )
    assert forms.form_of(RecomputeRegion(x, rest)) == ("graph" if read == "scale" else "excitation")
