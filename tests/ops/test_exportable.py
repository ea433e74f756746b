"""What ops compute for files is what they compute otherwise."""

import contextlib
import math

import pytest
import torch
from helpers.ops import leaf, randn

from lightning_da3.ops.activation import Slopes, hard_sigmoid, piecewise_linear
from lightning_da3.ops.adapter import adapt
from lightning_da3.ops.adapter_cells import AdapterOptions, Weights
from lightning_da3.ops.codes import Code, Rows
from lightning_da3.ops.exportable import exportable, is_exportable
from lightning_da3.ops.exportable_codes import code_parts, from_parts
from lightning_da3.ops.pooling import max_pool
from lightning_da3.ops.softmax import softmax
from lightning_da3.ops.tokens import TokenGrid, read_tokens, write_tokens


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


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("grid", [(5,), (3, 4), (2, 2, 3)])
def test_adapters(grid, exact, gated):
    p, cells = randn(3, 6, *grid).float(), math.prod(grid)
    kernel = (3,) * len(grid)
    drawn = [randn(*size, seed=i).float() for i, size in enumerate(_sizes(kernel))]
    noise = randn(3, cells, 1, seed=9).float() if gated else None
    options = AdapterOptions(1e-5, gated, exact)
    found = []
    for on in (False, True):
        one, weights = leaf(p), Weights(*map(leaf, drawn))
        with exportable() if on else contextlib.nullcontext():
            addend, gate = adapt(one, noise, weights, options)
            loss = (addend * randn(*addend.shape, seed=7).float()).sum()
            loss = loss if gate is None else loss + (gate * randn(*gate.shape).float()).sum()
            loss.backward()
        made = [addend] if gate is None else [addend, gate]
        found.append([*(y.detach() for y in made), one.grad, *(w.grad for w in weights)])
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(plain, other, rtol=1e-4, atol=1e-4)
    if gated:
        assert 0 < found[0][1].mean() < 1  # some gates are closed


def _sizes(kernel):
    """Of an adapter's parameters: 6 channels, 4 hidden ones, 5 outputs."""
    return (4, 6, *kernel), (4,), (4,), (1, 4), (1,), (5, 4), (5,)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("size", "own", "max_cells"),
    [((17,), 1, 4), ((17,), 1, 16), ((16,), 0, 4), ((7,), 2, 2), ((4, 6), 0, 4), ((5, 5), 0, 4)],
)
def test_tokens(size, own, max_cells, gated):
    place = TokenGrid.of(size, own, max_cells)
    x, f = randn(2, *size, 6).float(), randn(2, *size, 5, seed=1).float()
    gate = (randn(2, 1, own + math.prod(place.grid), seed=3) > 0).float() if gated else None
    found = []
    for on in (False, True):
        one, other = leaf(x), leaf(f)
        with exportable() if on else contextlib.nullcontext():
            went, cells = read_tokens(one, place)
            y = write_tokens(other * 1, cells[:, :5], gate, place)
            (y.square().sum() + went.square().sum()).backward()
        found.append((cells.detach(), y.detach(), one.grad, other.grad))
    for plain, exported in zip(*found, strict=True):
        torch.testing.assert_close(plain, exported, rtol=1e-5, atol=1e-5)
