"""What goes into a converted network from outside: batches, and state dicts of three kinds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_da3.config import DA3Config
from lightning_da3.errors import CheckpointError, ConfigError, InputError
from lightning_da3.files.domain_file import fingerprint
from lightning_da3.nn.convolution import FrozenConv, FrozenConvTranspose
from lightning_da3.nn.head import HeadSlot
from lightning_da3.nn.normalization import FrozenAffine
from lightning_da3.planning.plan import Plan

if TYPE_CHECKING:
    from lightning_da3.model.model import DA3Model

EXTRA = "_extra_state"  # PyTorch's own key
HAS_STATISTICS = "statistics.mean"  # a tensor that a domain has if it has statistics
CONFIG_PARTS = ("adapter", "gate", "head")  # that a domain must have been learned with

# what, beside its kind and its weights, a layer's outputs in eval depend on. Written into files:
# a name may be added only with care, as files that were made without it must go on loading
SETTINGS = (
    "kernel_size stride padding output_padding dilation groups padding_mode ceil_mode "
    "count_include_pad output_size eps num_groups negative_slope approximate"
).split()


def check_input(x: Tensor, plan: Plan) -> None:
    """Refuse a batch that the first convolution could not take.

    Raises:
        InputError: Its axes, channels or type do not fit.
    """
    if plan.input_channels is None:
        return
    axes, channels = plan.input_channels
    shape = ", ".join(["N", str(channels), *"DHW"[3 - axes :]])
    if not x.is_floating_point():
        raise InputError(
            f"{plan.network} takes floating-point batches of shape ({shape}), got {x.dtype}. "
            "Convert and normalise first: `batch.float() / 255`, say."
        )
    if x.dim() != axes + 2 or x.shape[1] != channels:
        raise InputError(f"{plan.network} takes batches of shape ({shape}), got {tuple(x.shape)}.")


def identity(model: DA3Model) -> dict[str, Any]:
    """What a domain's file says of the model that it was learned with; plain types."""
    return {
        "config": model.config.to_dict(),
        "network": model.plan.network,
        "backbone": model.fingerprint,
        "architecture": model.architecture,
        "plan": plan_hash(model.plan),
    }


def plan_hash(plan: Plan) -> str:
    """Identifies what a domain must fit: its hosts, by name, channels and stride, and its head."""
    hosts = [[h.name, h.in_channels, h.out_channels, h.stride] for h in plan.hosts]
    return _digest([hosts, plan.head])


def architecture(network: nn.Module, head: str | None) -> str:
    """Identifies a backbone's layers, their settings and shapes, whatever their weights.

    What a forward method computes between its layers is not looked at.

    Args:
        network: The user's.
        head: Module name of the head that domains replace, or None.

    Returns:
        A SHA-256 digest, the same on every device and for every dtype.
    """
    layers = [
        [name, type(layer).__name__, {key: _plain(getattr(layer, key, None)) for key in SETTINGS}]
        for name, layer in network.named_modules()
        if name != head and not list(layer.children())
    ]
    shapes = {k: list(v.shape) for k, v in backbone_state(network.state_dict(), head).items()}
    return _digest([layers, shapes])


def _plain(value: object) -> object:
    if isinstance(value, (tuple, list)):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, (bool, int, float, str)) else None


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check_identity(model: DA3Model, about: Mapping[str, Any], path: str) -> None:
    """Refuse a domain that was learned with another model.

    Args:
        model: That it should be loaded into.
        about: Metadata of the domain's file.
        path: Of the file, for the error.

    Raises:
        CheckpointError: The backbone or the config is another; all differences are named.
    """
    config = about.get("config")
    missing = {"domain", "num_classes", "config", "network", "backbone"} - set(about)
    missing |= set(CONFIG_PARTS) - set(config if isinstance(config, Mapping) else ())
    if missing:
        problems = [f"it lacks {sorted(missing)}; `save_domain` writes whole ones."]
    else:
        problems = list(_differences(about, model))
    if problems:
        raise CheckpointError(
            f"The domain file {path!r} does not fit this model: {' '.join(problems)}"
        )


def _differences(about: Mapping[str, Any], model: DA3Model) -> Iterator[str]:
    here = identity(model)
    same = {key: about.get(key, here[key]) == here[key] for key in here}
    if not same["backbone"]:
        what = "" if "architecture" not in about else f"{_what_differs(same['architecture'])} "
        yield (
            f"It was learned on another backbone ({about['network']}, fingerprint "
            f"{str(about['backbone'])[:12]}); this one is {here['network']}, fingerprint "
            f"{here['backbone'][:12]}. {what}Convert the backbone that it was learned on."
        )
    elif not same["architecture"]:
        yield (
            "It was learned on another architecture: the weights are the same, but layers or their "
            "settings (strides, say) differ. Convert the backbone that it was learned on."
        )
    try:
        theirs = DA3Config.from_dict(about["config"])  # fills in what a later version added
    except (ConfigError, TypeError) as error:
        yield f"Its config cannot be read: {error}"
        return
    other = list(_config_differences(theirs.to_dict(), here["config"]))
    yield from other
    if not other and same["backbone"] and same["architecture"] and not same["plan"]:
        yield (
            "Its plan has other hosts or another head, though backbone and config are the same. "
            "Use the version of lightning_da3 that it was learned with."
        )


def _what_differs(same_architecture: bool) -> str:
    if same_architecture:
        return (
            "The architecture is the same, the weights differ (rounded to another dtype, they are "
            "others: convert first, then `.to(dtype)`)."
        )
    return "The architecture differs."


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse tensors that a module could not hold.

    Floating-point types may differ: values are converted.

    Args:
        tensors: By name.
        expected: What the module has; only shapes and types are looked at.

    Raises:
        CheckpointError: Names, shapes or kinds of types differ; all differences are named.
    """
    problems = [f"It lacks {names}." for names in [sorted(set(expected) - set(tensors))] if names]
    for name, tensor in tensors.items():
        if name not in expected:
            problems.append(f"It has {name!r}, which is not expected.")
        elif tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
            problems.append(f"{name!r} has the shape {shapes}.")
        elif tensor.is_floating_point() != expected[name].is_floating_point():
            problems.append(f"{name!r} is of {tensor.dtype}, not {expected[name].dtype}.")
    if problems:
        raise CheckpointError(" ".join(problems))


def _computing(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config the outputs depend on: that there are gates, not how they are trained."""
    gate = {"gate": "GateConfig(...)"} if config.get("gate") is not None else {}
    return {**config, **gate}


def _config_differences(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> Iterator[str]:
    for key in CONFIG_PARTS:
        if key in theirs and theirs[key] != mine[key]:
            yield (
                f"Its config has {key}={theirs[key]}, here it is {mine[key]}. Convert with the "
                "config that it was learned with."
            )
    weights = [config.get("memory", {}).get("weights", "same") for config in (theirs, mine)]
    if weights[0] != weights[1]:
        yield (
            f"It was learned with MemoryConfig(weights={weights[0]!r}), here it is {weights[1]!r}: "
            "rounded weights are another backbone. Convert with the config that it was learned "
            "with."
        )


def backbone_state(state: Mapping[str, Any], head: str | None) -> dict[str, Tensor]:
    """What identifies a backbone: weights and statistics, without the head that domains replace.

    Args:
        state: Of the user's network.
        head: Module name of that head, or None.
    """
    skip = () if head is None else (f"{head}.",)
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor)
        and not name.startswith(skip)
        and not name.endswith("num_batches_tracked")
    }


def domain_state(module: nn.Module) -> dict[str, Any]:
    """The state of `module` without the backbones of the DA3Models in it."""
    return without_backbones(module.state_dict(), module)


def without_backbones(state: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """A state of `module`, without the backbones of the DA3Models in it."""
    from lightning_da3.model.model import DA3Model  # the one import upwards, of a type

    models = [name for name, child in module.named_modules() if isinstance(child, DA3Model)]
    prefixes = tuple(f"{name}.backbone." if name else "backbone." for name in models)
    return {key: value for key, value in state.items() if not key.startswith(prefixes)}


def complete_state(model: DA3Model, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Let `model` load a state of three kinds; edits `state` in place before it is loaded.

    Its own; its domains alone (the backbone must be the same); the user's network's own state, as
    a plain pretrained checkpoint holds it, into the backbone. Domains that the state has and the
    model lacks are added; those that only the model has are kept.

    Raises:
        CheckpointError: The state's domains were learned on another backbone or with another
            config.
    """
    extra = state.get(prefix + EXTRA)
    mine = {prefix + key: value for key, value in _own_tensors(model).items()}
    if extra is None and not any(key in mine for key in state):
        _from_network_(model, state, prefix)
    elif extra is not None:
        if extra["backbone"] != model.fingerprint:
            raise CheckpointError(
                f"The checkpoint's domains {list(extra['num_classes'])} were learned on another "
                f"backbone (fingerprint {extra['backbone'][:12]}, here {model.fingerprint[:12]}). "
                "Convert the backbone that they were learned on."
            )
        configs = (_computing(c) for c in (extra.get("config", {}), model.config.to_dict()))
        others = list(_config_differences(*configs))
        if others:
            raise CheckpointError(f"The checkpoint does not fit this model: {' '.join(others)}")
        for name, num_classes in extra["num_classes"].items():
            if name not in model.domains:
                model.add_domain(name, num_classes, extra.get("class_names", {}).get(name))
            if f"{prefix}bank.{name}.{HAS_STATISTICS}" in state:
                model.expect_statistics(name)
    statistics = {
        f"{prefix}bank.{name}.statistics.{key}"  # of the backbone: a state without them is as good
        for name in model.domains
        for key in getattr(model.domain(name).statistics, "_buffers", ())
    }
    has_backbone = any(key.startswith(prefix + "backbone.") for key in state)
    stored = () if extra is None else tuple(f"{prefix}bank.{n}." for n in extra["num_classes"])
    for key, value in mine.items():
        missing_domain = key.startswith(prefix + "bank.") and not key.startswith(stored)
        kept = missing_domain or key in statistics
        if kept or (not has_backbone and key.startswith(prefix + "backbone.")):
            state.setdefault(key, value)
    state.setdefault(prefix + EXTRA, model.get_extra_state())


def _own_tensors(model: DA3Model) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _from_network_(model: DA3Model, state: dict[str, Any], prefix: str) -> None:
    """Fold the user's network's own tensors into the frozen layers' keys, in place."""
    names = [key for key in state if key.startswith(prefix)]
    theirs = {key.removeprefix(prefix): state.pop(key) for key in names}
    if not theirs:
        return
    for path, layer in model.backbone.named_modules():
        if isinstance(layer, (FrozenConv, FrozenConvTranspose, FrozenAffine)):
            try:
                translated = layer.translate(theirs)
            except KeyError:
                continue  # PyTorch reports the missing key of the frozen layer
            state.update({f"{prefix}backbone.{path}.{k}": v for k, v in translated.items()})
        elif isinstance(layer, HeadSlot):
            for key in layer.original.state_dict():
                if f"{path}.{key}" in theirs:
                    state[f"{prefix}backbone.{path}.original.{key}"] = theirs[f"{path}.{key}"]
    for name in _own_tensors(model):  # layers that stayed as they were
        if name.removeprefix("backbone.") in theirs:
            state.setdefault(prefix + name, theirs[name.removeprefix("backbone.")])
    model.fingerprint = fingerprint(backbone_state(theirs, model.plan.head))
