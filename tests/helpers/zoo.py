"""Small networks as users write them, each named for what it does, each with a batch of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from helpers.models import CLASSES, Classifier, randomise_


def conv(cin: int, cout: int, kernel: int = 3, **choices: object) -> nn.Conv2d:
    """Of the same size."""
    return nn.Conv2d(cin, cout, kernel, padding=kernel // 2, **choices)


# --- functions and memory


class FunctionsWithOwnWeights(Classifier):
    """Convolutions and a linear map as functions of the network's own parameters."""

    def __init__(self) -> None:
        super().__init__(6)
        self.first = nn.Parameter(torch.randn(4, 3, 3, 3) * 0.3)
        self.shift = nn.Parameter(torch.randn(4) * 0.3)
        self.second = nn.Parameter(torch.randn(6, 2, 3, 3) * 0.3)
        self.row = nn.Parameter(torch.randn(6, 6, 3) * 0.3)
        self.matrix = nn.Parameter(torch.randn(6, 6) * 0.3)
        self.conv = conv(6, 6)

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.first, self.shift, padding=1))
        x = F.gelu(F.conv2d(x, self.second, None, 2, (1, 1), 1, 2))
        x = self.conv(x)
        row = F.conv1d(x.flatten(2), self.row, padding="same").relu()
        x = x + row.view_as(x)
        return F.linear(x.movedim(1, -1), self.matrix, bias=None).movedim(-1, 1).relu_()


class StandardisedWeights(Classifier):
    """Convolutions that standardise their weights in every call."""

    class Conv(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
            return F.conv2d(
                x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups
            )

    def __init__(self) -> None:
        super().__init__(4)
        self.stem, self.conv = conv(3, 4), self.Conv(4, 4, 3, 1, 1)
        self.last = self.Conv(4, 4, 3, 1, 1)

    def features(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.conv(self.stem(x))))


class ChangedInPlace(Classifier):
    """Values are changed in place while their old name is used later."""

    def __init__(self) -> None:
        super().__init__(4)
        self.stem, self.conv1, self.conv2 = conv(3, 4), conv(4, 4), conv(4, 4)

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv1(x)
        z = y
        y.mul_(0.5).add_(x)
        z = F.gelu(self.conv2(y + z))
        h = z + x
        w = h * 0.5
        w.neg_()
        h += w
        torch.relu_(h)
        return h * 2.0 + z


class PartsChangedInPlace(Classifier):
    """Channels of a value are written while the whole of it is read later."""

    def __init__(self) -> None:
        super().__init__(4)
        self.stem, self.conv1, self.conv2 = conv(3, 4), conv(4, 4), conv(4, 4)

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.silu(self.conv1(x))
        z = self.conv2(y) + 1.0
        z[:, :2].mul_(0.5)
        return z + F.silu(z)


class ItemsAssigned(PartsChangedInPlace):
    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv1(x)
        z = self.conv2(y.relu())
        z[:, :2] = y[:, 2:]
        return z + x


class ClampsAndMasks(Classifier):
    def __init__(self) -> None:
        super().__init__(4)
        self.conv1, self.conv2, self.conv3 = conv(3, 4), conv(4, 4), conv(4, 4)

    def features(self, x: Tensor) -> Tensor:
        x = self.conv1(x).clamp(min=-0.5)
        x = torch.where(x > 0, x, 0.2 * x)
        x = torch.abs(self.conv2(x)).clamp_(0.05, 1.0)
        x = self.conv3(x)
        return torch.maximum(x, x.mean((2, 3), keepdim=True))


# --- inputs and outputs


class Pair(nn.Module):
    """Two inputs, keyword arguments with defaults, a dictionary as output."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.both = conv(3, 4), conv(1, 4), conv(8, 4)
        self.fc = nn.Linear(4, CLASSES)

    def forward(
        self, image: Tensor, depth: Tensor, *, scale: float = 0.5, mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        x = torch.cat([self.left(image).relu(), self.right(depth).relu() * scale], 1)
        if mask is not None:
            x = x * mask
        x = self.both(x).relu()
        return {"logits": self.fc(x.mean((2, 3))), "map": x}


@dataclass
class Result:
    logits: Tensor
    features: Tensor | None = None


class DataclassOutput(Classifier):
    def __init__(self) -> None:
        super().__init__(4)
        self.conv1, self.conv2 = conv(3, 4), conv(4, 4)

    def forward(self, x: Tensor) -> Result:
        x = self.conv2(self.conv1(x).relu())
        return Result(self.fc(self.pool(x).flatten(1)), features=x)


class Detector(nn.Module):
    """Lists of images in; dictionaries out, or losses where there are targets."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            conv(3, 4, stride=2), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 8)
        )
        self.neck = nn.Sequential(conv(8, 8), nn.SiLU())
        self.boxes, self.scores = nn.Conv2d(8, 4, 1), nn.Conv2d(8, CLASSES, 1)

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        size = [max(image.shape[i] for image in images) for i in (1, 2)]
        batch = torch.stack(
            [F.pad(i, (0, size[1] - i.shape[2], 0, size[0] - i.shape[1])) for i in images]
        )
        x = self.neck(self.backbone(batch))
        boxes, scores = self.boxes(x).flatten(2), self.scores(x).flatten(2)
        if targets is None:
            return [{"boxes": b, "scores": s} for b, s in zip(boxes, scores, strict=True)]
        losses = {"boxes": boxes.new_zeros(()), "scores": boxes.new_zeros(())}
        for b, s, target in zip(boxes, scores, targets, strict=True):
            losses["boxes"] = losses["boxes"] + (b.mean(1) - target["box"]).square().sum()
            losses["scores"] = losses["scores"] - s.mean(1).log_softmax(0)[target["label"]]
        return losses


# --- Python in forward


class ControlFlowOnShapes(Classifier):
    def __init__(self) -> None:
        super().__init__(4)
        self.conv1, self.conv2, self.tail = conv(3, 4), conv(4, 4), conv(4, 4)

    def features(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        x = self.conv1(x).relu()
        if x.shape[-1] > 8:
            x = F.avg_pool2d(x, 2)
        x = self.conv2(x)
        for _ in range(x.dim() - 3):
            x = self.tail(x).tanh()
        return x


class ControlFlowOnData(Classifier):
    def __init__(self) -> None:
        super().__init__(4)
        self.stem = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.SiLU())
        self.deep = nn.Sequential(conv(4, 4), nn.GELU(), conv(4, 4))
        self.shallow = conv(4, 4)

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if float(x.detach().mean()) > -1e9:
            x = x + self.deep(x)
        while x.detach().abs().max() > 3.0:
            x = x * 0.5
        return self.shallow(x)


class RefinesStepwise(Classifier):
    """Python looks up where the last step points, a recurrent cell takes the next one."""

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.reset, self.new = conv(10, 6), conv(10, 6), conv(10, 6)
            self.step = conv(6, 2)

        def forward(self, hidden: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            both = torch.cat([hidden, x], dim=1)
            gate, reset = torch.sigmoid(self.gate(both)), torch.sigmoid(self.reset(both))
            new = torch.tanh(self.new(torch.cat([reset * hidden, F.relu(x)], dim=1)))
            hidden = (1 - gate) * hidden + gate * new
            return hidden, self.step(hidden)

    def __init__(self) -> None:
        super().__init__(6)
        self.stem = conv(3, 4, stride=2)
        self.enter, self.cell = conv(4, 6), self.Cell()

    def features(self, x: Tensor) -> Tensor:
        volume = self.stem(x)
        hidden = torch.tanh(self.enter(volume))
        points = torch.stack(
            torch.meshgrid(
                *[torch.linspace(-1, 1, n).to(x) for n in hidden.shape[2:]], indexing="xy"
            ),
            -1,
        ).expand(len(x), -1, -1, -1)
        for _ in range(3 if float(x.detach().abs().sum()) > 0 else 1):
            seen = F.grid_sample(F.relu(volume), points, align_corners=True)
            share = torch.softmax(seen, dim=1) * seen
            hidden, step = self.cell(hidden, F.avg_pool2d(share, 3, 1, 1))
            points = points + 0.1 * step.detach().tanh().movedim(1, -1)
        return hidden + step.sum(1, keepdim=True)


class CountsCalls(Classifier):
    """A buffer changes in forward, even in eval."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__(4)
        self.block = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4))
        self.register_buffer("calls", torch.zeros(()))

    def features(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.block(x)


class Checkpointed(Classifier):
    def __init__(self) -> None:
        super().__init__(4)
        self.stem = conv(3, 4)
        self.block = nn.Sequential(conv(4, 4), nn.BatchNorm2d(4), nn.ReLU())
        self.tail = nn.Sequential(conv(4, 4), nn.GELU(), conv(4, 4))

    def features(self, x: Tensor) -> Tensor:
        x = checkpoint(self.block, self.stem(x), use_reentrant=False)
        return checkpoint_sequential(self.tail, 1, x, use_reentrant=False)


class CompiledPart(Classifier):
    def __init__(self) -> None:
        super().__init__(4)
        self.stem = conv(3, 4)
        self.block = torch.compile(
            nn.Sequential(conv(4, 4), nn.BatchNorm2d(4), nn.ReLU()), backend="eager"
        )

    def features(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x))


class CompiledInPlace(CompiledPart):
    """``module.compile()`` leaves the module what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(conv(4, 4), nn.BatchNorm2d(4), nn.ReLU())
        self.block.compile(backend="eager")


class Hooks(Classifier):
    """Hooks that change what layers and blocks compute."""

    def __init__(self) -> None:
        super().__init__(4)
        self.stem, self.block = conv(3, 4), nn.Sequential(conv(4, 4), nn.ReLU())
        self.tail, self.act = conv(4, 4), nn.ReLU()
        self.stem.register_forward_hook(lambda module, args, y: y * 2.0)
        self.block.register_forward_hook(lambda module, args, y: y + args[0])
        self.act.register_forward_pre_hook(lambda module, args: (args[0] - 0.1,))

    def features(self, x: Tensor) -> Tensor:
        return self.act(self.tail(self.block(self.stem(x))))


# --- weights


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


# --- layers


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


# --- other axes


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


# --- tokens


class Attention(nn.Module):
    """`scaled_dot_product_attention` as networks call it."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Patches, a class token, positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8) * 0.3)
        self.positions = nn.Parameter(torch.randn(1, 10, 8) * 0.3)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class Windows(nn.Module):
    """Attention within windows of maps whose channels come last, every second time shifted."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, 2)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(4))
        self.attentions = nn.ModuleList(Attention(8, 2) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2)
        )
        self.merge, self.head = nn.Linear(32, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        for i in range(2):
            y = torch.roll(self.norms[2 * i](x), (-i, -i), (1, 2))
            n, h, w, c = y.shape
            y = y.view(n, h // 3, 3, w // 3, 3, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 9, c)
            y = self.attentions[i](y).view(n, h // 3, w // 3, 3, 3, c)
            y = y.permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
            x = x + torch.roll(y, (i, i), (1, 2))
            x = x + self.mlps[i](self.norms[2 * i + 1](x))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.head(self.merge(x).mean((1, 2)))


class EncoderLayers(nn.Module):
    """PyTorch's own transformer layers, norm first and norm last."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.first = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        self.last = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.first(self.embed(x))).mean(1))


class EncoderStack(EncoderLayers):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        self.first, self.last = (
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            nn.Identity(),
        )


class CrossAttention(nn.Module):
    """MultiheadAttention between two sequences, with a mask, and its weights returned."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv1d(3, 8, 3, padding=1)
        self.own = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=6)
        self.norm1, self.norm2, self.head = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, context: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(x).transpose(1, 2)
        y = self.norm1(x)
        x = x + self.own(y, y, y, need_weights=False)[0]
        query, context = self.norm2(x).transpose(0, 1), context.transpose(0, 1)
        y, weights = self.cross(query, context, context, key_padding_mask=padding)
        return self.head((x + y.transpose(0, 1)).mean(1)), weights


class Recurrent(nn.Module):
    """A convolution before an LSTM and a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 6, 3, padding=1), nn.BatchNorm1d(6)
        self.lstm = nn.LSTM(6, 5, batch_first=True, bidirectional=True)
        self.gru, self.fc = nn.GRU(10, 5, num_layers=2, batch_first=True), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().transpose(1, 2)
        x, _ = self.lstm(x)
        _, state = self.gru(x)
        return self.fc(state[-1])


class RecurrentAlone(nn.Module):
    """An LSTM, and a Linear before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.hidden, self.fc = nn.LSTM(3, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x, (_, c) = self.lstm(x)
        return self.fc(F.silu(self.hidden(x[-1] + c[0])))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 8),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(8, 8),
            nn.GELU(),
            nn.Linear(8, 8),
            nn.LayerNorm(8),
            nn.Linear(8, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class MlpMixer(nn.Module):
    """Linear maps over tokens and over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.tokens = nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, 9))
        self.channels = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norm2(x))
        return self.head(x.mean(1))


class Lazy(Classifier):
    """Layers that learn their size from the first batch."""

    def __init__(self) -> None:
        super().__init__(4)
        self.conv1, self.norm = nn.LazyConv2d(4, 3, padding=1), nn.LazyBatchNorm2d()
        self.conv2, self.fc = nn.LazyConv2d(4, 3), nn.LazyLinear(CLASSES)

    def features(self, x: Tensor) -> Tensor:
        return self.conv2(self.norm(self.conv1(x)).relu())


# --- what they take

Batch = tuple[object, ...]


def images(count: int = 1, *, channels: int = 3, side: int = 12) -> Callable[[], Batch]:
    return lambda: tuple(torch.randn(2, channels, side, side) for _ in range(count))


def of_shapes(*shapes: tuple[int, ...]) -> Callable[[], Batch]:
    return lambda: tuple(torch.randn(shape) for shape in shapes)


def _detection() -> Batch:
    pictures = [torch.randn(3, 12, 10), torch.randn(3, 9, 12)]
    targets = [{"box": torch.rand(4), "label": torch.tensor(i)} for i in (1, 3)]
    return pictures, targets


def _pair() -> Batch:
    return torch.randn(2, 3, 12, 12), torch.randn(2, 1, 12, 12)


def _cross() -> Batch:
    padding = torch.tensor([[False] * 4, [False, False, True, True]])
    return torch.randn(2, 3, 7), torch.randn(2, 4, 6), padding


ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    kind.__name__: (kind, batch)
    for kind, batch in (
        (FunctionsWithOwnWeights, images()),
        (StandardisedWeights, images()),
        (ChangedInPlace, images()),
        (PartsChangedInPlace, images()),
        (ItemsAssigned, images()),
        (ClampsAndMasks, images()),
        (Pair, _pair),
        (DataclassOutput, images()),
        (Detector, _detection),
        (ControlFlowOnShapes, images()),
        (ControlFlowOnData, images()),
        (RefinesStepwise, images()),
        (CountsCalls, images()),
        (Checkpointed, images()),
        (CompiledPart, images()),
        (CompiledInPlace, images()),
        (Hooks, images()),
        (TiedWeights, lambda: (torch.randint(11, (2, 9)),)),
        (Parametrised, images()),
        (OldWeightNorm, images()),
        (Transposed, images()),
        (Norms, images()),
        (NormsThatAssert, images()),
        (SqueezeExcite, images()),
        (GatedLinearUnits, images()),
        (LayerScale, images()),
        (SensorNetwork, of_shapes((2, 6, 40))),
        (Volumes, of_shapes((2, 1, 12, 8, 8))),
        (VisionTransformer, images()),
        (Windows, images()),
        (EncoderLayers, of_shapes((2, 7, 5))),
        (EncoderStack, of_shapes((2, 7, 5))),
        (CrossAttention, _cross),
        (Recurrent, of_shapes((2, 3, 9))),
        (RecurrentAlone, of_shapes((9, 2, 3))),
        (MLP, of_shapes((4, 6))),
        (MlpMixer, images()),
        (Lazy, images()),
    )
}


def network(name: str) -> nn.Module:
    """A network of the zoo, the same at every call, in train mode; lazy layers have run."""
    make, _ = ZOO[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = make()
        if any(isinstance(m, nn.modules.lazy.LazyModuleMixin) for m in net.modules()):
            with torch.no_grad():
                net(*batch(name))
        return randomise_(net)


def batch(name: str, dtype: torch.dtype = torch.float32) -> Batch:
    """A batch for a network of the zoo, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = ZOO[name][1]()
    to = lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf  # noqa: E731
    return tree_map(to, made)
