"""Puts a converted network in the place of the original in a bigger module, and loads both."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pickle import UnpicklingError
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lightning_da3.config import DA3Config
from lightning_da3.converting import convert
from lightning_da3.errors import CheckpointError, ConfigError, ConversionError
from lightning_da3.files.reading import check_readable
from lightning_da3.model.holder import hold_
from lightning_da3.model.model import DA3Model
from lightning_da3.model.outside import tensors_of
from lightning_da3.model.state import (
    EXTRA,
    EXTRA_TYPES,
    check_state,
    checked_extra,
    domain_state,
)
from lightning_da3.nn.statistics import Statistics
from lightning_da3.tracing.autocast import Precision, in_precision
from lightning_da3.trainer.example_inputs import inputs_of
from lightning_da3.trainer.finding import find_backbone
from lightning_da3.trainer.teachers import (
    convert_copies_,
    copies_of,
    follow_,
    tell_of_hooks,
)

_Module = TypeVar("_Module", bound=nn.Module)


def attach_(
    module: nn.Module,
    backbone: str | None,
    config: DA3Config,
    domains: Mapping[str, int | None],
    outside: str = "domain",
    precision: Precision = (),
) -> DA3Model:
    """Convert the network inside `module` if it is not yet, and activate a domain of it.

    Args:
        module: Edited in place, and only once nothing can fail any more.
        backbone: Dotted name of the network, or None to look for it.
        config: The choices for the conversion.
        domains: Number of classes by name, at least one; new ones are added, the first is
            activated unless another of them is active.
        outside: What becomes of what trains in `module` beside the network
            (`lightning_da3.model.holder.Holder.policy`).
        precision: The autocast that the network will be used under.

    Returns:
        The converted network, now part of `module`.

    Raises:
        ConfigError: The backbone cannot be found, the arguments contradict an existing domain, or
            a parameter beside the network has no shape yet.
        ConversionError: The network cannot be converted.
        DomainError: A domain is ill-named.
    """
    name = find_backbone(module, backbone)
    network = module.get_submodule(name)
    if isinstance(network, DA3Model):
        model = network
    else:
        tell_of_hooks(network)
        inputs = inputs_of(module, network)  # of the type of its weights: autocast may lower them
        with in_precision(precision):
            model = convert(network, config, inputs)
    for domain, num_classes in domains.items():
        _check_same(model, config, domain, num_classes)
        _check_outside(model, domain, outside)
    copies = copies_of(module, network) if model is not network else []
    hold_(module, name, model, outside, domains, copies)
    for domain, num_classes in domains.items():
        if domain not in model.domains:
            model.add_domain(domain, num_classes)
        if model.holder is not None:
            model.holder.complete(model.domain(domain))
    active = model.active_domain
    model.set_domain(active if active in domains else next(iter(domains)))
    put_(module, network, model)
    convert_copies_(module, copies, model)
    follow_(module, model, model.active_domain)
    if config.memory.budget is not None:  # of this machine, whatever the network came with
        model.budget_policy.hold(config.memory)
    return model


def put_(module: nn.Module, network: nn.Module, model: DA3Model) -> None:
    """Put a converted network wherever a module has the original, under every name of it."""
    for name, child in list(module.named_modules(remove_duplicate=False)):
        if child is network and name and model is not network:
            module.set_submodule(name, model)


def _check_outside(model: DA3Model, domain: str, outside: str) -> None:
    own = tensors_of(model.domain(domain).outside) if domain in model.domains else {}
    trained = [name for name, tensor in own.items() if isinstance(tensor, nn.Parameter)]
    if trained and outside != "domain":
        raise ConfigError(
            f"Domain {domain!r} has learned {trained} outside of the network, its own: "
            f'outside={outside!r} is too late. Leave it at "domain", or `delete_domain` first.'
        )


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


# --- states ---------------------------------------------------------------------------------------


def load_state_(
    module: nn.Module,
    state: Mapping[str, Any],
    strict: bool = True,
    load: Callable[..., Any] = nn.Module.load_state_dict,
) -> None:
    """Load a state of `module` and be strict about its domains, whatever `strict` says.

    Args:
        module: Holds one DA3Model or more.
        state: A state of `module`, with or without backbones, or as it was before the conversion.
        strict: Whether everything else must match, too.
        load: How the module loads a state.

    Raises:
        CheckpointError: Keys are missing or unexpected, or shapes or backbones differ. Nothing is
            loaded then.
    """
    state = dict(state)
    for name, model in _models(module).items():
        if model.holder is not None and model.holder.root is module:
            model.holder.align_(module, state, "")
        check_state(model, state, f"{name}." if name else "")
    with _unchanged_on_error(module, state):
        _load_(module, state, strict, load)


def _models(module: nn.Module) -> dict[str, DA3Model]:
    return {name: m for name, m in module.named_modules() if isinstance(m, DA3Model)}


@contextmanager
def _unchanged_on_error(module: nn.Module, state: Mapping[str, Any]) -> Iterator[None]:
    """Let a state of `module` be loaded in the block, whole or not at all."""
    # backbones only where `state` is from before the conversion: they are all that is large
    tensors = domain_state(module) if domains_in(state) else module.state_dict()
    before = {k: value.clone() for k, value in tensors.items() if isinstance(value, Tensor)}
    models = [(model, *_about(model)) for model in _models(module).values()]
    try:
        yield
    except BaseException:
        for model, fingerprint, former, statistics, skipped in models:
            model.fingerprint, model.former = fingerprint, former
            for name in model.domains:
                if name not in statistics:
                    model.delete_domain(name)
                else:
                    model.domain(name).statistics = statistics[name]
                    model.skip(name, skipped[name])
        for key, value in before.items():
            tensors[key].copy_(value)
        raise


def _about(
    model: DA3Model,
) -> tuple[str, Mapping[str, str], dict[str, Statistics | None], dict[str, tuple[str, ...]]]:
    """What loading a state changes of a model beside its tensors; domains by what they have."""
    statistics = {name: model.domain(name).statistics for name in model.domains}
    skipped = {name: model.skipped(name) for name in model.domains}
    return model.fingerprint, model.former, statistics, skipped


def _load_(
    module: nn.Module, state: Mapping[str, Any], strict: bool, load: Callable[..., Any]
) -> None:
    try:
        result = load(module, state, strict=False)
    except RuntimeError as error:
        raise CheckpointError(
            f"The checkpoint does not fit {type(module).__name__}: {error}"
        ) from (error)
    models = _models(module)
    inside = tuple(f"{name}." for name in models)
    trainable = {name for name, value in module.named_parameters() if value.requires_grad}
    missing = [k for k in result.missing_keys if strict or k in trainable or k.startswith(inside)]
    unexpected = [k for k in result.unexpected_keys if strict or k.startswith(inside)]
    problems = []
    if missing:
        problems.append(f"It lacks {missing}.")
    if unexpected:
        problems.append(f"It has {unexpected}, for which there is no place.")
    if problems:
        raise CheckpointError(
            f"The checkpoint does not fit {type(module).__name__}: {' '.join(problems)} Load it "
            "into the module, and with the domains and config, that it was saved from."
        )


def check_checkpoint(checkpoint: Any) -> None:
    """Refuse what is no checkpoint of Lightning's; what others left in it is not looked at.

    Raises:
        CheckpointError: A part is missing, empty or of another type; all are named.
    """
    given = checkpoint if isinstance(checkpoint, Mapping) else {}
    problems = [
        f"`{name}` is {str(given.get(name))[:60]!r}"
        for name, (kind, needed) in _PARTS.items()
        if (name in given or needed) and not isinstance(given.get(name), kind)
    ]
    for name in ("state_dict", "callbacks"):
        part = given.get(name)
        if isinstance(part, Mapping) and not all(isinstance(key, str) for key in part):
            problems.append(f"`{name}` has keys that are no names")
    if given.get("state_dict") == {}:
        problems.append("`state_dict` is empty")
    if problems:
        raise CheckpointError(
            f"This is no checkpoint that a Trainer can load: {', '.join(problems)}. Give one that "
            "a Trainer wrote, such as by `ModelCheckpoint`."
        )


_PARTS: dict[str, tuple[type, bool]] = {  # types, and whether there must be one
    "pytorch-lightning_version": (str, True),
    "state_dict": (Mapping, True),
    "callbacks": (Mapping, False),
    "loops": (Mapping, False),
    "optimizer_states": (list, False),
    "lr_schedulers": (list, False),
    "hyper_parameters": (Mapping, False),
}


def domains_in(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the DA3Models of a saved module say of their domains, by dotted name of the model."""
    return {
        name.removesuffix(f".{EXTRA}"): extra
        for name, extra in state.items()
        if name.endswith(f".{EXTRA}") and isinstance(extra, dict) and {*extra} >= {*EXTRA_TYPES}
    }


def load_from_checkpoint(cls: type[_Module], checkpoint_path: Any, **kwargs: Any) -> _Module:
    """A LightningModule with the domains of a checkpoint, the last active one active again.

    Lightning's own ``cls.load_from_checkpoint`` knows nothing of the conversion: it refuses the
    domains, and with ``strict=False`` drops them.

    Args:
        cls: The user's LightningModule, which makes its pretrained network in ``__init__`` or
            ``configure_model``: checkpoints do not hold the backbone.
        checkpoint_path: The path of a checkpoint that a Trainer with a `DA3Callback` wrote.
        kwargs: As ``cls.load_from_checkpoint`` takes them: ``map_location``, ``strict`` and what
            ``cls.__init__`` needs.

    Returns:
        The module, its network converted as it was when the checkpoint was written.

    Raises:
        CheckpointError: The checkpoint holds no domain, or does not fit.
    """

    def load_state_dict(module: nn.Module, state: Mapping[str, Any], strict: bool = True) -> Any:
        active = _convert_as_in_(module, state)
        load_state_(module, state, strict, cls.load_state_dict)
        for model, domain in active.items():
            model.set_domain(domain)
        return nn.Module().load_state_dict({})  # every key matched

    # a class that differs in the one step between making the module and loading it
    about = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    loading: Any = type(cls.__name__, (cls,), {**about, "load_state_dict": load_state_dict})
    if is_path := isinstance(checkpoint_path, (str, os.PathLike)) and os.path.lexists(
        checkpoint_path
    ):
        check_readable(checkpoint_path, "checkpoint")
    try:
        module = loading.load_from_checkpoint(checkpoint_path, **kwargs)
    except (KeyError, TypeError, AttributeError):  # of the user's class, or of a bad checkpoint
        if is_path:
            with suppress(UnpicklingError):  # of more than types that are known
                read = torch.load(checkpoint_path, map_location="meta", weights_only=True)
                check_checkpoint(read)
        raise
    module.__class__ = cls
    return cast(_Module, module)


def _convert_as_in_(module: nn.Module, state: Mapping[str, Any]) -> dict[DA3Model, str | None]:
    """Convert what was a DA3Model when `state` was saved; says which domains were active."""
    extras = domains_in(state)
    if not extras:
        raise CheckpointError(
            f"The checkpoint holds no domain. Use {type(module).__name__}.load_from_checkpoint."
        )
    active = {}
    for name, said in extras.items():
        extra = checked_extra(said)
        try:
            network = module.get_submodule(name)
        except AttributeError as error:
            raise CheckpointError(
                f"The checkpoint's domains {list(extra['num_classes'])} belong to the network "
                f"{name!r}, which {type(module).__name__} does not have after __init__ and "
                "configure_model. Make it there, or give ckpt_path to the Trainer."
            ) from error
        if not isinstance(network, DA3Model):
            original, network = network, convert(network, _config(extra))
            put_(module, original, network)
        network.follows = extra.get("follows", False)
        active[network] = extra["active"]
    for name, network in _models(module).items():
        if network in active and not network.follows:
            hold_(module, name, network)
    return active


def _config(extra: Mapping[str, Any]) -> DA3Config:
    try:
        return DA3Config.from_dict(extra["config"])
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"The checkpoint's config cannot be read: {error}") from error
