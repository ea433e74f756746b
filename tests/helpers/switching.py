"""Residual blocks whose forward switches autocast, or asks for it."""

import torch
from torch import nn


class Off(nn.Module):
    """A part of the forward is off autocast."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        y = self.conv2(self.conv1(x).relu())
        with torch.autocast("cpu", enabled=False):
            y = y.float() * 1.5
        return x + y


class AllOff(Off):
    """All of it is, layers included."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return x + self.conv2(self.conv1(x.float()).relu())


class Asks(Off):
    """It does something else under autocast."""

    def forward(self, x):
        y = self.conv2(self.conv1(x).relu())
        if torch.is_autocast_enabled("cpu"):
            y = y * 2
        return x + y


BLOCKS = [Off, AllOff, Asks]


class Switching(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.blocks, self.fc = nn.Sequential(*blocks), nn.Linear(8, 5)
        with torch.no_grad():
            self.norm.running_var.uniform_(0.5, 2.0)
            self.norm.running_mean.normal_()

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return self.fc(self.blocks(x).relu().mean((2, 3)))


def switching(block, count=3):
    """A network of such blocks."""
    torch.manual_seed(0)
    return Switching(*(block() for _ in range(count))).eval()
