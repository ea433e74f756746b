"""Small networks around one function, and gradients of their input."""

import torch
from torch import nn

from lightning_da3 import DA3Config, MemoryConfig, convert


class Around(nn.Module):
    """Convolutions, a function of their maps (N, 8, 8, 8) to maps of 8 channels, and a head."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.stem, self.body = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.tail, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.function(self.body(self.stem(x).relu()))
        return self.head(self.tail(x).mean((2, 3)))


def loss(network, x, seed=7):
    """The sum of squares, with these random numbers."""
    torch.manual_seed(seed)
    return network(x).square().sum()


def input_gradient(network, x):
    """The gradient of `loss`."""
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(network, x), x)[0]


def gradient_error(network, x, *, exact):
    """How far a converted network's input gradient is from PyTorch's, relative to its norm."""
    model = convert(network.eval(), DA3Config(gate=None, memory=MemoryConfig(exact=exact)))
    got, want = input_gradient(model, x), input_gradient(network, x)
    return ((got - want).norm() / want.norm()).item()


def assert_same_gradients(function, codes=0.05, rounding=1e-5, x=None):
    """`Around` a function has the input gradients that it had, exact or to the codes' rounding."""
    torch.manual_seed(0)
    network, x = Around(function), torch.randn(2, 3, 16, 16) if x is None else x
    assert gradient_error(network, x, exact=True) < rounding
    assert gradient_error(network, x, exact=False) < codes


def assert_written(function, config):
    """What `function` gives and writes is the same once converted, twice in a row."""
    with torch.no_grad():  # in eager PyTorch some of these write into what a gradient needs
        network = Around(function).eval()
        x = torch.randn(2, 3, 16, 16)
        want, model = network(x), convert(network, config, verify=False)
        assert model.plan.head == "head"
        for _ in range(2):
            torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
