"""Networks for tests of the prologue."""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from lightning_da3 import AdapterConfig, DA3Config, GateConfig, convert
from lightning_da3.nn.prologue import Prologue

STEM = "backbone.stem.0"


class Net(nn.Module):
    """A residual start with two results, a constant and a concatenation; hosts behind stride 8."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.rand(1, 3, 1, 1))
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        )
        self.down = nn.Conv2d(16, 8, 3, 2, 1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.SiLU())
        self.last = nn.Conv2d(16, 8, 3, 2, 1)
        self.hosts = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.skip = nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 2)

    def forward(self, x):
        x = self.down(self.stem((x - self.mean) / 2))
        x = self.last(torch.cat((x + self.block(x), F.max_pool2d(x, 3, 1, 1)), 1))
        return self.fc((self.hosts(x) + self.skip(x)).mean((2, 3)))


def domain_of(network, **adapter):
    torch.manual_seed(0)
    model = convert(network, DA3Config(AdapterConfig(**adapter), GateConfig(target=0.5, by="cell")))
    model.add_domain("d", num_classes=2)
    model.set_domain("d")
    return model.train()


class Noted:
    """What a prediction would be told."""

    def __init__(self):
        self.cuts = []

    def met(self, samples, count):
        self.cuts.append((samples, count))

    def aside(self):
        return contextlib.nullcontext()


def record_masks(model):
    noted = Noted()
    for module in starts(model):
        module.account = noted
    return noted.cuts


def starts(model):
    return [module for module in model.modules() if isinstance(module, Prologue)]


def images(count, size=64):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


class Own(nn.Module):
    def forward(self, x):
        return x * 2


def hooked():
    layer = nn.SiLU()
    layer.register_forward_hook(lambda *_: None)
    return layer
