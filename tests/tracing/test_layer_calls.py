"""Functions of a layer's own weights are calls of that layer."""

import pytest
import torch
from helpers import models, zoo
from helpers.comparing import (
    assert_relatively_close,
)
from torch import nn

from lightning_da3 import (
    AdapterConfig,
    CheckpointError,
    DA3Config,
    MemoryConfig,
    convert,
)

ADAPTER = AdapterConfig(hidden_channels=4, max_cells=16, min_stride=1)


CONFIG = DA3Config(adapter=ADAPTER, head=None)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_functions_of_constant_weights_keep_nothing():
    steps = convert(zoo.network("FunctionsWithOwnWeights"), CONFIG).plan.nodes
    functions = [step for step in steps if step.layer in ("conv1d", "conv2d")]
    assert len(functions) == 3
    assert {(step.action, step.keeps) for step in functions} == {("freeze", "nothing")}


def test_a_layer_that_computes_its_weight_is_that_layer():
    net = zoo.network("StandardisedWeights")
    model = convert(net, CONFIG)
    assert [host.name for host in model.plan.hosts] == ["stem", "conv", "last"]
    with pytest.raises(CheckpointError, match="'conv' is computed from other tensors"):
        model.load_state_dict(net.state_dict())


class NormAndActivation(nn.BatchNorm2d):
    """As networks of others fuse them: the function, and what follows."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        weight, bias = self.weight, self.bias
        x = nn.functional.batch_norm(
            x, self.running_mean, self.running_var, weight, bias, self.training, 0.1, self.eps
        )
        return self.act(x)


class CastingLinear(nn.Linear):
    def forward(self, input):  # noqa: A002
        return nn.functional.linear(input, self.weight, bias=self.bias)


class NormOfOtherWeights(nn.LayerNorm):
    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight + 1.0, self.bias)


class OwnLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), NormAndActivation(4)
        self.mix, self.scale = CastingLinear(4, 4), NormOfOtherWeights(4, eps=1e-3)
        self.fc = CastingLinear(4, 5)

    def forward(self, x):
        x = self.mix(self.norm(self.conv(x)).movedim(1, -1))
        return self.fc(self.scale(x).mean((1, 2)))


def test_functions_of_a_layer_s_own_weights_are_that_layer():
    net = models.randomise_(OwnLayers()).double().eval()
    model = convert(net, DA3Config(adapter=ADAPTER))
    step = {step.name: step for step in model.plan.nodes}
    assert step["batch_norm"].action == "fold"
    assert [s.layer for s in model.plan.nodes].count("Linear") == 2
    assert model.plan.head == "fc"
    assert step["layer_norm"].layer == "layer_norm"  # of another eps than the layer's own
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert_relatively_close(model(x), net(x), 1e-9)
    assert type(net.norm) is NormAndActivation
    other = models.randomise_(OwnLayers(), 5).double().eval()
    model.load_state_dict(other.state_dict())
    assert_relatively_close(model(x), other(x), 1e-9)


def test_a_function_of_weights_that_depend_on_the_input_stays():
    class Dynamic(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.kernel = nn.Conv2d(3, 4, 3), nn.Linear(3, 4 * 4)

        def forward(self, x):
            kernel = self.kernel(x.mean((0, 2, 3))).view(4, 4, 1, 1)
            return torch.conv2d(self.conv(x), kernel)

    net, x = Dynamic().double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    model = convert(net, DA3Config(adapter=ADAPTER, head=None, memory=MemoryConfig(exact=True)))
    (step,) = [step for step in model.plan.nodes if step.layer == "conv2d"]
    assert step.action == "leave"
    x, y = x.clone().requires_grad_(), x.clone().requires_grad_()
    model(x).square().sum().backward()
    net(y).square().sum().backward()
    assert_relatively_close(x.grad, y.grad, 1e-9)


class Pathways(nn.Module):
    """It takes a list, and writes into it, as networks of several pathways do."""

    def __init__(self):
        super().__init__()
        self.first = nn.ModuleList(nn.Conv2d(3, 8, 3, padding=1) for _ in range(2))
        self.same, self.head = nn.Identity(), nn.Linear(8, 5)

    def forward(self, maps):
        for i, layer in enumerate(self.first):
            maps[i] = layer(maps[i])
        return self.head(sum(x.mean((2, 3)) for x in self.same(maps)))


def test_a_list_that_a_network_writes_into_stays_the_users():
    network = Pathways().eval()
    maps = [torch.randn(2, 3, 8, 8) for _ in range(2)]
    given = list(maps)
    model = convert(network, example_inputs=(given,), verify=False)
    assert all(x is y for x, y in zip(given, maps, strict=True))
    torch.testing.assert_close(model(list(maps)), network(list(maps)), rtol=1e-4, atol=1e-5)
