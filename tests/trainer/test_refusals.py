"""What a run refuses: parts that would touch the backbone, and runs that would learn nothing."""

from types import SimpleNamespace

import lightning as L
import pytest
from helpers.doors import DOORS, through
from helpers.lit import data, lit
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, ModelPruning
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_da3 import ConfigError, DA3Error
from lightning_da3.trainer.averaging import AVERAGING_CALLBACKS
from lightning_da3.trainer.refusals import (
    REFUSED_CALLBACKS,
    REFUSED_PRECISIONS,
    check_plugins,
    check_strategy,
)


class Freezes(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net)

    def finetune_function(self, pl_module, epoch, optimizer):
        raise AssertionError("refused before")


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (Freezes, "Freezes cannot be used with a domain. It unfreezes the backbone"),
        (BackboneFinetuning, "BackboneFinetuning cannot .* It unfreezes the backbone"),
        (lambda: ModelPruning("l1_unstructured"), "ModelPruning .* It prunes the backbone"),
    ],
)
def test_callbacks_that_would_touch_the_backbone_are_refused(tmp_path, made, reason):
    for door in DOORS[1:]:
        with pytest.raises(ConfigError, match=reason):
            through(door, tmp_path, callbacks=[made()]).fit(lit(), data())
    trainer = through("callback", tmp_path)
    trainer.callbacks.append(made())
    with pytest.raises(ConfigError, match=reason):
        trainer.fit(lit(), data())


@pytest.mark.parametrize("name", REFUSED_PRECISIONS)
def test_precisions_that_would_replace_layers_are_refused(name):
    assert hasattr(L.pytorch.plugins, name)  # each needs a package of its own to be made
    plugin = type(name, (), {"__module__": "lightning.pytorch.plugins.precision"})()
    trainer = SimpleNamespace(callbacks=[], precision_plugin=plugin)
    with pytest.raises(ConfigError, match=f"{name} cannot be used with a domain. It replaces"):
        check_plugins(trainer)


def test_parts_known_by_name_exist():
    for name in (*REFUSED_CALLBACKS, *AVERAGING_CALLBACKS):
        assert hasattr(L.pytorch.callbacks, name)


def test_whatever_edits_a_frozen_tensor_is_found_out(tmp_path):
    class Edits(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            next(pl_module.net.backbone.parameters()).data.mul_(1.0001)

    with pytest.raises(DA3Error, match=r"1 frozen tensors changed while \['a'\] trained, such as"):
        through("callback", tmp_path, callbacks=[Edits()]).fit(lit(), data())


def test_other_strategies_are_refused_by_name():
    class Mine(DDPStrategy):
        """Derived from one that works."""

    class DeepSpeedStrategy(DDPStrategy):
        __module__ = "lightning.pytorch.strategies.deepspeed"

    check_strategy(Mine())
    for strategy in (FSDPStrategy(), ModelParallelStrategy(), DeepSpeedStrategy(), object()):
        with pytest.raises(ConfigError, match=rf'{type(strategy).__name__} is not.*"da3_ddp"'):
            check_strategy(strategy)


def test_a_fit_that_would_train_nothing_is_refused(tmp_path):
    module = lit()
    trainer = through("callback", tmp_path)
    trainer.fit(module, data())
    with pytest.raises(DA3Error, match=r"train \['a'\] for 0 steps.*max_epochs=2"):
        trainer.fit(module, data())
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, data())
    assert trainer.global_step == 9
