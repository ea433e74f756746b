"""One domain learned by one method: the same Trainer, data, seeds and epochs for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from learning import Classifier, fit
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from comparison.backbones import Backbone
from comparison.images import Domain
from comparison.methods import Method
from comparison.methods.da3 import DOMAIN, prepare
from lightning_da3 import DA3Model

TEST_BATCH = 64


@dataclass(frozen=True)
class Schedule:
    """How long everything trains, in batches of which size."""

    epochs: int
    batch_size: int

    def steps(self, images: int) -> int:
        """Training steps an epoch: whole batches, and one where there are too few images."""
        return max(1, images // self.batch_size)


@dataclass(frozen=True)
class Learned:
    """A network that learned a domain.

    Args:
        network: In eval.
        state: What the domain needs beside the pretrained network: all that trained, and the
            buffers that changed.
        curve: Accuracy on the test images after every epoch, a fraction each.
        skipped: What of the pretrained network the domain does without.
    """

    network: nn.Module
    state: dict[str, Tensor]
    curve: list[float]
    skipped: tuple[str, ...] = ()


class _Curve(L.Callback):
    """Accuracy after every epoch."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.values.append(float(trainer.callback_metrics["test_accuracy"]))


def learn(
    method: Method, backbone: Backbone, domain: Domain, rate: float, seed: int, schedule: Schedule
) -> Learned:
    """A fresh pretrained network with a fresh head learns a domain."""
    L.seed_everything(seed, verbose=False)
    network = method.build(backbone.with_head(len(domain.classes)))
    if isinstance(network, DA3Model):
        prepare(network, DataLoader(domain.train, TEST_BATCH))
    return learn_on(method, network, domain, rate, schedule)


def learn_on(
    method: Method, network: nn.Module, domain: Domain, rate: float, schedule: Schedule
) -> Learned:
    """A network that the method built learns a domain."""
    before = {name: value.clone() for name, value in _tensors(network).items()}
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    curve = _Curve()
    module = Classifier(network, rate, method.optimizer)
    callbacks = [*method.callbacks(), curve]
    fit(module, domain, schedule.epochs, None, [], callbacks, schedule.batch_size, bar=False)
    network = ready(module.network)
    state = {
        name: value.detach().contiguous()
        for name, value in _tensors(network).items()
        if name in trained or not torch.equal(value, before[name])
    }
    skipped = network.skipped(DOMAIN) if isinstance(network, DA3Model) else ()
    return Learned(network, state, curve.values, skipped)


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """The state, without what some networks say of themselves beside it."""
    return {name: v for name, v in network.state_dict().items() if isinstance(v, Tensor)}


def load_(network: nn.Module, path: Path, skipped: Sequence[str] = ()) -> list[str]:
    """Put a domain's state into a fresh network; names that the network does not have."""
    if isinstance(network, DA3Model):
        network.skip(DOMAIN, skipped)
    state = torch.load(path, weights_only=True)
    return network.load_state_dict(state, strict=False).unexpected_keys


def ready(network: nn.Module) -> nn.Module:
    """In eval, with the domain active."""
    if isinstance(network, DA3Model):
        network.set_domain(DOMAIN)
    return network.eval()


@torch.no_grad()
def evaluate(network: nn.Module, data: Dataset[Any]) -> tuple[float, float]:
    """Accuracy, a fraction, and mean cross-entropy of a network that is ready."""
    right, loss, count = 0, 0.0, 0
    for images, labels in DataLoader(data, TEST_BATCH):
        scores = network(images.contiguous(memory_format=torch.channels_last))
        right += int((scores.argmax(1) == labels).sum())
        loss += float(nn.functional.cross_entropy(scores, labels, reduction="sum"))
        count += len(labels)
    return right / count, loss / count
