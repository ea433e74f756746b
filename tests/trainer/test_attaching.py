"""A LightningModule from a checkpoint, with its domains."""

import pytest
import torch
from helpers.doors import checkpoint, through
from helpers.lit import Lit, LitConfigure, LitSetup, data, logits

from lightning_da3 import CheckpointError, load_from_checkpoint


class WithHyperParameters(Lit):
    def __init__(self, lr, made="init"):
        super().__init__(made, lr)
        self.save_hyperparameters()


class ConfigureWithHyperParameters(WithHyperParameters, LitConfigure):
    def __init__(self, lr):
        super().__init__(lr, "configure_model")


@pytest.mark.parametrize("kind", [WithHyperParameters, ConfigureWithHyperParameters])
@pytest.mark.slow
def test_load_from_checkpoint_keeps_every_domain(tmp_path, kind):
    module = kind(3e-3)
    through("callback", tmp_path, "a").fit(module, data())
    trainer = through("callback", tmp_path, "b", 3)
    trainer.fit(module, data(1))
    trainer.save_checkpoint(tmp_path / "both.ckpt")
    loader = kind.load_state_dict
    again = load_from_checkpoint(kind, tmp_path / "both.ckpt")
    assert kind.load_state_dict is loader
    assert type(again) is kind
    assert again.lr == 3e-3
    assert again.net.domains == ["a", "b"]
    assert again.net.active_domain == "b"
    for domain in "ab":
        assert torch.equal(logits(again, domain), logits(module, domain))
    other = load_from_checkpoint(kind, tmp_path / "both.ckpt", lr=1.0, strict=False)
    assert other.lr == 1.0
    assert torch.equal(logits(other, "a"), logits(module, "a"))


def test_load_from_checkpoint_refuses_what_it_cannot_load(tmp_path):
    path, _ = checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="network 'net', which LitSetup does not have"):
        load_from_checkpoint(LitSetup, path, made="setup")
    plain = {"state_dict": Lit().state_dict(), "pytorch-lightning_version": "2.5.0"}
    torch.save(plain, tmp_path / "plain.ckpt")
    with pytest.raises(CheckpointError, match=r"no domain. Use Lit.load_from_checkpoint"):
        load_from_checkpoint(Lit, tmp_path / "plain.ckpt")
    with pytest.raises(RuntimeError, match="Unexpected key"):
        Lit.load_from_checkpoint(path)  # the trap that ours avoids
