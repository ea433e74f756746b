"""Batch norms that could not be folded."""

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
    value_and_gradient,
)
from torch import nn

from lightning_da3.memory import saved_activation_bytes
from lightning_da3.nn.frozen import frozen
from lightning_da3.ops.normalization import frozen_affine


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
