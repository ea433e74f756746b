"""Convolutions with frozen weights against PyTorch's own: values, gradients, what is kept."""

import functools

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
from torch import nn

from lightning_da3.nn.convolution import FrozenConvTranspose
from lightning_da3.nn.frozen import frozen
from lightning_da3.ops import convolution
from lightning_da3.ops.convolution import frozen_conv, frozen_conv_transpose, pad_mode

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
        lambda t: frozen_conv(t, weight, bias, stride, padding, dilation, groups),
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
