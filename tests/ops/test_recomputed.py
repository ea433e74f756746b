"""Pieces that are computed again: values, gradients, decisions, what is kept."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.ops import FLOAT, assert_no_graph, kept_bytes, leaf, randn
from torch import nn

from lightning_da3.nn.activation import QuantizedGradActivation
from lightning_da3.nn.convolution import FrozenConv
from lightning_da3.ops import activation
from lightning_da3.ops.activation import Slopes, piecewise_linear
from lightning_da3.ops.recomputed import activated, recomputed
from lightning_da3.ops.smooth import SMOOTH, quantized_grad_activation


def piece(x, factor):
    return torch.tanh(x) * factor, (x * factor).exp().sum()


@pytest.mark.parametrize("exact", [True, False])
def test_recomputed_keeps_its_input_and_gives_its_gradient(exact):
    x = leaf(randn(2, 3, 40, 40, dtype=torch.float32)) * 1
    factor = randn(1, 3, 1, 1).float()
    kept = kept_bytes(lambda t: recomputed(piece, t, factor, exact=exact)[0], x, constants=[factor])
    groups = math.ceil(x.numel() / 240)  # the largest divisor of a sample
    assert kept == (x.numel() * FLOAT if exact else x.numel() + groups * 2 * FLOAT)

    def gradient(fn):
        y, z = fn(x, factor)
        return torch.autograd.grad(y.sum() + z, x)[0]

    got = gradient(lambda *args: recomputed(piece, *args, exact=exact))
    want = gradient(piece)
    assert (got - want).norm() <= (1e-6 if exact else 0.01) * want.norm()
    assert exact or not torch.equal(got, want)


@pytest.mark.parametrize("kernel", [1, 3])
def test_autocast_lowers_every_frozen_convolution(kernel):
    conv = FrozenConv(nn.Conv2d(4, 48, kernel))
    x = randn(2, 4, 9, 9, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    for given in (x, leaf(x)):
        with torch.autocast("cpu", torch.bfloat16):
            assert conv(given).dtype == torch.bfloat16


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["silu", "gelu", "mish", "softsign", "tanhshrink"])
def test_an_activated_convolution_is_computed_again_as_any_piece_is(name, dtype, exact):
    conv = FrozenConv(nn.Conv2d(4, 48, 3, 2, 1)).to(dtype)
    layer = QuantizedGradActivation(SMOOTH[name], inplace=True)
    x = leaf(randn(2, 4, 9, 9).to(dtype)) * 1
    others = randn(2, 48, 5, 5, seed=1).to(dtype)

    def alone(t):
        return activated(t, conv, layer, exact=exact)

    def piece(t):
        return recomputed(lambda s: (SMOOTH[name].value(conv(s)),), t, exact=exact)[0]

    constants = [conv.weight, conv.bias]
    assert kept_bytes(alone, x) == kept_bytes(piece, x, constants=constants)
    (got,), (want,) = (torch.autograd.grad(f(x), x, others) for f in (alone, piece))
    assert torch.equal(alone(x), piece(x))
    # in half the slope is computed in float32, and rounded once
    assert (got - want).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * want.norm()


DECISIONS = {  # what decides, and where
    "hardtanh": (
        lambda t: piecewise_linear(t, Slopes(0.5, 8.0)),
        lambda t: F.hardtanh(t, 0.5, 8.0),
        0.5,
    ),
    "hard sigmoid": (activation.hard_sigmoid, F.hardsigmoid, 3.0),
    "hardswish, low": (
        lambda t: quantized_grad_activation(t, SMOOTH["hardswish"]),
        F.hardswish,
        -3.0,
    ),
    "hardswish, high": (
        lambda t: quantized_grad_activation(t, SMOOTH["hardswish"]),
        F.hardswish,
        3.0,
    ),
    "selu": (lambda t: quantized_grad_activation(t, SMOOTH["selu"]), F.selu, 0.0),
}


@pytest.mark.parametrize("name", DECISIONS)
def test_what_is_computed_again_decides_as_before(name):
    """A ReLU's input that the codes cannot tell from zero passes the gradient that it passed."""
    ours, builtin, edge = DECISIONS[name]
    near, far = edge + randn(2, 200).float() * 1e-3, randn(2, 56).float() * 3  # far: a wide range
    x = torch.cat((near, far), dim=1)
    factor = randn(1, 256, seed=1).float()

    def twice(t):
        return (ours(t) * factor, ours(t.t()).t() + t)  # in another layout, too

    kept = kept_bytes(lambda t: recomputed(twice, t)[0], leaf(x) * 1, constants=[factor])
    assert kept == x.numel() + 8 * 8 + 2 * x.numel() // 8  # codes, eight ranges, and twice the bits
    t = leaf(x)
    y, z = recomputed(twice, t * 1)
    (got,) = torch.autograd.grad(y.sum() + 2 * z.sum(), t)
    (want,) = torch.autograd.grad((builtin(t) * (factor + 2) + 2 * t).sum(), t)
    # the slope of a smooth one follows its rounded input; a jump would be far more
    assert (got - want).abs().max() <= 0.1


def test_recomputed_hands_gradients_to_parameters_and_numbers_through():
    layer, x = nn.Linear(3, 2).double(), randn(4, 3)
    y, n = recomputed(lambda t: (layer(t), len(t)), x, exact=True, uses=[layer])
    assert n == 4
    y.sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(2, 3))


def test_recomputed_draws_the_same_numbers_again():
    x = leaf(randn(50))
    (y,) = recomputed(lambda t: (t * torch.rand_like(t),), x, exact=True, random=True)
    state = torch.get_rng_state()
    y.sum().backward()
    torch.testing.assert_close(x.grad, (y / x).detach())
    assert torch.equal(torch.get_rng_state(), state)  # the backward leaves no trace


def test_recomputed_under_autocast():
    x, weight = leaf(randn(4, 6).float()), randn(5, 6).float()
    with torch.autocast("cpu", torch.bfloat16):
        (y,) = recomputed(lambda t, w: (F.linear(t, w),), x, weight, exact=True)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(4, 6), rtol=0.02, atol=0.02)


def test_recomputed_builds_no_graph_without_need():
    assert_no_graph(lambda t: recomputed(piece, t, 2.0)[0], randn(5))
