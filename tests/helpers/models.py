"""A zoo of tiny networks, each named for what its graph has in it, and of torchvision's families.

Every network of `ZOO` takes `inputs(name)`, and `FAMILIES` says at which size a family runs.
"""

from collections.abc import Callable

import torch
import torchvision.models as tv
from torch import Tensor, nn
from torchvision.models.densenet import DenseNet
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from helpers.classifier import CLASSES, randomise_
from helpers.small import (
    Activations,
    ConvHead,
    ConvNorm,
    ConvWithoutNorm,
    Depthwise,
    DictOutput,
    DilatedAndGrouped,
    Functional,
    InplaceThenOutOfPlace,
    InplaceThenReused,
    Keywords,
    LayersByKeyword,
    NormFirst,
    NormOfTheBatch,
    OwnFunction,
    PaddingModes,
    Pools,
    Residual,
    SharedConv,
    SharedLayers,
    TwoInputsTwoOutputs,
    TwoReaders,
)


class OtherAxes(nn.Module):
    """Convolutions, norms and pools over one and three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.row = nn.Sequential(
            nn.Conv1d(4, 4, 3, 2, 1), nn.BatchNorm1d(4), nn.ReLU(), nn.MaxPool1d(2), nn.AvgPool1d(2)
        )
        self.block = nn.Sequential(
            nn.Conv3d(4, 4, 3, (1, 2, 2), 1), nn.BatchNorm3d(4), nn.MaxPool3d((1, 2, 2))
        )
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        row, block = self.row(x.flatten(2)), self.block(x.unsqueeze(2))
        return self.fc(torch.cat([row.mean(2), block.mean((2, 3, 4))], 1))


ZOO: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: kind
    for kind in (
        ConvWithoutNorm,
        ConvNorm,
        SharedLayers,
        SharedConv,
        TwoReaders,
        Residual,
        Functional,
        InplaceThenReused,
        InplaceThenOutOfPlace,
        Activations,
        OwnFunction,
        Pools,
        PaddingModes,
        DilatedAndGrouped,
        Depthwise,
        NormFirst,
        NormOfTheBatch,
        TwoInputsTwoOutputs,
        DictOutput,
        Keywords,
        LayersByKeyword,
        ConvHead,
        OtherAxes,
    )
}


WITHOUT_A_HEAD = ("TwoInputsTwoOutputs", "DictOutput")  # none that "auto" could find


def resnext() -> nn.Module:
    return ResNet(Bottleneck, [1, 1, 1, 1], CLASSES, groups=4, width_per_group=4)


def resnet_tiny() -> nn.Module:
    return ResNet(BasicBlock, [1, 1, 1, 1], CLASSES)


# by name: how to make it, and the image size it runs at
FAMILIES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (lambda: tv.resnet18(num_classes=CLASSES), 33),
    "resnext": (resnext, 32),
    "vgg11_bn": (lambda: _small_vgg(), 32),
    "alexnet": (lambda: _small_alexnet(), 64),
    "mobilenet_v2": (lambda: tv.mobilenet_v2(width_mult=0.35, num_classes=CLASSES), 48),
    "mnasnet0_5": (lambda: tv.mnasnet0_5(num_classes=CLASSES), 48),
    "shufflenet_v2_x0_5": (lambda: tv.shufflenet_v2_x0_5(num_classes=CLASSES), 48),
    "regnet_x_400mf": (lambda: tv.regnet_x_400mf(num_classes=CLASSES), 32),
    "squeezenet1_1": (lambda: tv.squeezenet1_1(num_classes=CLASSES), 48),
    "densenet": (lambda: DenseNet(8, (2, 2, 2), 16, num_classes=CLASSES), 32),
    "googlenet": (
        lambda: tv.googlenet(num_classes=CLASSES, init_weights=False, aux_logits=False),
        48,
    ),
    "inception_v3": (
        lambda: tv.inception_v3(num_classes=CLASSES, init_weights=False, aux_logits=False),
        96,
    ),
}


def _small_vgg() -> nn.Module:
    """torchvision's layers, but a classifier of 32 instead of 4,096 features."""
    net = tv.vgg11_bn(num_classes=1)
    net.avgpool = nn.AdaptiveAvgPool2d(1)
    net.classifier = nn.Sequential(
        nn.Linear(512, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, CLASSES)
    )
    return net


def _small_alexnet() -> nn.Module:
    net = tv.alexnet(num_classes=1)
    net.avgpool = nn.AdaptiveAvgPool2d(2)
    net.classifier = nn.Sequential(
        nn.Dropout(), nn.Linear(256 * 4, 32), nn.ReLU(inplace=True), nn.Linear(32, CLASSES)
    )
    return net


def zoo(name: str) -> nn.Module:
    """A network of the zoo, the same at every call, in train mode as any network begins."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomise_(ZOO[name]())


def family(name: str) -> nn.Module:
    """A network of torchvision's, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomise_(FAMILIES[name][0]())


def inputs(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """A batch of two for a network of the zoo or of a family."""
    generator = torch.Generator().manual_seed(1)
    size = FAMILIES[name][1] if name in FAMILIES else 12
    count = 2 if name == "TwoInputsTwoOutputs" else 1
    return tuple(torch.randn(2, 3, size, size, generator=generator).to(dtype) for _ in range(count))
