"""Activations that keep bits, and how bits are packed."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.ops import (
    FLOAT,
    assert_like_the_builtin,
    assert_no_graph,
    gradcheck,
    kept_bytes,
    leaf,
    randn,
)

from lightning_da3.ops import activation, bits
from lightning_da3.ops.activation import Slopes, piecewise_linear
from lightning_da3.ops.bits import dense, pack_between, unpack

# --- bits


@pytest.fixture(params=["numpy", "torch"])
def packing(request, monkeypatch):
    """Both ways to pack on one machine: CPU's, and the one elsewhere."""
    if request.param == "torch":
        monkeypatch.setattr(bits, "_use_numpy", lambda x: False)
    return request.param


def layouts():
    yield "contiguous", lambda x: x.contiguous()
    yield "channels_last", lambda x: x.contiguous(memory_format=torch.channels_last)
    yield "transposed", lambda x: x.transpose(1, 3).contiguous().transpose(1, 3)
    yield "gaps", lambda x: torch.stack([x, x], -1)[..., 0]
    yield "an offset", lambda x: torch.cat([x, x])[x.shape[0] :]
    yield "expanded", lambda x: x[:1].expand(x.shape)


LAYOUTS = dict(layouts())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 4, 3, 2), (2, 3, 3, 5), (1, 1, 1, 1), (0, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("packing")
def test_unpack_gives_what_pack_was_given(layout, shape, dtype):
    x = dense(LAYOUTS[layout](randn(*shape, dtype=dtype)))
    for low, high in ((0.0, math.inf), (-0.5, 0.5)):
        packed = pack_between(x, low, high)
        assert packed.dtype == torch.uint8
        assert packed.numel() == math.ceil(x.numel() / 8)
        mask = unpack(packed, x.size(), x.stride())
        if min(shape) > 1:  # else strides mean nothing
            assert mask.stride() == x.stride()
        assert torch.equal(mask.bool(), (x > low) & (x < high))


def test_dense_copies_only_what_has_gaps():
    x = randn(2, 4, 3, 2)
    for name in ("contiguous", "channels_last", "transposed", "an offset"):
        made = LAYOUTS[name](x)
        assert dense(made) is made
    for name in ("gaps", "expanded"):
        assert dense(LAYOUTS[name](x)).is_contiguous()


# --- activations

SLOPES = {
    # arguments of piecewise_linear, the built-in, the built-in in place
    "relu": ({}, F.relu, torch.relu_),
    "relu6": ({"high": 6.0}, F.relu6, lambda x: F.relu6(x, inplace=True)),
    "hardtanh": (
        {"low": -0.3, "high": 0.7},
        lambda x: F.hardtanh(x, -0.3, 0.7),
        lambda x: F.hardtanh_(x, -0.3, 0.7),
    ),
    "leaky": ({"slope": 0.2}, lambda x: F.leaky_relu(x, 0.2), lambda x: F.leaky_relu_(x, 0.2)),
}
LARGE = 4.0  # so that values pass 6, too


# nothing is written into expanded memory, by PyTorch either
LAYOUT_CASES = [(name, False) for name in LAYOUTS]
LAYOUT_CASES += [(name, True) for name in LAYOUTS if name != "expanded"]


@pytest.mark.parametrize(("layout", "inplace"), LAYOUT_CASES)
@pytest.mark.parametrize("name", SLOPES)
@pytest.mark.usefixtures("packing")
def test_two_slopes_is_the_builtin(name, layout, inplace):
    arguments, builtin, builtin_ = SLOPES[name]
    x = randn(3, 5, 3, 3, dtype=torch.float32) * LARGE
    x[0, 0, 0] = torch.tensor([0.0, 6.0, -0.3])  # the corners

    def lay_out(t):
        return LAYOUTS[layout](t * 1)  # not a leaf, and not x itself

    assert_like_the_builtin(
        lambda t: piecewise_linear(lay_out(t), Slopes(**arguments), inplace=inplace),
        lambda t: (builtin_ if inplace else builtin)(lay_out(t)),
        x,
        # one rounding of 1 - slope + slope
        **({"rtol": 1e-6, "atol": 0} if name == "leaky" else {}),
    )


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", SLOPES)
def test_two_slopes_gradcheck(name, inplace):
    gradcheck(
        lambda x: piecewise_linear(x.clone(), Slopes(**SLOPES[name][0]), inplace), randn(3, 5) * 2
    )


@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (2, 3, 5, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("packing")
def test_two_slopes_takes_any_shape_and_type(shape, dtype):
    x = randn(*shape, dtype=dtype)
    assert_like_the_builtin(piecewise_linear, F.relu, x)
    assert_like_the_builtin(
        lambda t: piecewise_linear(t, Slopes(-0.5, 0.5)), lambda t: F.hardtanh(t, -0.5, 0.5), x
    )


def test_two_slopes_in_place_is_the_same_tensor():
    x = leaf(randn(4, 4)) * 1
    y = piecewise_linear(x, inplace=True)
    assert y is x
    assert piecewise_linear(x, inplace=False) is not x


def test_two_slopes_in_place_refuses_a_leaf_as_pytorch_does():
    with pytest.raises(RuntimeError, match="leaf Variable"):
        piecewise_linear(leaf(randn(4)), inplace=True)


def test_two_slopes_gradient_keeps_channels_last():
    x = leaf(randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last))
    piecewise_linear(x).square().sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", SLOPES)
@pytest.mark.parametrize("numel", [64, 65, 1])
def test_two_slopes_keeps_a_bit_an_element(name, numel):
    arguments, builtin, _ = SLOPES[name]
    x = leaf(randn(numel, dtype=torch.float32)) * 1
    assert kept_bytes(lambda t: piecewise_linear(t, Slopes(**arguments)), x) == math.ceil(numel / 8)
    assert kept_bytes(builtin, x) == numel * FLOAT
    inplace = kept_bytes(lambda t: piecewise_linear(t, Slopes(**arguments), inplace=True), x)
    assert inplace == math.ceil(numel / 8)


def test_two_slopes_computes_no_bits_without_need(monkeypatch):
    def pack_between(*_):
        raise AssertionError("bits for nobody")

    monkeypatch.setattr(activation, "pack_between", pack_between)
    assert_no_graph(piecewise_linear, randn(2, 3))
    with pytest.raises(AssertionError, match="bits for nobody"):
        piecewise_linear(leaf(randn(2, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("high", [math.inf, 1.0])
def test_bits_of_more_than_is_packed_at_once(high, dtype, monkeypatch):
    x = randn(3, 41).to(dtype)
    want = pack_between(x, 0.0, high)
    monkeypatch.setattr(bits, "AT_ONCE", 16)
    assert torch.equal(pack_between(x, 0.0, high), want)
    inside = (x > 0) & (x < high)
    assert torch.equal(unpack(want, x.size(), x.stride()).bool(), inside)


@pytest.mark.slow
def test_two_slopes_compiles_to_one_graph():
    compiled = torch.compile(
        lambda x: piecewise_linear(x * 2, Slopes(0.0, 6.0)), fullgraph=True, backend="aot_eager"
    )
    x = randn(2, 3, 5, 5, dtype=torch.float32) * LARGE
    assert_like_the_builtin(compiled, lambda t: F.relu6(t * 2), x)
