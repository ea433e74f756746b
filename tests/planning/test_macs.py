"""Multiply-accumulates of hosts, as PyTorch counts them; and who notes that they ran."""

import pytest
import torch
import torch.nn.functional as F
from helpers.comparing import add
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_da3 import AdapterConfig, DA3Config, GateConfig, convert
from lightning_da3.planning.macs import macs_per_position

ADAPTER = AdapterConfig(hidden_channels=4, max_cells=16, min_stride=1)
CONFIG = DA3Config(ADAPTER, GateConfig(target=0.5, by="cell"), head=None)


class Residual(nn.Module):
    def __init__(self, stem, branch):
        super().__init__()
        self.stem, self.branch, self.fc = stem, branch, nn.Linear(16, 16)

    def forward(self, x):
        x = self.stem(x)
        return x + self.branch(x)


class Excited(nn.Module):
    """An inverted residual with squeeze and excitation."""

    def __init__(self):
        super().__init__()
        self.expand, self.wide = nn.Conv2d(16, 64, 1), nn.Conv2d(64, 64, 5, padding=2, groups=64)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze, self.excite = nn.Conv2d(64, 8, 1), nn.Conv2d(8, 64, 1)
        self.project = nn.Conv2d(64, 16, 1)

    def forward(self, x):
        x = F.silu(self.wide(F.silu(self.expand(x))))
        x = x * self.excite(F.silu(self.squeeze(self.pool(x)))).sigmoid()
        return self.project(x)


class Attention(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.qkv, self.out = how, nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        if self.how == "matmul":
            y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        elif self.how == "einsum":
            weights = torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1)
            y = torch.einsum("bhqk,bhkd->bhqd", weights, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 4, 4)

    def forward(self, x):
        return self.conv(x).flatten(2).transpose(1, 2)


CASES = {
    "squeeze and excitation": lambda: Residual(nn.Conv2d(3, 16, 3, 2, 1), Excited()),
    "matmul": lambda: Residual(Tokens(), Attention("matmul")),
    "einsum": lambda: Residual(Tokens(), Attention("einsum")),
    "perceptron": lambda: Residual(
        Tokens(), nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_hosts(name):
    torch.manual_seed(0)
    network, x = CASES[name]().eval(), torch.randn(1, 3, 32, 32)
    host = convert(network, CONFIG, example_inputs=x).plan.hosts[-1]
    y = network.stem(x)
    with FlopCounterMode(display=False) as counter:
        network.branch(y)
    assert host.macs_per_output * y.numel() / 16 == counter.get_total_flops() / 2


def test_pytorchs_own_attention():
    """Its counter does not know every kernel of it: counted by hand."""
    for how in ("function", "layer"):
        attention = nn.MultiheadAttention(16, 2, batch_first=True)
        graph = torch.fx.Graph()
        x = graph.placeholder("x")
        if how == "layer":
            node = graph.call_module("attention", (x, x, x))
            expected = 10 * 4 * 16 * 16 + 2 * 10 * 10 * 16
        else:
            node = graph.call_function(F.scaled_dot_product_attention, (x, x, x))
            expected = 2 * 10 * 10 * 16
        graph.output(node)
        gm = torch.fx.GraphModule({"attention": attention}, graph)
        assert macs_per_position(gm, [node], {x: (1, 10, 16)}, 10) == expected / 10


def test_without_shapes_all_maps_count_as_one_size():
    gm = torch.fx.symbolic_trace(Excited())
    weights = 64 * 16 + 64 * 25 + 2 * 64 * 8 + 16 * 64
    assert macs_per_position(gm, gm.graph.nodes, {}, None) == weights


def test_removing_dead_code_leaves_what_is_noted():
    model = add(convert(CASES["squeeze and excitation"]().eval(), CONFIG), "a")
    model.set_domain("a")
    model.train()
    x = torch.randn(2, 3, 16, 16)
    model(x)
    before = model.executed_flops_fraction
    model.backbone.graph.eliminate_dead_code()
    model.backbone.recompile()
    model(x)
    assert before is not None
    assert model.executed_flops_fraction is not None
