"""Networks with three domains that have learned something, for batches of several domains."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map
from torchvision.models import VisionTransformer

from helpers import models
from helpers.domains import shake_
from lightning_da3 import AdapterConfig, DA3Config, GateConfig, convert

ADAPTER = AdapterConfig(hidden_channels=4, max_cells=16, min_stride=1)
CLASSES = {"a": 3, "b": 7, "c": 4}
MIX = ["b", "a", None, "c", "b"]


class Island(models.Residual):
    """Python that looks at values, around graphs."""

    def features(self, x):
        if x.mean() > 1e6:
            raise OverflowError
        return super().features(x)


class Segmentation(nn.Module):
    """A head in the middle, a map of scores, and a second output that is none of its business."""

    def __init__(self):
        super().__init__()
        self.conv, self.score = nn.Conv2d(3, 7, 3, 2, 1), nn.Conv2d(7, models.CLASSES, 1)

    def forward(self, x):
        features = self.conv(x).relu()
        scores = F.interpolate(self.score(features), x.shape[-2:], mode="bilinear")
        return {"out": scores.softmax(1), "features": features, "scale": 2}


class Lists(nn.Module):
    """Takes and returns one entry an image, as detectors do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, images):
        maps = self.conv(torch.stack(images))
        return [{"boxes": m.flatten(1)[:, : 4 + i]} for i, m in enumerate(maps)]


class Crops(nn.Module):
    """Works on two crops of every image."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(torch.cat(x.chunk(2, dim=3))).mean((1, 2, 3)).view(2, -1).mean(0)


class SumOfTheBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(x).sum((0, 2, 3))


def transformer():
    return VisionTransformer(
        image_size=12,
        patch_size=3,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=12,
        num_classes=models.CLASSES,
    )


OWN = {"transformer": transformer, "Island": Island, "Segmentation": Segmentation}
HEADLESS = {"DictOutput", "Crops", "Lists", "SumOfTheBatch"}
OWN |= {kind.__name__: kind for kind in (Crops, Lists, SumOfTheBatch)}


def learned(name="Residual", gate=True, classes=CLASSES):
    """A network with domains that have learned something: random parameters."""
    network = models.randomise_(OWN[name]()) if name in OWN else models.zoo(name)
    head = None if name in HEADLESS else {"Island": "fc"}.get(name, "auto")
    config = DA3Config(
        adapter=ADAPTER, gate=GateConfig(target=0.5, by="cell") if gate else None, head=head
    )
    model = convert(network, config).eval()
    for domain, count in classes.items():
        model.add_domain(domain, None if head is None else count)
        shake_(model, domain, 1.0)
    return model


def batch():
    return torch.randn(len(MIX), 3, 12, 12, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def apart(model, x, names):
    """What a pass of its own gives for every sample."""
    before, outputs = model.active_domain, []
    for sample, name in zip(x, names, strict=True):
        model.set_domain(name)
        outputs.append(tree_map(_first, model(sample[None])))
    model.set_domain(before)
    return outputs


def _first(leaf):
    return leaf[0] if isinstance(leaf, torch.Tensor) else leaf
