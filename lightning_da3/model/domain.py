"""What one domain owns, how a fresh one is made, and the bank of all domains of a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from lightning_da3.config import DA3Config
from lightning_da3.errors import ConfigError
from lightning_da3.formatting import shown
from lightning_da3.model.outside import Outside
from lightning_da3.nn.adapter import Adapter
from lightning_da3.nn.call import LossUnit
from lightning_da3.nn.head import Head, new_head
from lightning_da3.nn.statistics import Statistics
from lightning_da3.passes.hosts import host_key
from lightning_da3.planning.plan import HostPlan, Plan

MOST_CLASSES = 2**31


class Domain(nn.Module):
    """An adapter for every host, the domain's head, and statistics once it has some.

    Args:
        adapters: Adapters by host key, in the order of the plan.
        head: The domain's classifier, or None if it uses the backbone's own.
        num_classes: The number of scores that the head gives.
        class_names: One name for every score, or None.

    Attributes:
        loss_unit: In what unit its losses come.
        skipped: Names of residual branches that it skips, in the order of the plan.
        closed: Names of the hosts in them, whose adapters do not act.
        held_open: These require gradients as well: optimizers that are being made take what does,
            in runs that know what is skipped and in those that are about to choose it.
        outside: What trains with it in the module that holds the network; None: nothing.

    Raises:
        ConfigError: `class_names` are no strings, or not as many as there are classes.
    """

    skipped: tuple[str, ...] = ()
    closed: tuple[str, ...] = ()
    held_open = False

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        head: nn.Module | None,
        num_classes: int | None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.statistics: Statistics | None = None  # of the backbone's features of its samples
        self.adapters = nn.ModuleDict(dict(adapters))
        self.head = head
        self.outside: Outside | None = None
        self.num_classes = num_classes
        self.class_names = checked_class_names(class_names, num_classes)
        self.loss_unit = LossUnit()

    def requires_grad_(self, requires_grad: bool = True) -> Domain:
        """Of all that acts: adapters of hosts that are skipped require no gradient."""
        super().requires_grad_(requires_grad)
        for host in () if self.held_open else self.closed:
            self.adapter(host).requires_grad_(False)
        return self

    @property
    def acting(self) -> nn.Module:
        """Its adapters that act, and its head, under the same names."""
        part, closed = nn.Module(), {host_key(host) for host in self.closed}
        acting = {key: a for key, a in self.adapters.items() if key not in closed}
        part.add_module("adapters", nn.ModuleDict(acting))
        part.add_module("head", self.head)
        return part

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Domain:
        """Move the unit along; whatever else becomes of the domain, it stays a float32."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        unit = self.loss_unit.value
        if unit is not None:
            self.loss_unit.on(fn(unit).device)
        return self

    def adapter(self, host: str) -> Adapter:
        """The adapter of the host of this name."""
        return cast(Adapter, self.adapters[host_key(host)])


class Bank(nn.ModuleDict):
    """The domains of one network by name, in the order in which they were added.

    It takes every name of a domain: PyTorch's own refuses those of its methods, such as ``items``.
    """

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self._modules[key] = module


def new_domain(
    plan: Plan,
    config: DA3Config,
    head: Head | None,
    num_classes: int | None,
    class_names: Sequence[str] | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Domain:
    """A fresh domain, which adds exactly zero to the backbone's features.

    Args:
        plan: The network's plan.
        config: The network's config.
        head: The classifier that the domain replaces, or None: it keeps the network's own.
        num_classes: The number of classes; None exactly if `head` is None.
        class_names: One name for every class, or None.
        device: Where the network computes.
        dtype: In which type the network computes.

    Raises:
        ConfigError: `num_classes` is missing or wrong, or `class_names` are not as many.
    """
    _check_classes(plan, config, num_classes, replaced=head is not None)
    exact = config.memory.exact
    own = None if head is None else new_head(head, cast(int, num_classes), device, exact=exact)
    with device:
        adapters = {
            host_key(host.name): _new_adapter(host, config).to(dtype=dtype) for host in plan.hosts
        }
    return Domain(adapters, own, num_classes, class_names)


def _new_adapter(host: HostPlan, config: DA3Config) -> Adapter:
    choice = config.adapter
    return Adapter(
        host.in_channels,
        host.out_channels,
        choice.hidden_channels,
        1 if host.stride is None else choice.kernel_size,
        host.axes,
        gated=config.cell_gates is not None,
        exact=config.memory.exact,
    )


def _check_classes(plan: Plan, config: DA3Config, num_classes: object, *, replaced: bool) -> None:
    if not replaced and num_classes is not None:
        why = "its config says head=None"
        if config.head is not None:
            why = f"no single Linear or convolution leads to the output of {plan.network}"
        raise ConfigError(
            f"`num_classes` is {shown(num_classes)}, but every domain keeps the network's own "
            f"output: {why}. Leave `num_classes` out, as is right where the classifier is outside "
            "of the network (`self.fc` beside it). To give every domain a layer of its own, name "
            f"it: DA3Config(head=...), one of {list(plan.linear_layers[-4:])}, say."
        )
    if replaced and num_classes is None:
        raise ConfigError(
            f"`num_classes` is missing: every domain gets its own {plan.head!r}. "
            "Say how many classes, as in `add_domain('flowers', num_classes=102)`; or keep the "
            "pretrained one, frozen, for all domains: DA3Config(head=None)."
        )
    if replaced:
        check_num_classes(num_classes)


def check_num_classes(num_classes: object) -> None:
    """Refuse what is no number of classes.

    Raises:
        ConfigError: It is none.
    """
    is_count = isinstance(num_classes, int) and not isinstance(num_classes, bool)
    if not (is_count and cast(int, num_classes) >= 1):
        raise ConfigError(f"`num_classes` must be an int of at least 1, got {shown(num_classes)}.")
    if cast(int, num_classes) >= MOST_CLASSES:
        raise ConfigError(f"`num_classes` must be below 2^31, got {shown(num_classes)}.")


def checked_class_names(names: Sequence[str] | None, num_classes: int | None) -> list[str] | None:
    """The names as a list.

    Raises:
        ConfigError: They are no strings, or not as many as there are classes.
    """
    if names is None:
        return None
    listed = isinstance(names, Sequence | np.ndarray) and not isinstance(names, str)
    if not (listed and all(isinstance(name, str) for name in names)):
        raise ConfigError(f"`class_names` must be a sequence of str, got {shown(names)}.")
    if len(names) != num_classes:
        raise ConfigError(
            f"`class_names` must have one name for each of the {num_classes} classes, got "
            f"{len(names)}."
        )
    return [str(name) for name in names]
