"""Pools against PyTorch's own: values, gradients, what is kept."""

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

from lightning_da3.ops.pooling import adaptive_avg_pool, avg_pool, max_pool

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
