"""Networks, batches and gradients for tests of budgets."""

import torch
import torch.nn.functional as F
from torch import nn

from helpers.comparing import add
from lightning_da3 import (
    AdapterConfig,
    DA3Config,
    GateConfig,
    MemoryConfig,
    convert,
)
from lightning_da3.memory import (
    measure_step,
    saved_activation_bytes,
)

KIB = 2**10


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return F.relu(x + self.conv2(F.silu(self.bn(self.conv1(x)))))


class Net(nn.Module):
    """A stem, residual blocks with codes and bits, and attention over positions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1))
        self.blocks = nn.Sequential(Block(32), Block(32))
        self.norm = nn.LayerNorm(32)
        self.fc = nn.Linear(32, 5)

    def forward(self, x):
        x = self.norm(self.blocks(self.stem(x)).flatten(2).transpose(1, 2))
        return self.fc(self.mixed(x).mean(1))

    def mixed(self, x):
        return x + F.scaled_dot_product_attention(x, x, x)


class Plain(Net):
    """No attention, whose kernel takes memory of its own that weighs in so small a network."""

    def mixed(self, x):
        return x


class Regions(nn.Module):
    """An output as large as the image, in a dict."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 16, 3, 4, 1)
        self.body = Block(16)
        self.fc = nn.Conv2d(16, 3, 1)

    def forward(self, x, scale):
        y = self.fc(self.body(self.down(x))) * scale[:, None, None, None]
        return {"out": F.interpolate(y, size=x.shape[2:]), "size": 3, "none": None}


class Mlp(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm, self.fc1 = nn.LayerNorm(channels), nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x):
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


def converted(network, *, noise=False, target=0.3, seed=0, **memory):
    torch.manual_seed(seed)
    config = DA3Config(
        adapter=AdapterConfig(hidden_channels=4, max_cells=9, min_stride=4, min_depth=0),
        gate=GateConfig(target=target, noise=noise, by="cell"),
        memory=MemoryConfig(**memory),
    )
    model = add(convert(network, config), "d")
    model.set_domain("d")
    return model.train()


def images(count=6, size=32, dtype=torch.float32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3)).to(dtype)


def gradients(model, x, split, **kwargs):
    model.budget_policy.split = split
    output = model(x, **kwargs)
    model.budget_policy.split = None
    output = output["out"] if isinstance(output, dict) else output
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(4)).to(output)
    trained = [p for p in model.parameters() if p.requires_grad]
    return output, torch.autograd.grad((output * weights).sum(), trained)


def costs_of(model, x, budget):
    """The peak that was predicted, and what a step really keeps and takes."""
    model.budget_policy.hold(MemoryConfig(budget=budget))
    model(x)  # decides

    def step():
        model(x).square().mean().backward()
        model.zero_grad()

    peak = measure_step(step, repeats=0).peak_bytes
    return model.budget_policy.predicted, saved_activation_bytes(model, x), peak
