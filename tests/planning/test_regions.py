"""The plan: what is computed again."""

import pytest
import torch
import torch.nn.functional as F
from helpers import zoo
from helpers.comparing import (
    add,
    assert_relatively_close,
)
from torch import nn

from lightning_da3 import (
    AdapterConfig,
    DA3Config,
    MemoryConfig,
    convert,
)
from lightning_da3.memory import SavedActivations

ADAPTER = AdapterConfig(hidden_channels=4, max_cells=16, min_stride=1)


CONFIG = DA3Config(adapter=ADAPTER, head=None)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["GatedLinearUnits", "VisionTransformer", "Recurrent"])
@pytest.mark.slow
def test_the_plan_is_the_same_for_every_type(name, dtype):
    plans = [convert(zoo.network(name).to(d), CONFIG).plan for d in (torch.float32, dtype)]
    assert plans[0] == plans[1]
    assert plans[0].regions


def test_a_segment_begins_behind_what_is_removed():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
            self.drop, self.norm = nn.Dropout(), nn.GroupNorm(1, 4)

        def forward(self, x):
            x = self.conv(x)
            return self.last(self.norm(self.drop(x)).sigmoid() * nn.functional.silu(x))

    net, x = Branch().eval(), torch.randn(2, 3, 8, 8)
    model = add(convert(net, CONFIG), "a")
    (region,) = model.plan.regions
    assert (region.source, region.nodes[0]) == ("conv", "drop")
    assert_relatively_close(model(x), net(x), 1e-5)
    model.set_domain("a")
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.domain("a").parameters())


class FixedSize(nn.Module):
    """Takes images of one size, which nobody would guess."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 16, 3, 2, 1))
        self.position = nn.Parameter(torch.zeros(1, 16, 10, 10))
        blocks = [(nn.Conv2d(16, 16, 3, padding=1), nn.SiLU()) for _ in range(4)]
        self.blocks = nn.Sequential(*[layer for block in blocks for layer in block])
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x) + self.position).mean((2, 3)))


def test_example_inputs_decide_where_guesses_do_not_fit():
    config = DA3Config(AdapterConfig(hidden_channels=4, min_stride=4))
    network, x = FixedSize().eval(), torch.randn(3, 3, 40, 40)
    plans = [convert(network, config, example_inputs=inputs).plan for inputs in (None, x)]
    assert [plan.parts[0].prologue is not None for plan in plans] == [False, True]


def test_what_overwrites_a_folded_norm_is_computed_again_with_its_convolution():
    layers = (nn.Conv2d(3, 8, 3), nn.Conv2d(8, 48, 1), nn.BatchNorm2d(48), nn.SiLU(inplace=True))
    network = nn.Sequential(*layers, nn.Conv2d(48, 8, 1), nn.Conv2d(8, 8, 3))
    (region,) = convert(network.eval(), CONFIG).plan.regions
    assert (region.form, region.nodes) == ("activated convolution", ("_1", "_2", "_3"))


class Reduced(nn.Module):
    """Attention whose keys a convolution makes fewer, which is a host: as in Segformer."""

    def __init__(self):
        super().__init__()
        self.stem, self.reduce = nn.Conv2d(3, 16, 4, 4), nn.Conv2d(16, 16, 2, 2)
        self.first = nn.Conv2d(16, 16, 3, padding=1)
        self.q, self.k, self.v, self.out, self.fc = (nn.Linear(16, 16) for _ in range(5))

    def forward(self, x):
        x = self.first(self.stem(x))
        queries, keys = (y.flatten(2).transpose(1, 2) for y in (x, self.reduce(x)))
        q, k, v = self.q(queries), self.k(keys), self.v(keys)
        y = F.scaled_dot_product_attention(*(t[:, None] for t in (q, k, v)))
        return self.fc((queries + self.out(y[:, 0])).mean(1))


def test_attention_behind_a_host_is_computed_again_from_its_operands():
    torch.manual_seed(0)
    network, x = Reduced().eval(), torch.randn(2, 3, 32, 32)
    found = {}
    for exact in (True, False):
        memory = MemoryConfig(exact=exact)
        config = DA3Config(AdapterConfig(4, min_stride=1), None, memory)
        model = add(convert(network, config, x, verify=False), "a").train()
        model.set_domain("a")
        assert [host.name for host in model.plan.hosts] == ["first", "reduce"]
        attention = [r for r in model.plan.parts[0].regions if r.also]
        assert len(attention) == (0 if exact else 1)
        with SavedActivations(model) as saved:
            y = model(x)
        y.square().sum().backward()
        gradients = [p.grad.flatten() for p in model.domain("a").parameters()]
        found[exact] = saved.bytes, torch.cat(gradients)
    assert found[False][0] < 0.6 * found[True][0]
    assert (found[False][1] - found[True][1]).norm() < 0.03 * found[True][1].norm()


class OnEveryLevel(nn.Module):
    """A head that takes the maps of a pyramid as a list, as those of detectors do."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU()]
        self.conv = nn.Sequential(*layers, nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8))
        self.score = nn.Conv2d(8, 4, 1)

    def forward(self, maps):
        return torch.cat([self.score(self.conv(x)).flatten(2) for x in maps], 2)


class Detector(nn.Module):
    """Python around graphs."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.calls = nn.Conv2d(3, 8, 3, 2, 1), OnEveryLevel(), 0

    def forward(self, x):
        self.calls += 1
        x = self.body(x)
        return self.head([x, F.max_pool2d(x, 2)])


def test_what_reads_a_list_of_maps_is_computed_again_from_the_maps():
    network, x = Detector().eval(), torch.randn(2, 3, 32, 32)
    config = DA3Config(adapter=AdapterConfig(hidden_channels=4, min_stride=2), head=None)
    model = convert(network, config, x)
    region = next(r for part in model.plan.parts if part.path == "head" for r in part.regions)
    assert [region.source, *region.also] == ["getitem", "getitem_1"]
    model = add(model, "a")
    model.set_domain("a")
    with SavedActivations(model, inputs=(x,)) as found:
        kept = model(x)
    assert kept.requires_grad
    maps = 2 * (16 * 16 + 8 * 8) * 8
    assert maps < found.bytes < 4 * maps  # a norm alone would keep eight times as much
