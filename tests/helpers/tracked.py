"""Fits whose loggers are looked at afterwards."""

from lightning.pytorch.loggers import CSVLogger

from helpers.lit import Lit, callback, data, trainer


class Validated(Lit):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        self.log("val/acc", (self.net(x).argmax(1) == y).float().mean())

    test_step = validation_step


def fit(tmp_path, loggers, module=None, da3=None, val=None, **kwargs):
    module, da3 = module or Validated(), da3 or callback()
    train = kwargs.pop("train", None) or data()
    kwargs = {"log_every_n_steps": 1, "num_sanity_val_steps": 0, **kwargs}
    fitter = trainer(tmp_path, da3, logger=loggers, **kwargs)
    fitter.fit(module, train, val or data())
    return module, fitter


def logger_of(tmp_path, **kwargs):
    return CSVLogger(tmp_path, name="logs", version="", **kwargs)
