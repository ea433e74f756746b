"""The plan: what becomes of every node."""

import pytest
import torch
from helpers.converted import choose, converted, network, steps
from torch import nn

from lightning_da3 import (
    AdapterConfig,
    DA3Config,
    MemoryConfig,
    convert,
)
from lightning_da3.nn.activation import PiecewiseLinear, Sum
from lightning_da3.nn.convolution import FrozenConv
from lightning_da3.nn.normalization import FrozenAffine
from lightning_da3.planning.plan import NodePlan, Plan

EXACT = MemoryConfig(exact=True)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_plan_of_convolutions_and_norms():
    plan, step = steps("ConvNorm")
    assert plan.nodes[:5] == (
        NodePlan("conv1", "conv1", "Conv2d", "freeze"),
        NodePlan("norm1", "norm1", "BatchNorm2d", "fold", fold_into="conv1"),
        NodePlan("relu", "relu", "ReLU", "replace", "bits", inplace=True),
        NodePlan("drop", "drop", "Dropout", "remove"),
        NodePlan("conv2", "conv2", "Conv2d", "freeze"),
    )
    assert step["fc"] == NodePlan("fc", "fc", "Linear", "leave", "head")
    assert plan.network == "ConvNorm"
    assert plan.head == "fc"
    assert plan.input_channels == (2, 3)
    first, second = plan.hosts
    assert (first.name, first.readers, first.last) == ("conv1", ("conv1",), "norm1")
    assert (first.in_channels, first.out_channels, first.stride) == (3, 4, (2, 2))
    assert first.macs_per_output == 3 * 4 * 9
    assert (second.in_channels, second.out_channels, second.stride) == (4, 6, (1, 1))


class Sums(nn.Module):
    """Sums whose first operand nobody else reads, one that is read again, one that broadcasts."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.third, self.fc = nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x):
        x = self.first(x)
        y = self.second(x) + x
        z = y + x
        w = self.third(z).mean((2, 3), keepdim=True) + z
        return self.fc((w + y).mean((2, 3)))


def test_sums_are_written_where_nobody_else_reads():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    model = convert(Sums().eval(), DA3Config(AdapterConfig(4, min_stride=1)), example_inputs=x)
    actions = {step.name: (step.action, step.inplace) for step in model.plan.nodes}
    assert actions["add"] == actions["add_3"] == ("accumulate", True)
    assert actions["add_1"] == actions["add_2"] == ("leave", False)


def test_a_sum_takes_the_wider_type_and_shape():
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    total = x + y
    assert Sum()(x, y) is x
    torch.testing.assert_close(x, total, rtol=0, atol=0)
    assert Sum(inplace=False)(x, y) is not x
    narrow = torch.randn(2, 1)
    torch.testing.assert_close(Sum()(narrow, y), narrow + y, rtol=0, atol=0)
    half = torch.randn(2, 3).bfloat16()
    assert Sum()(half, y).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "norm", "action", "inplace"),
    [
        ("SharedLayers", "norm", "affine", True),  # called twice
        ("SharedConv", "norm2", "affine", True),  # its convolution is
        ("TwoReaders", "norm", "affine", False),  # someone else reads the convolution
        ("NormFirst", "norm1", "affine", False),  # reads the network's input
        ("NormFirst", "norm2", "affine", True),  # reads a fresh concatenation
        ("NormOfTheBatch", "norm", "leave", False),  # has no statistics
        ("Residual", "down_1", "fold", False),
    ],
)
def test_plan_of_a_batch_norm(name, norm, action, inplace):
    _, step = steps(name)
    assert (step[norm].action, step[norm].inplace) == (action, inplace)


def test_plan_of_a_layer_that_is_called_twice():
    plan, _ = steps("SharedLayers")
    assert [host.name for host in plan.hosts] == ["conv", "conv:2"]
    model = converted("SharedLayers")
    frozen = [m for m in model.backbone.modules() if isinstance(m, FrozenConv)]
    assert len(frozen) == 2  # the stem, and one for both calls
    assert len(model.domain("a").adapters) == 2


def test_plan_of_functions_and_methods():
    _, step = steps("Functional")
    actions = {name: (plan.action, plan.keeps) for name, plan in step.items()}
    bits = ("replace", "bits")
    for name in ("relu", "relu_1", "relu_", "hardtanh", "relu6", "leaky_relu"):
        assert actions[name] == bits
    assert actions["max_pool2d"] == ("replace", "bits")
    assert actions["avg_pool2d"] == actions["adaptive_avg_pool2d"] == ("replace", "nothing")
    assert actions["dropout"] == ("remove", "nothing")


@pytest.mark.parametrize("name", ["InplaceThenReused", "InplaceThenOutOfPlace"])
def test_plan_writes_only_into_memory_that_nobody_else_reads(name):
    _, step = steps(name)
    assert step["relu"].inplace  # as the user's own
    assert not step["hardtanh"].inplace


def test_plan_says_what_is_left_to_pytorch():
    plan, _ = steps("OwnFunction")
    assert plan.left_to_pytorch == ("own_function",)
    assert str(plan).splitlines()[-1] == "left to PyTorch (more memory): own_function"


def test_plan_of_smooth_activations():
    """Their derivative is coded; in exact mode what they read is kept, or computed again."""
    _, step = steps("Activations")
    assert step["layers_9"].keeps == "codes"
    plan, step = steps("Activations", memory=EXACT)
    assert step["layers_9"].keeps == "kept"  # so small a network peaks lowest with all of it
    assert plan.left_to_pytorch == ("GELU", "LeakyReLU")


def test_plan_prints_as_a_table():
    plan, _ = steps("ConvNorm")
    assert Plan.__str__(plan).splitlines() == [  # without what a step costs
        "ConvNorm: 2 hosts, head: fc",
        "name     layer                action      keeps      host",
        "conv1    Conv2d               freeze      nothing    reads conv1",
        "norm1    BatchNorm2d          fold        nothing    writes conv1, means computed again",
        "relu     ReLU                 replace_    bits",
        "drop     Dropout              remove      nothing",
        "conv2    Conv2d               freeze      nothing    reads conv2",
        "norm2    BatchNorm2d          fold        nothing    writes conv2, means computed again",
        "relu_1   ReLU                 replace_    bits",
        "pool     AdaptiveAvgPool2d    replace     nothing",
        "flatten  flatten              leave       nothing",
        "fc       Linear               leave       head",
    ]


def test_plan_is_a_value():
    one, other = (convert(network("Residual"), choose()).plan for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert one != convert(network("Residual"), choose(head=None)).plan


def test_the_rewritten_network_has_what_the_plan_says():
    model = converted("TwoReaders")
    kinds = {type(module) for module in model.backbone.modules()}
    assert {FrozenConv, FrozenAffine, PiecewiseLinear} <= kinds
    assert not {nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.AdaptiveAvgPool2d} & kinds
