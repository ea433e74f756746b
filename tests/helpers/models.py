"""A zoo of tiny networks, each named for what its graph has in it, and of torchvision's families.

Every network of `ZOO` takes `inputs(name)`, and `FAMILIES` says at which size a family runs.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import Tensor, nn
from torchvision.models.densenet import DenseNet
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

CLASSES = 5


class Classifier(nn.Module):
    """What the networks share: a pool and a classifier behind `features`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.features(x)).flatten(1))


class ConvWithoutNorm(Classifier):
    def __init__(self) -> None:
        super().__init__(6)
        self.conv1 = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.relu2 = nn.ReLU(inplace=True)

    def features(self, x: Tensor) -> Tensor:
        return self.relu2(self.conv2(self.relu1(self.conv1(x))))


class ConvNorm(Classifier):
    def __init__(self) -> None:
        super().__init__(6)
        self.conv1 = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)  # called twice
        self.drop = nn.Dropout(0.5)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(6, affine=False)

    def features(self, x: Tensor) -> Tensor:
        x = self.drop(self.relu(self.norm1(self.conv1(x))))
        return self.relu(self.norm2(self.conv2(x)))


class SharedLayers(Classifier):
    """One convolution and one batch norm, each called twice."""

    def __init__(self) -> None:
        super().__init__(4)
        self.stem = nn.Conv2d(3, 4, 1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):
            x = F.relu(self.norm(self.conv(x)))
        return x


class SharedConv(Classifier):
    """One convolution with a batch norm of its own behind every call."""

    def __init__(self) -> None:
        super().__init__(3)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv(F.relu(self.norm1(self.conv(x))))))


class TwoReaders(Classifier):
    """The batch norm is not alone in reading the convolution."""

    def __init__(self) -> None:
        super().__init__(4)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def features(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.norm(x).relu() + x


class Residual(Classifier):
    def __init__(self) -> None:
        super().__init__(8)
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4))
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(4, 8, 3, 2, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.down = nn.Sequential(nn.Conv2d(4, 8, 1, 2, bias=False), nn.BatchNorm2d(8))

    def features(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        y += self.down(x)
        return self.relu(y)


class Functional(Classifier):
    def __init__(self) -> None:
        super().__init__(6)
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.conv3 = nn.Conv2d(6, 6, 3, padding=1)

    def features(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 3, stride=2, padding=1)
        x = F.avg_pool2d(torch.relu(self.conv2(x)), 2)
        x = F.dropout(self.conv3(x).relu_(), 0.5, training=self.training)
        return F.leaky_relu(F.relu6(F.hardtanh(x, -1.0, 2.0)), 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.features(x), (1, 1)), 1))


class InplaceThenReused(Classifier):
    """What an in-place ReLU wrote is read again under the old name."""

    def __init__(self) -> None:
        super().__init__(4)
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def features(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        y = self.conv2(self.relu(x))
        return x + F.hardtanh(self.relu(y), 0.1, 0.3) + y


class InplaceThenOutOfPlace(Classifier):
    """The second activation must not write where the first did: that memory has another reader."""

    def __init__(self) -> None:
        super().__init__(4)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def features(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = self.relu(x)
        return F.hardtanh(y, 0.1, 0.3) + x


class Activations(Classifier):
    def __init__(self) -> None:
        super().__init__(4)
        kinds = [
            nn.ReLU6(),
            nn.Hardtanh(-0.3, 0.4),
            nn.LeakyReLU(0.2),
            nn.LeakyReLU(-0.5),
            nn.GELU(),
        ]
        layers: list[nn.Module] = []
        for i, kind in enumerate(kinds):
            layers += [nn.Conv2d(4 if i else 3, 4, 3, padding=1), kind]
        self.layers = nn.Sequential(*layers)

    def features(self, x: Tensor) -> Tensor:
        return self.layers(x)


@torch.fx.wrap
def own_function(x: Tensor) -> Tensor:
    """Nothing is known of it."""
    return x * torch.sigmoid(x)


class OwnFunction(Classifier):
    def __init__(self) -> None:
        super().__init__(4)
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def features(self, x: Tensor) -> Tensor:
        return own_function(self.conv2(own_function(self.conv1(x))))


class Pools(Classifier):
    def __init__(self) -> None:
        super().__init__(4)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.MaxPool2d(3, 2, 1, ceil_mode=True),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.AvgPool2d(3, 2, 1, count_include_pad=False),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.AdaptiveAvgPool2d((None, 3)),
            nn.MaxPool2d(2, 1, dilation=2),
        )

    def features(self, x: Tensor) -> Tensor:
        return self.layers(x)


class PaddingModes(Classifier):
    def __init__(self) -> None:
        super().__init__(4)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
            nn.ReLU(),
            nn.Conv2d(4, 4, (3, 5), padding=(1, 2), padding_mode="reflect"),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1, stride=2, padding_mode="replicate"),
            nn.ReLU(),
            nn.Conv2d(4, 4, (2, 4), padding="same"),  # more zeros on one side than on the other
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding="valid"),
        )

    def features(self, x: Tensor) -> Tensor:
        return self.layers(x)


class DilatedAndGrouped(Classifier):
    def __init__(self) -> None:
        super().__init__(8)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=2, dilation=2),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 8, (3, 1), stride=(2, 1), padding=(3, 0), dilation=(3, 1), groups=2),
            nn.ReLU(),
        )

    def features(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Depthwise(Classifier):
    """An inverted residual: wide in the middle, a depthwise convolution there."""

    def __init__(self) -> None:
        super().__init__(4)
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.block = nn.Sequential(
            nn.Conv2d(4, 12, 1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU6(inplace=True),
            nn.Conv2d(12, 12, 3, 1, 1, groups=12, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU6(inplace=True),
            nn.Conv2d(12, 4, 1, bias=False),
            nn.BatchNorm2d(4),
        )

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.block(x)


class NormFirst(Classifier):
    """Batch norm before the convolution and a concatenation behind it, as in DenseNet."""

    def __init__(self) -> None:
        super().__init__(9)
        self.norm1, self.conv1 = nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3, padding=1)
        self.norm2, self.relu = nn.BatchNorm2d(9), nn.ReLU(inplace=True)

    def features(self, x: Tensor) -> Tensor:
        y = self.conv1(self.relu(self.norm1(x)))
        return self.relu(self.norm2(torch.cat([x, y], 1)))


class NormOfTheBatch(Classifier):
    """A batch norm without running statistics: nothing to fold."""

    def __init__(self) -> None:
        super().__init__(4)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)

    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


class AlwaysDropout(Classifier):
    """Dropout that the user wants in eval, too."""

    def __init__(self) -> None:
        super().__init__(4)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def features(self, x: Tensor) -> Tensor:
        return F.dropout(self.conv(x), 0.5, training=True)


class TwoInputsTwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.score = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, y = self.left(x).relu(), self.right(y).relu()
        return self.score((x * y).mean((2, 3))), [x, y]


class DictOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.conv(x).relu()
        return {"logits": self.fc(x.mean((2, 3))), "map": x}


class Keywords(nn.Module):
    """Called by keyword, with a default; its layers are called by keyword, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu, self.fc = nn.ReLU(), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor, scale: float = 2.0, shift: Tensor | None = None) -> Tensor:
        x = self.relu(self.norm(self.conv(x) * scale))
        return self.fc(x.mean((2, 3)))


class LayersByKeyword(Keywords):
    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(input=self.norm(input=self.conv(input=x)))
        return self.fc(input=x.mean((2, 3)))


class ConvHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)
        self.score = nn.Conv2d(4, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.conv(x).relu()).mean((2, 3))


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


def randomise_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and affine parameters of every batch norm as training leaves them, not 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        if module.running_mean is not None:
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
        if module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.2, generator=generator)
    return model


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
