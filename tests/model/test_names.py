"""Modules of the user's that have the names of ours."""

import copy
import pickle

import torch
from torch import fx, nn

from lightning_da3 import DA3Config, convert
from lightning_da3.tracing.graph_modules import graph_of_layer, graph_of_module


class Scaled(nn.Module):
    """A layer of the name that ours have, beside a tensor of the name that its own has."""

    def __init__(self):
        super().__init__()
        self.layer, self.weight = nn.GroupNorm(2, 8), nn.Parameter(torch.zeros(8))
        nn.init.uniform_(self.layer.weight)

    def forward(self, x):
        return self.layer(x) + self.weight.view(-1, 1, 1)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.scaled = nn.Conv2d(3, 8, 1), Scaled()
        self.after, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def features(self, x):
        return self.after(self.scaled(self.stem(x)))

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def test_a_module_does_not_answer_for_its_child():
    scaled = Scaled()
    whole, alone = graph_of_module(scaled, fx.Tracer().trace(scaled)), graph_of_layer(scaled.layer)
    for graph, answers in ((whole, False), (alone, True)):
        for each in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
            assert hasattr(each, "num_groups") is answers


def test_layers_of_the_users_may_have_our_names():
    network, x = Named().eval(), torch.randn(2, 3, 16, 16)
    model = convert(network, DA3Config(head="head"), x)
    torch.testing.assert_close(model.features(x), network.features(x))
