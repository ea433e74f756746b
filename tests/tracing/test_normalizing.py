"""Graphs in one form."""

import pytest
import torch
from helpers import zoo
from torch import nn

from lightning_da3 import (
    AdapterConfig,
    DA3Config,
    convert,
)

ADAPTER = AdapterConfig(hidden_channels=4, max_cells=16, min_stride=1)


CONFIG = DA3Config(adapter=ADAPTER, head=None)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_what_asserts_the_rank_of_a_layer_s_output_reads_nothing():
    model = convert(zoo.network("NormsThatAssert").eval(), CONFIG)
    actions = {node.name: node.action for node in model.plan.nodes}
    assert list(actions.values()).count("fold") == 3
    # behind a host its adapter lies between the two; else they meet past an Identity
    assert [actions[f"norm{i}_act"] for i in (1, 2, 3)] == ["replace", "replace", "replace"]
    (total,) = (node for node in model.plan.nodes if node.layer == "add")
    assert (total.action, total.inplace) == ("accumulate", True)  # past a Dropout
    # what is not known beforehand is asserted as ever: of the input, and of a sum
    assert [node.layer for node in model.plan.nodes].count("_assert") == 2


def test_a_rank_that_is_wrong_is_found_when_it_runs():
    class Volumes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x):
            x = self.conv(x)
            torch._assert(x.dim() == 5, "expected volumes")
            return self.last(x) * x.ndim

    model = convert(Volumes(), CONFIG)
    with pytest.raises(AssertionError, match="expected volumes"):
        model(torch.randn(2, 3, 8, 8))
