"""What a host's adapter does at full resolution: values, gradients, what is kept."""

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

from lightning_da3.ops.convolution import frozen_conv
from lightning_da3.ops.host import coarse_grid, read, upsample, write

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
