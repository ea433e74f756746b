"""Convolutions whose weight trains against PyTorch's own: values, gradients, what is kept."""

import pytest
import torch
import torch.nn.functional as F
from helpers.ops import kept_bytes, leaf, randn

from lightning_da3.ops.trained_convolution import trained_conv

CASES = {  # shape of x, shape of the weight, stride, padding, dilation
    "pointwise": ((2, 8, 9, 8), (5, 8, 1, 1), (1, 1), (0, 0), (1, 1)),
    "padded": ((2, 8, 7, 6), (4, 8, 3, 3), (1, 2), (1, 0), (1, 1)),
    "dilated": ((2, 3, 9, 9), (4, 3, 3, 2), (1, 1), (2, 0), (2, 3)),
    "1d": ((2, 4, 17), (3, 4, 3), (2,), (1,), (1,)),
    "3d": ((1, 2, 5, 4, 6), (3, 2, 3, 3, 1), (1, 1, 2), (1, 1, 0), (1, 1, 1)),
}


def found(convolution, inputs):
    y = convolution(*inputs)
    return y, torch.autograd.grad((y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum(), inputs)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, layout):
    shape, kernel, *geometry = CASES[name]
    if layout is torch.channels_last and len(shape) != 4:
        pytest.skip("of two axes alone")
    x = randn(*shape).float().contiguous(memory_format=layout)
    inputs = [leaf(t) for t in (x, randn(*kernel).float(), randn(kernel[0]).float())]
    builtin = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[len(shape)]
    y, (dx, dw, db) = found(lambda x, w, b: trained_conv(x, w, b, *geometry), inputs)
    want, (want_x, want_w, want_b) = found(lambda x, w, b: builtin(x, w, b, *geometry), inputs)
    torch.testing.assert_close((y, dx, db), (want, want_x, want_b))
    assert (dw - want_w).norm() < 0.02 * want_w.norm()


def test_codes_are_kept():
    x, weight = randn(2, 8, 16, 16).float(), leaf(randn(5, 8, 1, 1).float())
    kept = kept_bytes(lambda: trained_conv(x, weight, None, (1, 1), (0, 0), (1, 1)))
    assert x.numel() <= kept < 1.2 * x.numel()


def test_autocast_and_a_frozen_input():
    x, weight = randn(2, 8, 6, 6).float(), leaf(randn(5, 8, 1, 1).float())
    with torch.autocast("cpu", torch.bfloat16):
        y = trained_conv(x, weight, None, (1, 1), (0, 0), (1, 1))
        assert y.dtype is torch.bfloat16
    y.sum().backward()
    want = x.sum((0, 2, 3)).expand(5, -1)[..., None, None]
    torch.testing.assert_close(weight.grad, want, rtol=0.05, atol=0.5)
