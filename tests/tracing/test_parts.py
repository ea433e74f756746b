"""What is written into a part of a tensor, or by a function into its argument, is written."""

import pytest
import torch
from helpers.around import Around, assert_written, gradient_error, input_gradient
from torch import nn

from lightning_da3 import AdapterConfig, DA3Config, convert

CONFIG = DA3Config(gate=None, adapter=AdapterConfig(hidden_channels=4, min_stride=1))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def adds_to_a_part(x):
    y = x.sin()
    y[:, 1:, ::2] += x[:, :1, ::2]
    y[..., -1] *= 0.5
    return y + x


def moves_parts(x):
    y = x + 1.0
    for i in range(1, 8):
        y[:, i] = y[:, i - 1] * 0.5 + x[:, i]
    return y


def assigns_through_a_view(x):
    y = x + 1.0
    part = y[:, 2:]
    part[:, 0] = 0.0
    return y


def reads_an_old_view(x):
    y = x + 1.0
    part = y[:, :2]
    y[:, 0] = 0.0
    return torch.cat([part, y[:, 2:]], 1)


def adds_to_a_part_of_a_view(x):
    y = x + 1.0
    y.flatten(2)[:, 1:] += 1.0
    return y


def keeps_what_it_added(x):
    y = x + 1.0
    part = y[:, :4]
    part += 1.0
    y[:, 4:] = part
    return y


def adds_what_it_wrote_elsewhere(x):
    y, z = x + 1.0, x - 1.0
    part = z[:, :4]
    part += 1.0
    y[:, :4] = part
    return y * z


def assigns_where(x):
    y = x + 1.0
    y[y > 1.0] = 0.0
    return y


def assigns_in_order(x):
    y = x + 1.0
    y[:, [3, 1]] = x[:, :2]
    return y


@torch.fx.wrap
def shifted(x, by):
    x[:, 1:] += by
    return x


def writes_in_a_function_that_is_a_node(x):
    y = x + 1.0
    shifted(y, 2.0)
    return y * 2.0


@torch.fx.wrap
def swapped(x, y):
    x += y
    y += x
    return x


def writes_into_two_arguments(x):
    y, z = x + 1.0, x * 2.0
    swapped(y, z)
    return y + z


def writes_in_a_function_and_reads_a_view(x):
    y = x + 1.0
    part = y[:, 4:]
    y = shifted(y, 2.0)
    return torch.cat([part, y[:, :4]], 1)


PARTS = [adds_to_a_part, moves_parts, assigns_through_a_view, reads_an_old_view, assigns_where]
PARTS += [adds_to_a_part_of_a_view, keeps_what_it_added, adds_what_it_wrote_elsewhere]
PARTS += [assigns_in_order, writes_in_a_function_that_is_a_node, writes_into_two_arguments]
PARTS += [writes_in_a_function_and_reads_a_view]


@pytest.mark.parametrize("function", PARTS)
def test_what_is_written_in_parts_is_written(function):
    assert_written(function, CONFIG)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "coded"])
@pytest.mark.parametrize("function", PARTS)
def test_gradients_of_what_is_written_in_parts(function, exact):
    error = gradient_error(Around(function), torch.randn(2, 3, 16, 16), exact=exact)
    assert error < (1e-5 if exact else 0.03)


WHOLE = (adds_to_a_part, moves_parts, writes_in_a_function_that_is_a_node)


@pytest.mark.parametrize("function", WHOLE)
def test_what_is_written_in_parts_is_a_graph(function):
    plan = convert(Around(function).eval(), CONFIG, verify=False).plan
    assert not plan.python
    assert not plan.functions


def writes_first(x, y):
    """A function that stays Python, and writes into one of its arguments."""
    if x.sum() > 1e9:
        raise OverflowError
    x[:, :4] += y
    return x


class Writes(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.bias = nn.Conv2d(8, 8, 1), nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x):
        return self.layer(writes_first(self.layer(x), self.bias))


def test_a_function_that_writes_into_one_argument_leaves_the_others_as_they_are():
    network, x = Around(Writes()).eval(), torch.randn(2, 3, 16, 16)
    model = convert(network, CONFIG, verify=False)
    assert not model.plan.python
    torch.testing.assert_close(model(x), network(x), rtol=1e-4, atol=1e-5)
    assert [node for node, _ in model.plan.functions] == ["writes_first"]
    got, want = input_gradient(model, x), input_gradient(network, x)
    assert (got - want).norm() / want.norm() < 0.05
