"""What needs plain PyTorch alone: fine-tuning, a linear probe, biases only.

A method takes a network that has the new domain's head, and returns it with `requires_grad` and
modes as they are in training: batch norm follows the batches in train mode, and keeps the
pretrained statistics in eval. What a method holds in eval, stays in eval.
"""

from __future__ import annotations

from torch import nn

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def head_of(network: nn.Module) -> tuple[str, nn.Module]:
    """The classifier and its name: the last layer with weights."""
    named = [(n, m) for n, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return named[-1]


def fine_tuning(network: nn.Module) -> nn.Module:
    """Everything trains, with batch norm on the statistics of each batch."""
    return network.train().requires_grad_(True)


def linear_probe(network: nn.Module) -> nn.Module:
    """The head alone trains, on what the pretrained network sees."""
    network.eval().requires_grad_(False)
    head_of(network)[1].requires_grad_(True)
    return network


def biases_only(network: nn.Module) -> nn.Module:
    """The biases that the network has, those of norms included, and the head train."""
    linear_probe(network)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            parameter.requires_grad_(True)
    return network
