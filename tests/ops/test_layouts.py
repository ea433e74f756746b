"""Gradients lie in memory as what they are gradients of, whatever lies behind."""

import pytest
import torch
import torch.nn.functional as F
from helpers.ops import leaf, randn
from torch import nn

from lightning_da3 import DA3Config, MemoryConfig, convert
from lightning_da3.nn.convolution import FrozenConv, FrozenConvTranspose
from lightning_da3.ops.activation import Slopes, hard_sigmoid, piecewise_linear
from lightning_da3.ops.convolution import pad_mode
from lightning_da3.ops.host import read
from lightning_da3.ops.pooling import adaptive_avg_pool, avg_pool, max_pool
from lightning_da3.ops.recomputed import recomputed
from lightning_da3.ops.sampling import grid_sample
from lightning_da3.ops.smooth import SMOOTH, quantized_grad_activation


def conv(*args, **kwargs):
    return FrozenConv(nn.Conv2d(*args, **kwargs)).double()


LAST = torch.channels_last
OPS = {
    "conv": conv(4, 6, 3, padding=1),
    "strided": conv(4, 6, 3, stride=2),
    "pointwise": conv(4, 48, 1),
    "strided pointwise": conv(4, 48, 1, stride=2),
    "depthwise": conv(4, 4, 5, padding=2, groups=4),
    "reflecting": conv(4, 6, 3, padding=1, padding_mode="reflect"),
    "transposed": FrozenConvTranspose(nn.ConvTranspose2d(4, 6, 3, 2)).double(),
    "padded": lambda x: pad_mode(x, (1, 1, 1, 1), "circular"),
    "max pool": lambda x: max_pool(x, (2, 2), (2, 2), (0, 0), (1, 1), False),
    "average pool": lambda x: avg_pool(x, (2, 2), (2, 2), (0, 0)),
    "adaptive pool": lambda x: adaptive_avg_pool(x, (2, 3)),
    "relu": lambda x: piecewise_linear(x, Slopes(0.0, float("inf"))),
    "hard sigmoid": hard_sigmoid,
    "silu": lambda x: quantized_grad_activation(x, SMOOTH["silu"]),
    "host": lambda x: read(x, (2, 2))[0],
    "region": lambda x: recomputed(lambda t: (OPS["conv"](t).sigmoid(),), x)[0],
    "exact region": lambda x: recomputed(lambda t: (OPS["conv"](t).sigmoid(),), x, exact=True)[0],
}


PLACES = [(name, layout) for name in OPS for layout in (torch.contiguous_format, LAST)]
# pools give contiguous gradients in any case, for which no norm of PyTorch's is wrong
PLACES = [p for p in PLACES if not ("pool" in p[0] and p[1] is LAST)]


@pytest.mark.parametrize(("name", "layout"), PLACES)
def test_a_gradient_lies_as_its_tensor_does(name, layout):
    x = leaf(randn(1, 4, 8, 6).contiguous(memory_format=layout))
    y = OPS[name](x)
    for behind in (torch.contiguous_format, LAST):
        grad = randn(*y.shape, seed=1).contiguous(memory_format=behind)
        (grad_x,) = torch.autograd.grad(y, x, grad, retain_graph=True)
        assert grad_x.stride() == x.stride()


SLOW = pytest.mark.slow
NORMS = {
    "instance norm": lambda: nn.InstanceNorm2d(8),
    "affine": lambda: nn.InstanceNorm2d(8, affine=True),
    "batch norm": lambda: nn.BatchNorm2d(8),
    "batch norm of the batch": lambda: nn.BatchNorm2d(8, track_running_stats=False),
    "group norm": lambda: nn.GroupNorm(2, 8),
}
BEHIND = {
    "conv": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "transposed": lambda: nn.ConvTranspose2d(8, 8, 3, padding=1),
    "relu": lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)),
    "smooth": lambda: nn.Sequential(nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1)),
    "pool": lambda: nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1)),
}


@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize(
    "norm", [n if n == "instance norm" else pytest.param(n, marks=SLOW) for n in NORMS]
)
def test_gradients_of_norms_at_a_batch_of_one(norm, behind):
    """By finite differences: PyTorch's own are wrong where gradients lie channels_last."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, 2, 1), NORMS[norm](), BEHIND[behind](), nn.Tanh())
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    network = network.double().eval()
    x, along = randn(1, 3, 16, 16), randn(1, 3, 16, 16, seed=1)

    def loss(x):
        return network(x).square().sum()

    want = (loss(x + 1e-6 * along) - loss(x - 1e-6 * along)) / 2e-6
    for exact, tolerance in ((True, 1e-5), (False, 0.05)):
        model = convert(network, DA3Config(gate=None, memory=MemoryConfig(exact=exact)))
        t = leaf(x)
        (grad,) = torch.autograd.grad(model(t).square().sum(), t)
        assert abs((grad * along).sum() - want) <= tolerance * abs(want)


def test_sampling_at_points():
    x, grid = leaf(randn(1, 4, 8, 6)), randn(1, 5, 5, 2).tanh()
    y = grid_sample(x, grid, align_corners=False)
    assert torch.equal(y, F.grid_sample(x, grid, align_corners=False))
    grad = randn(*y.shape, seed=1).contiguous(memory_format=LAST)
    (grad_x,) = torch.autograd.grad(y, x, grad)
    assert grad_x.stride() == x.stride()
