"""Layers, functions and methods of users."""

import pytest
import torch
from helpers.converted import choose
from torch import nn

from lightning_da3 import (
    ConfigError,
    convert,
)
from lightning_da3.layers import Replacement, register
from lightning_da3.nn.frozen import PiecewiseLinear
from lightning_da3.ops.activation import RELU


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Doubles(nn.Module):
    def forward(self, x):
        return x * 2


class DoublesSlowly(Doubles):
    pass


def test_users_register_their_own_layers():
    class Frozen(nn.Module):
        def forward(self, x):
            return x + x

    @register(Doubles)
    def _doubles(layer):
        return Replacement(lambda inplace: Frozen())

    def tracer_sees(kind):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), kind(), nn.Conv2d(4, 4, 3))
        return convert(net, choose(head=None))

    # both compute the same; the exact type alone has the rule
    for kind in (Doubles, DoublesSlowly):
        model = tracer_sees(kind)
        assert model(torch.zeros(1, 3, 6, 6)).shape == (1, 4, 2, 2)
    with pytest.raises(ConfigError, match=r"Doubles is registered already .its rule is _doubles"):
        register(Doubles)(lambda layer: None)
    with pytest.raises(ConfigError, match=r"takes subclasses of torch.nn.Module.* got 'ReLU'"):
        register("ReLU")(lambda layer: None)


class Negate(nn.Module):
    def forward(self, x):
        return -x if self.training else x.clamp(min=0)  # the branch and the method hide what it is


@register(Negate)
def _negate(layer):
    return Replacement(lambda overwrite: PiecewiseLinear(RELU, overwrite), "bits", False)


def test_a_registered_layer_is_replaced():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), Negate(), nn.Flatten(1), nn.LazyLinear(3)
    )
    x = torch.randn(2, 3, 8, 8)
    expected = net.eval()(x)
    model = convert(net, choose())
    (step,) = [step for step in model.plan.nodes if step.layer == "Negate"]
    assert (step.action, step.keeps, step.inplace) == ("replace", "bits", True)
    torch.testing.assert_close(model.train()(x), expected)


def test_a_type_has_one_rule_and_is_a_module():
    with pytest.raises(ConfigError, match="Negate is registered already"):
        register(Negate)(_negate)
    with pytest.raises(ConfigError, match="`register` takes subclasses"):
        register(int)(_negate)
