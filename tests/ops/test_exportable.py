"""What ops compute for files is what they compute otherwise."""

import pytest
import torch
from helpers.ops import leaf, randn

from lightning_da3.ops.activation import Slopes, hard_sigmoid, piecewise_linear
from lightning_da3.ops.codes import Code, Rows
from lightning_da3.ops.exportable import exportable, is_exportable
from lightning_da3.ops.exportable_codes import code_parts, from_parts
from lightning_da3.ops.pooling import max_pool
from lightning_da3.ops.softmax import softmax


def test_the_switch_is_off_outside():
    with exportable():
        assert is_exportable()
        with exportable():
            pass
        assert is_exportable()
    assert not is_exportable()


OPS = {
    "relu": piecewise_linear,
    "relu6": lambda x: piecewise_linear(x, Slopes(0.0, 6.0)),
    "leaky_relu": lambda x: piecewise_linear(x, Slopes(slope=0.1)),
    "hard_sigmoid": hard_sigmoid,
    "max_pool": lambda x: max_pool(x, (2, 2), (2, 2), (0, 0), (1, 1)),
    "softmax": lambda x: softmax(x, -1),
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients(name, layout):
    x = (randn(2, 5, 6, 6) * 4).float().contiguous(memory_format=layout)
    found = []
    for on in (False, True):
        one = leaf(x)
        if on:
            with exportable():
                y = OPS[name](one)
                y.square().sum().backward()
        else:
            y = OPS[name](one)
            y.square().sum().backward()
        found.append((y.detach(), one.grad))
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(plain, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [(3, 8, 4, 4), (2, 5, 16), (4, 7), (3, 1, 1, 1)])
def test_codes(size):
    x = randn(*size).float()
    x[0] = 2.0  # a constant
    for how in [Code.of(x), *([Rows.of(x)] if x.dim() > 2 else [])]:
        with exportable():
            found = how.decode(how.encode(x))
        torch.testing.assert_close(found, how.decode(how.encode(x)), rtol=1e-6, atol=1e-6)


def test_ranges_of_all_sizes():
    rows = randn(4, 16).float() * torch.tensor([[1e-30], [1e-7], [1.0], [1e20]])
    for row in rows:
        back, span = from_parts(*code_parts(row)), row.max() - row.min()
        assert (back - row).abs().max() <= 1.01 * span / 510
