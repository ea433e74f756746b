"""How deep in the network hosts begin, and that earlier domains still fit."""

import pytest
import torch
from helpers.domains import refused, shake_
from torch import nn

from lightning_da3 import AdapterConfig, CheckpointError, DA3Config, convert
from lightning_da3.files.domain_file import read_domain, write_domain
from lightning_da3.planning import planner
from lightning_da3.planning.depths import depths


def hosts(network, x, **adapter):
    config = DA3Config(AdapterConfig(hidden_channels=2, min_stride=1, **adapter))
    return [host.name for host in convert(network.eval(), config, x, verify=False).plan.hosts]


def mlp():
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


class Blocks(nn.Module):
    """Residual blocks of tokens."""

    def __init__(self, count=4):
        super().__init__()
        self.blocks, self.fc = nn.ModuleList([mlp() for _ in range(count)]), nn.Linear(8, 2)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.fc(x.mean(1))


class Block(nn.Module):
    """Two residual branches."""

    def __init__(self):
        super().__init__()
        self.mlp, self.more = mlp(), mlp()

    def forward(self, x):
        x = x + self.mlp(x)
        return x + self.more(x)


class Looping(nn.Module):
    """What stays Python between blocks that are graphs."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for layer in self.layers:
            if x.sum().item() < 1e9:
                x = layer(x)
        return x


class Towers(nn.Module):
    """Two ways of tokens, of four blocks and of two, which meet; Python calls the first if slow."""

    def __init__(self, slow=False):
        super().__init__()
        self.left = Looping() if slow else nn.ModuleList([mlp() for _ in range(4)])
        self.right, self.fc = nn.ModuleList([mlp(), mlp()]), nn.Linear(8, 2)

    def forward(self, x):
        y = self.left(x) if isinstance(self.left, Looping) else x
        for block in () if isinstance(self.left, Looping) else self.left:
            y = y + block(y)
        for block in self.right:
            x = x + block(x)
        return self.fc((x * y).mean(1))


X = torch.randn(2, 4, 8)


@pytest.mark.parametrize(
    ("least", "count"),
    [("auto", 3), (0, 4), (0.3, 3), (0.5, 2), (0.7, 1), (1, 1)],
)
def test_blocks_of_tokens_are_hosts_from_a_third_of_the_depth(least, count):
    assert hosts(Blocks(), X, min_depth=least) == [f"blocks.{4 - i}" for i in range(count, 0, -1)]
    assert hosts(Blocks(1), X, min_depth=least) == ["blocks.0"]
    assert len(hosts(Blocks(3), X)) == 2
    assert len(hosts(Blocks(3), X, min_depth=0.5)) == 2  # with the one in the middle


def test_each_of_two_ways_has_a_last_half():
    assert sorted(hosts(Towers(), X, min_depth=0.5)) == ["left.2", "left.3", "right.1"]


def test_graphs_that_python_calls_follow_each_other(monkeypatch):
    seen = {}
    monkeypatch.setattr(planner, "depths", lambda graphs: seen.update(depths(graphs)) or seen)
    hosts(Towers(slow=True), X)
    assert list(seen) == [
        *(("", f"right.{i}") for i in range(2)),
        *((f"left.layers.{i}", f"left.layers.{i}.{n}") for i in range(2) for n in ("mlp", "more")),
    ]
    assert list(seen.values()) == pytest.approx([0, 1, 0, 1 / 3, 2 / 3, 1])


def test_maps_are_told_apart_by_strides_alone():
    convs = [nn.Conv2d(3, 3, 3, padding=1) for _ in range(4)]
    network = nn.Sequential(*convs, nn.Flatten(1), nn.Linear(48, 2))
    x = torch.randn(2, 3, 4, 4)
    assert hosts(network, x) == ["0", "1", "2", "3"]
    assert hosts(network, x, min_depth=0.5) == ["2", "3"]


def _as_before(path):
    """Rewrite a file as versions without `min_depth` wrote it."""
    file = read_domain(path)
    config = {**file.metadata["config"], "version": 1}
    config["adapter"] = {k: v for k, v in config["adapter"].items() if k != "min_depth"}
    write_domain(path, file.tensors, {**file.metadata, "config": config})


def test_domains_of_before_load_where_hosts_are_the_same(tmp_path):
    path = tmp_path / "a.safetensors"
    every = DA3Config(AdapterConfig(hidden_channels=2, min_depth=0))
    network = Blocks().eval()
    model = convert(network, every, X)
    model.add_domain("a", 2)
    shake_(model, "a")
    model.save_domain("a", path)
    _as_before(path)
    again = convert(network, every, X)
    again.load_domain(path)
    assert DA3Config.from_dict(read_domain(path).metadata["config"]) == every
    advice = "DA3Config(adapter=AdapterConfig(min_stride='auto', min_depth=0))"
    new = convert(network, DA3Config(AdapterConfig(hidden_channels=2)), X)
    with refused(CheckpointError, "It has other hosts", advice):
        new.load_domain(path)
    with refused(CheckpointError, "It has other hosts", advice):
        new.load_state_dict(model.state_dict())
    explicit = convert(
        network, DA3Config(AdapterConfig(hidden_channels=2, min_stride=1, min_depth=0)), X
    )
    explicit.load_domain(path)  # asked for otherwise, but the same hosts
    explicit.load_state_dict(model.state_dict())
