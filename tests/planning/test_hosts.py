"""The plan: where adapters attach, and which layer is the head."""

import itertools
import operator

import pytest
import torch
from helpers import models
from helpers.comparing import (
    add,
)
from helpers.converted import choose, converted, network, refused, steps
from torch import nn

from lightning_da3 import (
    AdapterConfig,
    ConfigError,
    DA3Config,
    convert,
)
from lightning_da3.nn.adapter import HostInput, HostOutput
from lightning_da3.nn.convolution import FrozenConv


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_plan_of_a_depthwise_block_is_one_host_between_its_narrow_ends():
    plan, step = steps("Depthwise")
    stem, block = plan.hosts
    assert stem.name == "stem"
    assert (block.name, block.readers, block.last) == ("block.3", ("block_0",), "block_7")
    assert (block.in_channels, block.out_channels) == (4, 4)
    assert block.macs_per_output == 4 * 12 + 12 * 9 + 12 * 4
    assert step["block_2"].keeps == step["block_5"].keeps == "bits"


@pytest.mark.slow
def test_plan_of_a_strided_depthwise_block_counts_what_runs_before_the_stride():
    plan = convert(models.family("mobilenet_v2"), choose()).plan
    host = next(host for host in plan.hosts if host.name == "features.2.conv.1.0")
    assert host.stride == (2, 2)
    c, wide, out = 8, 48, 8
    assert host.macs_per_output == 4 * c * wide + 9 * wide + wide * out


def test_min_stride_leaves_early_maps_alone():
    plan, step = steps("Residual", adapter=AdapterConfig(min_stride=4))
    assert [host.name for host in plan.hosts] == ["conv1", "conv2"]
    assert step["relu"].keeps == "nothing"  # upstream of the first host
    assert step["relu_1"].keeps == "bits"


@pytest.mark.parametrize(
    ("whole", "least"), [(2, 2), (4, 4), (8, 8), (16, 8), (24, 12), (32, 16), (128, 16)]
)
def test_by_default_hosts_begin_behind_half_of_the_downsampling(whole, least):
    """At least 8, or as far as it goes, and at most 16."""

    def conv(stride):
        return nn.Conv2d(3, 3, 3, stride=stride, padding=1)

    strides = [2, 2, 2, 3] if whole == 24 else [2] * (whole.bit_length() - 1)
    network = nn.Sequential(*[conv(s) for s in strides], conv(1), nn.Flatten(1), nn.LazyLinear(2))
    size = 2 * whole
    network(torch.randn(1, 3, size, size))
    plan = convert(network, example_inputs=torch.randn(1, 3, size, size)).plan
    at = itertools.accumulate([*strides, 1], operator.mul)  # the output of every convolution
    assert len(plan.hosts) == sum(reduction >= least for reduction in at)


def test_a_host_that_begins_where_another_ends_reads_what_was_written():
    """Also where the output has memory of its own, which the other's adapter alone writes to."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    model = add(convert(network, choose(head=None)), "a")
    model.set_domain("a")
    for output in model.modules():
        if isinstance(output, HostOutput):
            output.inplace = False
    seen = {}
    for name, module in model.backbone.named_modules():
        if isinstance(module, HostInput | HostOutput | FrozenConv):
            module.register_forward_hook(lambda m, x, y, name=name: seen.update({name: (x[0], y)}))
    with torch.no_grad():
        next(iter(model.domain("a").adapters.values())).value.bias.add_(1.0)
    model(torch.randn(2, 3, 6, 6))
    written, read = seen["host_outputs.0"][1][0], seen["host_inputs.1"]
    assert not torch.equal(written, seen["host_outputs.0"][0])
    assert read[0] is written
    assert seen["1"][0] is read[1][0]  # through the input, whose backward adds to its gradient


def test_plan_of_other_axes():
    plan, step = steps("OtherAxes")
    assert [host.name for host in plan.hosts] == ["conv", "row.0", "block.0"]
    assert [host.stride for host in plan.hosts] == [(1, 1), (2,), (1, 2, 2)]
    assert step["row_0"].action == step["block_0"].action == "freeze"
    assert step["row_1"].action == step["block_1"].action == "fold"
    assert step["row_3"].keeps == step["block_2"].keeps == "bits"


def test_hosts_are_where_maps_are_smallest_if_none_is_as_small_as_asked():
    """A network for small images is never downsampled by 8."""
    plan, _ = steps("Residual", adapter=AdapterConfig())
    assert [host.name for host in plan.hosts] == ["conv1", "conv2"]


def test_a_network_of_linear_layers_alone_has_hosts_too():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    model = add(convert(net, choose()), "a")
    assert [(host.name, host.stride) for host in model.plan.hosts] == [("0", None), ("2", None)]
    assert model.plan.head == "4"
    model.set_domain("a")
    x = torch.randn(5, 6)
    assert model(x).shape == (5, 3)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.domain("a").parameters())


@pytest.mark.parametrize(
    ("name", "head"), [("ConvHead", "score"), ("squeezenet1_1", "classifier.1"), ("Pools", "fc")]
)
def test_the_classifier_is_found(name, head):
    model = converted(name)
    assert model.plan.head == head
    assert model(*models.inputs(name)).shape == (2, 3)


def test_a_head_that_cannot_be_found_is_the_networks_own():
    class TwoHeads(models.ConvNorm):
        def __init__(self):
            super().__init__()
            self.more = nn.Linear(6, models.CLASSES)

        def forward(self, x):
            features = self.pool(self.features(x)).flatten(1)
            return self.fc(features) + self.more(features)

    model = convert(TwoHeads(), choose())
    assert model.plan.head is None
    model.add_domain("own")
    with pytest.raises(ConfigError, match="no single Linear or convolution leads to the output"):
        model.add_domain("new", num_classes=3)
    refused(network("ConvNorm"), "no Linear or convolution named 'fcc'", "'fc'", head="fcc")


def test_patches_are_embedded_as_they_were_if_there_is_more_to_adapt():
    patches = nn.Conv2d(3, 8, 4, stride=4)
    alone = nn.Sequential(patches, nn.Flatten(1), nn.Linear(72, 2))
    more = nn.Sequential(patches, nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(1), nn.Linear(72, 2))
    x = torch.randn(2, 3, 12, 12)
    found = [[h.name for h in convert(n, choose(head=None), x).plan.hosts] for n in (alone, more)]
    assert found == [["0"], ["1"]]


class Probed(nn.Module):
    """Tokens of patches of 8, which one query pools, as in SigLIP."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 8, 8, 8), nn.LayerNorm(8)
        self.blocks = nn.ModuleList([self._mlp(), self._mlp()])
        self.probe, self.pool = nn.Parameter(torch.randn(1, 1, 8)), self._mlp()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

    def _mlp(self):
        return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = x + block(x)
        x = self.norm(x)
        pooled = self.attend(self.probe.repeat(len(x), 1, 1), x, x)[0]
        return x, (pooled + self.pool(pooled))[:, 0]


def test_one_token_that_stands_for_all_is_no_downsampling():
    config = DA3Config(AdapterConfig(min_depth=0))
    model = convert(Probed(), config, torch.randn(2, 3, 32, 32), verify=False)
    assert [host.name for host in model.plan.hosts] == ["blocks.0", "blocks.1", "pool"]
