"""The strategies "da3" and "da3_ddp": what DA3Callback does, at the earliest point."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal, TypedDict

import lightning as L
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry
from typing_extensions import override

from lightning_da3.config import DA3Config
from lightning_da3.errors import ConfigError
from lightning_da3.trainer.building import builds_later
from lightning_da3.trainer.callback import DA3Callback
from lightning_da3.trainer.lightning_private import PreparingStrategy, forks
from lightning_da3.trainer.refusals import check_converted_before, check_plugins
from lightning_da3.trainer.session import TrainingSession
from lightning_da3.trainer.strategy_methods import LearnsDomains
from lightning_da3.verifying.running import forward_only


class DA3Strategy(LearnsDomains, SingleDeviceStrategy):
    """One device; the network is converted before any callback or optimizer sees it.

    What is learned comes from the Trainer's `DA3Callback`, or, if it has none, from here: the
    strategy then adds one.

    Args:
        domain: The name of the domain; or, to learn several, numbers of classes by name.
        num_classes: The number of classes of the one domain; needed when it is new.
        config: The choices for the conversion; the same for every domain of one network.
        backbone: Name of the network inside the LightningModule; by default the one child that has
            convolutions.
        save_dir: Folder in which ``<domain>.safetensors`` is kept up to date after every epoch.
        budget: The peak bytes that a step may take, as in `MemoryConfig`; None: as `config` says.
        monitor: A logged metric that an epoch is saved by, as for `DA3Callback`.
        mode: Whether less of it is better (``"min"``) or more (``"max"``).
        outside: What becomes of what trains beside the network, as for `DA3Callback`.
        kwargs: As `lightning.pytorch.strategies.SingleDeviceStrategy` takes them.
    """

    strategy_name = "da3"

    def __init__(
        self,
        domain: str | dict[str, int] | None = None,
        num_classes: int | None = None,
        config: DA3Config | None = None,
        backbone: str | None = None,
        save_dir: str | None = None,
        budget: int | str | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        outside: Literal["domain", "shared", "frozen"] = "domain",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        rest: _Rest = {"save_dir": save_dir, "monitor": monitor, "mode": mode, "outside": outside}
        self._da3 = _callback(domain, num_classes, config, backbone, rest, budget)
        self._devices: list[torch.device] | None = None

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The one device, in the list in which a Trainer hands it over."""
        return self._devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        if len(devices) != 1:
            raise ConfigError(
                f'strategy="da3" trains on one device, the Trainer was given {len(devices)}: '
                'Trainer(strategy="da3", devices=1), or strategy="da3_ddp".'
            )
        self._devices, self._root_device = devices, devices[0]

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self.session = _start(self.lightning_module, self._da3)


class DA3DDPStrategy(LearnsDomains, PreparingStrategy):
    """DistributedDataParallel; the network is converted before any callback or optimizer sees it.

    Gradients are those of one process with the same global batch, the gates' budget included.
    ``start_method`` ``"spawn"`` and ``"fork"`` (notebooks) convert before the processes start, so
    that the main process has the learned domains at the end.

    Args:
        domain: The name of the domain; or, to learn several, numbers of classes by name.
        num_classes: The number of classes of the one domain; needed when it is new.
        config: The choices for the conversion; the same for every domain of one network.
        backbone: Name of the network inside the LightningModule; by default the one child that has
            convolutions.
        save_dir: Folder in which ``<domain>.safetensors`` is kept up to date after every epoch.
        budget: The peak bytes that a step may take, as in `MemoryConfig`; None: as `config` says.
        monitor: A logged metric that an epoch is saved by, as for `DA3Callback`.
        mode: Whether less of it is better (``"min"``) or more (``"max"``).
        outside: What becomes of what trains beside the network, as for `DA3Callback`.
        kwargs: As `lightning.pytorch.strategies.DDPStrategy` takes them.
    """

    strategy_name = "da3_ddp"

    def __init__(
        self,
        domain: str | dict[str, int] | None = None,
        num_classes: int | None = None,
        config: DA3Config | None = None,
        backbone: str | None = None,
        save_dir: str | None = None,
        budget: int | str | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        outside: Literal["domain", "shared", "frozen"] = "domain",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        rest: _Rest = {"save_dir": save_dir, "monitor": monitor, "mode": mode, "outside": outside}
        self._da3 = _callback(domain, num_classes, config, backbone, rest, budget)

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self.session = _start(self.lightning_module, self._da3)

    @override
    def before_launch(self, trainer: L.Trainer) -> None:
        """Convert in the main process, which gets the domains' state back from a started one."""
        if trainer.state.fn == "fit":
            callback = _find(trainer, self._da3)
            module = trainer.lightning_module
            if builds_later(module):
                check_converted_before(self, module, callback.backbone)
            with forward_only() if forks(self) else nullcontext():
                callback.session.attach(module, trainer, copied=False)


class _Rest(TypedDict):
    """What a `DA3Callback` takes beside."""

    save_dir: str | None
    monitor: str | None
    mode: Literal["min", "max"]
    outside: Literal["domain", "shared", "frozen"]


def _callback(
    domain: str | dict[str, int] | None,
    num_classes: int | None,
    config: DA3Config | None,
    backbone: str | None,
    rest: _Rest,
    budget: int | str | None,
) -> DA3Callback | None:
    if domain is not None:
        return DA3Callback(domain, num_classes, config, backbone, budget=budget, **rest)
    given = {
        "num_classes": num_classes,
        "config": config,
        "backbone": backbone,
        "save_dir": rest["save_dir"],
        "monitor": rest["monitor"],
        "budget": budget,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if given:
        raise ConfigError(f"{sorted(given)} say how to learn a domain, but `domain` is missing.")
    return None


def _start(pl_module: L.LightningModule | None, own: DA3Callback | None) -> TrainingSession:
    """The first hook in which the Trainer has all of its callbacks."""
    assert pl_module is not None
    trainer: Any = pl_module.trainer
    callback = _find(trainer, own)
    if callback not in trainer.callbacks:
        trainer.callbacks.insert(0, callback)
    check_plugins(trainer)
    if not builds_later(pl_module):
        callback.session.attach(pl_module, trainer)
    return callback.session


def _find(trainer: Any, own: DA3Callback | None) -> DA3Callback:
    """The Trainer's DA3Callback, or the strategy's own."""
    theirs = [c for c in trainer.callbacks if isinstance(c, DA3Callback) and c is not own]
    if theirs and own is None:
        return theirs[0]
    if theirs or own is None:
        name = type(trainer.strategy).__name__
        problem = "is said twice" if theirs else "was not said"
        raise ConfigError(
            f"What {name} shall learn {problem}. Either give the Trainer a "
            f'DA3Callback(domain="flowers", num_classes=102), or the strategy: '
            f'{name}(domain="flowers", num_classes=102).'
        )
    return own


def _register() -> None:
    description = "Learns domains beside a frozen backbone (lightning_da3)"
    registered = {
        "da3": (DA3Strategy, {}),
        "da3_ddp": (DA3DDPStrategy, {}),
        "da3_ddp_spawn": (DA3DDPStrategy, {"start_method": "spawn"}),
        "da3_ddp_notebook": (DA3DDPStrategy, {"start_method": "fork"}),
    }
    for name, (strategy, arguments) in registered.items():
        StrategyRegistry.register(name, strategy, description, override=True, **arguments)


_register()
