"""fit_sequence: wherever it is stopped, it ends with the same weights, bit for bit."""

import random
from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_da3 import (
    AdapterConfig,
    CheckpointError,
    ConfigError,
    DA3Callback,
    DA3Config,
    DA3Model,
    DomainError,
    DomainFolder,
    DomainTask,
    convert,
    fit_sequence,
)
from lightning_da3.files.domain_file import read_domain

CONFIG = DA3Config(adapter=AdapterConfig(hidden_channels=2, min_stride=1))  # gates draw noise


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


VALIDATED = {
    "module": Validated,
    "tasks": lambda: {"a": (2, loader(), val_loader()), "b": (3, Data())},
}
WAYS = {
    "every step": {},
    "every third step": {"every": 3},
    "epochs of one step": {"tasks": lambda: {"a": (2, loader(batch_size=10))}, "max_epochs": 4},
    "by steps": {"max_epochs": -1, "max_steps": 8},
    "by steps, validated": {**VALIDATED, "max_epochs": -1, "max_steps": 8},
    "validated": VALIDATED,
    "validated in the epoch": {**VALIDATED, "val_check_interval": 2},
    "accumulated": {"accumulate_grad_batches": 2},
    "stopped early": {
        **VALIDATED,
        "max_epochs": 5,
        "more": lambda: [EarlyStopping("val_loss", min_delta=10.0, patience=1)],
    },
    "generator of its own": {"tasks": lambda: {"a": (2, own_generator())}},
    "stream": {"tasks": lambda: {"a": (2, DataLoader(Stream(), batch_size=2))}, "max_epochs": 3},
}


def total_batches(way, folder):
    """Of an uninterrupted run, whose domains stay in the folder."""
    counted = []

    class Count(L.Callback):
        def on_train_batch_start(self, *_):
            counted.append(1)

    more = WAYS[way].get("more", list)
    learn(folder, **{**WAYS[way], "more": lambda: [*more(), Count()]})
    return len(counted)


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_died_often_ends_with_the_same_bits(tmp_path, way):
    total = total_batches(way, tmp_path / "whole")
    deaths = 0
    while True:
        try:
            # never twice at one place, and through in the end
            learn(tmp_path / "often", **WAYS[way], after=total // 3 + deaths)
            break
        except DeathError:
            deaths += 1
    assert deaths >= 2
    assert_same(weights(tmp_path / "often"), weights(tmp_path / "whole"))
    left = {path.name for path in (tmp_path / "often").iterdir()}
    assert left == {*(path.name for path in (tmp_path / "whole").iterdir())}
    assert not [name for name in left if name.endswith((".ckpt", ".tmp"))]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["by steps, validated", "validated in the epoch", "stopped early"])
def test_wherever_a_run_died_it_ends_with_the_same_bits(tmp_path, way):
    total = total_batches(way, tmp_path / "whole")
    for after in range(total):
        folder = tmp_path / str(after)
        with pytest.raises(DeathError):
            learn(folder, **WAYS[way], after=after)
        learn(folder, **WAYS[way])
        assert_same(weights(folder), weights(tmp_path / "whole"))


def test_a_stop_costs_at_most_the_steps_between_two_saves(tmp_path):
    steps = []

    class Steps(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            steps.append(trainer.global_step)

    with pytest.raises(DeathError):
        learn(tmp_path, after=3, every=2)
    learn(tmp_path, every=2, more=lambda: [Steps()])
    assert steps[:3] == [2, 3, 4]  # of the first domain's ten


def test_workers_of_the_dataloader_give_the_same_bits(tmp_path):
    def tasks():
        return {"a": (2, loader(num_workers=1))}

    learn(tmp_path / "whole", tasks=tasks, max_epochs=1)
    with pytest.raises(DeathError):
        learn(tmp_path / "died", tasks=tasks, max_epochs=1, after=3)
    learn(tmp_path / "died", tasks=tasks, max_epochs=1)
    assert_same(weights(tmp_path / "died"), weights(tmp_path / "whole"))


# --- what comes out


def test_what_comes_out(tmp_path):
    tasks = {
        "a": DomainTask(2, loader(), class_names=["cat", "dog"]),
        "b": DomainTask(3, loader()),
    }
    module = learn(tmp_path, tasks=lambda: tasks, max_epochs=1)
    assert module.net.domains == ["a", "b"]
    assert module.net.active_domain is None
    assert module.net.domain("a").class_names == ["cat", "dog"]
    folder = DomainFolder(tmp_path)
    assert folder.names() == ["a", "b"]
    extra = folder.index()["a"]["extra"]
    assert extra["finished"] is True
    assert extra["metrics"]["loss"] > 0
    model = convert(Lit().net, CONFIG)
    folder.load(model, "b")
    again = Lit()
    again.net = model
    assert torch.equal(logits(again, "b"), logits(module, "b"))


def test_a_domain_depends_on_no_other(tmp_path):
    learn(tmp_path / "both", max_epochs=1)
    learn(tmp_path / "one", tasks=lambda: {"b": (3, loader())}, max_epochs=1)
    assert_same({"b": weights(tmp_path / "both")["b"]}, weights(tmp_path / "one"))


def test_what_is_finished_is_loaded_and_not_touched(tmp_path):
    first = learn(tmp_path, max_epochs=1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = learn(tmp_path, max_epochs=1, after=0)  # would die at its first batch
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert torch.equal(logits(again, "a"), logits(first, "a"))
    more = learn(
        tmp_path,
        tasks=lambda: {"c": (4, loader()), "a": (2, loader()), "b": (3, loader())},
        max_epochs=1,
    )
    assert more.net.domains == ["c", "a", "b"]
    assert torch.equal(logits(more, "b"), logits(first, "b"))


def test_a_network_made_late(tmp_path):
    class Late(Lit):
        def __init__(self):
            super().__init__()
            self.kept = [self.net]
            del self.net

        def configure_model(self):
            if not hasattr(self, "net"):
                self.net = self.kept[0]

    for _ in range(2):  # learned, then loaded
        module = learn(tmp_path, module=Late, max_epochs=1)
        assert isinstance(module.net, DA3Model)
        assert module.net.domains == ["a", "b"]


def test_the_data_module_is_left_as_it_was(tmp_path):
    data = Data()
    learn(tmp_path, module=Validated, tasks=lambda: {"a": (2, data)}, max_epochs=1)
    assert "train_dataloader" not in vars(data)


# --- what is refused


@pytest.mark.parametrize(
    ("tasks", "error", "message"),
    [
        ({}, ConfigError, "`tasks` is empty"),
        ({"a": 2}, ConfigError, r"domain 'a' must be a tuple \(num_classes, train, val, class_n"),
        ({"a": (2,)}, ConfigError, "must be a tuple"),
        ({"../a": (2, None)}, DomainError, "cannot name a domain"),
        ({"a": (2, None, None, ["x"])}, ConfigError, "each of the 2 classes, got 1"),
    ],
)
def test_wrong_tasks(tmp_path, tasks, error, message):
    with pytest.raises(error, match=message):
        learn(tmp_path / "new", tasks=lambda: tasks)
    assert not (tmp_path / "new").exists()


def test_wrong_arguments(tmp_path):
    with pytest.raises(ConfigError, match="`save_every_n_steps` must be at least 1, got 0"):
        learn(tmp_path, every=0)
    with pytest.raises(ConfigError, match="Hand them on"):
        fit_sequence(
            Lit, {"a": (2, loader())}, lambda callbacks: make_trainer([]), tmp_path, config=CONFIG
        )


def test_callbacks_that_would_be_lost_are_refused(tmp_path):
    trainer = partial(L.Trainer, callbacks=[EarlyStopping("loss")])
    with pytest.raises(ConfigError, match="callbacks of its own, which would be lost"):
        fit_sequence(Lit, {"a": (2, loader())}, trainer, tmp_path, config=CONFIG)


def test_a_file_of_an_unfinished_domain_is_not_taken_for_a_finished_one(tmp_path):
    saved = DA3Callback("a", 2, config=CONFIG, save_dir=str(tmp_path))
    make_trainer([saved], max_epochs=1, enable_checkpointing=False).fit(Lit(), loader())
    content = saved.path.read_bytes()
    with pytest.raises(CheckpointError, match=r"was not written by a finished `fit_sequence`"):
        learn(tmp_path)
    assert saved.path.read_bytes() == content


def test_damage_is_named_and_nothing_is_overwritten(tmp_path):
    with pytest.raises(DeathError):
        learn(tmp_path, after=3)
    (tmp_path / "a.ckpt").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match=r"Cannot read the checkpoint .*a\.ckpt"):
        learn(tmp_path)
    (tmp_path / "a.ckpt").unlink()
    learn(tmp_path, max_epochs=1)
    path = tmp_path / "a.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"Cannot read the domain file .*a\.safetensors"):
        learn(tmp_path)


def test_a_folder_of_another_backbone_is_found_out_before_training(tmp_path):
    learn(tmp_path, tasks=lambda: {"a": (2, loader())}, max_epochs=1)

    class Other(Lit):
        def __init__(self):
            super().__init__()
            nn.init.ones_(self.net[0].weight)

    with pytest.raises(CheckpointError, match="another backbone"):
        learn(tmp_path, module=Other, after=0)
    assert not (tmp_path / "b.ckpt").exists()


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    with pytest.raises(DeathError):
        learn(tmp_path, after=3)
    content = (tmp_path / "a.ckpt").read_bytes()

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(L.Trainer, "save_checkpoint", full)
    with pytest.raises(CheckpointError, match=r"Cannot write the checkpoint .*No space left"):
        learn(tmp_path)
    assert (tmp_path / "a.ckpt").read_bytes() == content
