"""A forward that asks for the types of what it computes gets its answer in every call."""

import copy
import warnings

import pytest
import torch
from helpers.around import Around
from torch import nn

from lightning_da3 import AdapterConfig, ConversionWarning, DA3Config, convert
from lightning_da3.tracing import probes

CONFIG = DA3Config(gate=None, adapter=AdapterConfig(4, min_stride=1))
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LOWERED = torch.bfloat16


def by_is(x):
    return x * 2 if x.dtype is LOWERED else x


def by_is_not(x):
    return x * 2 if x.dtype is not torch.float32 else x


def by_a_name(x):
    kind = x.dtype
    return x * 2 if kind is LOWERED else x


def of_a_helper(x):
    def is_narrow(t):
        return t.dtype is LOWERED

    return x * 2 if is_narrow(x) else x


def by_a_dictionary(x):
    return x * {LOWERED: 2.0}.get(x.dtype, 1.0)


def by_a_set(x):
    return x * 2 if x.dtype in {torch.float16, LOWERED} else x


def by_its_text(x):
    return x * 2 if "bfloat16" in str(x.dtype) else x


def by_a_format(x):
    return x * (2 if f"{x.dtype}" == "torch.bfloat16" else 1)


def by_bytes(x):
    return x * 2 if x.element_size() == 2 else x


def by_all_bytes(x):
    return x * 2 if x.nbytes == 2 * x.numel() else x


ASKS = [by_is, by_is_not, by_a_name, of_a_helper, by_a_dictionary, by_a_set, by_its_text]
ASKS += [by_a_format, by_bytes, by_all_bytes]


def seed(function):
    torch.manual_seed(0)
    return Around(function).eval()


def far(ours, theirs):
    assert ours.dtype == theirs.dtype
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


@pytest.mark.parametrize("function", ASKS)
def test_it_is_told_what_they_are_in_every_call(function):
    network = seed(function)
    model = convert(network, CONFIG, X, verify=False)
    assert not model.plan.python  # the function alone is called as it is
    with torch.no_grad():
        assert far(model(X), network(X)) < 1e-5
        with torch.autocast("cpu", LOWERED):
            assert far(model(X), network(X)) < 0.02
        lowered, x = copy.deepcopy(network).to(LOWERED), X.to(LOWERED)
        assert far(convert(lowered, CONFIG, x, verify=False)(x), lowered(x)) < 0.02


def by_size(x):
    return x * {8: 2.0, 16: 3.0}.get(x.shape[-1], 1.0)


def by_a_set_of_sizes(x):
    return x * 2 if x.shape[-1] in {8, 12} else x


@pytest.mark.parametrize("function", [by_size, by_a_set_of_sizes])
def test_sizes_are_keys_too(function):
    network = seed(function)
    model = convert(network, CONFIG, X, verify=False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConversionWarning)
        for side in (16, 24, 32, 40):
            x = torch.randn(2, 3, side, side)
            assert far(model(x), network(x)) < 1e-5


def with_defaults(x, kind=None):
    kind = x.dtype if kind is None else kind
    return x.to(kind) * 2


def test_asking_whether_something_is_none_is_no_reason_to_stay_python():
    model = convert(seed(with_defaults), CONFIG, X, verify=False)
    assert not model.plan.functions
    assert not model.plan.python


@pytest.mark.filterwarnings("ignore:.*traced once more")
def test_what_refuses_the_inputs_it_was_made_for_runs_as_python(monkeypatch):
    monkeypatch.setattr(probes, "_STATES", ())  # tracing does not know what depends on precision
    network = seed(by_bytes)
    model = convert(network, CONFIG, X, verify=False)
    assert not model.plan.functions
    with torch.no_grad(), torch.autocast("cpu", LOWERED):
        with pytest.warns(ConversionWarning, match="`forward` stays Python for inputs like this"):
            got = model(X)
        assert far(got, network(X)) < 0.02
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert far(model(X), network(X)) < 0.02  # said once
    with torch.no_grad():
        assert far(model(X), network(X)) < 1e-5


@pytest.mark.filterwarnings("ignore:.*traced once more")
def test_so_does_a_module_in_it_that_refuses_them(monkeypatch):
    """Its graph would refuse them again."""
    monkeypatch.setattr(probes, "_STATES", ())
    network = seed(Bytes())
    model = convert(network, CONFIG, X, verify=False)
    model.add_domain("a", 5)
    model.set_domain("a")
    network.head = model.domain("a").head
    with torch.no_grad(), torch.autocast("cpu", LOWERED):
        with pytest.warns(ConversionWarning, match="`forward` stays Python for inputs like this"):
            assert far(model(X), network(X)) < 0.02
        for parameter in model.domain("a").adapters.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        assert far(model(X), network(X)) > 0.1  # adapters act


class Bytes(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1))

    def forward(self, x):
        y = self.layers(x)
        return y * 2 if y.element_size() == 2 else y


class Narrow(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = self.conv(x)
        return y * 2 if y.dtype is LOWERED else y


def test_of_a_module():
    network = seed(Narrow())
    model = convert(network, CONFIG, X, verify=False)
    assert [path for path, _ in model.plan.python] == ["function"]
    with torch.no_grad(), torch.autocast("cpu", LOWERED):
        assert far(model(X), network(X)) < 0.02
