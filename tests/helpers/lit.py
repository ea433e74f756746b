"""A LightningModule that knows nothing of DA3, made at every point where users make them."""

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_da3 import AdapterConfig, DA3Callback, DA3Config, GateConfig

CONFIG = DA3Config(
    AdapterConfig(hidden_channels=4, min_stride=1), GateConfig(target=0.5, by="cell")
)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


class Lit(L.LightningModule):
    """Knows nothing of DA3. `made` says where the network is made."""

    def __init__(self, made="init", lr=1e-2):
        super().__init__()
        self.made, self.lr = made, lr
        if made == "init":
            self.net = network()

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return loss

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.lr)


class LitSetup(Lit):
    def setup(self, stage):
        if not hasattr(self, "net"):
            self.net = network()


class LitConfigure(Lit):
    def configure_model(self):
        if not hasattr(self, "net"):
            self.net = network()


KINDS = {"init": Lit, "setup": LitSetup, "configure_model": LitConfigure}


def lit(made="init"):
    return KINDS[made](made)


def data(seed=0, nan=False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 3, 16, 16, generator=generator)
    y = (x.mean(dim=(1, 2, 3)) > 0).long()
    if nan:
        x[9] = float("nan")
    return DataLoader(TensorDataset(x, y), batch_size=4)


def trainer(tmp_path, callback, epochs=2, **kwargs):
    kwargs = {"logger": False, "enable_checkpointing": False, **kwargs}
    callbacks = [callback, *kwargs.pop("callbacks", [])]
    return L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=tmp_path,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


def callback(domain="a", num_classes=2, **kwargs):
    return DA3Callback(domain, num_classes, config=CONFIG, **kwargs)


def logits(module, domain):
    module.net.set_domain(domain)
    module.eval()
    with torch.no_grad():
        scores = module.net(torch.ones(2, 3, 16, 16))
    module.train()
    return scores


def parameters(module, domain):
    return {k: v.clone() for k, v in module.net.domain(domain).state_dict().items()}
