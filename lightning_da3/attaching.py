"""Finds the network inside a bigger module and puts its converted twin in its place."""

from __future__ import annotations

from torch import nn

from lightning_da3.config import DA3Config
from lightning_da3.converting import convert
from lightning_da3.domains import DA3Model
from lightning_da3.errors import ConfigError, ConversionError

SPATIAL = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def find_backbone(module: nn.Module, name: str | None) -> str:
    """Dotted name of the network inside `module`.

    Args:
        module: A LightningModule, say.
        name: What the user says it is called, or None to look for the one child with convolutions.

    Raises:
        ConfigError: The name is wrong, or nothing or more than one child fits.
    """
    children = dict(module.named_children())
    if name is not None:
        try:
            module.get_submodule(name)
        except AttributeError as error:
            raise ConfigError(
                f"{type(module).__name__} has no submodule {name!r} to take as backbone. "
                f"It has {sorted(children)}."
            ) from error
        return name
    fitting = [key for key, child in children.items() if _has_convolutions(child)]
    if len(fitting) != 1:
        found = f"{fitting} all have" if fitting else f"of {sorted(children)} none has"
        raise ConfigError(
            f"Cannot tell which part of {type(module).__name__} is the backbone: {found} "
            "convolutions. Name it: DA3Callback(..., backbone='net'), where self.net is the "
            "network."
        )
    return fitting[0]


def _has_convolutions(module: nn.Module) -> bool:
    return any(isinstance(layer, (DA3Model, *SPATIAL)) for layer in module.modules())


def attach_(
    module: nn.Module,
    backbone: str | None,
    config: DA3Config,
    domain: str,
    num_classes: int | None,
) -> DA3Model:
    """Convert the network inside `module` if it is not yet, and activate a domain of it.

    Args:
        module: Edited in place, and only once nothing can fail any more.
        backbone: Its dotted name, or None to look for it.
        config: For the conversion.
        domain: Added if it is new.
        num_classes: Of a new domain.

    Returns:
        The converted network, now part of `module`.

    Raises:
        ConfigError: The backbone cannot be found, or the arguments contradict an existing domain.
        ConversionError: The network cannot be converted.
        DomainError: The domain is ill-named.
    """
    name = find_backbone(module, backbone)
    network = module.get_submodule(name)
    model = network if isinstance(network, DA3Model) else convert(network, config)
    _check_same(model, config, domain, num_classes)
    if domain not in model.domains:
        model.add_domain(domain, num_classes)
    model.set_domain(domain)
    if model is not network:
        module.set_submodule(name, model)
    return model


def _check_same(model: DA3Model, config: DA3Config, domain: str, num_classes: int | None) -> None:
    if model.config != config:
        raise ConversionError(
            f"The network was converted with {model.config}, this callback asks for {config}. One "
            "conversion serves every domain: give every DA3Callback the same config."
        )
    if domain in model.domains and num_classes is not None:
        classes = model.domain(domain).num_classes
        if classes != num_classes:
            raise ConfigError(
                f"Domain {domain!r} has {classes} classes already, got num_classes={num_classes}. "
                "Use another domain name, or `delete_domain` first."
            )
