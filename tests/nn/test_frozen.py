"""Frozen layers: what is read of the layers that they stand for."""

import pytest
from torch import nn

from lightning_da3.nn.convolution import pad_of


@pytest.mark.parametrize("padding", ["same", "valid", 0, 1, (1, 2)])
@pytest.mark.parametrize("kernel", [2, 3, (3, 4)])
@pytest.mark.parametrize("dilation", [1, 2, (1, 3)])
def test_the_padding_is_the_layer_s_own(padding, kernel, dilation):
    conv = nn.Conv2d(1, 1, kernel, padding=padding, dilation=dilation)
    assert pad_of(conv) == list(conv._reversed_padding_repeated_twice)
