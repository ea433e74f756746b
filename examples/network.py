"""The network that the examples start from: a small RegNet, pretrained on printed characters."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import CHARACTERS
from safetensors.torch import load_file
from torchvision.models.regnet import BlockParams, RegNet

WEIGHTS = Path(__file__).parent / "weights" / "characters.safetensors"


def build_network(pretrained: bool = True) -> RegNet:
    """Builds a RegNet of 1.1 million parameters for 48x48 images; its classes are `CHARACTERS`.

    Args:
        pretrained: Load the weights that `pretrain.py` wrote; otherwise they are random.
    """
    widths = [24, 48, 96, 192]
    blocks = BlockParams(
        depths=[1, 1, 2, 2],
        widths=widths,
        group_widths=widths,
        bottleneck_multipliers=[1.0] * 4,
        strides=[1, 2, 2, 2],
    )
    network = RegNet(
        blocks, num_classes=len(CHARACTERS), stem_width=24, norm_layer=torch.nn.BatchNorm2d
    )
    if pretrained:
        network.load_state_dict(load_file(WEIGHTS))  # float16 in the file, float32 in the network
    return network
