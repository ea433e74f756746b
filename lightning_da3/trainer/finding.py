"""Which part of a LightningModule is the network."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lightning_da3.errors import ConfigError
from lightning_da3.layers import CONVS
from lightning_da3.model.model import DA3Model
from lightning_da3.trainer.teachers import copies_of

MOST = 0.9  # of all parameters: the network
LOSSES_AND_METRICS = ("torch.nn.modules.loss", "torchmetrics")


def find_backbone(module: nn.Module, name: str | None) -> str:
    """Dotted name of the network inside `module`.

    Without a name: the one child that is converted already; else the one with convolutions, or, if
    none has any, with linear layers. Of several the one that alone trains, or that has at least
    90 % of their parameters. Losses, metrics and momentum teachers are none.

    Args:
        module: A LightningModule, say.
        name: What the user says it is called, or None to look for it.

    Raises:
        ConfigError: The name is wrong, nothing fits or no child more than others, or the module is
            itself the network.
    """
    children = dict(module.named_children())
    if name == "":
        raise ConfigError(_is_the_network(module))
    if name is not None:
        try:
            module.get_submodule(name)
        except AttributeError as error:
            raise ConfigError(
                f"{type(module).__name__} has no submodule {name!r} to take as backbone. "
                f"It has {sorted(children)}."
            ) from error
        return name
    candidates = {k: child for k, child in children.items() if not _is_no_network(child)}
    fitting: Mapping[str, nn.Module] = {}
    for kinds in ((DA3Model,), (DA3Model, *CONVS), (DA3Model, nn.Linear)):
        fitting = fitting or {k: c for k, c in candidates.items() if _has(c, *kinds)}
    if not fitting:
        raise ConfigError(
            f"Cannot tell which part of {type(module).__name__} is the backbone: of "
            f"{sorted(children)} none has convolutions or linear layers. Name it: "
            "DA3Callback(..., backbone='net'), where self.net is the network."
        )
    found = _clear(fitting)
    if found is None:
        if any(not list(child.children()) for child in fitting.values()):  # a layer of its own
            raise ConfigError(_is_the_network(module))
        counts = ", ".join(f"{key!r} ({_count(child):,})" for key, child in fitting.items())
        example = max(fitting, key=lambda key: _count(fitting[key]))
        raise ConfigError(
            f"Cannot tell which part of {type(module).__name__} is the backbone. These have "
            f"convolutions or linear layers (parameters): {counts}. Name it: "
            f"DA3Callback(..., backbone={example!r}), say."
        )
    return found


def _clear(fitting: Mapping[str, nn.Module]) -> str | None:
    """The one that stands out; None if none does."""
    trained = [
        k for k, child in fitting.items() if any(p.requires_grad for p in child.parameters())
    ]
    everything = sum(map(_count, fitting.values()))
    most = [key for key, child in fitting.items() if _count(child) >= MOST * everything]
    first, *others = fitting
    copies = copies_of(nn.ModuleDict(dict(fitting)), fitting[first])
    original = [first] if {*others} <= {*copies} else []  # and momentum teachers of it
    for choice in (list(fitting), trained, most, original):
        if len(choice) == 1:
            return choice[0]
    return None


def _is_the_network(module: nn.Module) -> str:
    name = type(module).__name__
    return (
        f"{name} is itself the network: its layers {[k for k, _ in module.named_children()]} are "
        "its own attributes. Only a network inside of it can be converted. Move its layers and its "
        "`forward` into a class of their own, `class Net(nn.Module)`;\nthen write "
        f"`self.net = Net()` in `{name}.__init__`, and `return self.net(x)` in its `forward`."
    )


def _is_no_network(module: nn.Module) -> bool:
    if isinstance(module, DA3Model) and module.follows:
        return True
    named = type(module).__name__.endswith(("Loss", "Criterion"))
    return named or any(
        kind.__module__.startswith(LOSSES_AND_METRICS) for kind in type(module).__mro__
    )


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _has(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    return any(isinstance(layer, kinds) for layer in module.modules())
