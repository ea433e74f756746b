"""A small network of three blocks, the second of which may be odd."""

import pytest
import torch
from torch import nn

from helpers.comparing import assert_relatively_close
from lightning_da3 import (
    AdapterConfig,
    ConversionWarning,
    DA3Config,
    GateConfig,
    MemoryConfig,
    convert,
)

ADAPTER = AdapterConfig(hidden_channels=4, max_cells=16, min_stride=1)
CONFIG = DA3Config(adapter=ADAPTER, gate=GateConfig(target=0.5, by="cell"), head=None)
EXACT = DA3Config(ADAPTER, GateConfig(target=0.5, by="cell"), MemoryConfig(exact=True), head=None)


class Block(nn.Module):
    """conv, norm, relu, and what comes between, of the caller."""

    def __init__(self, channels, then=lambda block, x: x):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.then = then

    def forward(self, x):
        return self.then(self, self.norm(self.conv(x)).relu())


class Net(nn.Module):
    """Three blocks, of which the second is the odd one."""

    def __init__(self, then=lambda block, x: x):
        super().__init__()
        self.a, self.b, self.c = Block(3), Block(4, then), Block(4)
        self.fc = nn.Linear(4, 3)
        for i, block in enumerate((self.a, self.b, self.c)):
            nn.init.constant_(block.norm.running_mean, -0.1 * i)
            nn.init.constant_(block.norm.weight, 1.5)

    def forward(self, x):
        return self.fc(self.c(self.b(self.a(x))).mean((2, 3)))


def assert_same(model, net, x):
    net.eval()
    with torch.no_grad():
        assert_relatively_close(model(x), net(x), 1e-4)


def python_of(net, named, **options):
    """The modules that stay Python, after a warning that names `named`; and the model."""
    with pytest.warns(ConversionWarning, match=named):
        model = convert(net, CONFIG, **options)
    return [path for path, _ in model.plan.python], model
