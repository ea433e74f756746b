"""Which calls and layers may draw random numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_da3.layers import layer_may_draw, may_draw

X = torch.zeros(2, 3)

DRAW = [
    (F.dropout, (X,), {}),
    (F.dropout, (X, 0.5), {}),
    (F.dropout1d, (X, 0.5, True), {}),
    (F.alpha_dropout, (X,), {"training": True}),
    (torch.dropout, (X, 0.5, True), {}),
    (torch.feature_dropout, (X, 0.5, True), {}),
    (F.scaled_dot_product_attention, (X, X, X, None, 0.1), {}),
    (F.scaled_dot_product_attention, (X, X, X), {"dropout_p": 0.1}),
    (F.scaled_dot_product_attention, (X, X, X), {"dropout_p": object()}),  # a node of the graph
    (F.rrelu, (X,), {"training": True}),
    (torch.rrelu, (X, 0.1, 0.3, True), {}),
    (F.gumbel_softmax, (X,), {}),
    (F.fractional_max_pool2d, (X, 2), {"output_size": 3}),
    (torch.rand_like, (X,), {}),
    (torch.randperm, (3,), {}),
    (torch.normal, (X, X), {}),
    (torch.poisson, (X,), {}),
    (torch.pca_lowrank, (X,), {}),
    (nn.init.xavier_uniform_, (X,), {}),
    (torch.ops.aten.bernoulli.p, (X, 0.5), {}),
    ("bernoulli_", (X,), {}),
    ("normal_", (X,), {}),
    ("multinomial", (X, 2), {}),
    ("geometric_", (X, 0.5), {}),
    (torch.Tensor.uniform_, (X,), {}),
]


@pytest.mark.parametrize("call", DRAW, ids=lambda call: getattr(call[0], "__name__", call[0]))
def test_what_draws(call):
    assert may_draw(*call)


CALM = [
    (F.dropout, (X,), {"training": False}),
    (F.dropout, (X, 0.0), {}),
    (F.dropout2d, (X, 0.5, False), {}),
    (torch.dropout, (X, 0.5, False), {}),
    (torch.dropout, (X,), {"p": 0.0, "train": True}),
    (F.scaled_dot_product_attention, (X, X, X), {}),
    (F.scaled_dot_product_attention, (X, X, X, None, 0.0), {}),
    (F.scaled_dot_product_attention, (X, X, X), {"is_causal": True}),
    (F.rrelu, (X,), {}),
    (torch.rrelu, (X, 0.1, 0.3), {}),
    (F.gelu, (X,), {}),
    (F.grid_sample, (X, X), {}),
    (torch.norm, (X,), {}),
    (torch.ops.aten.relu.default, (X,), {}),
    ("renorm", (X,), {}),
    ("view", (X, 3), {}),
]


@pytest.mark.parametrize("call", CALM, ids=lambda call: getattr(call[0], "__name__", call[0]))
def test_what_does_not_draw(call):
    assert not may_draw(*call)


class Unknown(nn.Module):
    def forward(self, x):
        return x


def test_layers():
    assert layer_may_draw(nn.FractionalMaxPool2d(2, 3))
    assert layer_may_draw(Unknown())
    assert not any(map(layer_may_draw, [nn.Dropout(), nn.GELU(), nn.LSTM(2, 2), nn.RReLU()]))
    assert not layer_may_draw(torch.fx.symbolic_trace(nn.Sequential(nn.GELU(), nn.Dropout())))
    noisy = nn.Sequential(nn.GELU(), nn.FractionalMaxPool2d(2, 3))
    assert layer_may_draw(torch.fx.symbolic_trace(noisy))
