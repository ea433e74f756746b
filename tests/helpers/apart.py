"""A LightningModule whose classifier is outside of its network, with a loss that has weights."""

import torch
import torch.nn.functional as F
from torch import nn

from helpers.lit import CONFIG, Lit, data, network, trainer
from lightning_da3 import DA3Callback, DA3Config
from lightning_da3.model.outside import tensors_of

ALONE = DA3Config(adapter=CONFIG.adapter, gate=None, head=None)


class Scale(nn.Module):
    """A loss with a weight."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, scores, y):
        return F.cross_entropy(scores * self.scale, y)


class Apart(Lit):
    """The commonest way to transfer."""

    def __init__(self, made="init", lr=1e-2):
        super().__init__("later", lr)
        self.net = network()[:-1]
        self.classifier = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2))
        self.margin = Scale()
        self.offset = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return self.classifier(self.net(x)) + self.offset

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = self.margin(self(x), y)
        self.log("loss", loss)
        return loss

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("accuracy", (self(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


PARAMETERS = {
    "classifier.0.weight",
    "classifier.0.bias",
    "classifier.1.weight",
    "classifier.1.bias",
    "margin.scale",
    "offset",
}


@torch.no_grad()
def scores(module, domain):
    """Of the whole LightningModule."""
    module.net.set_domain(domain)
    module.eval()
    result = (
        module.margin(module(torch.ones(2, 3, 16, 16)), torch.tensor([0, 1])).clone(),
        module(torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)),
    )
    module.train()
    return torch.cat([result[0].view(1), result[1].flatten()])


def learn(tmp_path, module, domain, loader=None, callbacks=(), epochs=1, ckpt_path=None, **kwargs):
    da3 = DA3Callback(domain, config=ALONE, predict=False, **kwargs)
    fitter = trainer(tmp_path, da3, epochs=epochs, callbacks=list(callbacks))
    fitter.fit(module, loader or data(sum(map(ord, domain))), ckpt_path=ckpt_path)
    return fitter


def learned(module, domain):
    """The set of a domain, copied."""
    module.net.refresh()
    return {k: v.clone() for k, v in tensors_of(module.net.domain(domain).outside).items()}


def assert_equal(one, other):
    assert set(one) == set(other)
    assert not [name for name in one if not torch.equal(one[name], other[name])]
