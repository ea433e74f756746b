"""What modules decide on sizes is checked in every call; on the number of samples it is Python."""

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.around import Around
from torch import nn

from lightning_da3 import AdapterConfig, ConversionWarning, DA3Config, convert

CONFIG = DA3Config(gate=None, adapter=AdapterConfig(hidden_channels=4, min_stride=1))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Windows(nn.Module):
    """It pads to whole windows, and asks whether that was needed; small maps it leaves alone."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 5, 5)

    def forward(self, x):
        x = self.first(x)
        more = -x.shape[-1] % 5
        if more > 0:
            x = F.pad(x, (0, more, 0, more))
        if x.shape[-1] > 20:
            x = x * 2
        return self.second(x)


def test_a_module_of_several_layers_may_decide_on_sizes():
    network = Around(Windows()).eval()
    model = convert(network, CONFIG, torch.randn(2, 3, 16, 16), verify=False)
    assert not model.plan.python
    assert "function.second" in {host.name for host in model.plan.hosts}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as many samples as one likes
        for count in (1, 3, 4):
            x = torch.randn(count, 3, 16, 16)
            torch.testing.assert_close(model(x), network(x), rtol=1e-4, atol=1e-5)
    for side in (18, 20, 50, 60):  # each of what it decides, the other way, and both
        x = torch.randn(2, 3, side, side)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConversionWarning)
            torch.testing.assert_close(model(x), network(x), rtol=1e-4, atol=1e-5)


class Even(nn.Module):
    """It refuses odd sizes, which it asks NumPy for."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1))

    def forward(self, x):
        if (np.array(x.shape[2:]) % 2).any():
            raise ValueError("odd sizes")
        return self.layers(x)


def test_a_module_may_ask_numpy_of_sizes():
    network = Around(Even()).eval()
    model = convert(network, CONFIG, torch.randn(2, 3, 16, 16), verify=False)
    for side in (16, 20):
        x = torch.randn(2, 3, side, side)
        torch.testing.assert_close(model(x), network(x), rtol=1e-4, atol=1e-5)
    with (
        pytest.warns(ConversionWarning, match=r"traced once more, .*\(`if \(np.array"),
        pytest.raises(ValueError, match="odd sizes"),
    ):
        model(torch.randn(2, 3, 18, 18))


class OnSamples(nn.Module):
    """What it does depends on how many samples there are."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1))

    def forward(self, x):
        return self.layers(x) * (2 if x.shape[0] % 2 else 1)


def test_a_module_that_decides_on_the_number_of_samples_stays_python():
    network = Around(OnSamples()).eval()
    model = convert(network, CONFIG, torch.randn(2, 3, 16, 16), verify=False)
    assert [path for path, _ in model.plan.python] == ["function"]
    for count in (1, 2, 3):
        x = torch.randn(count, 3, 16, 16)
        torch.testing.assert_close(model(x), network(x), rtol=1e-4, atol=1e-5)


class OnDevice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1))

    def forward(self, x):
        y = self.layers(x)
        return y if y.device.type != "meta" and not y.is_cuda else y * 2


def test_a_module_may_decide_on_the_device():
    network, x = Around(OnDevice()).eval(), torch.randn(2, 3, 16, 16)
    model = convert(network, CONFIG, verify=False)
    assert not model.plan.python
    torch.testing.assert_close(model(x), network(x), rtol=1e-4, atol=1e-5)
    with (
        pytest.warns(ConversionWarning, match="traced once more"),
        pytest.warns(ConversionWarning, match=r"stays Python.*`return y if y.device.type != "),
    ):
        y = copy.deepcopy(model).to("meta")(torch.empty(2, 3, 16, 16, device="meta"))
    assert y.shape == (2, 5)
