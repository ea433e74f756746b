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
