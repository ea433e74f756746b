"""Tiny networks, each named for what its graph has in it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.classifier import CLASSES, Classifier


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
