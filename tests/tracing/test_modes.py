"""What a graph does not see is done: gradients and autocast switched, own backwards, hooks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.around import Around, assert_same_gradients
from torch import nn

from lightning_da3 import AdapterConfig, DA3Config, convert

CONFIG = DA3Config(gate=None, adapter=AdapterConfig(hidden_channels=4, min_stride=1))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- modes and functions of autograd --------------------------------------------------------------


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        del ctx
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        del ctx
        return -g


class Rounds(torch.autograd.Function):  # a straight-through estimator, without ctx in forward
    @staticmethod
    def forward(x):
        return x.round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        del ctx
        return g


reverse = Reverse.apply


def by_its_class(x):
    return Reverse.apply(x) * 0.5 + x


def by_a_name(x):
    return reverse(x) * 0.5


def in_a_helper(x):
    return by_a_name(x) * 0.5 + x


def without_gradients(x):
    with torch.no_grad():
        scale = x.mean((2, 3), keepdim=True)
    return x / (1 + scale.abs())


@torch.no_grad()
def decorated(x):
    return x.mean((2, 3), keepdim=True)


def calls_what_is_decorated(x):
    return x / (1 + decorated(x).abs())


def in_inference(x):
    with torch.inference_mode():
        scale = float(x.shape[1])
    return x * scale


FUNCTIONS = [Reverse.apply, by_its_class, by_a_name, in_a_helper, Rounds.apply]
FUNCTIONS += [without_gradients, calls_what_is_decorated, in_inference]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_are_cut_and_turned_where_the_user_does(function):
    network = Around(function).eval()
    assert convert(network, CONFIG, verify=False).plan.head == "head"
    # rounding is what its backward does not see: codes may change what is rounded
    assert_same_gradients(function, codes=0.05 if function is not Rounds.apply else 0.5)


def in_float32(x):
    with torch.autocast("cpu", enabled=False):
        return torch.matmul(x.float(), x.float().transpose(-1, -2))


def test_autocast_is_off_where_the_user_switches_it_off():
    kinds = []

    def noted(x):
        y = in_float32(x)
        kinds.append(y.dtype)
        return y

    network, x = Around(noted).eval(), torch.randn(2, 3, 16, 16)
    model = convert(network, CONFIG, verify=False)
    kinds.clear()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, want = model(x), network(x)
    assert kinds == [torch.float32] * 2
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


# --- hooks ----------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.b(F.gelu(self.a(self.norm(x))))


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


@pytest.mark.parametrize("where", ["blocks.2.a", "blocks.2.norm", "blocks.2", "blocks.1"])
def test_a_hook_runs_once_and_sees_a_graph(where):
    network, seen = Blocks(), []
    network.get_submodule(where).register_forward_hook(lambda m, i, y: seen.append(y))
    model = convert(network, CONFIG, verify=False)
    model.add_domain("d", 3)
    model.set_domain("d")
    model.train()
    seen.clear()
    y = model(torch.randn(2, 3, 16, 16))
    assert len(seen) == 1
    y.sum().backward()
    assert len(seen) == 1
    assert seen[0].requires_grad


def test_a_hook_that_changes_an_output_changes_it():
    network = Blocks().eval()
    network.blocks[1].register_forward_hook(lambda m, i, y: y * 2)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(
        convert(network, CONFIG, verify=False)(x), network(x), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("where", ["", "blocks.1", "head"])
def test_a_copy_has_the_hooks(where):
    network, x = Blocks().eval(), torch.randn(2, 3, 16, 16)
    network.get_submodule(where).register_forward_hook(lambda m, i, y: y * 2)
    model = copy.deepcopy(convert(network, CONFIG, verify=False))
    torch.testing.assert_close(model(x), network(x), rtol=1e-4, atol=1e-5)
