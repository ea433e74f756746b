"""The callback in a Trainer of the `pytorch_lightning` package, which is not a dependency."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers.lit import CONFIG, callback, data, lit, logits, network, parameters

from lightning_da3 import (
    ConfigError,
    DA3Callback,
    DA3Model,
    DA3Strategy,
    DomainLoader,
    load_from_checkpoint,
)
from lightning_da3.trainer.building import builds_later

pl = pytest.importorskip("pytorch_lightning")
from pytorch_lightning.callbacks import (  # noqa: E402
    BackboneFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


class Lit(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


class LitConfigure(Lit):
    def __init__(self):
        pl.LightningModule.__init__(self)

    def configure_model(self):
        if not hasattr(self, "net"):
            self.net = network()


def trainer(*callbacks, **kwargs):
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


@pytest.mark.parametrize("kind", [Lit, LitConfigure])
def test_fit_test_and_load(tmp_path, kind):
    module, saver = kind(), ModelCheckpoint(dirpath=tmp_path)
    assert builds_later(module) == (kind is LitConfigure)
    fitter = trainer(callback(), saver)
    fitter.fit(module, data())
    assert isinstance(module.net, DA3Model)
    assert fitter.global_step == 6
    state = torch.load(saver.best_model_path, weights_only=True)["state_dict"]
    assert not [key for key in state if key.startswith("net.backbone.")]
    learned = logits(module, "a")
    again = kind()
    trainer(callback(), enable_checkpointing=False).test(
        again, data(), ckpt_path=saver.best_model_path, verbose=False
    )
    assert torch.equal(logits(again, "a"), learned)
    loaded = load_from_checkpoint(kind, saver.best_model_path)
    assert torch.equal(logits(loaded, "a"), learned)


def test_callbacks_of_that_package_are_known(tmp_path):
    module = Lit()
    before = [v.clone() for v in parameters_of_backbone(module)]
    trainer(callback(), EMAWeightAveraging(decay=0.7), enable_checkpointing=False).fit(
        module, data()
    )
    assert any(v.any() for k, v in parameters(module, "a").items() if "value.weight" in k)
    after = parameters_of_backbone(module)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    with pytest.raises(ConfigError, match="BackboneFinetuning cannot be used"):
        trainer(callback(), BackboneFinetuning(), enable_checkpointing=False).fit(Lit(), data())


def parameters_of_backbone(module):
    """Of the converted network; of one that is not yet, as conversion would fold it."""
    from lightning_da3 import convert

    net = module.net if isinstance(module.net, DA3Model) else convert(module.net, CONFIG)
    return list(net.backbone.state_dict().values())


def test_modules_and_strategies_of_the_other_package_are_refused(tmp_path):
    with pytest.raises(TypeError, match="must be a `LightningModule`"):
        trainer(callback(), enable_checkpointing=False).fit(lit(), data())
    with pytest.raises(ValueError, match="invalid strategy"):
        trainer(strategy=DA3Strategy("a", 2))
    with pytest.raises(TypeError, match="must be a `LightningModule`"):
        L.Trainer(callbacks=[callback()], logger=False, max_epochs=1).fit(Lit(), data())


def test_a_domain_loader_of_the_other_package_is_an_error(tmp_path):
    both = DA3Callback({"a": 2, "b": 2}, config=CONFIG)
    with pytest.raises(ConfigError, match="of a `lightning` Trainer"):
        trainer(both, enable_checkpointing=False).fit(Lit(), DomainLoader({"a": data()}))
