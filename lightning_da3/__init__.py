"""On-device, multi-domain training for PyTorch Lightning.

>>> import lightning as L
>>> from lightning_da3 import DA3Callback
>>> trainer = L.Trainer(callbacks=[DA3Callback(domain="flowers", num_classes=102)])
>>> trainer.fit(lit_model, flowers)

Without a Trainer: ``model = convert(network)``, ``model.add_domain("flowers", num_classes=102)``,
``model.set_domain("flowers")``.
"""

from lightning_da3.budget.accumulation import accumulated
from lightning_da3.config import AdapterConfig, DA3Config, GateConfig, MemoryConfig
from lightning_da3.converting import convert
from lightning_da3.errors import (
    CheckpointError,
    ConfigError,
    ConversionError,
    DA3Error,
    DomainError,
    InputError,
    PredictionWarning,
)
from lightning_da3.files.folder import DomainFolder
from lightning_da3.files.hub import pull_domain, push_domain
from lightning_da3.model.model import DA3Model
from lightning_da3.trainer.attaching import load_from_checkpoint
from lightning_da3.trainer.callback import DA3Callback
from lightning_da3.trainer.loaders import DomainLoader
from lightning_da3.trainer.sequence import DomainTask, fit_sequence
from lightning_da3.trainer.strategies import DA3DDPStrategy, DA3Strategy

__version__ = "0.1.0"

__all__ = [
    "AdapterConfig",
    "CheckpointError",
    "ConfigError",
    "ConversionError",
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
    "PredictionWarning",
    "accumulated",
    "convert",
    "fit_sequence",
    "load_from_checkpoint",
    "pull_domain",
    "push_domain",
]
