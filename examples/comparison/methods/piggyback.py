"""Piggyback: a binary mask for every frozen weight.

Mallya, Davis, Lazebnik, "Piggyback: adapting a single network to multiple tasks by learning to mask
weights" (2018). The effective weight is 1[m > 5e-3] * W; every m starts at 1e-2, all weights open;
the gradient of the threshold is the identity, so that dL/dm = dL/dW_eff * W. A domain stores its
masks, one bit a weight, and its head. Batch norm stays as pretrained.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from comparison.methods.plain import head_of, linear_probe

START, THRESHOLD = 1e-2, 5e-3
HEAD_FASTER = 10.0  # as in the authors' code: 1e-4 for the masks, 1e-3 for the head


class Mask(nn.Module):
    """weight -> 1[m > 5e-3] * weight"""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.full_like(weight, START, requires_grad=True))

    def forward(self, weight: Tensor) -> Tensor:
        open_ = (self.mask > THRESHOLD).to(weight.dtype)
        through = self.mask - self.mask.detach()  # zero, with the gradient of the mask
        return (open_ + through) * weight


def piggyback(network: nn.Module) -> nn.Module:
    """Masks on the weights of all convolutions and linear layers but the head."""
    linear_probe(network)
    head = head_of(network)[1]
    for module in list(network.modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module is not head:
            parametrize.register_parametrization(module, "weight", Mask(module.weight.detach()))
    return network


def masked(network: nn.Module) -> nn.Module:
    """With the masks applied for good, as one uses what was learned."""
    for module in list(network.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
    return network


def optimizer(network: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Adam, with a higher rate for what is not a mask."""
    trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
    masks = [p for name, p in trained.items() if name.endswith(".mask")]
    head = [p for name, p in trained.items() if not name.endswith(".mask")]
    groups = [{"params": masks, "lr": rate}, {"params": head, "lr": HEAD_FASTER * rate}]
    return torch.optim.Adam(groups)
