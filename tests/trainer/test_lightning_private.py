"""What is read of Lightning without being public, where it is there and where it is not."""

import builtins
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from helpers.lit import LitConfigure, lit
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lightning_da3 import ConfigError, DA3DDPStrategy
from lightning_da3.trainer import lightning_private
from lightning_da3.trainer.lightning_private import (
    PreparingLauncher,
    averaged_model,
    count_logged_,
    find_unused_parameters_,
    is_compiled,
    is_of_lightning,
    overrides,
    profiler_runs,
    starts_processes,
)


def test_classes_of_lightning_are_known_by_name():
    class Mine(DDPStrategy):
        pass

    class SingleDeviceStrategy:
        """Of another package."""

    assert is_of_lightning(Mine(), "DDPStrategy")
    assert not is_of_lightning(SingleDeviceStrategy(), "SingleDeviceStrategy")
    assert not is_of_lightning(None, "DDPStrategy")


def test_hooks_that_a_module_defines():
    assert overrides(LitConfigure(), "configure_model")
    assert not overrides(lit(), "configure_model")
    nameless = type("Nameless", (), {"setup": SimpleNamespace()})
    assert overrides(nameless(), "setup")  # nothing says where it is defined


def test_a_strategy_without_a_launcher_starts_no_processes():
    assert not starts_processes(SingleDeviceStrategy())
    assert not starts_processes(object())


@pytest.mark.parametrize("method", ["spawn", "fork", "popen"])
def test_the_launcher_prepares_where_it_starts_processes(method):
    strategy = DA3DDPStrategy("a", 2, start_method=method)
    L.Trainer(strategy=strategy, accelerator="cpu", devices=2, logger=False)
    assert isinstance(strategy.launcher, PreparingLauncher) == (method != "popen")
    assert starts_processes(strategy) == (method != "popen")


def test_without_a_launcher_of_the_known_kind_nothing_is_prepared(monkeypatch):
    monkeypatch.setattr(lightning_private, "starts_processes", lambda _: False)
    strategy = DA3DDPStrategy("a", 2, start_method="spawn")
    L.Trainer(strategy=strategy, accelerator="cpu", devices=2, logger=False)
    assert not isinstance(strategy.launcher, PreparingLauncher)


def test_compiled_modules_are_known():
    module = lit()
    assert not is_compiled(module)
    assert not is_compiled(object())
    module._compiler_ctx = {"compiler": "dynamo"}
    assert is_compiled(module)


def test_logged_values_count_by_samples_where_that_can_be_said():
    trainer = SimpleNamespace(_results=SimpleNamespace(batch_size=None))
    count_logged_(trainer, 3)
    assert trainer._results.batch_size == 3
    for other in (SimpleNamespace(), SimpleNamespace(_results=None)):
        count_logged_(other, 3)  # Lightning counts by itself
        assert getattr(other, "_results", None) is None


def test_ddp_is_told_of_unused_parameters():
    strategy = DDPStrategy()
    find_unused_parameters_(strategy)
    assert strategy._ddp_kwargs["find_unused_parameters"] is True
    find_unused_parameters_(SingleDeviceStrategy())  # needs nothing
    del strategy._ddp_kwargs
    with pytest.raises(ConfigError, match="does not say how DDPStrategy wraps the module"):
        find_unused_parameters_(strategy)


@pytest.mark.parametrize(
    "callback", [EMAWeightAveraging(), StochasticWeightAveraging(swa_lrs=1e-2)], ids=["ema", "swa"]
)
def test_averages_are_found(callback):
    assert averaged_model(callback) is None  # before a fit
    callback._average_model = lit()
    assert averaged_model(callback) is callback._average_model
    del callback._average_model
    with pytest.raises(ConfigError, match="does not show the weights that it averages"):
        averaged_model(callback)


def test_another_profiler_is_noticed():
    assert not profiler_runs()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert profiler_runs()


def test_where_nobody_tells_of_profilers_one_may_run(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "torch._C._autograd":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert profiler_runs()
