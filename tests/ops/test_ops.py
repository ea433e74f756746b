"""Every op against PyTorch's own: values, gradients, and what is kept for the backward."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.ops import FLOAT, kept_bytes, leaf, randn
from torch import nn

from lightning_da3.memory import saved_activation_bytes
from lightning_da3.nn.frozen import FrozenConv, FrozenConvTranspose, QuantizedGradActivation, frozen
from lightning_da3.ops import activation, bits, convolution
from lightning_da3.ops.activation import Slopes, piecewise_linear
from lightning_da3.ops.adapter import adapt
from lightning_da3.ops.adapter_cells import AdapterOptions, Weights
from lightning_da3.ops.bits import dense, pack_between, unpack
from lightning_da3.ops.codes import Rows
from lightning_da3.ops.convolution import frozen_conv, frozen_conv_transpose, pad_mode
from lightning_da3.ops.host import coarse_grid, divides, read, upsample, write
from lightning_da3.ops.normalization import frozen_affine
from lightning_da3.ops.pooling import adaptive_avg_pool, avg_pool, max_pool
from lightning_da3.ops.recomputed import activated, recomputed
from lightning_da3.ops.smooth import SMOOTH, quantized_grad_activation
from lightning_da3.ops.tokens import TokenGrid, read_tokens, write_tokens


def value_and_gradient(fn, x):
    x = leaf(x)
    y = fn(x)
    (grad,) = torch.autograd.grad(y, x, torch.empty_like(y).copy_(randn(*y.shape, seed=7)))
    return y.detach(), grad


def assert_like_the_builtin(ours, builtin, x, **tolerance):
    """Same value and gradient; exact to the bit where no tolerance is given."""
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    y, grad = value_and_gradient(ours, x)
    expected_y, expected_grad = value_and_gradient(builtin, x)
    torch.testing.assert_close(y, expected_y, **tolerance)
    torch.testing.assert_close(grad, expected_grad, **tolerance)


def gradcheck(fn, *inputs):
    assert torch.autograd.gradcheck(fn, [leaf(x) for x in inputs])


def assert_no_graph(fn, x):
    """Nothing is kept, and nothing computed, that only a backward pass would need."""
    assert not fn(x).requires_grad
    with torch.no_grad():
        y = fn(leaf(x))
    assert y.grad_fn is None
    assert kept_bytes(fn, x) == 0


# --- the helpers themselves


def test_the_comparison_tells_a_wrong_gradient():
    with pytest.raises(AssertionError):
        assert_like_the_builtin(lambda x: x.relu(), lambda x: x.relu().detach() + 0 * x, randn(9))


# --- convolution

CONVS = {
    # shape of x, shape of the weight, stride, padding, dilation, groups
    "plain": ((2, 3, 5, 5), (4, 3, 3, 3), (1, 1), (0, 0), (1, 1), 1),
    "padded": ((1, 2, 5, 4), (3, 2, 3, 3), (1, 1), (1, 2), (1, 1), 1),
    "strided, rest of 1": ((1, 2, 6, 7), (2, 2, 3, 3), (2, 2), (1, 1), (1, 1), 1),
    "strided, rest of 2": ((1, 2, 7, 8), (2, 2, 2, 3), (3, 3), (0, 1), (1, 1), 1),
    "dilated": ((1, 2, 7, 6), (2, 2, 3, 2), (1, 2), (2, 0), (2, 3), 1),
    "grouped": ((2, 4, 5, 5), (6, 2, 3, 3), (2, 1), (1, 1), (1, 1), 2),
    "depthwise": ((1, 3, 5, 5), (6, 1, 3, 3), (1, 1), (1, 1), (1, 1), 3),
    "pointwise": ((2, 3, 4, 3), (5, 3, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "pointwise, strided": ((2, 3, 5, 6), (5, 3, 1, 1), (2, 2), (0, 0), (1, 1), 1),
    "pointwise, padded": ((1, 2, 3, 3), (2, 2, 1, 1), (1, 1), (1, 0), (1, 1), 1),
    "a stride beyond the kernel": ((1, 2, 7, 7), (2, 2, 2, 2), (4, 3), (0, 0), (1, 1), 1),
    "no sample": ((0, 3, 5, 5), (4, 3, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "1d": ((2, 4, 7), (4, 2, 3), (2,), (1,), (1,), 2),
    "3d": ((1, 2, 3, 4, 3), (2, 2, 2, 3, 1), (1, 2, 1), (1, 0, 0), (1, 1, 1), 1),
}


def conv_case(name, dtype=torch.float64, layout=torch.contiguous_format):
    shape, kernel, stride, padding, dilation, groups = CONVS[name]
    axes = len(kernel) - 2
    x, weight, bias = randn(*shape), randn(*kernel, seed=1), randn(kernel[0], seed=2)
    x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
    if axes == 2:
        x, weight = x.to(memory_format=layout), weight.to(memory_format=layout)
    builtin = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[axes]
    return (
        x,
        lambda t, slopes=None: frozen_conv(
            t, weight, bias, stride, padding, dilation, groups, slopes
        ),
        lambda t: builtin(t, weight, bias, stride, padding, dilation, groups),
    )


@pytest.mark.parametrize("name", [name for name in CONVS if name != "no sample"])
def test_frozen_conv_gradcheck(name):
    x, ours, _ = conv_case(name)
    gradcheck(ours, x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", CONVS)
def test_frozen_conv_is_the_builtin(name, dtype, layout):
    x, ours, builtin = conv_case(name, dtype, layout)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_like_the_builtin(ours, builtin, x, rtol=tolerance, atol=tolerance)


FUSED = {
    "relu": (Slopes(), F.relu),
    "relu6": (Slopes(high=6.0), F.relu6),
    "leaky": (Slopes(slope=0.2), lambda y: F.leaky_relu(y, 0.2)),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("slopes", FUSED)
@pytest.mark.parametrize(
    "name", ["strided, rest of 2", "depthwise", "pointwise", "no sample", "1d"]
)
def test_frozen_conv_with_an_activation_is_the_two_builtins(name, slopes, layout):
    x, ours, builtin = conv_case(name, torch.float32, layout)
    kept, activation_ = FUSED[slopes]
    assert_like_the_builtin(
        lambda t: ours(t, kept), lambda t: activation_(builtin(t)), x, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("slopes", FUSED)
def test_frozen_conv_with_an_activation_keeps_a_bit_an_output(slopes):
    weight = nn.Parameter(randn(6, 3, 3, 3), requires_grad=False)
    kept, _ = FUSED[slopes]
    x = leaf(randn(2, 3, 7, 5))
    gradcheck(lambda t: frozen_conv(t, weight, padding=(1, 1), slopes=kept), x.detach())
    bytes_ = kept_bytes(
        lambda t: frozen_conv(t, weight, padding=(1, 1), slopes=kept), x, constants=[weight]
    )
    assert bytes_ == math.ceil(2 * 6 * 7 * 5 / 8)
    assert_no_graph(lambda t: frozen_conv(t, weight, slopes=kept), x.detach())


def test_frozen_conv_without_a_bias():
    x, weight = randn(2, 3, 5, 5), randn(4, 3, 3, 3)
    assert_like_the_builtin(
        lambda t: frozen_conv(t, weight), lambda t: F.conv2d(t, weight), x, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("kernel", [1, 3])
def test_frozen_conv_result_may_be_overwritten(kernel):
    weight = randn(4, 3, kernel, kernel, dtype=torch.float32).to(memory_format=torch.channels_last)
    x = leaf(randn(1, 3, 5, 5, dtype=torch.float32).to(memory_format=torch.channels_last))
    y = frozen_conv(x, weight)
    expected = y.detach().relu()
    assert torch.equal(y.relu_(), expected)
    y.sum().backward()
    reference = leaf(x)
    F.conv2d(reference, weight).relu().sum().backward()
    torch.testing.assert_close(x.grad, reference.grad)


def test_convolutions_where_autocast_lowers_the_output(monkeypatch):
    """As on GPUs, where autocast knows `torch.convolution`; on CPU only functions that call it."""

    def lowered(x, weight, bias, stride, padding, dilation, groups):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    monkeypatch.setattr(convolution, "conv", lowered)
    x, weight = leaf(randn(2, 3, 6, 6).float()), leaf(randn(4, 3, 3, 3).float())
    with torch.autocast("cpu", torch.bfloat16):
        y = frozen_conv(x, weight.detach(), None, padding=(1, 1))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    reference = leaf(x)
    F.conv2d(reference, weight, padding=1).sum().backward()
    torch.testing.assert_close(x.grad, reference.grad, rtol=0.02, atol=0.1)


def test_frozen_conv_keeps_nothing_where_pytorch_keeps_the_input():
    x = leaf(randn(2, 3, 8, 8, dtype=torch.float32))
    weights = [frozen(randn(4, 3, 3, 3).float()), frozen(randn(4).float())]
    assert kept_bytes(lambda t: frozen_conv(t, *weights), x, constants=weights) == 0
    kept = kept_bytes(lambda t: F.conv2d(t, *weights), x, constants=weights)
    assert kept == 2 * 3 * 8 * 8 * FLOAT


def test_frozen_conv_builds_no_graph_without_need():
    x, ours, _ = conv_case("plain")
    assert_no_graph(ours, x)


MODES = ("reflect", "replicate", "circular", "constant")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("shape", "padding"),
    [((1, 2, 4), (1, 2)), ((2, 1, 4, 3), (2, 1, 0, 3)), ((1, 1, 3, 3, 4), (1, 1, 2, 0, 1, 2))],
    ids=["1d", "2d", "3d"],
)
def test_pad_mode(shape, padding, mode):
    x = randn(*shape)
    gradcheck(lambda t: pad_mode(t, padding, mode), x)
    assert_like_the_builtin(
        lambda t: pad_mode(t, padding, mode), lambda t: F.pad(t, padding, mode), x
    )


@pytest.mark.parametrize("mode", MODES)
def test_pad_mode_keeps_nothing(mode):
    x = leaf(randn(2, 3, 8, 8, dtype=torch.float32))
    assert kept_bytes(lambda t: pad_mode(t, (1, 1, 2, 2), mode), x) == 0
    kept = kept_bytes(lambda t: F.pad(t, (1, 1, 2, 2), mode), x)
    assert kept == (2 * 3 * 8 * 8 * FLOAT if mode in ("reflect", "replicate") else 0)
    assert_no_graph(lambda t: pad_mode(t, (1, 1, 2, 2), mode), x.detach())


# --- a trainable convolution that keeps codes


@pytest.mark.parametrize(
    ("axes", "options"),
    [
        (1, {}),
        (2, {"stride": 2, "padding": 1, "output_padding": 1}),
        (2, {"groups": 2, "dilation": 2}),
        (3, {"stride": 2, "bias": False}),
    ],
)
def test_frozen_conv_transpose(axes, options):
    kind = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[axes]
    layer = kind(4, 6, 3, dtype=torch.float64, **options).requires_grad_(False)
    ours = FrozenConvTranspose(layer)
    x = randn(2, 4, *[5] * axes)
    assert_like_the_builtin(ours, layer, x)
    assert kept_bytes(ours, leaf(x), constants=list(ours.parameters())) == 0


# --- computed again


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
    weight = leaf(randn(3))
    x = randn(4, 3)
    y, n = recomputed(lambda t: (t * weight, len(t)), x, exact=True, parameters=(weight,))
    assert n == 4
    y.sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0))


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


# --- tokens


TOKENS = [((17,), 1), ((11,), 2), ((7,), 0), ((6, 8), 0), ((7, 5), 0), ((2, 4, 4), 0)]


@pytest.mark.parametrize(("size", "own"), TOKENS)
@pytest.mark.parametrize("gated", [True, False])
def test_tokens_gradcheck(size, own, gated):
    place = TokenGrid.of(size, own, 4)
    x = randn(2, *size, 3)
    cells = own + math.prod(place.grid)
    gate = (randn(2, 1, cells, seed=1) > -0.5).double() if gated else None
    addend = randn(2, 3, cells, seed=2)
    gradcheck(lambda t: [r * 1 for r in read_tokens(t * 1, place)], x)
    gradcheck(lambda f, a: write_tokens(f, a, gate, place, exact=True), x, addend)


@pytest.mark.parametrize(("size", "own"), TOKENS)
def test_tokens_lie_in_cells(size, own):
    place = TokenGrid.of(size, own, 4)
    x = randn(2, *size, 3)
    through, p = read_tokens(x, place)
    assert through is x
    assert p.shape == (2, 3, own + math.prod(place.grid))
    assert torch.equal(p[:, :, :own].transpose(1, 2), x.reshape(2, -1, 3)[:, :own])
    y = write_tokens(torch.zeros_like(x), p, torch.ones(2, 1, p.shape[2]).double(), place)
    if divides(place.size, place.grid):  # what was spread from the cells has the cells' means
        torch.testing.assert_close(read_tokens(y, place)[1], p)
    assert torch.equal(y.reshape(2, -1, 3)[:, -1], p[:, :, -1])


def test_the_gradient_of_the_gate_of_single_tokens_is_exact():
    place = TokenGrid.of((10,), 1, 9)
    f, addend, gate = randn(2, 10, 3), randn(2, 3, 10, seed=1), leaf(torch.ones(2, 1, 10).double())
    y = write_tokens(f.clone(), addend, gate, place, exact=True)
    grad = randn(*y.shape, seed=4)
    (got,) = torch.autograd.grad(y, gate, grad)
    torch.testing.assert_close(got[:, 0], (grad * f).sum(2))


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


# --- pools

MAX_POOLS = {
    # shape, kernel, stride, padding, dilation, ceil_mode
    "plain": ((2, 3, 6, 6), (2, 2), (2, 2), (0, 0), (1, 1), False),
    "overlapping": ((1, 2, 7, 8), (3, 2), (2, 1), (1, 1), (1, 1), False),
    "ceil": ((1, 2, 7, 6), (3, 3), (2, 2), (0, 1), (1, 1), True),
    "dilated": ((1, 2, 8, 9), (3, 2), (1, 2), (1, 0), (2, 3), False),
    "no sample": ((0, 2, 6, 6), (2, 2), (2, 2), (0, 0), (1, 1), False),
    "unbatched": ((2, 6, 6), (2, 3), (2, 2), (0, 1), (1, 1), False),
    "widest": ((1, 1, 17, 17), (16, 16), (1, 1), (0, 0), (1, 1), False),
    "too wide for a byte": ((1, 1, 18, 18), (17, 16), (1, 1), (0, 0), (1, 1), False),
    "1d": ((2, 3, 9), (3,), (2,), (1,), (2,), True),
    "1d, unbatched": ((3, 9), (2,), (2,), (0,), (1,), False),
    "3d": ((1, 2, 4, 5, 6), (2, 3, 2), (1, 2, 2), (1, 1, 0), (1, 1, 2), True),
    "3d, unbatched": ((2, 4, 4, 4), (2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1), False),
}


def max_pool_case(name):
    shape, *geometry = MAX_POOLS[name]
    builtin = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(geometry[0])]
    return shape, lambda x: max_pool(x, *geometry), lambda x: builtin(x, *geometry)


@pytest.mark.parametrize("name", MAX_POOLS)
def test_max_pool_is_the_builtin(name):
    shape, ours, builtin = max_pool_case(name)
    assert_like_the_builtin(ours, builtin, randn(*shape))
    assert_like_the_builtin(ours, builtin, randn(*shape).round())  # ties
    assert_like_the_builtin(ours, builtin, torch.zeros(shape))
    assert_like_the_builtin(ours, builtin, torch.full(shape, -math.inf))


@pytest.mark.parametrize("name", ["plain", "overlapping", "ceil", "dilated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_max_pool_of_channels_last(name, dtype):
    shape, ours, builtin = max_pool_case(name)
    x = randn(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    assert_like_the_builtin(ours, builtin, x)


@pytest.mark.parametrize("name", ["overlapping", "ceil", "dilated", "unbatched", "1d", "3d"])
def test_max_pool_gradcheck(name):
    shape, ours, _ = max_pool_case(name)
    gradcheck(ours, randn(*shape))


@pytest.mark.parametrize("name", ["plain", "ceil", "widest", "1d", "3d"])
def test_max_pool_keeps_half_a_byte_an_output_or_one(name):
    shape, ours, builtin = max_pool_case(name)
    x = leaf(randn(*shape, dtype=torch.float32)) * 1
    outputs = builtin(x).numel()
    index_bytes = 8  # of PyTorch's own
    kept = kept_bytes(ours, x)
    assert kept == (outputs if name == "widest" else math.ceil(outputs / 2))
    assert kept_bytes(builtin, x) == x.numel() * FLOAT + outputs * index_bytes


def test_max_pool_builds_no_graph_without_need():
    for name in ("plain", "1d", "3d"):
        shape, ours, _ = max_pool_case(name)
        assert_no_graph(ours, randn(*shape))


AVG_POOLS = {
    # shape, kernel, stride, padding, ceil_mode, count_include_pad, divisor
    "plain": ((2, 3, 6, 6), (2, 2), (2, 2), (0, 0), False, True, None),
    "padded": ((1, 2, 7, 6), (3, 2), (2, 1), (1, 1), False, True, None),
    "without pad": ((1, 2, 7, 6), (3, 3), (2, 2), (1, 1), True, False, None),
    "ceil": ((1, 2, 7, 6), (3, 3), (2, 2), (1, 1), True, True, None),
    "divisor": ((1, 2, 5, 5), (2, 2), (2, 2), (0, 0), False, True, 3),
    "no sample": ((0, 2, 6, 6), (2, 2), (2, 2), (0, 0), False, True, None),
    "unbatched": ((2, 5, 6), (2, 3), (2, 2), (0, 1), False, True, None),
    "1d": ((2, 3, 9), (3,), (2,), (1,), True, False, None),
    "3d": ((1, 2, 4, 5, 6), (2, 3, 2), (1, 2, 2), (1, 1, 0), True, False, 5),
}


def avg_pool_case(name):
    shape, *arguments = AVG_POOLS[name]
    axes = len(arguments[0])
    builtin = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[axes]
    own = arguments[:-1] if axes == 1 else arguments
    return shape, lambda x: avg_pool(x, *arguments), lambda x: builtin(x, *own)


@pytest.mark.parametrize("name", AVG_POOLS)
def test_avg_pool(name):
    shape, ours, builtin = avg_pool_case(name)
    x = randn(*shape)
    assert_like_the_builtin(ours, builtin, x)
    if x.numel():
        gradcheck(ours, x)
    if x.dim() == 4:
        layout = torch.channels_last
        assert_like_the_builtin(ours, builtin, x.float().contiguous(memory_format=layout))


@pytest.mark.parametrize("name", ["plain", "without pad", "1d", "3d"])
def test_avg_pool_keeps_nothing(name):
    shape, ours, builtin = avg_pool_case(name)
    x = leaf(randn(*shape, dtype=torch.float32)) * 1
    assert kept_bytes(ours, x) == 0
    assert kept_bytes(builtin, x) == x.numel() * FLOAT
    assert_no_graph(ours, x.detach())


ADAPTIVE = {
    # shape, grid
    "to one": ((2, 3, 5, 4), (1, 1)),
    "divisible": ((2, 3, 6, 4), (3, 2)),
    "not divisible": ((1, 2, 7, 5), (3, 4)),
    "larger": ((1, 2, 3, 3), (5, 4)),
    "one axis kept": ((1, 2, 6, 5), (None, 2)),
    "no sample": ((0, 2, 6, 6), (3, 3)),
    "unbatched": ((2, 6, 5), (2, 2)),
    "1d": ((2, 3, 7), (3,)),
    "1d to one": ((2, 3, 7), (1,)),
    "3d": ((1, 2, 4, 5, 3), (2, 2, None)),
}


def adaptive_case(name):
    shape, grid = ADAPTIVE[name]
    builtin = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
    return shape, lambda x: adaptive_avg_pool(x, grid), lambda x: builtin[len(grid)](x, grid)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_avg_pool(name):
    shape, ours, builtin = adaptive_case(name)
    x = randn(*shape)
    assert_like_the_builtin(ours, builtin, x, rtol=1e-12, atol=1e-12)
    if x.numel():
        gradcheck(ours, x)
    if x.dim() == 4:
        x = x.float().contiguous(memory_format=torch.channels_last)
        assert_like_the_builtin(ours, builtin, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["to one", "divisible", "not divisible", "1d", "3d"])
def test_adaptive_avg_pool_keeps_nothing(name):
    shape, ours, builtin = adaptive_case(name)
    x = leaf(randn(*shape, dtype=torch.float32)) * 1
    assert kept_bytes(ours, x) == 0
    assert kept_bytes(builtin, x) == (0 if "to one" in name else x.numel() * FLOAT)
    assert_no_graph(ours, x.detach())


# --- batch norm that could not be folded


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 5), (0, 3, 2, 2), (1, 3, 2, 2, 2)])
def test_frozen_affine(shape, inplace):
    x, scale, shift = randn(*shape), randn(3, seed=1), randn(3, seed=2)

    def ours(t):
        return frozen_affine(t * 1, scale, shift, inplace)

    def builtin(t):
        zero, one = torch.zeros(3).double(), torch.ones(3).double()
        return F.batch_norm(t, zero, one, scale, shift, eps=0.0)

    assert_like_the_builtin(ours, builtin, x, rtol=1e-12, atol=1e-12)
    if x.numel():
        gradcheck(ours, x)
    assert_no_graph(lambda t: frozen_affine(t.clone(), scale, shift, inplace), x)


@pytest.mark.parametrize("inplace", [False, True])
def test_frozen_affine_of_channels_last(inplace):
    x = randn(2, 3, 4, 5, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    scale, shift = randn(3, seed=1).float(), randn(3, seed=2).float()
    y, grad = value_and_gradient(lambda t: frozen_affine(t * 1, scale, shift, inplace), x)
    torch.testing.assert_close(y, x * scale.view(3, 1, 1) + shift.view(3, 1, 1))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("inplace", [False, True])
def test_frozen_affine_keeps_nothing(inplace):
    constants = [frozen(randn(3).float()), frozen(randn(3).float())]
    norm = nn.BatchNorm2d(3).eval().requires_grad_(False)
    x = leaf(randn(2, 3, 4, 4, dtype=torch.float32)) * 1
    assert saved_activation_bytes(norm, x) == x.numel() * FLOAT
    kept = kept_bytes(lambda t: frozen_affine(t, *constants, inplace), x, constants=constants)
    assert kept == 0


# --- hosts

GRIDS = {
    # shape of the map, grid
    "cells of 2 x 3": ((2, 3, 4, 6), (2, 2)),
    "cells of single pixels": ((2, 3, 3, 2), (3, 2)),
    "one cell": ((2, 3, 3, 4), (1, 1)),
    "cells that differ": ((2, 3, 5, 7), (2, 3)),
    "one axis divides": ((1, 2, 6, 5), (3, 2)),
    "a grid beyond the map": ((1, 2, 3, 2), (4, 4)),
    "1d": ((2, 3, 6), (2,)),
    "1d, cells that differ": ((2, 3, 7), (3,)),
    "3d": ((1, 2, 4, 2, 4), (2, 1, 2)),
    "3d, cells that differ": ((1, 2, 3, 4, 3), (2, 3, 2)),
}
POOLS = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


@pytest.mark.parametrize(
    ("size", "max_cells", "grid"),
    [
        ((14, 14), 49, (7, 7)),
        ((13, 15), 49, (7, 5)),
        ((7, 7), 49, (7, 7)),
        ((56, 8), 49, (7, 4)),
        ((3, 3), 49, (3, 3)),
        ((9, 9), 1, (1, 1)),
        ((9, 9), 3, (1, 1)),
        ((100,), 49, (34,)),
        ((9, 9, 9), 27, (3, 3, 3)),
        ((0, 4), 16, (1, 4)),
    ],
)
def test_coarse_grid(size, max_cells, grid):
    assert coarse_grid(size, max_cells) == grid


@pytest.mark.parametrize("name", GRIDS)
def test_read(name):
    shape, grid = GRIDS[name]
    x = randn(*shape)

    def ours(t):
        through, pooled = read(t * 1, grid)
        return torch.cat([(through * 2).flatten(), pooled.flatten()])

    def builtin(t):
        return torch.cat([(t * 2).flatten(), POOLS[len(grid)](t, grid).flatten()])

    assert_like_the_builtin(ours, builtin, x, rtol=1e-12, atol=1e-12)
    gradcheck(ours, x)


def test_read_of_channels_last():
    x = randn(2, 4, 6, 6, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    weight = randn(4, 4, 3, 3, dtype=torch.float32)

    def ours(t):
        through, pooled = read(t, (2, 3))
        return frozen_conv(through, weight, None, padding=(1, 1)).sum() * pooled.square().sum()

    def builtin(t):
        pooled = F.adaptive_avg_pool2d(t, (2, 3))
        return F.conv2d(t, weight, padding=1).sum() * pooled.square().sum()

    assert_like_the_builtin(ours, builtin, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", [0, 1], ids=["input alone", "cells alone"])
def test_read_where_one_result_gets_no_gradient(which):
    x = leaf(randn(2, 3, 4, 4))
    (read(x, (2, 2))[which] * 3).sum().backward()
    expected = 3.0 if which == 0 else 3.0 / 4
    torch.testing.assert_close(x.grad, torch.full_like(x, expected))


def test_read_keeps_nothing_and_builds_no_graph_without_need():
    x = leaf(randn(2, 3, 6, 6, dtype=torch.float32)) * 1
    assert kept_bytes(lambda t: read(t, (3, 3)), x) == 0
    assert kept_bytes(lambda t: F.adaptive_avg_pool2d(t, (3, 3)), x) > 0
    assert_no_graph(lambda t: read(t, (3, 3))[1], x.detach())
    plain = x.detach()
    assert read(plain, (3, 3))[0] is plain


def host_case(name):
    shape, grid = GRIDS[name]
    coarse = (shape[0], shape[1], *grid)
    gate = (randn(shape[0], 1, *grid, seed=2) > 0).double()
    return randn(*shape), randn(*coarse, seed=1), gate


def plain_write(f, addend, gate):
    """`write` in plain PyTorch."""
    size = f.shape[2:]
    y = f if gate is None else f * upsample(gate, size)
    return y + upsample(addend, size)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", GRIDS)
def test_write_is_plain_pytorch_but_for_the_gate(name, gated, exact):
    f, addend, gate = host_case(name)
    gate = gate if gated else None
    f, addend = leaf(f), leaf(addend)
    y = write(f * 1, addend, gate, exact)
    expected = plain_write(f, addend, gate)
    assert torch.equal(y, expected)
    grad = randn(*y.shape, seed=3)
    got = torch.autograd.grad(y, [f, addend], grad)
    for one, other in zip(got, torch.autograd.grad(expected, [f, addend], grad), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    gradcheck(lambda a, b: write(a * 1, b, gate, exact), f, addend)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_write_overwrites_its_input(layout):
    f, addend, gate = (t.float() for t in host_case("cells of 2 x 3"))
    f = f.contiguous(memory_format=layout)
    expected = plain_write(f, addend, gate)
    y = write(f, addend, gate)
    assert y is f
    assert torch.equal(y, expected)
    assert y.grad_fn is None
    trained = leaf(f) * 1
    assert write(trained, addend, gate) is trained


def gate_gradient(f, addend, gate, grad, exact):
    gate = leaf(gate)
    return torch.autograd.grad(write(f.clone(), addend, gate, exact), gate, grad)[0]


def exact_gate_gradient(f, addend, gate, grad):
    gate = leaf(gate)
    return torch.autograd.grad(plain_write(f, addend, gate), gate, grad)[0]


@pytest.mark.parametrize("name", [name for name in GRIDS if "beyond" not in name])
def test_the_gate_gradient_is_its_stated_estimate(name):
    """Sum over channels of (sum over the cell of dL/dy) x (mean over the cell of f)."""
    f, addend, gate = host_case(name)
    grad = randn(*f.shape, seed=3)
    axes = len(gate.shape) - 2
    if all(n % g == 0 for n, g in zip(f.shape[2:], gate.shape[2:], strict=True)):
        means = POOLS[axes](f, gate.shape[2:])
        sums = POOLS[axes](grad, gate.shape[2:]) * (f[0, 0].numel() / gate[0, 0].numel())
        expected = (sums * means).sum(1, keepdim=True)
        torch.testing.assert_close(gate_gradient(f, addend, gate, grad, exact=True), expected)
    flat = torch.ones_like(f) * randn(1, f.shape[1], *[1] * axes)  # cells without variation
    torch.testing.assert_close(
        gate_gradient(flat, addend, gate, grad, exact=True),
        exact_gate_gradient(flat, addend, gate, grad),
    )


def test_the_gate_gradient_is_exact_for_single_pixels():
    f, addend, gate = host_case("cells of single pixels")
    grad = randn(*f.shape, seed=3)
    expected = exact_gate_gradient(f, addend, gate, grad)
    torch.testing.assert_close(gate_gradient(f, addend, gate, grad, exact=True), expected)
    coded = gate_gradient(f, addend, gate, grad, exact=False)
    ranges = f.flatten(2).amax(2) - f.flatten(2).amin(2)
    bound = (grad.abs() * (ranges / 510)[:, :, None, None]).sum(1, keepdim=True)
    assert ((coded - expected).abs() <= bound * (1 + 1e-6)).all()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("detail", "least"),
    # measured: 0.999, 0.98, 0.77, 0.24
    [(4, 0.99), (8, 0.97), (16, 0.7), (32, 0.2)],
    ids=["smooth", "detail of a cell's size", "half of it", "white noise"],
)
def test_how_good_the_gate_gradient_is(detail, least, exact):
    """Cosine with the exact gradient, cells of 4 x 4 pixels on maps of 32 x 32, 16 channels.

    `detail` is the number of random values along an axis that the maps are interpolated from.
    """

    def smooth(seed):
        values = randn(4, 16, detail, detail, seed=seed)
        if detail == 32:
            return values
        return F.interpolate(values, (32, 32), mode="bilinear", align_corners=True)

    f, grad = smooth(0), smooth(1)
    addend, gate = torch.zeros(4, 16, 8, 8).double(), torch.ones(4, 1, 8, 8).double()
    got = gate_gradient(f, addend, gate, grad, exact)
    cosine = F.cosine_similarity(
        got.flatten(), exact_gate_gradient(f, addend, gate, grad).flatten(), 0
    )
    assert cosine >= least


def test_write_keeps_the_gate_and_the_cell_means():
    n, o, cells = 2, 3, 4
    f, addend, gate = (t.float() for t in host_case("cells of 2 x 3"))
    f, addend = leaf(f) * 1, leaf(addend)
    trained = leaf(gate) * 1
    kept_gate, means = n * cells * FLOAT, n * o * cells
    codes = means + 2 * n * FLOAT  # of all channels together: they are few
    assert kept_bytes(write, f, addend, None) == 0
    assert kept_bytes(write, f, addend, gate) == kept_gate
    assert kept_bytes(write, f, addend, trained, exact=True) == kept_gate + means * FLOAT
    assert kept_bytes(write, f, addend, trained) == kept_gate + codes
    plain = kept_bytes(plain_write, f, addend, trained)
    assert plain >= f.numel() * FLOAT  # f itself, for the gate's gradient


def test_write_builds_no_graph_without_need():
    f, addend, gate = host_case("cells of 2 x 3")
    assert_no_graph(lambda t: write(t.clone(), addend, gate), f)


def plain_adapter(p, noise, weights, eps=1e-5):
    """The adapter in plain PyTorch, its gate straight-through."""
    pad = weights.squeeze.shape[2] // 2
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[p.dim() - 2]
    hidden = conv(p, weights.squeeze, padding=pad)
    normal = F.group_norm(hidden, 1, weights.scale, weights.shift, eps)
    cells = normal.relu().flatten(2).transpose(1, 2)
    logits = F.linear(cells, weights.attend, weights.attend_bias)
    addend = F.linear(torch.sigmoid(logits) * cells, weights.value, weights.value_bias)
    logits = logits if noise is None else logits + noise
    soft = torch.sigmoid(logits)
    gate = (logits > 0).to(p.dtype) + soft - soft.detach()

    def on_grid(rows):
        return rows.transpose(1, 2).unflatten(2, p.shape[2:])

    return on_grid(addend), on_grid(gate)


@pytest.mark.parametrize("reads", ["both", "addend", "gate"])
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize(
    ("shape", "last"),
    [
        ((2, 6, 5), False),
        ((2, 6, 4, 3), False),
        ((2, 6, 4, 3), True),
        ((1, 6, 1, 1), True),
        ((2, 6, 2, 3, 2), False),
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel", [1, 3])
def test_the_adapter_is_that_of_plain_pytorch(kernel, shape, last, noisy, reads):
    torch.manual_seed(1)
    axes, m, o = len(shape) - 2, 4, 5
    sizes = [(m, 6, *[kernel] * axes), (m,), (m,), (1, m), (1,), (o, m), (o,)]
    weights = Weights(*[leaf(torch.randn(size, dtype=torch.float64)) for size in sizes])
    p = torch.randn(shape, dtype=torch.float64)
    p = leaf(p.contiguous(memory_format=torch.channels_last) if last else p)
    noise = torch.randn(shape[0], p[0, 0].numel(), 1, dtype=torch.float64) if noisy else None
    said = adapt(p, noise, weights, AdapterOptions(1e-5, gated=True, exact=True))
    expected = plain_adapter(p, noise, weights)
    torch.testing.assert_close(said, expected)
    pick = {"both": slice(None), "addend": slice(1), "gate": slice(1, None)}[reads]
    others = [torch.randn_like(y) for y in expected[pick]]
    sources = [p, *weights[: 5 if reads == "gate" else None]]
    got = torch.autograd.grad(said[pick], sources, others)
    want = torch.autograd.grad(expected[pick], sources, others)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_the_adapter_keeps_codes_and_few_channels():
    weights = Weights(
        *[leaf(torch.randn(s)) for s in [(4, 64, 3, 3), (4,), (4,), (1, 4), (1,), (32, 4), (32,)]]
    )
    p = leaf(torch.randn(2, 64, 7, 7))
    codes, hidden, own = Rows.of(p).encode(p).numel(), 2 * 4 * 49, 2 * FLOAT  # own: rstd
    for exact, expected in (
        (False, codes + hidden * FLOAT // 2 + own),
        (True, (p.numel() + hidden) * FLOAT),
    ):
        kept = kept_bytes(
            lambda *t, e=exact: adapt(t[0], None, weights, AdapterOptions(1e-5, True, e)), p
        )
        assert kept == expected


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e9])
def test_the_hidden_map_is_kept_in_half_whatever_its_range(scale, compiled):
    """Its mean is far from zero, too: 1e9 is far above what half precision holds."""
    torch._dynamo.reset()
    sizes = [(8, 32, 1, 1), (8,), (8,), (1, 8), (1,), (16, 8), (16,)]
    weights = Weights(*[leaf(randn(*s, seed=i).float()) for i, s in enumerate(sizes)])
    p = leaf((randn(3, 32, 5, 5).float() + 2) * scale)

    def gradient(exact):
        def of(p, *weights):
            return adapt(
                p, None, Weights(*weights), AdapterOptions((1e-3 * scale) ** 2, True, exact)
            )

        of = torch.compile(of, backend="aot_eager_decomp_partition") if compiled else of
        said = of(p, *weights)
        others = [randn(*y.shape, seed=9).float() for y in said]
        return torch.autograd.grad(said, [p, *weights], others)

    for one, other in zip(gradient(exact=False), gradient(exact=True), strict=True):
        assert (one - other).norm() <= 0.01 * other.norm()
        assert other.norm() > 0


def test_a_constant_hidden_map_has_a_gradient():
    sizes = [(4, 6, 1, 1), (4,), (4,), (1, 4), (1,), (5, 4), (5,)]
    weights = Weights(
        *[leaf(torch.zeros(s) if i == 0 else torch.ones(s)) for i, s in enumerate(sizes)]
    )
    p = leaf(torch.randn(2, 6, 3, 3))
    got = torch.autograd.grad(
        adapt(p, None, weights, AdapterOptions(1e-5, True, False))[0].sum(), weights
    )
    want = torch.autograd.grad(plain_adapter(p, None, weights)[0].sum(), weights)
    torch.testing.assert_close(got, want, rtol=0.02, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # of the compiler about itself
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("exact", [False, True], ids=["coded", "exact"])
@pytest.mark.parametrize("shape", [(2, 64, 17), (2, 64, 4, 3)], ids=str)
def test_the_compiled_adapter_keeps_what_the_eager_one_keeps(shape, exact, autocast):
    torch._dynamo.reset()
    kernel = [1] if len(shape) == 3 else [3, 3]
    sizes = [(16, 64, *kernel), (16,), (16,), (1, 16), (1,), (32, 16), (32,)]
    weights = [leaf(randn(*size).float()) for size in sizes]
    p = leaf(randn(*shape).float())

    def ours(p, *weights):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return adapt(p, None, Weights(*weights), AdapterOptions(1e-5, True, exact))

    # quick: types and layouts of the op; what inductor keeps, test_works_with.py measures
    backend = "aot_eager_decomp_partition"
    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    said, expected = compiled(p, *weights), ours(p, *weights)
    torch.testing.assert_close(said, expected)
    others = [torch.randn_like(y) for y in expected]
    got = torch.autograd.grad(said, [p, *weights], others)
    want = torch.autograd.grad(expected, [p, *weights], others)
    torch.testing.assert_close(got, want)
    kept = [kept_bytes(f, p, *weights, constants=weights) for f in (compiled, ours)]
    assert kept[0] <= kept[1]


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape", [(1, 64, 7, 7), (1, 64, 4, 3), (2, 64, 3, 3), (1, 64, 9)], ids=str
)
def test_a_compiler_knows_how_an_adapter_s_results_are_laid_out(shape, last):
    kernel = [1] if len(shape) == 3 else [3, 3]
    sizes = [(16, 64, *kernel), (16,), (16,), (1, 16), (1,), (32, 16), (32,)]
    p = randn(*shape).float()
    if last and len(shape) == 4:
        p = p.contiguous(memory_format=torch.channels_last)
    weights = [randn(*size).float() for size in sizes]
    for exact in (True, False):
        arguments = (p, None, weights, 1e-5, True, exact, torch.float32)
        torch.library.opcheck(
            torch.ops.lightning_da3.adapt.default, arguments, test_utils=("test_faketensor",)
        )


def test_the_adapter_without_a_trained_convolution():
    weights = Weights(
        *[torch.randn(s) for s in [(4, 6, 3, 3), (4,), (4,), (1, 4), (1,), (5, 4), (5,)]]
    )
    p = leaf(torch.randn(2, 6, 4, 4))
    how = AdapterOptions(1e-5, gated=True, exact=False)
    kept = kept_bytes(lambda t: adapt(t, None, weights, how), p)
    own = sum(weight.numel() for weight in weights) + 2  # and every sample's rstd
    # the hidden map in half: no weight's gradient reads p
    assert kept == 2 * 4 * 16 * FLOAT // 2 + own * FLOAT
    got = torch.autograd.grad(adapt(p, None, weights, how)[0].sum(), p)
    want = torch.autograd.grad(plain_adapter(p, None, weights)[0].sum(), p)
    assert (got[0] - want[0]).norm() <= 1e-3 * want[0].norm()


def test_a_pointwise_convolution_of_one_sample_is_channels_last():
    """By its strides, too: what reads it would copy it otherwise."""
    last = torch.channels_last
    x = torch.randn(1, 8, 5, 5).to(memory_format=last).requires_grad_()
    y = frozen_conv(x, torch.randn(6, 8, 1, 1).to(memory_format=last))
    assert y.stride() == (150, 1, 30, 6)
    assert not y._is_view()


@pytest.mark.filterwarnings("ignore")  # of the compiler about itself
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_the_compiled_convolution_is_the_eager_one(transposed, layout, autocast):
    """In value, gradient, type and layout; the weight rests in half."""
    torch._dynamo.reset()
    x = leaf(torch.randn(2, 4, 5, 6).to(memory_format=layout))
    weight = torch.randn(4, 4, 3, 3).bfloat16().to(memory_format=layout)
    of = frozen_conv
    if transposed:
        of = functools.partial(frozen_conv_transpose, output_padding=(0, 1), groups=1)

    def ours(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return of(x, weight, None, stride=(2, 2), padding=(1, 1), dilation=(1, 1))

    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    said, expected = compiled(x), ours(x)
    torch.testing.assert_close(said, expected, check_stride=True)
    others = torch.randn_like(expected)
    got = torch.autograd.grad(said, x, others)
    torch.testing.assert_close(got, torch.autograd.grad(expected, x, others))
    assert kept_bytes(compiled, x, constants=[weight]) == 0
