"""State dicts of three kinds: a model's own, its domains alone, and its network's from before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from lightning_da3.config import DA3Config
from lightning_da3.errors import CheckpointError, ConfigError, DA3Error
from lightning_da3.files.domain_file import fingerprint
from lightning_da3.files.fitting import config_differences
from lightning_da3.files.names import check_name
from lightning_da3.model.branches import check_saved
from lightning_da3.model.domain import Bank, Domain
from lightning_da3.model.holder import Holder
from lightning_da3.model.identity import (
    backbone_state,
    computing,
    config_in,
    other_hosts,
    uncompiled_name,
)
from lightning_da3.model.original import Original
from lightning_da3.model.outside import Outside, tensors_of
from lightning_da3.model.versions import scaled_today
from lightning_da3.nn.convolution import FrozenConv, FrozenConvTranspose
from lightning_da3.nn.head import HeadSlot
from lightning_da3.nn.normalization import FrozenAffine
from lightning_da3.nn.python import PythonFunction
from lightning_da3.planning.plan import Plan

EXTRA = "_extra_state"  # PyTorch's own key
HAS_STATISTICS = "statistics.mean"  # a tensor that a domain has if it has statistics
OUTSIDE, SHARED = "outside.", "shared."  # a domain's, and no domain's, beside the network
EXTRA_TYPES: dict[str, type | tuple[type, ...]] = {  # of what is always there
    "backbone": str,
    "num_classes": Mapping,
    "active": (str, type(None)),
}


class HoldsDomains(Protocol):
    """What is used here of a DA3Model."""

    backbone: nn.Module
    plan: Plan
    config: DA3Config
    fingerprint: str
    former: Mapping[str, str]
    original: Original
    holder: Holder | None
    shared: Outside | None

    @property
    def domains(self) -> list[str]:
        """The names of the domains."""

    def domain(self, name: str) -> Domain:
        """The modules of one domain."""

    def add_domain(
        self, name: str, num_classes: int | None = None, class_names: Any = None
    ) -> None:
        """Make a fresh domain."""

    def expected_tensors(
        self, num_classes: int | None, class_names: Any, *, statistics: bool
    ) -> dict[str, Tensor]:
        """What a domain holds, without values."""

    def expect_statistics(self, name: str) -> None:
        """Make room for statistics that are about to be loaded."""

    def expected_outside(
        self, name: str | None, outside: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What may be loaded of what trains beside the network with a domain."""

    def expect_outside(self, name: str, outside: Mapping[str, Tensor]) -> None:
        """Make room for that."""

    def get_extra_state(self) -> dict[str, Any]:
        """What a state dict says beside its tensors."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """PyTorch's own."""

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """PyTorch's own."""


def domain_state(module: nn.Module) -> dict[str, Any]:
    """The state of `module` without the backbones of the DA3Models in it."""
    return without_backbones(module.state_dict(), module)


def without_backbones(state: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """A state of `module`, without the backbones of the DA3Models in it."""
    models = [
        name for name, m in module.named_modules() if isinstance(m._modules.get("bank"), Bank)
    ]
    prefixes = tuple(f"{name}.backbone." if name else "backbone." for name in models)
    return {key: value for key, value in state.items() if not key.startswith(prefixes)}


def check_tensors(tensors: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    """Refuse tensors that a module could not hold.

    Floating-point types may differ: values are converted.

    Args:
        tensors: The tensors by name.
        expected: What the module has; only shapes and types are looked at.

    Raises:
        CheckpointError: Names, shapes or kinds of types differ; all differences are named.
    """
    problems = [f"It lacks {names}." for names in [sorted(set(expected) - set(tensors))] if names]
    for name, tensor in tensors.items():
        if name not in expected:
            problems.append(f"It has {name!r}, which is not expected.")
        elif not isinstance(tensor, Tensor):
            problems.append(f"{name!r} is a {type(tensor).__name__}, not a tensor.")
        elif tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
            problems.append(f"{name!r} has the shape {shapes}.")
        elif tensor.is_floating_point() != expected[name].is_floating_point():
            problems.append(f"{name!r} is of {tensor.dtype}, not {expected[name].dtype}.")
    if problems:
        raise CheckpointError(" ".join(problems))


def complete_state(model: HoldsDomains, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Let `model` load a state of three kinds; edits `state` in place before it is loaded.

    Its own; its domains alone (the backbone must be the same); the user's network's own state, as
    a plain pretrained checkpoint holds it, into the backbone. Domains that the state has and the
    model lacks are added; those that only the model has are kept.

    Raises:
        CheckpointError: As for `check_state`.
    """
    if not any(key.startswith(prefix) for key in state):
        return  # PyTorch says so, or does not, as `strict` has it
    check_state(model, state, prefix)
    extra = state.get(prefix + EXTRA)
    if model.holder is None:  # nothing trains beside it
        for key in [key for key in state if key.startswith(prefix + SHARED)]:
            del state[key]
    mine = {prefix + key: value for key, value in _own_tensors(model).items()}
    if extra is not None and _is_ours(model, state, prefix):
        bank = f"{prefix}bank."
        theirs = {key: value for key, value in state.items() if key.startswith(bank)}
        state.update(scaled_today(theirs, extra.get("config")))
        _make_room(model, extra, state, prefix)
        mine = {prefix + key: value for key, value in _own_tensors(model).items()}
    elif not any(key in mine for key in state):
        _from_network_(model, state, prefix)
        extra = None
    has_backbone = any(key.startswith(prefix + "backbone.") for key in state)
    stored = () if extra is None else tuple(f"{prefix}bank.{n}." for n in extra["num_classes"])
    optional = _optional_keys(model, prefix)
    for key, value in mine.items():
        if key.startswith(prefix + "backbone."):
            kept = not has_backbone
        else:
            kept = not key.startswith(stored) or key in optional
        if kept:
            state.setdefault(key, value)
    state.setdefault(prefix + EXTRA, model.get_extra_state())


def check_state(model: HoldsDomains, state: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse what `model` could load in part at most; nothing is changed, and nothing allocated.

    Args:
        model: The `DA3Model`.
        state: Of `model`, of its domains alone, or of the user's network.
        prefix: What its names begin with.

    Raises:
        CheckpointError: The state holds nothing of the model; its domains were learned on another
            backbone or with another config; or they lack something, or have something of another
            shape or kind.
    """
    if not any(key.startswith(prefix) for key in state):
        raise CheckpointError(
            f"The checkpoint holds nothing of the network {prefix.removesuffix('.')!r}: neither "
            "domains nor weights. Give one that was saved from this network."
        )
    if _is_ours(model, state, prefix):
        extra = checked_extra(state[prefix + EXTRA])
        _check_extra(model, extra)
        _check_domains(model, extra, state, prefix)


def _is_ours(model: HoldsDomains, state: Mapping[str, Any], prefix: str) -> bool:
    """Whether a state is of a `DA3Model`; a user's network may have an extra state of its own."""
    extra = state.get(prefix + EXTRA)
    if isinstance(extra, Mapping) and {*EXTRA_TYPES} <= {*extra}:
        return True
    own = any(prefix + key in state for key in _own_tensors(model))
    return extra is not None and (own or any(k.startswith(prefix + "bank.") for k in state))


def checked_extra(extra: Any) -> dict[str, Any]:
    """What a state says beside its tensors, if it is what `DA3Model.get_extra_state` makes.

    Raises:
        CheckpointError: It is not.
    """
    good = (
        isinstance(extra, Mapping)
        and all(isinstance(extra.get(name, ...), kind) for name, kind in EXTRA_TYPES.items())
        and isinstance(extra.get("class_names", {}), Mapping)
        and isinstance(extra.get("config", {}), Mapping)
        and (extra["active"] is None or extra["active"] in extra["num_classes"])
    )
    if not good:
        raise CheckpointError(
            f"The checkpoint does not say whose domains it holds: {str(extra)[:200]!r}. It is "
            "damaged, or not of `lightning_da3`. Give another one."
        )
    return dict(extra)


def _check_extra(model: HoldsDomains, extra: Mapping[str, Any]) -> None:
    """Refuse domains that were learned with another backbone or config."""
    if extra["backbone"] not in (model.fingerprint, model.former.get("backbone")):
        raise CheckpointError(
            f"The checkpoint's domains {list(extra['num_classes'])} were learned on another "
            f"backbone (fingerprint {extra['backbone'][:12]}, here {model.fingerprint[:12]}). "
            "Convert the backbone that they were learned on."
        )
    try:
        configs = [computing(c) for c in (config_in(extra), model.config.to_dict())]
        others = list(config_differences(*configs))
    except ConfigError as error:
        raise CheckpointError(f"The checkpoint's config cannot be read: {error}.") from error
    if others:
        raise CheckpointError(f"The checkpoint does not fit this model: {' '.join(others)}")
    check_saved(model.plan, extra)


def _check_domains(
    model: HoldsDomains, extra: Mapping[str, Any], state: Mapping[str, Any], prefix: str
) -> None:
    """Refuse domains that lack something, or have something else than a domain here has."""
    bank = f"{prefix}bank."
    expected: dict[str, Tensor] = {}
    try:
        for name, num_classes in extra["num_classes"].items():
            if name not in model.domains:
                check_name(name)
            class_names = extra.get("class_names", {}).get(name)
            has_statistics = f"{bank}{name}.{HAS_STATISTICS}" in state
            tensors = model.expected_tensors(num_classes, class_names, statistics=has_statistics)
            outside = outside_in(state, f"{bank}{name}.")
            tensors |= model.expected_outside(name, outside)
            expected.update({f"{bank}{name}.{key}": value for key, value in tensors.items()})
            if name in model.domains:
                _check_classes(name, num_classes, model.domain(name).num_classes)
        check_tensors({k: v for k, v in state.items() if k.startswith(bank)}, expected)
    except DA3Error as error:
        problems = [*other_hosts(config_in(extra), model.config.to_dict()), str(error)]
        raise CheckpointError(
            f"The checkpoint does not fit this model: {' '.join(problems)}"
        ) from error


def _check_classes(name: str, theirs: int | None, mine: int | None) -> None:
    if theirs != mine:
        raise CheckpointError(f"Its domain {name!r} has {theirs} classes, the one here {mine}.")


def _make_room(
    model: HoldsDomains, extra: Mapping[str, Any], state: Mapping[str, Any], prefix: str
) -> None:
    """Add the domains and the statistics that the state has and the model lacks."""
    for name, num_classes in extra["num_classes"].items():
        if name not in model.domains:
            model.add_domain(name, num_classes, extra.get("class_names", {}).get(name))
        if f"{prefix}bank.{name}.{HAS_STATISTICS}" in state:
            model.expect_statistics(name)
        model.expect_outside(name, outside_in(state, f"{prefix}bank.{name}."))


def _optional_keys(model: HoldsDomains, prefix: str) -> set[str]:
    """Of statistics and of what trains beside the network: older states have none."""
    return {
        f"{prefix}bank.{name}.{part}{key}"
        for name in model.domains
        for part, keys in (
            ("statistics.", getattr(model.domain(name).statistics, "_buffers", ())),
            (OUTSIDE, tensors_of(model.domain(name).outside)),
        )
        for key in keys
    }


def outside_in(state: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What a state has of what trains beside the network with a domain.

    Args:
        state: A domain's, or one that has it.
        prefix: What the names of the domain's tensors begin with.
    """
    prefix += OUTSIDE
    return {k.removeprefix(prefix): value for k, value in state.items() if k.startswith(prefix)}


def _own_tensors(model: HoldsDomains) -> dict[str, Tensor]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    sets = {SHARED: model.shared}
    sets |= {f"bank.{name}.{OUTSIDE}": model.domain(name).outside for name in model.domains}
    for prefix, outside in sets.items():  # whether or not they are in use elsewhere
        tensors.update({prefix + key: value for key, value in tensors_of(outside).items()})
    return tensors


def _from_network_(model: HoldsDomains, state: dict[str, Any], prefix: str) -> None:
    """Fold the user's network's own tensors into the frozen layers' keys, in place."""
    names = [key for key in state if key.startswith(prefix)]
    theirs = {uncompiled_name(key.removeprefix(prefix)): state.pop(key) for key in names}
    theirs.pop(EXTRA, None)
    if not theirs:
        return
    for path, layer in model.backbone.named_modules():
        if isinstance(layer, (FrozenConv, FrozenConvTranspose, FrozenAffine)):
            try:
                translated = layer.translate(theirs)
            except KeyError:
                continue  # PyTorch reports the missing key of the frozen layer
            state.update({f"{prefix}backbone.{path}.{k}": v for k, v in translated.items()})
        elif isinstance(layer, (HeadSlot, PythonFunction)):  # which hold a layer of the user's
            for key in layer.state_dict():
                its = f"{path}.{key.partition('.')[2]}"
                if its in theirs:
                    state[f"{prefix}backbone.{path}.{key}"] = theirs[its]
    for name in _own_tensors(model):  # layers that stayed as they were
        if name.removeprefix("backbone.") in theirs:
            state.setdefault(prefix + name, theirs[name.removeprefix("backbone.")])
    model.fingerprint = fingerprint(backbone_state(theirs, model.plan.head))
    model.former = {}
    model.original.renew(theirs)
