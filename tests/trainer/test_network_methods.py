"""LightningModules that call more of their network than its `forward`."""

import pytest
import torch
import torch.nn.functional as F
from helpers.lit import CONFIG, Lit, callback, data, trainer
from torch import nn

from lightning_da3 import DA3Callback, DomainLoader


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.width = 8
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.fc = nn.Linear(8, 5)

    def forward_features(self, x):
        return self.body(self.stem(x)).mean((2, 3))

    def forward(self, x):
        return self.fc(self.forward_features(x))


class ByParts(Lit):
    """Regularises features, and has a learning rate for each part."""

    def __init__(self):
        super().__init__("elsewhere")
        torch.manual_seed(0)
        self.net = Net()

    def training_step(self, batch, batch_idx):
        x, y = batch
        features = self.net.forward_features(x)
        assert features.shape[1] == self.net.width
        return F.cross_entropy(self.net.fc(features), y) + 1e-3 * features.square().mean()

    def configure_optimizers(self):
        body = {"params": self.net.body.parameters(), "lr": 1e-2}
        return torch.optim.SGD([body, {"params": self.net.fc.parameters()}], lr=1e-1)


def by_hand(module, x):
    return module.net.fc(module.net.body(module.net.stem(x)).mean((2, 3)))


def test_they_learn_as_forward_does(tmp_path):
    module, da3 = ByParts(), callback()
    trainer(tmp_path, da3, epochs=1).fit(module, data())
    moved = [p.detach().clone() for p in module.net.domain("a").parameters()]
    trainer(tmp_path, da3, epochs=1).fit(module, data())
    pairs = zip(moved, module.net.domain("a").adapters.parameters(), strict=False)
    assert not all(torch.equal(before, now) for before, now in pairs)
    module.eval()
    x = torch.ones(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(by_hand(module, x), module.net(x))
    assert "(measured)" in str(da3.saying.status)
    assert "da3/executed_flops_fraction" in module.trainer.callback_metrics


@pytest.mark.parametrize("domain", ["a", "b"])
def test_with_several_domains_in_turn(tmp_path, domain):
    class All(ByParts):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-1)

    module = All()
    loaders = DomainLoader({"a": data(), "b": data(1)})
    trainer(tmp_path, DA3Callback({"a": 2, "b": 3}, config=CONFIG), epochs=1).fit(module, loaders)
    module.net.set_domain(domain)
    module.eval()
    x = torch.ones(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(by_hand(module, x), module.net(x))
