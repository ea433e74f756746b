"""The same run through the callback, the strategy, or both."""

import lightning as L
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint

from helpers.lit import CONFIG, Lit, data, lit
from lightning_da3 import DA3Callback, DA3Config, DA3Strategy

DOORS = ("callback", "strategy and callback", "strategy")
EITHER = ("callback", "strategy")  # where the doors meet other choices
QUIET = DA3Config(adapter=CONFIG.adapter, gate=None)  # nothing random but the fresh adapters


def through(door, tmp_path, domain="a", num_classes=2, config=CONFIG, epochs=2, **kwargs):
    """A Trainer that learns `domain`, told through one of the doors."""
    callbacks = kwargs.pop("callbacks", [])
    if door != "strategy":
        callbacks = [*callbacks, DA3Callback(domain, num_classes, config)]
    strategy = {
        "callback": "auto",
        "strategy and callback": "da3",
        "strategy": DA3Strategy(domain, num_classes, config),
    }[door]
    kwargs = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", **kwargs}
    return L.Trainer(
        strategy=strategy,
        max_epochs=epochs,
        default_root_dir=tmp_path,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


def checkpoint(tmp_path, made="init", domain="a", config=CONFIG, **kwargs):
    """The path of a checkpoint of a fitted module, and the module."""
    saver = ModelCheckpoint(dirpath=tmp_path / "saved", **kwargs)
    module = lit(made)
    trainer = through(
        "strategy", tmp_path, domain, config=config, enable_checkpointing=True, callbacks=[saver]
    )
    trainer.fit(module, data())
    return saver.best_model_path, module


class Watched(Lit):
    """Validates, too, so that callbacks have something to watch."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self.net(batch[0])
