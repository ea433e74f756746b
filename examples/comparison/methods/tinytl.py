"""TinyTL: biases, and lite residual modules beside the blocks.

Cai, Gan, Zhu, Han, "TinyTL: reduce memory, not parameters for efficient on-device learning" (2020).
A lite residual module sees its block's input at half the resolution: average pool of 2, convolution
of at most 5 x 5 in 2 groups, norm, ReLU, convolution of single pixels, norm (whose scale starts at
zero), and a bilinear resize; it is added to the block's output. The backbone's weights and
statistics stay, its biases train. In plain PyTorch, as here, frozen layers keep their inputs for
the backward pass all the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comparison.input_errors import InputError
from comparison.methods.blocks import blocks
from comparison.methods.plain import biases_only

LARGEST_KERNEL, GROUPS = 5, 2
PROBE_SIZE = 64  # height and width of the image that finds out the shapes


class LiteResidual(nn.Module):
    """block(x) + resize(BN(conv1(ReLU(BN(conv(pool(x)))))))

    Args:
        block: What stays frozen but for its biases.
        x: An input of the block.
        y: Its output.
    """

    def __init__(self, block: nn.Module, x: Tensor, y: Tensor) -> None:
        super().__init__()
        channels, made = x.shape[1], y.shape[1]
        self.block = block
        size = min(x.shape[-2:])
        kernel = min(LARGEST_KERNEL, size // 2 * 2 - 1) if size >= 2 else 1
        self.lite = nn.Sequential(
            nn.AvgPool2d(2, ceil_mode=True),
            nn.Conv2d(
                channels,
                channels,
                kernel,
                stride=max(1, round(size / min(y.shape[-2:]))),
                padding=kernel // 2,
                groups=GROUPS if channels % GROUPS == 0 else 1,
                bias=False,
            ),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, made, 1, bias=False),
            nn.BatchNorm2d(made),
        )
        nn.init.zeros_(self.lite[-1].weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        added = F.interpolate(self.lite(x), y.shape[-2:], mode="bilinear", align_corners=False)
        return y + added


def tinytl(network: nn.Module) -> nn.Module:
    """Biases, lite residual modules beside all blocks, and the head train."""
    biases_only(network)
    for name, (block, x, y) in _shapes(network).items():
        lite = LiteResidual(block, x, y)
        lite.lite.train()  # its norms follow the batches
        network.set_submodule(name, lite)
    return network


def _shapes(network: nn.Module) -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """Every block whose input and output are maps, with those of one small image."""
    found: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}
    hooks = []
    for name, block in blocks(network):

        def hook(block: nn.Module, inputs: tuple[Tensor, ...], y: Tensor, name: str = name) -> None:
            if all(isinstance(t, Tensor) and t.dim() == 4 for t in (*inputs[:1], y)):
                found[name] = (block, inputs[0], y)

        hooks.append(block.register_forward_hook(hook))
    try:
        with torch.no_grad():
            network(torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"TinyTL finds the shapes of blocks out with an image of {PROBE_SIZE}x{PROBE_SIZE}, "
            "which this network does not take: leave this method out with --methods."
        ) from error
    finally:
        for handle in hooks:
            handle.remove()
    if not found:
        raise InputError(
            "TinyTL's modules stand beside blocks of convolutions, of which this network has none "
            "in a row: leave this method out with --methods."
        )
    return found
