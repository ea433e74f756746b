"""Layers, functions and methods of users."""

import pytest
import torch
from helpers.converted import choose
from torch import nn

from lightning_da3 import ConfigError, convert
from lightning_da3.layers import Replacement, facts_of, facts_of_function, register
from lightning_da3.layers.facts import TABLE
from lightning_da3.nn.activation import PiecewiseLinear
from lightning_da3.ops.activation import RELU


@pytest.fixture(autouse=True)
def _seed_and_table():
    torch.manual_seed(0)
    known = dict(TABLE)
    yield
    TABLE.clear()
    TABLE.update(known)


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


# --- facts without a replacement


class Scale(nn.Module):
    """By a number for every channel, written in two ways."""

    def __init__(self, channels):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(channels))

    def forward(self, x):
        return x * self.scale.view(-1, *[1] * (x.dim() - 2)) if len(x) else x


class ScaleToo(Scale):
    pass


def depthwise(kind):
    """A depthwise convolution between two pointwise ones, with a layer of a user in between."""
    wide = nn.Sequential(nn.Conv2d(4, 8, 1), kind(8), nn.Conv2d(8, 8, 3, 1, 1, groups=8))
    stem, head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 3)
    return nn.Sequential(stem, wide, nn.Conv2d(8, 4, 1), head, nn.AdaptiveAvgPool2d(1)).eval()


def test_facts_alone_tell_of_a_layer():
    register(Scale, by_sample=True, elementwise=True, keeps="nothing")
    net, x = depthwise(Scale), torch.randn(2, 3, 8, 8)
    model = convert(net, choose(head=None), example_inputs=x)
    (step,) = [step for step in model.plan.nodes if step.layer == "Scale"]
    assert (step.action, step.keeps) == ("leave", "nothing")
    block = next(host for host in model.plan.hosts if host.name == "1.2")
    assert (block.in_channels, block.out_channels) == (4, 4)  # past the layer
    assert model.plan.left_to_pytorch == ()
    torch.testing.assert_close(model(x), net(x))

    register(ScaleToo)  # as little as can be said: it is one node
    model = convert(depthwise(ScaleToo), choose(head=None))
    (step,) = [step for step in model.plan.nodes if step.layer == "ScaleToo"]
    assert (step.action, step.keeps) == ("leave", "recomputed")  # instead of kept
    assert "1.2" not in {host.name for host in model.plan.hosts if host.in_channels == 4}


def test_facts_and_a_rule_together():
    @register(Scale, elementwise=True)
    def gone(layer):
        return Replacement(None)

    assert facts_of(Scale(3)).elementwise
    assert facts_of(Scale(3)).rule is gone
    with pytest.raises(ConfigError, match=r"Scale is registered already \(its rule is gone\)"):
        register(Scale, by_sample=True)


def halve(x):
    return x / 2


def test_functions_and_methods():
    register(halve, elementwise=True, keeps="nothing")
    register("erfinv", "of.no.package", layer=lambda: nn.Tanh())
    assert facts_of_function(halve).elementwise
    assert isinstance(facts_of_function("erfinv").layer(), nn.Tanh)
    assert facts_of_function(torch.erfinv) == facts_of_function(torch.Tensor.erfinv)

    def erfinv(x):
        return x

    assert facts_of_function(erfinv).layer is None  # a name stands for PyTorch's alone
    with pytest.raises(ConfigError, match=r"acosh is no layer, so it has no rule.*layer=lambda"):
        register("acosh")(halve)


# --- what cannot be registered


@pytest.mark.parametrize(
    ("what", "facts", "message"),
    [
        (nn.ReLU, {}, r"ReLU is registered already \(its rule is _relu\).* a subclass of your own"),
        (nn.Linear, {"keeps": "nothing"}, "Linear is registered already. A layer"),
        ("add", {}, "add is registered already"),
        ("no_method", {}, "names of Tensor methods and dotted names .* got 'no_method'"),
        (3, {}, r"`register` takes subclasses of torch.nn.Module, functions, .* got 3"),
        (nn.ReLU(), {}, r"`register` takes subclasses .* got ReLU\(\)"),
        (Scale, {"elementwize": True}, "no fact 'elementwize'. It knows layer, keeps, by_sample,"),
        (Scale, {"keeps": "bytes"}, r"`keeps` must be one of \['nothing', .*\], got 'bytes'"),
        (Scale, {"keeps": "codes"}, "`keeps` must be one of .* got 'codes'"),
        (Scale, {"does": "sums"}, r"`does` must be one of \['', 'sum', .* got 'sums'"),
        (Scale, {"by_sample": 1}, "`by_sample` must be True or False, got 1"),
        (int, {"keep": 1}, r"takes subclasses .* got <class 'int'>.*no fact 'keep'"),  # both
    ],
)
def test_wrong_registrations_are_refused_and_leave_no_trace(what, facts, message):
    before = dict(TABLE)
    with pytest.raises(ConfigError, match=message):
        register(what, **facts)
    assert before == TABLE


def test_wrong_rules_are_refused():
    with pytest.raises(ConfigError, match=r"`keeps` of a Replacement must be one of .* got 'byte'"):
        Replacement(None, "byte")

    @register(Scale)
    def rule(layer):
        return "nothing"

    with pytest.raises(ConfigError, match=r"The rule rule of Scale must return a Replacement"):
        convert(depthwise(Scale), choose(head=None))
