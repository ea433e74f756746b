"""A small network of residual blocks in rows, as the networks that people use."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, channels, made, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, made, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(made)
        self.conv2 = nn.Conv2d(made, made, 3, padding=1, groups=made, bias=False)
        self.bn2 = nn.BatchNorm2d(made)
        self.short = nn.Conv2d(channels, made, 1, stride, bias=False)

    def forward(self, x):
        y = self.conv1(x)
        y = self.bn2(self.conv2(self.bn1(y).relu()))
        return (y + self.short(x)).relu()


class SmallNet(nn.Module):
    """Two blocks; 16 px images or larger."""

    def __init__(self, classes=3):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, padding=1)
        self.blocks = nn.Sequential(Block(8, 8), Block(8, 16, 2))
        self.classifier = nn.Linear(16, classes)

    def forward(self, x):
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


def small_net(classes=3, seed=0):
    """With statistics of batch norm that are not what they start from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SmallNet(classes)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
    return network


def small_batch(count=4, size=16, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, size, size, generator=generator)
    return images, torch.arange(count) % classes
