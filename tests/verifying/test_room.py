"""Comparisons with little memory: less is compared, and that is said."""

import math
import warnings
import weakref

import pytest
import torch
from helpers.domains import refused
from torch import nn

from lightning_da3 import (
    AdapterConfig,
    ConfigError,
    ConversionError,
    ConversionWarning,
    DA3Config,
    convert,
)
from lightning_da3.converting import compared
from lightning_da3.nn.convolution import FrozenConv
from lightning_da3.verifying import room, shadows
from lightning_da3.verifying.batches import Known
from lightning_da3.verifying.expected import Expected, expected_of
from lightning_da3.verifying.room import NoRoom, needed_bytes

CONFIG = DA3Config(gate=None, adapter=AdapterConfig(4, min_stride=1))
X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


OWN, WIDE = needed_bytes(network()), needed_bytes(network(), torch.double)


@pytest.fixture
def free(monkeypatch):
    """Sets the number of bytes that are free."""

    def have(number):
        monkeypatch.setattr(room, "free_bytes", lambda device: number)

    return have


def test_what_is_needed():
    weights = 4 * sum(p.numel() for p in network().parameters())
    assert weights // 4 == OWN
    assert pytest.approx(2 * weights * 1.25, abs=1) == WIDE
    assert needed_bytes(network(), own=True) == pytest.approx(weights * 1.25, abs=1)
    assert needed_bytes(network().double(), torch.double) == 2 * OWN  # it is not copied


@pytest.mark.parametrize(
    ("number", "dtype", "passes"), [(WIDE, torch.double, 5), (WIDE - 1, None, 2), (OWN, None, 2)]
)
def test_less_memory_less_is_compared(free, number, dtype, passes):
    free(number)
    found = expected_of(network(), Known((X,)), thorough=None)
    assert isinstance(found, Expected)
    assert (found.dtype, len(found.passes)) == (dtype, passes)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConversionWarning)
        convert(network(), CONFIG, X)


def test_no_copy_is_larger_than_there_is_room(free, monkeypatch):
    free(WIDE - 1)
    own = shadows.shadow
    types = []

    def noted(module, dtype=None):
        types.append(dtype)
        return own(module, dtype)

    monkeypatch.setattr("lightning_da3.verifying.expected.shadow", noted)
    convert(network(), CONFIG, X)
    assert types
    assert not any(types)


def test_without_room_nothing_is_compared_and_a_warning_says_so(free, monkeypatch):
    free(OWN - 1)
    assert isinstance(expected_of(network(), Known((X,)), thorough=None), NoRoom)
    monkeypatch.setattr("lightning_da3.verifying.expected.run", None)  # nothing runs
    with pytest.warns(ConversionWarning, match="is not compared with its conversion: that takes"):
        model = convert(network(), CONFIG, X)
    monkeypatch.undo()
    torch.testing.assert_close(model(X), network()(X))


def test_asked_for_it_compares_what_it_can(free):
    free(WIDE - 1)
    with pytest.warns(ConversionWarning, match="in its own types, not in float64: that takes"):
        _, found = compared(network(), CONFIG, X)
    assert len(found) == 6
    assert all(c.ok for c in found)
    with pytest.warns(ConversionWarning, match="in its own types, not in float64: that takes"):
        convert(network(), CONFIG, X, verify=True)
    free(OWN - 1)
    with refused(ConfigError, "cannot be compared with its conversion", "B are free"):
        convert(network(), CONFIG, X, verify=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConversionWarning)
        convert(network(), CONFIG, X, verify=False)


def test_what_may_be_rounding_is_said_where_there_is_no_room_for_float64(free, monkeypatch):
    forward, factor = FrozenConv.forward, 1.003
    monkeypatch.setattr(FrozenConv, "forward", lambda self, x: forward(self, x) * factor)
    free(WIDE - 1)
    with pytest.warns(ConversionWarning, match=r"may be rounding. A comparison in float64 would"):
        convert(network(), CONFIG, X)
    factor = 2.0
    with refused(ConversionError, "does not reproduce the backbone"):
        convert(network(), CONFIG, X)


def test_where_the_system_does_not_say_what_is_free(monkeypatch):
    def unknown(device):
        raise ConfigError

    monkeypatch.setattr(room, "free_bytes", unknown)
    known = Known((X,))
    assert room.free_for(network()) == math.inf
    assert expected_of(network(), known, thorough=None).dtype == torch.double
    monkeypatch.setattr("lightning_da3.verifying.expected.MOST_PARAMETERS", 100)
    assert expected_of(network(), known, thorough=None) is None
    monkeypatch.undo()
    monkeypatch.setattr("lightning_da3.verifying.expected.MOST_PARAMETERS", 100)
    assert expected_of(network(), known, thorough=None) is not None  # memory counts


def test_copies_of_large_networks_do_not_linger(monkeypatch):
    monkeypatch.setattr(shadows, "LARGE", 100)
    model = convert(network(), CONFIG, X, verify=False)
    weights = []
    for _ in range(3):
        copied = shadows.shadow(model, torch.double)
        assert sum(ref() is not None for ref in weights) <= 1  # the one before, still bound
        weights.append(weakref.ref(next(p for p in copied.parameters())))


def test_what_is_garbage_is_free(monkeypatch):
    found = iter([OWN - 1, OWN])
    monkeypatch.setattr(room, "free_bytes", lambda device: next(found))
    assert room.lack_of_room(network()) == ""
