"""Runs of fit_sequence that die where they are told to."""

import random
from functools import partial

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
)

from lightning_da3 import AdapterConfig, DA3Config, GateConfig, fit_sequence
from lightning_da3.files.domain_file import read_domain

ADAPTER = AdapterConfig(hidden_channels=2, min_stride=1)
CONFIG = DA3Config(ADAPTER, GateConfig(target=0.5, by="cell"))  # gates draw noise


class DeathError(Exception):
    """As of a process that is gone."""


class Death(L.Callback):
    def __init__(self, after):
        self.left = after

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.left -= 1
        if self.left < 0:
            raise DeathError


class Images(Dataset):
    """Every sample draws from all three global sources of random numbers."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        noise = torch.randn(3, 8, 8) + float(np.random.rand()) + random.random()  # noqa: NPY002
        return noise + index, index % 2


class Stream(IterableDataset):
    """Of unknown length; its order is drawn, its samples are not."""

    def __iter__(self):
        for index in torch.randperm(6).tolist():
            yield torch.full((3, 8, 8), float(index)), index % 2


class Lit(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)  # in place of pretrained weights
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
        self.log("loss", loss)
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


def loader(**kwargs):
    return DataLoader(Images(), **{"batch_size": 2, "shuffle": True, **kwargs})


def val_loader():
    return DataLoader(Images(), batch_size=5)


def own_generator():
    return loader(generator=torch.Generator().manual_seed(5))


class Drawn(Sampler):
    """An order that another sampler gives, shuffled by numbers of its own."""

    def __init__(self, sampler, generator):
        self.inner, self.rng = sampler, generator

    def __len__(self):
        return len(self.inner)

    def __iter__(self):
        indices = list(self.inner)
        if isinstance(self.rng, torch.Generator):
            order = torch.randperm(len(indices), generator=self.rng).tolist()
        elif isinstance(self.rng, random.Random):
            order = self.rng.sample(range(len(indices)), len(indices))
        else:
            order = self.rng.permutation(len(indices))
        return iter([indices[i] for i in order])


def batches_drawn_by(generator, inner=None):
    """A dataloader of batches; what is drawn, and by what, lies deep inside of its samplers."""
    images = Images()
    sampler = Drawn(RandomSampler(images, generator=inner), generator)
    return DataLoader(images, batch_sampler=BatchSampler(Drawn(sampler, generator), 2, False))


def make_trainer(callbacks, more=list, **options):
    options = {"max_epochs": 2, "logger": False, "deterministic": True, **options}
    return L.Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*more(), *callbacks],
        **options,
    )


def learn(folder, *, tasks=None, module=Lit, every=1, after=10**6, more=list, **options):
    """One process's life: it dies after so many batches, of all domains together."""
    death = Death(after)
    tasks = {"a": (2, loader()), "b": (3, loader())} if tasks is None else tasks()
    return fit_sequence(
        module,
        tasks,
        partial(make_trainer, more=lambda: [*more(), death], **options),
        folder,
        config=CONFIG,
        save_every_n_steps=every,
    )


def weights(folder):
    return {path.stem: read_domain(path).tensors for path in folder.glob("*.safetensors")}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        for key, value in tensors.items():
            assert torch.equal(found[name][key], value), f"{name}: {key}"


def logits(module, domain):
    module.net.eval().set_domain(domain)
    with torch.no_grad():
        return module.net(torch.ones(1, 3, 8, 8))
