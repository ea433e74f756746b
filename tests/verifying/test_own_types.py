"""Comparisons in the types that a network has, and under the autocast that it is converted in."""

import copy
import warnings

import pytest
import torch
from helpers.around import Around
from helpers.switching import Asks, switching
from torch import nn

from lightning_da3 import AdapterConfig, ConversionWarning, DA3Config, convert
from lightning_da3.converting import compared
from lightning_da3.verifying.own_types import in_own_types

CONFIG = DA3Config(gate=None, adapter=AdapterConfig(4, min_stride=1))
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LOWERED = torch.bfloat16


def seed(function):
    torch.manual_seed(0)
    return Around(function).eval()


def by_the_type_of_a_tensor(x):  # of PyTorch's first years; nothing tells a trace of it
    return x * 2 if isinstance(x, torch.FloatTensor) else x


def by_the_lowered_type(x):
    return x * 2 if isinstance(x, torch.BFloat16Tensor) else x


def test_what_float64_hides_is_seen():
    network = seed(by_the_type_of_a_tensor)
    with pytest.warns(ConversionWarning, match="in its own types"):
        model = convert(network, CONFIG, X)
    torch.testing.assert_close(model(X), network(X), rtol=1e-4, atol=1e-5)


def test_what_is_other_under_autocast_alone_is_seen_there():
    network = seed(by_the_lowered_type)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConversionWarning)
        convert(network, CONFIG, X)
    with torch.autocast("cpu", LOWERED):
        with pytest.warns(ConversionWarning, match="under autocast"):
            model = convert(network, CONFIG, X)
        torch.testing.assert_close(model(X), network(X), rtol=0.02, atol=0.02)


def test_inside_autocast_no_rounding_is_blamed():
    network = switching(Asks)
    with torch.autocast("cpu", LOWERED), warnings.catch_warnings():
        warnings.simplefilter("error", ConversionWarning)
        model = convert(network, CONFIG, X)
        got, want = model(X), network(X)
    assert [path for path, _ in model.plan.python] == ["blocks.0", "blocks.1", "blocks.2"]
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
    torch.testing.assert_close(model(X), network(X), rtol=1e-4, atol=1e-5)


def names(network, **about):
    _, found = compared(network, CONFIG, X.to(next(network.parameters()).dtype), **about)
    assert all(each.ok for each in found)
    return [each.name for each in found if each.name.startswith("outputs")][-2:]


def test_what_is_compared():
    network, own, last = switching(Asks), "outputs, eval, in its own types", "train mode"
    assert own in names(network)
    assert last in names(copy.deepcopy(network).double())[-1]  # its own are compared anyway
    with torch.autocast("cpu", LOWERED):
        assert names(network) == [own, "outputs, eval, under autocast"]


class Chaotic(nn.Module):
    """A rounding comes to everything."""

    def forward(self, x):
        for _ in range(60):
            x = (3.99 * x * (1 - x)).clamp(0, 1)
        return x


def test_where_rounding_decides_nothing_is_compared():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), Chaotic()).eval()
    with torch.autocast("cpu", LOWERED):
        assert not [*in_own_types(network, torch.double, (X,), draws=False)]
        assert len([*in_own_types(seed(nn.ReLU()), torch.double, (X,), draws=False)]) == 2


def test_a_failing_pass_is_left_out():
    def function(x):
        if x.dtype == torch.float32:
            raise ValueError
        return x

    assert not [*in_own_types(seed(function), torch.double, (X,), draws=False)]
