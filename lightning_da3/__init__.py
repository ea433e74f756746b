"""On-device, multi-domain training for PyTorch Lightning.

>>> import lightning as L
>>> from lightning_da3 import DA3Callback
>>> trainer = L.Trainer(callbacks=[DA3Callback(domain="flowers", num_classes=102)])
>>> trainer.fit(lit_model, flowers)

Without a Trainer: ``model = convert(network)``, ``model.add_domain("flowers", num_classes=102)``,
``model.set_domain("flowers")``.
"""

from typing import NoReturn

from lightning_da3.errors import (
    CheckpointError,
    ConfigError,
    ConversionError,
    ConversionWarning,
    DA3Error,
    DomainError,
    InputError,
    NoEffectWarning,
    PredictionWarning,
)

__version__ = "0.1.0"

try:
    import torch as _torch  # noqa: F401
except ImportError as error:  # a device may have no more than `lightning_da3.device` needs
    _no_torch = str(error)
else:
    _no_torch = ""
    from lightning_da3.budget.accumulation import accumulated
    from lightning_da3.config import AdapterConfig, DA3Config, GateConfig, MemoryConfig
    from lightning_da3.converting import convert
    from lightning_da3.costs.report import StepCosts
    from lightning_da3.costs.steps import step_costs
    from lightning_da3.files.folder import DomainFolder
    from lightning_da3.files.hub import pull_domain, push_domain
    from lightning_da3.model.model import DA3Model
    from lightning_da3.model.status import Status
    from lightning_da3.trainer.attaching import load_from_checkpoint
    from lightning_da3.trainer.callback import DA3Callback
    from lightning_da3.trainer.loaders import DomainLoader
    from lightning_da3.trainer.sequence import DomainTask, fit_sequence
    from lightning_da3.trainer.strategies import DA3DDPStrategy, DA3Strategy

__all__ = [
    "AdapterConfig",
    "CheckpointError",
    "ConfigError",
    "ConversionError",
    "ConversionWarning",
    "DA3Callback",
    "DA3Config",
    "DA3DDPStrategy",
    "DA3Error",
    "DA3Model",
    "DA3Strategy",
    "DomainError",
    "DomainFolder",
    "DomainLoader",
    "DomainTask",
    "GateConfig",
    "InputError",
    "MemoryConfig",
    "NoEffectWarning",
    "PredictionWarning",
    "Status",
    "StepCosts",
    "accumulated",
    "convert",
    "fit_sequence",
    "load_from_checkpoint",
    "pull_domain",
    "push_domain",
    "step_costs",
]

_MOVED = {  # modules of version 0.1
    "accumulating": "budget.accumulation",
    "attaching": "trainer.attaching",
    "callbacks": "trainer.callback",
    "checkpointing": "files.domain_file",
    "command": "cli",
    "domains": "model.model",
    "first_steps": "trainer.first_steps",
    "folder": "files.folder",
    "hub": "files.hub",
    "loaders": "trainer.loaders",
    "loggers": "trainer.loggers",
    "prediction": "costs.steps",
    "registry": "layers",
    "sequence": "trainer.sequence",
    "state": "model.state",
    "strategies": "trainer.strategies",
}


def __getattr__(name: str) -> NoReturn:
    """Say where a module went, or what a name needs.

    Raises:
        ImportError: The module of this name moved, or PyTorch is missing. (Of an AttributeError
            Python would not show the message to who writes ``from lightning_da3 import registry``.)
        AttributeError: There never was such a name.
    """
    if name in _MOVED:
        raise ImportError(f"`lightning_da3.{name}` moved: import `lightning_da3.{_MOVED[name]}`.")
    if _no_torch and name in __all__:
        raise ImportError(
            f"`lightning_da3.{name}` needs PyTorch, which cannot be imported ({_no_torch}): `pip "
            "install torch`. Without it there is `lightning_da3.device`, which learns from "
            "exported files."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
