"""A Trainer with mixed precision: the network is converted, and starts, as it will be trained."""

import copy
import warnings

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers.around import Around
from helpers.lit import data, trainer
from helpers.switching import BLOCKS, Asks, Off, switching
from torch import nn

from lightning_da3 import (
    AdapterConfig,
    ConfigError,
    ConversionWarning,
    DA3Callback,
    DA3Config,
    DA3Model,
    GateConfig,
    MemoryConfig,
    convert,
)
from lightning_da3.trainer.precision import precision_of

# of what stays Python: Lightning warns of modules that are held in eval
pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode")
EXACT = MemoryConfig(exact=True)
CONFIG = DA3Config(AdapterConfig(4, min_stride=1), gate=None, memory=EXACT)


def network():
    torch.manual_seed(0)
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), Block(), Block(), pooled, nn.Linear(8, 5)).eval()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x).relu()


def off(x):
    with torch.autocast("cpu", enabled=False):
        return torch.softmax(x.float().flatten(2), -1).view(x.shape) * 64


def asks(x):
    return x * 2 if torch.is_autocast_enabled("cpu") else x


def by_type(x):
    return x * 2 if x.dtype == torch.bfloat16 else x


def by_is(x):
    return x * 2 if x.dtype is torch.bfloat16 else x


def by_tensor_type(x):
    return x * 2 if isinstance(x, torch.BFloat16Tensor) else x


class Cast(nn.Module):
    """Computes in the type that another layer has."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.other(self.one(x).to(self.other.weight.dtype)).to(x.dtype)


class Narrow(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = self.conv(x)
        return y * 2 if y.dtype != self.conv.weight.dtype else y


MAKES = {f.__name__: lambda f=f: Around(f) for f in (off, asks, by_type, by_is)}
MAKES |= {"Cast": lambda: Around(Cast()), "Narrow": lambda: Around(Narrow())}
MAKES |= {block.__name__: lambda block=block: switching(block) for block in BLOCKS}


class Lit(L.LightningModule):
    """Compares its network with another in the first step, where both are used."""

    def __init__(self, net, other=None):
        super().__init__()
        self.net, self.others, self.far = net, [other], None

    def training_step(self, batch, batch_idx):
        x, y = batch
        assert torch.is_autocast_enabled("cpu")
        if self.far is None and self.others[0] is not None:
            self.far = self.compared(x, y)
        return F.cross_entropy(self.net(x), y)

    def compared(self, x, y):
        head, other = self.net.domain("a").head, self.others[0]
        name = self.net.plan.head
        other.set_submodule(name, nn.Linear(head.in_features, head.out_features))
        other.get_submodule(name).load_state_dict(head.state_dict())
        found = []
        for network, weight in ((self.net, head.weight), (other, other.get_submodule(name).weight)):
            inputs = x.clone().requires_grad_()
            output = network(inputs)
            loss = F.cross_entropy(output, y)
            found.append((output.detach(), *torch.autograd.grad(loss, [weight, inputs])))
            assert loss.dtype == torch.float32
        for one, two in zip(*found, strict=True):
            assert one.dtype == two.dtype
        pairs = zip(*found, strict=True)
        return [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs]

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


def fit(folder, module, **kwargs):
    da3 = DA3Callback("a", 2, CONFIG)
    made = trainer(folder, da3, epochs=1, precision="bf16-mixed", **kwargs)
    made.fit(module.train(), data())


@pytest.mark.parametrize("make", MAKES.values(), ids=[*MAKES])
def test_what_is_trained_is_the_network_under_the_same_autocast(tmp_path, make):
    torch.manual_seed(0)
    net = make().eval()
    module = Lit(net, copy.deepcopy(net))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConversionWarning)  # nothing is traced once more
        fit(tmp_path, module)
    output, head, inputs = module.far
    assert output < 0.02
    assert head < 0.05
    assert inputs < 0.15  # a rounding decides where a ReLU is open
    adapters = module.net.domain("a").adapters
    assert adapters
    assert all(any(v.any() for v in a.value.parameters()) for a in adapters.values())  # all learned


def test_so_it_is_with_a_strategy_of_our_own(tmp_path):
    net = switching(Asks)
    module = Lit(net, copy.deepcopy(net))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConversionWarning)
        fit(tmp_path, module, strategy="da3")
    assert module.far[0] < 0.02


@pytest.mark.parametrize("make", [lambda: Around(off), lambda: switching(Off)])
def test_a_network_that_was_converted_before_is_traced_once_more(tmp_path, make):
    torch.manual_seed(0)
    net = make().eval()
    module = Lit(convert(net, CONFIG), copy.deepcopy(net))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, module)
    said = [w for w in caught if "traced once more" in str(w.message)]
    assert len(said) == 1
    assert module.far[0] < 0.02
    adapters = module.net.domain("a").adapters
    assert all(any(v.any() for v in a.value.parameters()) for a in adapters.values())


def test_the_precision_of_a_trainer():
    assert precision_of(L.Trainer(accelerator="cpu", precision="bf16-mixed", logger=False)) == (
        ("cpu", torch.bfloat16),
    )
    for precision in ("32-true", "64-true", "bf16-true"):
        plain = L.Trainer(accelerator="cpu", precision=precision, logger=False)
        assert precision_of(plain) == ()
        assert torch.get_default_dtype() == torch.float32


class Seen(L.Callback):
    """The head and what is skipped when the first step begins."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not hasattr(self, "head"):
            self.head = pl_module.net.domain("a").head.weight.detach().clone()
            self.skipped = pl_module.net.skipped("a")


def started(folder, net, precision, config=CONFIG):
    seen = Seen()
    da3 = DA3Callback("a", 2, config, start_head=True)
    made = trainer(folder, da3, epochs=1, precision=precision, callbacks=[seen])
    made.fit(Plain(net).train(), data())
    return seen


class Plain(Lit):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)


def test_heads_start_in_the_precision_of_the_steps(tmp_path):
    net = switching(Asks)
    lowered = started(tmp_path, copy.deepcopy(net), "bf16-mixed").head
    model = convert(net, CONFIG)
    model.add_domain("a", 2)
    model.start_head("a", data())
    assert (model.domain("a").head.weight - lowered).norm() > 0.1 * lowered.norm()
    with torch.autocast("cpu", torch.bfloat16):
        other = convert(net, CONFIG)
        other.add_domain("a", 2)
        other.start_head("a", data())
    torch.testing.assert_close(other.domain("a").head.weight, lowered, rtol=0.05, atol=0.05)


def test_branches_are_chosen_in_the_precision_of_the_steps(tmp_path, monkeypatch):
    config = DA3Config(CONFIG.adapter, GateConfig(by="domain", target=0.6), memory=EXACT)
    lowered, forward = [], DA3Model.forward

    def noted(self, *args, **kwargs):
        if self.candidates is not None:
            lowered.append(torch.is_autocast_enabled("cpu"))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(DA3Model, "forward", noted)
    net = network()
    nn.init.zeros_(net[2].conv.weight)
    nn.init.zeros_(net[2].conv.bias)  # so that nothing is lost with it
    assert started(tmp_path, net, "bf16-mixed", config).skipped == ("2.conv",)
    assert lowered
    assert all(lowered)


def test_branches_that_autocast_keeps_from_being_skipped_are_refused(tmp_path):
    config = DA3Config(CONFIG.adapter, GateConfig(by="domain", target=0.7), memory=EXACT)
    with pytest.raises(ConfigError, match="no residual branch that can be skipped"):
        started(tmp_path, switching(Off), "bf16-mixed", config)
    assert started(tmp_path, switching(Off), "32-true", config).skipped
