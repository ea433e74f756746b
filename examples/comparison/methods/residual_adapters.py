"""Residual adapters, series and parallel: small convolutions beside frozen ones, and batch norms.

Rebuffi, Bilen, Vedaldi, "Learning multiple visual domains with residual adapters" (2017) and
"Efficient parametrization of multi-domain deep neural networks" (2018). After, or beside, every
frozen spatial convolution stands a convolution of single pixels. It and all batch norms train, in
train mode, with the head.

Ours: the new convolutions start at zero, so that training starts from the pretrained network; and
beside a grouped convolution they have its groups, so that adapters stay smaller than their network.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from comparison.input_errors import InputError
from comparison.methods.plain import NORMS, linear_probe


class Series(nn.Module):
    """z + W BN(z) with z = conv(x); the network's own batch norm follows."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        channels = conv.out_channels
        self.conv = conv
        self.norm = nn.BatchNorm2d(channels)
        self.adapter = nn.Conv2d(channels, channels, 1, groups=conv.groups, bias=False)
        nn.init.zeros_(self.adapter.weight)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        return z + self.adapter(self.norm(z))


class Parallel(nn.Module):
    """conv(x) + W x, where W is at the middle of the window; the network's batch norm follows."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.adapter = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            1,
            stride=conv.stride,
            groups=conv.groups,
            bias=False,
        )
        nn.init.zeros_(self.adapter.weight)
        self.margins = _margins(conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.adapter(F.pad(x, self.margins))


def series_adapters(network: nn.Module) -> nn.Module:
    """Fine-tunes batch norms, series adapters and the head."""
    return _adapted(network, Series)


def parallel_adapters(network: nn.Module) -> nn.Module:
    """Fine-tunes batch norms, parallel adapters and the head."""
    return _adapted(network, Parallel)


def _adapted(network: nn.Module, kind: type[Series] | type[Parallel]) -> nn.Module:
    linear_probe(network).train()
    hosts = {
        name: module
        for name, module in network.named_modules()
        if type(module) is nn.Conv2d
        and max(module.kernel_size) > 1
        and not isinstance(module.padding, str)
        and module.padding_mode == "zeros"
    }
    if not hosts:
        raise InputError(
            "Residual adapters stand beside spatial convolutions, of which this network has none: "
            "leave these methods out with --methods."
        )
    for name, conv in hosts.items():
        network.set_submodule(name, kind(conv))
    for module in network.modules():
        if isinstance(module, (*NORMS, kind)):
            module.requires_grad_(True)
    for conv in hosts.values():
        conv.requires_grad_(False)
    return network


def _margins(conv: nn.Conv2d) -> list[int]:
    """What to add to each side of x (take away, if negative): the window's middle remains."""
    margins: list[int] = []
    for size, dilation, padding in zip(conv.kernel_size, conv.dilation, conv.padding, strict=True):
        reach = dilation * (size - 1)
        margins = [padding - reach // 2, padding - (reach - reach // 2), *margins]
    return margins
