"""Views of channels_last maps."""

import dataclasses

import pytest
import torch
from helpers.comparing import (
    assert_relatively_close,
)
from torch import nn

from lightning_da3 import (
    AdapterConfig,
    ConversionError,
    DA3Config,
    convert,
)

ADAPTER = AdapterConfig(hidden_channels=4, max_cells=16, min_stride=1)


CONFIG = DA3Config(adapter=ADAPTER, head=None)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_views_that_channels_last_maps_do_not_have_are_copies():
    class Flat(nn.Module):
        def __init__(self, python):
            super().__init__()
            self.python, self.conv1 = python, nn.Conv2d(3, 8, 3, padding=1)
            self.conv2, self.fc = nn.Conv2d(8, 4, 3, padding=1), nn.Linear(64, 2)

        def forward(self, x):
            if self.python and x.sum() > 1e9:
                x = -x
            x = self.conv2(self.conv1(x).relu())
            like = x.new_empty(len(x), 64)
            return self.fc(x.view(x.size(0), -1) + x.view_as(like))

    x = torch.randn(2, 3, 4, 4)
    for python in (False, True):
        network = Flat(python).eval()
        model = convert(network, dataclasses.replace(CONFIG, head=None), x)
        assert bool(model.plan.python) is python
        assert_relatively_close([model(x)], [network(x)], 1e-5)


@pytest.mark.parametrize("axes", [2, 1])
def test_what_writes_through_a_view_writes_into_the_map_or_is_refused(axes):
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 2)

        def forward(self, x):
            x = self.conv(x).view(x.dtype)
            x.view(size=(len(x), 8, -1) if axes == 2 else (len(x), -1)).mul_(2.0)
            return self.fc(x.mean((2, 3)))

    network, x = Written().eval(), torch.randn(2, 3, 4, 4)
    if axes == 2:  # the view exists
        assert_relatively_close([convert(network, CONFIG, x)(x)], [network(x)], 1e-5)
    else:
        with pytest.raises(ConversionError, match=r"`mul_` writes through a view.*contiguous"):
            convert(network, CONFIG, x)(x)


def test_maps_come_out_laid_out_as_the_input_is():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1))
    model = convert(network, dataclasses.replace(CONFIG, head=None))
    x = torch.randn(2, 3, 4, 4)
    assert model(x).view(-1).shape == (128,)
    last = model(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert_relatively_close([last], [model(x)], 1e-5)
