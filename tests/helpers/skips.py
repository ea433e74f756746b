"""Tiny residual networks, some of whose branches domains skip."""

import copy

import torch
from torch import nn

from helpers import models
from helpers.comparing import add
from lightning_da3 import AdapterConfig, DA3Config, GateConfig, MemoryConfig, convert

ADAPTER = AdapterConfig(hidden_channels=4, max_cells=16, min_stride=1, min_depth=0)


class Post(nn.Module):
    """As in ResNet: everything in place, an activation behind the sum."""

    def __init__(self, channels=8):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x
        return self.relu(y)


class Scaled(nn.Module):
    """As in ConvNeXt and EfficientNet: scaled, depthwise, nothing behind the sum."""

    def __init__(self, channels=8):
        super().__init__()
        self.widen, self.norm = nn.Conv2d(channels, 16, 1), nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.narrow, self.act = nn.Conv2d(16, channels, 1), nn.SiLU()
        self.gamma = nn.Parameter(torch.rand(channels, 1, 1))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        y = self.narrow(self.act(self.depthwise(self.act(self.norm(self.widen(x))))))
        return x + self.drop(self.gamma * y)


class Tokens(nn.Module):
    """As in transformers: two branches with one path in common."""

    def __init__(self, channels=8):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attention = nn.MultiheadAttention(channels, 2, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(channels, 16), nn.Linear(16, channels)
        self.act = nn.GELU()

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class Net(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(inplace=True))
        self.blocks, self.fc = nn.Sequential(*blocks), nn.Linear(8, 5)
        self.of_tokens = isinstance(blocks[0], Tokens)

    def features(self, x):
        x = self.stem(x)
        if self.of_tokens:
            x = x.flatten(2).transpose(1, 2)
        return self.blocks(x)

    def forward(self, x):
        x = self.features(x)
        return self.fc(x.mean(1) if x.dim() == 3 else x.mean((2, 3)))


def post():
    return Net(Post(), Post(), Post())


def scaled():
    return Net(Scaled(), Scaled(), Scaled())


def tokens():
    return Net(Tokens(), Tokens())


class Behind(nn.Module):
    """What is left of a `Post` block."""

    def forward(self, x):
        return x.relu()


class OfTwo(Tokens):
    """A block of tokens without one of its branches."""

    def __init__(self, block, gone):
        nn.Module.__init__(self)
        names = ("norm2", "fc1", "fc2", "act") if gone == 1 else ("norm1", "attention")
        for name in names:
            self.add_module(name, getattr(block, name))

    def forward(self, x):
        if hasattr(self, "attention"):
            y = self.norm1(x)
            return x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


# network, what is skipped, and what stands for the blocks instead
KINDS = {
    "post": (post, ["blocks.1"], {1: lambda _: Behind()}),
    "post, two": (post, ["blocks.0", "blocks.1"], {0: lambda _: Behind(), 1: lambda _: Behind()}),
    "scaled": (scaled, ["blocks.2"], {2: lambda _: nn.Identity()}),
    "scaled, all but one": (
        scaled,
        ["blocks.2", "blocks.0"],
        {0: lambda _: nn.Identity(), 2: lambda _: nn.Identity()},
    ),
    "attention": (tokens, ["blocks.1"], {1: lambda block: OfTwo(block, 1)}),
    "mlp": (tokens, ["blocks.0:2"], {0: lambda block: OfTwo(block, 2)}),
}


def config(*, gate=None, exact=False):
    return DA3Config(adapter=ADAPTER, gate=gate, memory=MemoryConfig(exact=exact))


BY_DOMAIN = GateConfig(by="domain", target=0.7)


def network(make=post):
    torch.manual_seed(0)
    return models.randomise_(make()).eval()


def converted(*domains, make=post, **choices):
    """A network whose domains have learned something: random parameters."""
    model = convert(network(make), config(**choices), images())
    for i, domain in enumerate(domains):
        add(model, domain, seed=i + 1)
    return model


def pair(kind, **choices):
    """A model whose domain skips, and one of the network that has no such branches."""
    make, branches, instead = KINDS[kind]
    model = converted("a", make=make, **choices)
    model.skip("a", branches)
    smaller = copy.deepcopy(network(make))
    for i, of in instead.items():
        smaller.blocks[i] = of(smaller.blocks[i])
    other = convert(smaller, config(**choices), images())
    other.add_domain("a", 3)
    state = model.domain("a").state_dict()
    renamed = dict(state)
    if kind == "attention":  # which of both is left has the first name there
        there = "adapters.blocks__1__call2."
        renamed |= {
            k.replace(there, "adapters.blocks__1."): v for k, v in state.items() if there in k
        }
    own = other.domain("a").state_dict()
    other.domain("a").load_state_dict({key: renamed[key] for key in own})
    for each in (model, other):
        each.set_domain("a")
    return model, other


def images(count=4):
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(3))
