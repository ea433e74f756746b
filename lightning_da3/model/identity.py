"""What tells one converted network from another, and whether a domain was learned with this one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from lightning_da3.config import DA3Config
from lightning_da3.errors import CheckpointError, ConfigError
from lightning_da3.files.domain_file import fingerprint
from lightning_da3.files.fitting import CONFIG_PARTS, WHERE, config_differences
from lightning_da3.planning.plan import Plan

# what, beside its kind and its weights, a layer's outputs in eval depend on. Written into files:
# a name may be added only with care, as files that were made without it must go on loading
SETTINGS = (
    "kernel_size stride padding output_padding dilation groups padding_mode ceil_mode "
    "count_include_pad output_size eps num_groups negative_slope approximate"
).split()


class HasIdentity(Protocol):
    """What is used here of a DA3Model."""

    config: DA3Config
    plan: Plan
    fingerprint: str
    architecture: str
    former: Mapping[str, str]


def identity(model: HasIdentity) -> dict[str, Any]:
    """What a domain's file says of the model that it was learned with; plain types."""
    return {
        "config": model.config.to_dict(),
        "network": model.plan.network,
        "backbone": model.fingerprint,
        "architecture": model.architecture,
        "plan": plan_hash(model.plan),
    }


def plan_hash(plan: Plan) -> str:
    """A digest of what a domain must fit: the hosts, by name, channels and stride, and its head."""
    hosts = [[h.name, h.in_channels, h.out_channels, h.stride] for h in plan.hosts]
    return _digest([hosts, plan.head])


def architecture(network: nn.Module, head: str | None) -> str:
    """A digest of a backbone's layers, their settings and shapes, whatever their weights.

    What a forward method computes between its layers is not looked at.

    Args:
        network: The user's network.
        head: The module name of the head that domains replace, or None.

    Returns:
        A SHA-256 digest: the same on every device, for every dtype, and whether or not
        `torch.compile` made parts of the network.
    """
    return _architecture(network, head, uncompiled_name)


def _architecture(network: nn.Module, head: str | None, name_of: Callable[[str], str]) -> str:
    layers = [
        [
            name_of(name),
            type(layer).__name__,
            {k: _plain(getattr(layer, k, None)) for k in SETTINGS},
        ]
        for name, layer in network.named_modules()
        if name_of(name) != head and not list(layer.children())
    ]
    state = _backbone_state(network.state_dict(), head, name_of)
    return _digest([layers, {name: list(value.shape) for name, value in state.items()}])


def former_identity(network: nn.Module, head: str | None) -> dict[str, str]:
    """What earlier versions called a network of which `torch.compile` made parts; else nothing.

    They took ``_orig_mod`` for a part of names. Their files are to load.
    """
    state = network.state_dict()
    if all(name == uncompiled_name(name) for name in state):
        return {}
    return {
        "backbone": fingerprint(_backbone_state(state, head, str)),
        "architecture": _architecture(network, head, str),
    }


def uncompiled_name(name: str) -> str:
    """The dotted name that a part of a network has without `torch.compile`."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _plain(value: object) -> object:
    if isinstance(value, (tuple, list)):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, (bool, int, float, str)) else None


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check_identity(model: HasIdentity, about: Mapping[str, Any], path: str) -> None:
    """Refuse a domain that was learned with another model.

    Args:
        model: The `DA3Model` that the domain should be loaded into.
        about: The metadata of the domain's file.
        path: The path of the file, for the error.

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


def _differences(about: Mapping[str, Any], model: HasIdentity) -> Iterator[str]:
    here = identity(model)
    same = {
        key: about.get(key, here[key]) in (here[key], model.former.get(key, here[key]))
        for key in here
    }
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
    other = list(config_differences(theirs.to_dict(), here["config"]))
    if not same["plan"]:
        other += other_hosts(theirs.to_dict(), here["config"])
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


def config_in(extra: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of the config that a state has, with what a later version added to them.

    Raises:
        ConfigError: They cannot be read.
    """
    config = extra.get("config", {})
    return {key: v for key, v in DA3Config.from_dict(config).to_dict().items() if key in config}


def computing(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config the outputs depend on: that there are gates, not how they are trained."""
    gate = config.get("gate")
    if gate is None or "gate" not in config:
        return dict(config)
    return {**config, "gate": "GateConfig(...)" if gate["by"] == "cell" else None}


def other_hosts(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    """What to do about a domain of other hosts, for people; nothing if they were asked for alike.

    Args:
        theirs: The config that the domain was learned with, as far as it is known.
        mine: The config of the model here.
    """
    asked = [
        {k: config["adapter"][k] for k in WHERE} for config in (theirs, mine) if "adapter" in config
    ]
    if len(asked) < 2 or asked[0] == asked[1]:
        return []
    texts = [", ".join(f"{name}={value!r}" for name, value in each.items()) for each in asked]
    return [
        f"It has other hosts: it was learned with AdapterConfig({texts[0]}), here it is "
        f"AdapterConfig({texts[1]}). Convert with `DA3Config(adapter=AdapterConfig({texts[0]}))`, "
        "and what else its config has."
    ]


def backbone_state(state: Mapping[str, Any], head: str | None) -> dict[str, Tensor]:
    """What identifies a backbone: weights and statistics, without the head that domains replace.

    Args:
        state: The state dict of the user's network.
        head: The module name of that head, or None.

    Returns:
        Tensors by the names that they have without `torch.compile`.
    """
    return _backbone_state(state, head, uncompiled_name)


def _backbone_state(
    state: Mapping[str, Any], head: str | None, name_of: Callable[[str], str]
) -> dict[str, Tensor]:
    named = {name_of(name): value for name, value in state.items()}
    skip = () if head is None else (f"{head}.",)
    return {
        name: value
        for name, value in named.items()
        if isinstance(value, Tensor)
        and not name.startswith(skip)
        and not name.endswith("num_batches_tracked")
    }
