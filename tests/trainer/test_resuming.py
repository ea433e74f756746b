"""fit_sequence: wherever it is stopped, it ends with the same weights, bit for bit."""

import random

import lightning as L
import numpy as np
import pytest
import torch
from helpers.marks import others_by_hand
from helpers.sequences import (
    Data,
    DeathError,
    Stream,
    Validated,
    assert_same,
    batches_drawn_by,
    learn,
    loader,
    own_generator,
    val_loader,
    weights,
)
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import DataLoader

from lightning_da3 import CheckpointError
from lightning_da3.trainer.resuming import generators_of

VALIDATED = {
    "module": Validated,
    "tasks": lambda: {"a": (2, loader(), val_loader()), "b": (3, Data())},
}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


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
    "batch sampler": {"tasks": lambda: {"a": (2, batches_drawn_by(seeded(1), inner=seeded(2)))}},
    "batch sampler of numpy": {
        "tasks": lambda: {"a": (2, batches_drawn_by(np.random.default_rng(1), inner=seeded(2)))}
    },
    "batch sampler of old numpy": {
        "tasks": lambda: {"a": (2, batches_drawn_by(np.random.RandomState(1)))}
    },
    "batch sampler of Python": {"tasks": lambda: {"a": (2, batches_drawn_by(random.Random(1)))}},
    "stream": {"tasks": lambda: {"a": (2, DataLoader(Stream(), batch_size=2))}, "max_epochs": 3},
}


OFTEN = [
    "batch sampler",
    *others_by_hand(
        [way for way in WAYS if way != "batch sampler"],
        *("accumulated", "validated in the epoch", "stopped early"),
    ),
]


def total_batches(way, folder):
    """Of an uninterrupted run, whose domains stay in the folder."""
    counted = []

    class Count(L.Callback):
        def on_train_batch_start(self, *_):
            counted.append(1)

    more = WAYS[way].get("more", list)
    learn(folder, **{**WAYS[way], "more": lambda: [*more(), Count()]})
    return len(counted)


@pytest.mark.parametrize("way", OFTEN)
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


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "way",
    [
        "stopped early",
        "by steps, validated",
        "validated in the epoch",
    ],
)
def test_wherever_a_run_died_it_ends_with_the_same_bits(tmp_path, way):
    total = total_batches(way, tmp_path / "whole")
    for after in range(total):
        folder = tmp_path / str(after)
        with pytest.raises(DeathError):
            learn(folder, **WAYS[way], after=after)
        learn(folder, **WAYS[way])
        assert_same(weights(folder), weights(tmp_path / "whole"))


@pytest.mark.slow
def test_a_stop_costs_at_most_the_steps_between_two_saves(tmp_path):
    steps = []

    class Steps(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            steps.append(trainer.global_step)

    with pytest.raises(DeathError):
        learn(tmp_path, after=3, every=2)
    learn(tmp_path, every=2, more=lambda: [Steps()])
    assert steps[:3] == [2, 3, 4]  # of the first domain's ten


@pytest.mark.slow
def test_workers_of_the_dataloader_give_the_same_bits(tmp_path):
    def tasks():
        return {"a": (2, loader(num_workers=1))}

    learn(tmp_path / "whole", tasks=tasks, max_epochs=1)
    with pytest.raises(DeathError):
        learn(tmp_path / "died", tasks=tasks, max_epochs=1, after=3)
    learn(tmp_path / "died", tasks=tasks, max_epochs=1)
    assert_same(weights(tmp_path / "died"), weights(tmp_path / "whole"))


@pytest.mark.slow
def test_a_checkpoint_of_other_samplers_is_refused(tmp_path):
    with pytest.raises(DeathError):
        learn(tmp_path, tasks=lambda: {"a": (2, own_generator())}, after=3)
    with pytest.raises(CheckpointError, match=r"1 random generators .* have 0 now"):
        learn(tmp_path, tasks=lambda: {"a": (2, loader())})


def test_a_loader_that_says_little_of_itself():
    assert list(generators_of([1, 2])) == []
    order = seeded(1)
    assert list(generators_of(loader(generator=order))) == [order]
    drawn = batches_drawn_by(order, inner=order)
    drawn.batch_sampler.itself = drawn.batch_sampler  # a circle
    assert list(generators_of(drawn)) == [order]
