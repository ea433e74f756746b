"""Smooth activations against PyTorch's own: values, and gradients within the stated bound."""

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_da3.errors import ConfigError
from lightning_da3.ops.bits import dense
from lightning_da3.ops.smooth import SMOOTH, celu, elu, gelu, quantized_grad_activation, softplus

CASES = {
    "silu": (SMOOTH["silu"], nn.SiLU()),
    "hardswish": (SMOOTH["hardswish"], nn.Hardswish()),
    "mish": (SMOOTH["mish"], nn.Mish()),
    "sigmoid": (SMOOTH["sigmoid"], nn.Sigmoid()),
    "logsigmoid": (SMOOTH["logsigmoid"], nn.LogSigmoid()),
    "tanh": (SMOOTH["tanh"], nn.Tanh()),
    "tanhshrink": (SMOOTH["tanhshrink"], nn.Tanhshrink()),
    "softsign": (SMOOTH["softsign"], nn.Softsign()),
    "selu": (SMOOTH["selu"], nn.SELU()),
    "gelu": (SMOOTH["gelu"], nn.GELU()),
    "gelu, tanh": (gelu("tanh"), nn.GELU(approximate="tanh")),
    "elu": (SMOOTH["elu"], nn.ELU()),
    "elu of 2.5": (elu(2.5), nn.ELU(2.5)),
    "elu below 0": (elu(-0.7), nn.ELU(-0.7)),
    "celu": (SMOOTH["celu"], nn.CELU()),
    "celu of 0.3": (celu(0.3), nn.CELU(0.3)),
    "softplus": (SMOOTH["softplus"], nn.Softplus()),
    "softplus of 3": (softplus(3.0, 2.0), nn.Softplus(3.0, 2.0)),
}
EVERY = pytest.mark.parametrize("name", CASES)


def randn(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def leaf(x):
    return x.detach().clone(memory_format=torch.preserve_format).requires_grad_()


def value_and_gradient(fn, x, grad):
    x = x.detach().requires_grad_()  # no clone: that would be dense
    y = fn(x)
    (grad_x,) = torch.autograd.grad(y, x, grad)
    return y.detach(), grad_x


def kept(fn, x):
    """Every tensor that autograd saves while `fn` runs."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = fn(x)
    assert y.shape == x.shape
    return saved


def assert_within_the_bound(smooth, builtin, x, rounding=1e-6):
    grad = randn(*x.shape, dtype=x.dtype, seed=7)
    y, grad_x = value_and_gradient(lambda t: quantized_grad_activation(t, smooth), x, grad)
    expected_y, expected = value_and_gradient(builtin, x, grad)
    assert y.dtype == grad_x.dtype == x.dtype
    torch.testing.assert_close(y, expected_y, rtol=0, atol=0)
    allowed = (smooth.step / 2 + rounding) * grad.abs().double()
    assert ((grad_x.double() - expected.double()).abs() <= allowed).all()


# --- the table


def test_every_name_is_tried():
    assert set(SMOOTH) <= set(CASES)
    assert all(smooth.name == name for name, smooth in SMOOTH.items())


@EVERY
def test_the_range_of_the_derivative_is_exact(name):
    smooth, builtin = CASES[name]
    jumps = torch.tensor([-1e5, -3 + 1e-9, -1e-9, 3 - 1e-9, 1e5], dtype=torch.float64)
    x = leaf(torch.cat([torch.linspace(-30, 30, 600_001, dtype=torch.float64), jumps]))
    (slopes,) = torch.autograd.grad(builtin(x).sum(), x)
    assert smooth.low - 1e-12 <= slopes.min() <= smooth.low + 1e-6
    assert smooth.high - 1e-6 <= slopes.max() <= smooth.high + 1e-12


@EVERY
def test_how_much_the_derivative_bends(name):
    smooth, _ = CASES[name]
    x = torch.linspace(-25, 25, 1_000_001, dtype=torch.float64)
    slopes = smooth.derivative(x, smooth.value(x))
    most = (slopes.diff().abs() / x.diff()).max()
    if math.isinf(smooth.bend):
        assert most > 100
    else:
        assert most <= smooth.bend * (1 + 1e-6) <= 1.01 * most


@EVERY
def test_the_derivative_is_autograds(name):
    smooth, builtin = CASES[name]
    x = leaf(torch.linspace(-25, 25, 5001, dtype=torch.float64))
    y = builtin(x)
    (slopes,) = torch.autograd.grad(y.sum(), x)
    ours = smooth.derivative(x.detach(), y.detach())
    # PyTorch takes 1 / alpha of CELU in float32
    torch.testing.assert_close(ours, slopes, rtol=1e-6 if "celu" in name else 1e-12, atol=1e-12)
    assert ours.data_ptr() not in (x.data_ptr(), y.data_ptr())


@EVERY
def test_modules_may_hold_it(name):
    smooth, _ = CASES[name]
    x = randn(5)
    for twin in (copy.deepcopy(smooth), pickle.loads(pickle.dumps(smooth))):
        assert torch.equal(twin.value(x), smooth.value(x))
        assert (twin.name, twin.low, twin.high) == (smooth.name, smooth.low, smooth.high)


# --- values and gradients


@EVERY
def test_within_the_bound(name):
    smooth, builtin = CASES[name]
    x = torch.cat([randn(500) * 4, torch.linspace(-30, 30, 501).double(), torch.zeros(1)])
    assert_within_the_bound(smooth, builtin, x, rounding=1e-12)
    assert_within_the_bound(smooth, builtin, x.float())


def test_the_bound_is_no_wider_than_needed():
    smooth, builtin = CASES["silu"]
    x = torch.linspace(-3, 3, 5000)
    ones = torch.ones(5000)
    _, ours = value_and_gradient(lambda t: quantized_grad_activation(t, smooth), x, ones)
    _, exact = value_and_gradient(builtin, x, ones)
    assert (ours - exact).abs().max() > 0.95 * smooth.step / 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@EVERY
def test_half_precision(name, dtype):
    smooth, builtin = CASES[name]
    x = (randn(3, 50) * 3).to(dtype)
    grad = randn(3, 50, dtype=dtype, seed=7)
    y, grad_x = value_and_gradient(lambda t: quantized_grad_activation(t, smooth), x, grad)
    assert y.dtype == grad_x.dtype == dtype
    expected_y, expected = value_and_gradient(builtin, x, grad)
    torch.testing.assert_close(y, expected_y, rtol=0, atol=0)
    rounding = torch.finfo(dtype).eps * (2 if "shrink" in name else 1) * grad.abs().float()
    allowed = smooth.step / 2 * grad.abs().float() + rounding
    assert ((grad_x.float() - expected.float()).abs() <= allowed + 1e-6).all()


@settings(max_examples=50, deadline=None)
@given(
    name=st.sampled_from(sorted(CASES)),
    numbers=st.lists(st.floats(-1e4, 1e4), max_size=9),
)
def test_any_numbers(name, numbers):
    assert_within_the_bound(*CASES[name], torch.tensor(numbers, dtype=torch.float64))


@pytest.mark.parametrize("name", ["gelu", "tanh", "softsign"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_has_its_value(name, value):
    smooth, builtin = CASES[name]
    x = torch.tensor([value, 1.0])
    y, _ = value_and_gradient(lambda t: quantized_grad_activation(t, smooth), x, torch.ones(2))
    torch.testing.assert_close(y, builtin(x), rtol=0, atol=0, equal_nan=True)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
    "with gaps": lambda x: x[:, ::2],
    "expanded": lambda x: x[:, :1].expand(-1, 4, -1, -1),
    "empty": lambda x: x[:0],
    "scalar": lambda x: x[0, 0, 0, 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@EVERY
def test_layouts(name, layout):
    smooth, builtin = CASES[name]
    x = LAYOUTS[layout](randn(3, 5, 3, 7, dtype=torch.float32))
    assert_within_the_bound(smooth, builtin, x)
    y, grad_x = value_and_gradient(
        lambda t: quantized_grad_activation(t, smooth), x, torch.ones_like(x)
    )
    assert y.stride() == builtin(x).stride()
    if dense(x) is x:
        assert grad_x.stride() == x.stride()


def test_a_gradient_of_another_layout():
    smooth, builtin = CASES["silu"]
    x = randn(2, 3, 5, 7).to(memory_format=torch.channels_last)
    grad = randn(2, 3, 5, 7, seed=7)
    _, ours = value_and_gradient(lambda t: quantized_grad_activation(t, smooth), x, grad)
    _, exact = value_and_gradient(builtin, x, grad)
    assert ours.stride() == x.stride()
    assert ((ours - exact).abs() <= (smooth.step / 2 + 1e-9) * grad.abs()).all()


# --- what is kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@EVERY
def test_bytes(name, dtype):
    smooth, builtin = CASES[name]
    x = leaf(randn(2, 3, 5, 7, dtype=dtype))
    saved = kept(lambda t: quantized_grad_activation(t, smooth), x)
    assert sum(t.untyped_storage().nbytes() for t in saved) == 2 * 3 * 5 * 7
    plain = {t.data_ptr(): t.untyped_storage().nbytes() for t in kept(builtin, x)}
    assert sum(plain.values()) >= 210 * dtype.itemsize


@EVERY
def test_without_need_nothing_is_kept_or_coded(name):
    smooth, builtin = CASES[name]
    smooth = replace(smooth, backward=None)  # a call would raise
    x = randn(9)
    with torch.no_grad():
        assert quantized_grad_activation(leaf(x), smooth).grad_fn is None
    assert kept(lambda t: quantized_grad_activation(t, smooth), x) == []
    assert torch.equal(quantized_grad_activation(x, smooth), builtin(x))


# --- in place


@pytest.mark.parametrize("name", ["silu", "hardswish", "mish", "sigmoid"])
def test_without_a_gradient_nothing_is_written_beside_the_input(name):
    """Not even for a moment: the largest maps of a network are in front of its first host."""
    x, made = randn(64), []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            y = func(*args, **(kwargs or {}))
            made.append(y.untyped_storage().data_ptr())
            return y

    want = SMOOTH[name].value(x)
    with torch.no_grad(), Made():
        got = quantized_grad_activation(x, SMOOTH[name], inplace=True)
    assert set(made) == {x.untyped_storage().data_ptr()}
    assert got is x
    torch.testing.assert_close(got, want)


@EVERY
def test_in_place(name):
    smooth, _ = CASES[name]
    x = leaf(randn(2, 3, 5, 7).to(memory_format=torch.channels_last))
    y, expected = x * 1.0, quantized_grad_activation(x, smooth)
    result = quantized_grad_activation(y, smooth, inplace=True)
    assert result.data_ptr() == y.data_ptr()
    assert torch.equal(result, expected)
    (grad,) = torch.autograd.grad(result.sum(), x)
    assert torch.equal(grad, torch.autograd.grad(expected.sum(), x)[0])


def test_in_place_into_what_is_not_dense():
    x = leaf(randn(4, 6))
    whole = x * 1.0
    quantized_grad_activation(whole[:, ::2], SMOOTH["silu"], inplace=True)
    assert torch.equal(whole[:, ::2], F.silu(x[:, ::2]))
    assert torch.equal(whole[:, 1::2], x[:, 1::2])
    (grad,) = torch.autograd.grad(whole.sum(), x)
    assert torch.equal(grad[:, 1::2], torch.ones(4, 3).double())
    (exact,) = torch.autograd.grad(F.silu(x).sum(), x)
    assert ((grad - exact)[:, ::2].abs() <= SMOOTH["silu"].step / 2 + 1e-12).all()


def test_in_place_without_a_gradient():
    x = randn(9)
    expected = F.silu(x)
    assert quantized_grad_activation(x, SMOOTH["silu"], inplace=True) is x
    assert torch.equal(x, expected)


# --- refused


def test_other_approximations():
    with pytest.raises(ConfigError, match="must be 'none' or 'tanh', got 'erf'"):
        gelu("erf")


def test_celu_without_a_bound():
    with pytest.raises(ConfigError, match="`alpha` must be above 0, got -1"):
        celu(-1.0)


def test_a_second_derivative():
    x = leaf(randn(5))
    y = quantized_grad_activation(x, SMOOTH["silu"])
    (grad,) = torch.autograd.grad(y, x, leaf(randn(5)), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# --- compiled


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["silu", "gelu, tanh", "softplus of 3"])
def test_compiled(name, inplace):
    smooth, _ = CASES[name]
    x = randn(2, 3, 5, 7, dtype=torch.float32).to(memory_format=torch.channels_last)

    def run(t):
        return quantized_grad_activation(t * 2.0, smooth, inplace)

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    grad = randn(*x.shape, dtype=x.dtype, seed=7)
    y, grad_x = value_and_gradient(compiled, x, grad)
    expected_y, expected = value_and_gradient(run, x, grad)
    torch.testing.assert_close(y, expected_y)
    # the compiled value may differ by one rounding, and with it a code
    assert ((grad_x - expected).abs() <= 2 * smooth.step * grad.abs() * 1.001).all()
    torch.testing.assert_close(grad_x.mean(), expected.mean(), rtol=0, atol=1e-3)
