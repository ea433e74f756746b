"""fit_sequence: wherever it is stopped, it ends with the same weights, bit for bit."""

import random

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_da3 import AdapterConfig, CheckpointError, ConfigError, DA3Config, DomainError
from lightning_da3.checkpointing import fingerprint, read_domain
from lightning_da3.domains import DA3Model
from lightning_da3.sequence import fit_sequence

CONFIG = DA3Config(adapter=AdapterConfig(hidden_channels=2, min_stride=1))  # gates draw noise


class Stopped(Exception):
    pass


class Stop(L.Callback):
    """As a process that dies after a number of training batches."""

    def __init__(self, after):
        self.left = after

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.left -= 1
        if self.left < 0:
            raise Stopped


class Images(Dataset):
    """Whose every sample draws from all three sources of random numbers."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        noise = torch.randn(3, 8, 8) + float(np.random.rand()) + random.random()
        return noise + index, index % 2


class Lit(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)  # the pretrained weights
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 5),
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(F.dropout(self.net(x), 0.1), y)
        self.log("loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


class Validated(Lit):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return val_loader()


def val_loader():
    return DataLoader(Images(), batch_size=5)


def loader(**kwargs):
    return DataLoader(Images(), batch_size=2, shuffle=True, **kwargs)


def make_trainer(after=10**6, **options):
    stop = Stop(after)
    defaults = {"max_epochs": 2, "logger": False, "deterministic": True, "accelerator": "cpu"}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    options = {**defaults, **quiet, **options}
    return lambda callbacks: L.Trainer(callbacks=[stop, *callbacks], **options)


def learn(folder, after=10**6, tasks=None, every=1, module=Lit, **options):
    tasks = tasks or {"a": (2, loader()), "b": (3, loader())}
    return fit_sequence(
        module,
        tasks,
        make_trainer(after, **options),
        folder,
        config=CONFIG,
        save_every_n_steps=every,
    )


def weights(folder):
    return {path.stem: read_domain(path).tensors for path in folder.glob("*.safetensors")}


def assert_same(folder, expected):
    found = weights(folder)
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        for key, value in tensors.items():
            assert torch.equal(found[name][key], value), f"{name}: {key}"


def stopped_and_resumed(folder, after, **options):
    with pytest.raises(Stopped):
        learn(folder, after, **options)
    learn(folder, **options)
    assert sorted(path.name for path in folder.iterdir()) == [
        "a.safetensors", "b.safetensors", "index.json"
    ]
    return weights(folder)

WAYS = {
    "each step": {},
    "every third step": {"every": 3},
    "no validation, by steps": {"max_epochs": -1, "max_steps": 8},
    "validation": {"module": Validated, "tasks": {"a": (2, loader(), val_loader()), "b": (3, Data())}},
    "validation in the epoch": {"module": Validated, "tasks": {"a": (2, loader(), val_loader()), "b": (3, Data())}, "val_check_interval": 2},
    "accumulation": {"accumulate_grad_batches": 2},
}

@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("after", range(0, 19))
def test_bf(tmp_path, way, after):
    options = WAYS[way]
    learn(tmp_path / "whole", **options)
    if options.get("max_steps"): after = min(after, 15)
    stopped_and_resumed(tmp_path / "resumed", after, **options)
    assert_same(tmp_path / "resumed", weights(tmp_path / "whole"))
