"""Networks with unusual weights and layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from helpers.classifier import CLASSES, Classifier
from helpers.zoo_forward import conv


class TiedWeights(nn.Module):
    """Tokens in and out by one matrix, and one kernel in two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv1, self.conv2 = (nn.Conv1d(8, 8, 3, padding=1) for _ in range(2))
        self.conv2.weight = self.conv1.weight
        self.score = nn.Linear(8, 11, bias=False)
        self.score.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).transpose(1, 2)
        x = self.conv2(F.silu(self.conv1(x)))
        return self.score(x.transpose(1, 2))


class Parametrised(Classifier):
    def __init__(self) -> None:
        super().__init__(4)
        self.stem = parametrizations.weight_norm(conv(3, 4))
        self.norm = nn.BatchNorm2d(4)
        self.conv = parametrizations.spectral_norm(conv(4, 4))
        self.mix = parametrizations.orthogonal(nn.Linear(4, 4))

    def features(self, x: Tensor) -> Tensor:
        x = self.conv(self.norm(self.stem(x)).relu()).relu()
        return self.mix(x.movedim(1, -1)).movedim(-1, 1)


class OldWeightNorm(Classifier):
    """What ``weight_norm`` and ``spectral_norm`` were before parametrisations: hooks."""

    def __init__(self) -> None:
        super().__init__(4)
        self.stem = nn.utils.spectral_norm(conv(3, 4))
        self.conv = _old_weight_norm(conv(4, 4))

    def features(self, x: Tensor) -> Tensor:
        return self.conv(self.stem(x).relu()).relu()


def _old_weight_norm(layer: nn.Module) -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


class Transposed(Classifier):
    """A small U-Net: down, and up again by transposed convolutions."""

    def __init__(self) -> None:
        super().__init__(4)
        self.down1, self.down2 = conv(3, 4, stride=2), conv(4, 8, stride=2)
        self.up1 = nn.ConvTranspose2d(8, 4, 3, 2, 1, output_padding=1)
        self.up2 = nn.ConvTranspose2d(8, 4, 2, 2, groups=2)
        self.norm, self.last = nn.BatchNorm2d(4), conv(4, 4)

    def features(self, x: Tensor) -> Tensor:
        x = self.down1(x).relu()
        y = self.norm(self.up1(self.down2(x).relu())).relu()
        return self.last(self.up2(torch.cat([x, y], 1)))


class Norms(Classifier):
    def __init__(self) -> None:
        super().__init__(4)
        self.conv1, self.conv2, self.conv3, self.conv4, self.conv5 = (
            conv(3 if i == 0 else 4, 4) for i in range(5)
        )
        self.group, self.instance = nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)
        self.tracked = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.layer, self.rms = nn.LayerNorm([4, 12, 12]), nn.RMSNorm(4)
        self.local = nn.LocalResponseNorm(3)

    def features(self, x: Tensor) -> Tensor:
        x = self.group(self.conv1(x)).relu()
        x = self.instance(self.conv2(x)).relu()
        x = F.silu(self.tracked(self.conv3(x)))
        x = F.gelu(self.layer(self.conv4(x)))
        x = self.local(self.conv5(x))
        return F.normalize(self.rms(x.movedim(1, -1)).movedim(-1, 1), dim=1)


class NormAct(nn.BatchNorm2d):
    """As libraries write it: a norm that asserts what it gets, and an activation behind it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        weights = (self.running_mean, self.running_var, self.weight, self.bias)
        x = F.batch_norm(x, *weights, self.training, self.momentum, self.eps)
        return self.act(self.drop(x))


class NormsThatAssert(Classifier):
    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.norm1 = conv(3, 4, stride=2, bias=False), NormAct(4)
        self.deep, self.norm2 = conv(4, 4, bias=False), NormAct(4)
        self.mix, self.norm3 = conv(4, 4, 1, bias=False), NormAct(4)
        self.drop, self.last = nn.Dropout(), conv(4, 6)

    def features(self, x: Tensor) -> Tensor:
        torch._assert(x.dim() == 4, "expected images")
        x = self.norm1(self.stem(x))
        x = self.drop(self.norm3(self.mix(self.norm2(self.deep(x))))) + x
        torch._assert(x.dim() != 5, "expected no volumes")
        return self.last(x)


class SqueezeExcite(Classifier):
    """An inverted residual with squeeze-excite."""

    def __init__(self) -> None:
        super().__init__(4)
        self.stem = nn.Sequential(conv(3, 4, stride=2, bias=False), nn.BatchNorm2d(4), nn.SiLU())
        self.expand = nn.Sequential(
            nn.Conv2d(4, 12, 1, bias=False), nn.BatchNorm2d(12), nn.SiLU(inplace=True)
        )
        self.depthwise = nn.Sequential(
            conv(12, 12, groups=12, bias=False), nn.BatchNorm2d(12), nn.SiLU(inplace=True)
        )
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 3, 1), nn.SiLU(), nn.Conv2d(3, 12, 1)
        )
        self.project = nn.Sequential(nn.Conv2d(12, 4, 1, bias=False), nn.BatchNorm2d(4))

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depthwise(self.expand(x))
        return x + self.project(y * self.squeeze(y).sigmoid())


class GatedLinearUnits(Classifier):
    def __init__(self) -> None:
        super().__init__(4)
        self.stem, self.conv, self.glu = conv(3, 8), conv(4, 16), nn.GLU(dim=1)
        self.mix, self.last = nn.Linear(8, 8), conv(4, 4)

    def features(self, x: Tensor) -> Tensor:
        x = F.glu(self.stem(x), dim=1)
        x = self.glu(self.conv(x))
        value, gate = self.mix(x.movedim(1, -1)).chunk(2, dim=-1)  # SwiGLU
        return self.last((value * F.silu(gate)).movedim(-1, 1))


class LayerScale(Classifier):
    """A ConvNeXt block."""

    def __init__(self) -> None:
        super().__init__(6)
        self.stem = nn.Conv2d(3, 6, 2, 2)
        self.depthwise, self.norm = conv(6, 6, 5, groups=6), nn.LayerNorm(6, eps=1e-6)
        self.up, self.down = nn.Linear(6, 24), nn.Linear(24, 6)
        self.gamma = nn.Parameter(torch.rand(6))

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


class SensorNetwork(nn.Module):
    """Accelerometers of a wearable, (N, C, T): dilated and grouped convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(6, 8, 5, stride=2, padding=2, bias=False),
            nn.BatchNorm1d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool1d(2),
            nn.Conv1d(8, 8, 3, padding=2, dilation=2, groups=4),
            nn.BatchNorm1d(8),
            nn.SiLU(),
            nn.Conv1d(8, 8, 3, padding=4, dilation=4, padding_mode="circular"),
            nn.ELU(),
            nn.AdaptiveAvgPool1d(1),
        )
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(x).flatten(1))


class Volumes(nn.Module):
    """Scans, (N, 1, D, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(1, 4, 3, 2, 1, bias=False), nn.BatchNorm3d(4), nn.ReLU()
        )
        self.conv1 = nn.Conv3d(4, 4, 3, padding=2, dilation=2, groups=2)
        self.norm, self.pool = nn.InstanceNorm3d(4, affine=True), nn.MaxPool3d(2)
        self.conv2 = nn.Conv3d(4, 4, (1, 3, 3), padding=(0, 1, 1))
        self.up, self.score = nn.ConvTranspose3d(4, 4, 2, 2), nn.Conv3d(4, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.pool(F.leaky_relu(self.norm(self.conv1(x))))
        return self.score(self.up(self.conv2(y).relu()) + x)


class Lazy(Classifier):
    """Layers that learn their size from the first batch."""

    def __init__(self) -> None:
        super().__init__(4)
        self.conv1, self.norm = nn.LazyConv2d(4, 3, padding=1), nn.LazyBatchNorm2d()
        self.conv2, self.fc = nn.LazyConv2d(4, 3), nn.LazyLinear(CLASSES)

    def features(self, x: Tensor) -> Tensor:
        return self.conv2(self.norm(self.conv1(x)).relu())
