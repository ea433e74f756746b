"""Networks whose forward is unusual: functions, writes, inputs and outputs, Python."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from helpers.classifier import CLASSES, Classifier


def conv(cin: int, cout: int, kernel: int = 3, **choices: object) -> nn.Conv2d:
    """Of the same size."""
    return nn.Conv2d(cin, cout, kernel, padding=kernel // 2, **choices)


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
