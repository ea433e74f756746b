"""When the network is converted: once the module has built it, and nothing is left behind."""

import contextlib
import dataclasses
import pickle

import lightning as L
import pytest
import torch
from helpers.lit import CONFIG, KINDS, Lit, LitConfigure, callback, data, lit, network, trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from lightning_da3 import DA3Callback, DA3Model
from lightning_da3.trainer.building import when_built


def hooks_of(module):
    return [hook for hook in ("setup", "configure_model") if hook in vars(module)]


@pytest.mark.parametrize("made", KINDS)
def test_the_wrapped_hooks_remove_themselves(made):
    module, calls = lit(made), []
    when_built(module, lambda: calls.append(hasattr(module, "net")))
    assert calls == ([True] if made == "init" else [])
    module.setup("fit")
    module.configure_model()
    assert calls == [True]
    assert hooks_of(module) == []
    module.configure_model()
    assert calls == [True]


@pytest.mark.parametrize("made", KINDS)
@pytest.mark.slow
def test_a_fitted_module_can_be_pickled(tmp_path, made):
    module = lit(made)
    trainer(tmp_path, callback(), epochs=1).fit(module, data())
    module.trainer = None
    assert isinstance(pickle.loads(pickle.dumps(module)).net, DA3Model)


def test_a_module_that_fails_before_it_is_built_is_left_as_it_was(tmp_path):
    class Fails(LitConfigure):
        def setup(self, stage):
            raise RuntimeError("no data")

    module = Fails("configure_model")
    with pytest.raises(RuntimeError, match="no data"):
        trainer(tmp_path, callback()).fit(module, data())
    assert hooks_of(module) == []


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that")
def test_callbacks_may_call_configure_model_before_the_network_is_there(tmp_path):
    """Weight averaging does so, in a `setup` that comes before the module's own."""

    class Both(Lit):
        def setup(self, stage):
            self.net = network()

        def configure_model(self):
            self.scale = nn.Identity()

    module = Both("setup")
    averaging = [EMAWeightAveraging(decay=0.7)]
    trainer(tmp_path, callback(), epochs=1, callbacks=averaging).fit(module, data())
    assert isinstance(module.net, DA3Model)


def test_a_network_that_is_built_anew_every_time_is_converted(tmp_path):
    class Anew(Lit):
        def configure_model(self):
            self.net = network()

    module = Anew("configure_model")
    for _ in range(2):
        trainer(tmp_path, callback(), epochs=1).fit(module, data())
        assert isinstance(module.net, DA3Model)


@pytest.mark.parametrize("made", ["setup", "configure_model"])
def test_conversion_does_not_follow_the_device_of_configure_model(tmp_path, made):
    class Elsewhere(SingleDeviceStrategy):
        @contextlib.contextmanager
        def tensor_init_context(self, empty_init=None):
            with torch.device("meta"):
                yield

    class Shifts(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = network()

        def forward(self, x):
            return self.parts(x + torch.linspace(0, 1, x.shape[-1]))

    class Module(KINDS[made]):
        def setup(self, stage):
            if made == "setup":
                self.net = Shifts()

        def configure_model(self):
            if not hasattr(self, "net"):
                with torch.device("cpu"):
                    self.net = Shifts()

    module = Module(made)
    strategy = Elsewhere("cpu")
    da3 = DA3Callback("a", config=dataclasses.replace(CONFIG, head=None))
    trainer(tmp_path, da3, epochs=1, strategy=strategy).fit(module, data())
    assert {p.device.type for p in module.parameters()} == {"cpu"}
    assert isinstance(module.trainer, L.Trainer)
