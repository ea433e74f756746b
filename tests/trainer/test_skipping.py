"""Domains that skip branches, learned in a Trainer."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers.domains import refused
from helpers.lit import data, trainer
from helpers.skips import BY_DOMAIN, config, network
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_da3 import ConfigError, DA3Callback, DomainLoader, GateConfig, convert
from lightning_da3.trainer.attaching import load_from_checkpoint

CONFIG = config(gate=BY_DOMAIN)


class Lit(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network().train()

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2, weight_decay=0.1)


class Seen(L.Callback):
    """What is skipped when the first step begins, and closed adapters before and after."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        net = pl_module.net
        if not hasattr(self, "skipped"):
            self.skipped = {name: net.skipped(name) for name in net.domains}
            self.head = net.domain("a").head.weight.detach().clone()
            self.closed = closed(net)


def closed(net):
    domain = net.domain("a")
    return {h: copy(domain.adapter(h)) for h in domain.closed}


def copy(adapter):
    return {name: value.clone() for name, value in adapter.state_dict().items()}


def chosen():
    model = convert(network(), CONFIG)
    model.add_domain("a", 2)
    found = model.choose_branches("a", data(), BY_DOMAIN.target)
    model.start_head("a", data())
    return found, model.domain("a").head.weight


def fitted(tmp_path, module, batches=None, da3=None, **kwargs):
    seen = Seen()
    da3 = da3 or DA3Callback("a", 2, CONFIG, start_head=True)
    callbacks = [seen, *kwargs.pop("callbacks", [])]
    trainer(tmp_path, da3, callbacks=callbacks, **kwargs).fit(module, batches or data())
    return seen


def test_branches_are_chosen_before_the_first_step_and_the_head_starts_behind_them(
    tmp_path, caplog
):
    module = Lit()
    da3 = DA3Callback("a", 2, CONFIG, start_head=True, save_dir=str(tmp_path))
    with caplog.at_level("INFO"):
        seen = fitted(tmp_path, module, da3=da3)
    found, head = chosen()
    assert found
    assert seen.skipped == {"a": found}
    torch.testing.assert_close(seen.head, head)
    left = module.net.plan.executed_share(found)
    assert f"'a' skips {[*found]}: {left:.0%} of the network's FLOPs are left." in caplog.text
    assert float(module.net.executed_flops_fraction) == torch.tensor(left)
    now = closed(module.net)
    assert now
    for host, tensors in seen.closed.items():  # weight decay moves them neither
        assert all(torch.equal(value, now[host][name]) for name, value in tensors.items())
    fresh = convert(network(), CONFIG)
    fresh.load_domain(tmp_path / "a.safetensors")
    assert fresh.skipped("a") == found
    seen = fitted(tmp_path, module, data(1))  # it has learned: it keeps to what it skips
    assert seen.skipped == {"a": found}


def test_resumed_and_loaded_it_skips_the_same(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    module = Lit()
    da3 = DA3Callback("a", 2, CONFIG)
    kwargs = {"enable_checkpointing": True, "callbacks": [checkpoint]}
    fitted(tmp_path, module, da3=da3, epochs=1, **kwargs)
    found = module.net.skipped("a")
    loaded = load_from_checkpoint(Lit, tmp_path / "last.ckpt")
    assert loaded.net.skipped("a") == found
    with torch.no_grad():
        x = torch.ones(2, 3, 16, 16)
        assert torch.equal(loaded.eval().net(x), module.eval().net(x))
    whole = Lit()
    fitted(tmp_path, whole, da3=DA3Callback("a", 2, CONFIG), epochs=2)
    again, seen = Lit(), Seen()
    fit = trainer(tmp_path, DA3Callback("a", 2, CONFIG), callbacks=[seen], epochs=2)
    fit.fit(again, data(), ckpt_path=tmp_path / "last.ckpt")
    assert seen.skipped == {"a": found}
    for name, value in whole.net.domain("a").state_dict().items():
        assert torch.equal(value, again.net.domain("a").state_dict()[name]), name


def test_several_domains_each_skip_their_own(tmp_path):
    module = Lit()
    loader = DomainLoader({"a": data(), "b": data(1)})
    da3 = DA3Callback({"a": 2, "b": 2}, config=CONFIG)
    seen = fitted(tmp_path, module, loader, da3)
    assert seen.skipped["a"] == chosen()[0]
    assert seen.skipped["b"]
    assert module.net.skipped("b") == seen.skipped["b"]


def test_branches_that_are_so_large_that_the_target_is_missed_by_far_are_said(tmp_path):
    module = Lit()
    da3 = DA3Callback("a", 2, config(gate=GateConfig(target=0.95)))
    with pytest.warns(UserWarning, match="'a' keeps 69% of the network's FLOPs, though 95%"):
        fitted(tmp_path, module, data(1), da3)
    assert len(module.net.skipped("a")) == 1


def test_steps_that_cannot_be_asked_are_refused(tmp_path):
    module = Lit()
    module.automatic_optimization = False
    with refused(ConfigError, 'GateConfig(by="domain") needs the loss', "`model.choose_branches("):
        fitted(tmp_path, module, da3=DA3Callback("a", 2, CONFIG))
