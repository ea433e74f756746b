"""Tokens (T, N, D): the axis of the samples is found, or there is no adapter."""

import pytest
import torch
from helpers.comparing import add, mix_gates_, score
from helpers.converted import choose
from torch import nn

from lightning_da3 import convert
from lightning_da3.config import MemoryConfig
from lightning_da3.reference import PlainPyTorch


class TimeFirst(nn.Module):
    """As networks of sound are: blocks of (T, N, D) in a network of (N, T, D)."""

    def __init__(self, folded=False):
        super().__init__()
        self.folded = folded
        self.embed = nn.Linear(4, 8)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        x = x.reshape(-1, 1, 8) if self.folded else x.transpose(0, 1)
        x = x + self.mlp(x)
        return self.head(x.view(-1, 9, 8).mean(1) if self.folded else x.mean(0))


@pytest.fixture(params=[False, True], ids=["turned", "folded"])
def net(request):
    torch.manual_seed(0)
    return TimeFirst(request.param)


def learned(net, x, **choices):
    model = add(add(convert(net, choose(**choices), x), "a"), "b", seed=2)
    model.set_domain("a")
    mix_gates_(model, [x])
    return model


def test_a_sample_does_not_depend_on_the_others(net):
    x = torch.randn(3, 9, 4)
    model = learned(net, x).eval()
    with torch.no_grad():
        together = model(x)
        torch.testing.assert_close(together, torch.cat([model(row[None]) for row in x]))
        if not net.folded:
            model.set_domain("b")
            other = model(x)
            mixed = torch.stack(model(x, domains=["a", "b", "a"]))
            torch.testing.assert_close(mixed, torch.stack([together[0], other[1], together[2]]))


def test_gradients_are_those_of_plain_autograd(net):
    x, net = torch.randn(3, 9, 4, dtype=torch.float64), net.double()
    model = learned(net, x, memory=MemoryConfig(exact=True)).train()
    plain = PlainPyTorch(net, model)
    trained = [p for p in model.parameters() if p.requires_grad]
    model.gate_loss_scale = 1.0  # as `plain.loss` is added
    expected = torch.autograd.grad(score(plain(x)) + plain.loss(), trained)
    torch.testing.assert_close(torch.autograd.grad(score(model(x)), trained), expected)
