"""The network that tests of predictions and costs share."""

import torch
import torch.nn.functional as F
from torch import nn

from lightning_da3 import DA3Config, GateConfig, MemoryConfig, convert


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act = nn.SiLU()
        self.conv2 = nn.Conv2d(channels, channels, 1)
        self.squeeze = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        y = self.conv2(self.act(self.bn1(self.conv1(x))))
        return x + y * torch.sigmoid(self.squeeze(F.adaptive_avg_pool2d(y, 1)))


class Net(nn.Module):
    """Strides, a residual, a product, bits, codes and a max pool."""

    def __init__(self, num_classes=5):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.down = nn.Conv2d(16, 32, 3, 2, 1)
        self.blocks = nn.Sequential(Block(32), nn.ReLU(), Block(32))
        self.fc = nn.Linear(32, num_classes)

    def forward(self, x):
        return self.fc(self.blocks(self.down(self.pool(self.stem(x)))).mean((2, 3)))


def domain_of(network, **memory):
    model = convert(
        network, DA3Config(gate=GateConfig(target=0.5, by="cell"), memory=MemoryConfig(**memory))
    )
    model.add_domain("d", num_classes=5)
    model.set_domain("d")
    return model.train()
