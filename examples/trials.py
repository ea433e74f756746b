"""What the trials of durability.py share: how much of each, a small network, processes."""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_da3 import AdapterConfig, CheckpointError, DA3Config, DA3Model, GateConfig, convert

ADAPTER = AdapterConfig(hidden_channels=4, min_stride=2)
CONFIG = DA3Config(
    ADAPTER, GateConfig(target=0.5, by="cell")
)  # whose noise a resumed run has to draw again
CLASSES = 3


@dataclasses.dataclass
class Scale:
    """How much of everything, in full or with --quick."""

    kills: int = 200
    damaged: int = 1000
    domains: int = 100
    races: int = 200
    saves: int = 5


QUICK = Scale(kills=6, damaged=39, domains=4, races=10, saves=1)


def check(name: str, value: object, good: bool) -> bool:
    """One printed figure and whether it is as it should be."""
    print(f"  {'yes' if good else 'NO '}  {name}: {value}")
    return good


# --- a small network and its domains --------------------------------------------------------------


class Classifier(L.LightningModule):
    """A small network with its weights made from a seed, in place of a pretrained one."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def training_step(self, batch: Any, _: int) -> Tensor:
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def network(channels: int = 8) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, 5),
        )


def batches(seed: int) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(24, 3, 12, 12, generator=generator)
    labels = torch.randint(CLASSES, (24,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=4, shuffle=True)


def trainer(callbacks: list[L.Callback], epochs: int = 2) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        deterministic=True,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def trained(channels: int = 8, config: DA3Config = CONFIG) -> DA3Model:
    """A converted network with a domain whose every value is random."""
    model = convert(network(channels), config)
    model.add_domain("a", CLASSES)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.domain("a").parameters():
            parameter.normal_(generator=generator)
    return model


def outputs(model: DA3Model, name: str) -> Tensor:
    model.eval().set_domain(name)
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 2 * 3 * 12 * 12).reshape(2, 3, 12, 12))


# --- processes ------------------------------------------------------------------------------------


def fork(work: Callable[[], object]) -> int:
    """A process that has everything imported already, runs `work` and ends: 0 if it succeeded."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    faulthandler.enable()  # whoever dies of another signal than the trial's says where
    code = 1
    try:
        work()
        code = 0
    except CheckpointError as error:
        print(f"       {error}")
        code = 2
    except BaseException:
        traceback.print_exc()
        raise  # no further than to the exit
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(process: int) -> int:
    """Its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
