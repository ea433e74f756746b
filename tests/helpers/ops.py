"""What tests of single ops share."""

import torch
from torch import nn

from lightning_da3.memory import saved_activation_bytes

FLOAT = 4  # bytes


def randn(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def leaf(x):
    return x.detach().clone(memory_format=torch.preserve_format).requires_grad_()


class Runs(nn.Module):
    """`fn` as a module that holds its constants, so that they do not count as activations."""

    def __init__(self, fn, constants):
        super().__init__()
        self.fn, self.constants = fn, nn.ParameterList(constants)

    def forward(self, *args, **kwargs):
        return self.fn(*args, **kwargs)


def kept_bytes(fn, *args, constants=(), **kwargs):
    return saved_activation_bytes(Runs(fn, constants), *args, **kwargs)


def value_and_gradient(fn, x):
    x = leaf(x)
    y = fn(x)
    (grad,) = torch.autograd.grad(y, x, torch.empty_like(y).copy_(randn(*y.shape, seed=7)))
    return y.detach(), grad


def assert_like_the_builtin(ours, builtin, x, **tolerance):
    """Same value and gradient; exact to the bit where no tolerance is given."""
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    y, grad = value_and_gradient(ours, x)
    expected_y, expected_grad = value_and_gradient(builtin, x)
    torch.testing.assert_close(y, expected_y, **tolerance)
    torch.testing.assert_close(grad, expected_grad, **tolerance)


def gradcheck(fn, *inputs):
    assert torch.autograd.gradcheck(fn, [leaf(x) for x in inputs])


def assert_no_graph(fn, x):
    """Nothing is kept, and nothing computed, that only a backward pass would need."""
    assert not fn(x).requires_grad
    with torch.no_grad():
        y = fn(leaf(x))
    assert y.grad_fn is None
    assert kept_bytes(fn, x) == 0
