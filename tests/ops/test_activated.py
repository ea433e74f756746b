"""Activations that keep codes of their input: value, gradient, and what follows from the codes."""

import math
import pickle
from dataclasses import replace

import pytest
import torch
from helpers.ops import kept_bytes, leaf, randn
from torch import nn

from lightning_da3.nn.activation import QuantizedGradActivation
from lightning_da3.nn.shared_codes import SharedCodes
from lightning_da3.ops.activated import ValueCode, activation_of_codes, gives_value
from lightning_da3.ops.smooth import SMOOTH, celu, elu, gelu, softplus

BUILTIN = {
    "silu": nn.SiLU(),
    "mish": nn.Mish(),
    "sigmoid": nn.Sigmoid(),
    "logsigmoid": nn.LogSigmoid(),
    "tanh": nn.Tanh(),
    "tanhshrink": nn.Tanhshrink(),
    "gelu": nn.GELU(),
    "elu": nn.ELU(),
    "celu": nn.CELU(),
    "softplus": nn.Softplus(),
}
EVERY = pytest.mark.parametrize("name", BUILTIN)


def ours(x, smooth, inplace=False):
    codes, how = ValueCode.encode(x, smooth)
    return activation_of_codes(x, codes, how, inplace)


def relative(one, other):
    return float((one.double() - other.double()).norm() / other.double().norm())


def test_which_activations_can_be_computed_from_codes_of_their_input():
    assert {name for name, smooth in SMOOTH.items() if gives_value(smooth)} == set(BUILTIN)
    assert gives_value(gelu("tanh"))
    # their derivative jumps, or turns too fast
    assert not any(map(gives_value, (SMOOTH["hardswish"], SMOOTH["selu"], SMOOTH["softsign"])))
    assert not any(map(gives_value, (elu(2.5), elu(-0.7), celu(0.3), softplus(3.0, 2.0))))
    assert not gives_value(replace(SMOOTH["silu"], bend=math.inf))


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0, 10.0])
@EVERY
def test_value_and_gradient(name, spread):
    """Of these ranges the derivative's own codes are off by up to 0.003, those of y by 0.005."""
    smooth, builtin = SMOOTH[name], BUILTIN[name]
    x, grad = leaf(spread * randn(4, 32, 5, 5)), randn(4, 32, 5, 5, seed=7)
    y, expected = ours(x, smooth), builtin(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    (got,), (want,) = (torch.autograd.grad(v, x, grad) for v in (y, expected))
    saturated = name in ("sigmoid", "tanh", "tanhshrink") and spread == 10.0
    assert relative(got, want) <= (0.015 if saturated else 0.0085)
    codes, how = ValueCode.encode(x, smooth)
    assert relative(how.decode(codes), expected.detach()) <= 0.0125


def test_one_far_off_does_not_blur_the_others():
    x = randn(4, 800)
    x[:, 0] = 1e4
    x = leaf(x)
    (got,) = torch.autograd.grad(ours(x, SMOOTH["silu"]).sum(), x)
    (want,) = torch.autograd.grad(nn.SiLU()(x).sum(), x)
    assert (got - want).abs().max() <= 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(2, 6, 7), (2, 6, 5, 4), (1, 6, 3, 2, 4), (0, 6, 5, 4)], ids=str)
def test_types_and_layouts(shape, last, dtype):
    x = randn(*shape, dtype=dtype)
    if last and len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    x = leaf(x)
    y = ours(x, SMOOTH["gelu"])
    (grad,) = torch.autograd.grad(y, x, torch.ones(shape, dtype=dtype))
    assert grad.dtype == y.dtype == dtype
    assert grad.shape == x.shape
    codes, how = ValueCode.encode(x, SMOOTH["gelu"])
    again = how.decode(codes)
    assert (again.dtype, again.shape) == (dtype, x.shape)
    if x.numel():
        assert grad.stride() == again.stride() == x.stride()
    torch.testing.assert_close(again, y.detach(), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("inplace", [False, True])
@EVERY
def test_in_place(name, inplace):
    x = leaf(randn(3, 40))
    z = x * 1.0
    y = ours(z, SMOOTH[name], inplace)
    assert (y.data_ptr() == z.data_ptr()) == inplace
    (got,) = torch.autograd.grad(y.sum(), x)
    (want,) = torch.autograd.grad(ours(x * 1.0, SMOOTH[name]).sum(), x)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_infinities_and_nan_go_through():
    x = leaf(torch.tensor([math.inf, -math.inf, math.nan, 0.5] * 20))
    codes, how = ValueCode.encode(x, SMOOTH["tanh"])
    torch.testing.assert_close(
        how.decode(codes), x.detach().tanh(), rtol=0.02, atol=0.02, equal_nan=True
    )


def test_codes_are_all_that_is_kept_and_the_value_stands_in_for_nothing_else():
    layer, x = QuantizedGradActivation(SMOOTH["silu"], inplace=False), leaf(randn(2, 400).float())
    shared = SharedCodes()
    assert kept_bytes(lambda t: layer(t, shared=shared), x) == 800 + 16 * 8
    y = layer(x, shared=shared)
    assert shared.of(y) is not None
    assert shared.of(y.clone()) is None
    assert shared.of(y.view_as(y)) is None
    with torch.no_grad():
        y.mul_(2.0)
    assert shared.of(y) is None  # written to
    shared = SharedCodes()
    with torch.no_grad():
        layer(x, shared=shared)
    assert shared.kept is None
    assert kept_bytes(layer, x) == 800  # the derivative's own


def test_a_way_of_coding_can_be_pickled():
    x = randn(2, 40)
    codes, how = ValueCode.encode(x, SMOOTH["silu"])
    again = pickle.loads(pickle.dumps(how)).decode(codes)
    torch.testing.assert_close(again, how.decode(codes), rtol=0, atol=0)
