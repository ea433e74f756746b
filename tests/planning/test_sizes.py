"""Layers and functions whose sizes are computed in forward."""

import pytest
import torch
import torch.nn.functional as F
from helpers.around import Around
from helpers.comparing import assert_relatively_close
from torch import nn

from lightning_da3 import InputError, convert

FUNCTIONS = {
    "average pool": lambda x: F.avg_pool2d(x, (x.size(2), x.size(3))),
    "average pool, a list": lambda x: F.avg_pool2d(x, [x.size(2), 2], stride=[x.size(2), 1]),
    "average pool, by name": lambda x: F.avg_pool2d(x, kernel_size=x.shape[2:]),
    "average pool, a number": lambda x: F.avg_pool2d(x, x.size(3)),
    "max pool": lambda x: F.max_pool2d(x, kernel_size=(x.size(2), 1)),
    "max pool, strides": lambda x: F.max_pool2d(x, 2, stride=(x.size(2) // 4, 2)),
    "one axis": lambda x: F.avg_pool1d(x.flatten(2), (x.size(2),)).unsqueeze(2),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, (x.shape[2] // 2, x.shape[3] // 2)),
    "adaptive, one number": lambda x: F.adaptive_avg_pool2d(x, x.shape[2] // 2),
    "adaptive, half": lambda x: F.adaptive_avg_pool2d(x, (None, x.shape[3] // 2)),
    "adaptive max": lambda x: F.adaptive_max_pool2d(x, (x.shape[2] // 2, 1)),
    "interpolate": lambda x: F.interpolate(F.max_pool2d(x, 2), size=x.shape[2:]),
    "interpolate, computed": lambda x: F.interpolate(x, size=(x.shape[2] * 2, x.shape[3] + 1)),
    "pad": lambda x: F.pad(x, (0, x.size(3) % 3, 0, x.size(2) % 3)),
    "dropout": lambda x: F.dropout(x, 1.0 / x.size(1), training=False),
    "leaky relu": lambda x: F.leaky_relu(x, 1.0 / x.size(1)),
    "hardtanh": lambda x: F.hardtanh(x, -1.0 * x.size(1), x.size(1) / 8.0),
    "expand": lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, *x.shape[2:]) * x,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    torch.manual_seed(0)
    network = Around(FUNCTIONS[name]).eval()
    model = convert(network)
    for size in (16, 24):
        x = torch.randn(2, 3, size, size)
        assert_relatively_close(model(x), network(x), 1e-5)


class Up(nn.Module):
    def __init__(self, up, size):
        super().__init__()
        self.down, self.up, self.size = nn.Conv2d(3, 8, 3, 2, 1), up, size
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        y = self.up(self.down(x), **self.size(x))
        return y, self.head(y.mean((2, 3)))


SIZES = {
    "shape": lambda x: {"output_size": x.shape[-2:]},
    "size": lambda x: {"output_size": x.size()},
    "numbers": lambda x: {"output_size": [x.size(2), x.size(3) - 1]},
    "none": lambda x: {},
}


@pytest.mark.parametrize("name", SIZES)
def test_transposed_convolutions(name):
    torch.manual_seed(0)
    network = Up(nn.ConvTranspose2d(8, 8, 3, 2, 1), SIZES[name]).eval()
    model = convert(network)
    for size in (16, 18):
        x = torch.randn(1, 3, size, size)
        assert_relatively_close(model(x), network(x), 1e-5)


def test_a_size_that_no_padding_gives_is_refused():
    network = Up(nn.ConvTranspose2d(8, 8, 3, 2, 1), lambda x: {"output_size": (40, x.size(3))})
    model = convert(network.eval())
    with pytest.raises(InputError, match=r"from \[15, 15\] to \[16, 16\] .* got \(40, 16\)"):
        model(torch.randn(1, 3, 16, 16))
