"""What a user can choose: frozen, self-checking, versioned dataclasses. No logic but the checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

import torch

from lightning_da3.choices import is_finite, is_int, is_one_of, refuse, require
from lightning_da3.errors import ConfigError
from lightning_da3.formatting import UNITS, bytes_in, shown

CONFIG_VERSION = 2  # 1: hosts in all blocks of tokens, addends without a scale, gates by default

Budget = int | str  # bytes; or "128MiB", or "auto"
_Config = TypeVar("_Config")


@dataclass(frozen=True)
class AdapterConfig:
    """The additive attention adapter of every host.

    Args:
        hidden_channels: Channels ``m`` of the adapter's hidden map; more learn more and cost more.
        kernel_size: Window of the adapter's first convolution on the coarse grid: 1 or 3.
        max_cells: Largest number of cells of the coarse grid (64: at most 8 x 8 on images).
        min_stride: Hosts get an adapter only where the network, their own stride included, has
            downsampled its input by at least this factor. Larger maps keep the most and adapt the
            least; nothing upstream of the first host is trained through, so a larger value starts
            the graph later. "auto": half of the network's own downsampling, but at least 8 and at
            most 16.
        min_depth: Hosts lie no earlier in the network than this share of all places where hosts
            could be, on the longest way through each: 0 anywhere, 0.5 in the last half, 1 the last
            alone. What lies before the first host is neither kept, computed again nor trained
            through: a larger value is cheaper, and learns less of domains far from the
            pretraining. "auto": a third if most hosts are blocks of tokens, which no stride tells
            apart and which are computed again; else 0.
    """

    hidden_channels: int = 64
    kernel_size: int = 1
    max_cells: int = 64
    min_stride: int | Literal["auto"] = "auto"
    min_depth: float | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        """Check every field and report all problems at once."""
        problems: list[str] = []
        for name in ("hidden_channels", "max_cells"):
            value = getattr(self, name)
            require(
                problems,
                is_int(value) and value >= 1,
                f"`{name}` must be an int of at least 1, got {shown(value)}.",
            )
        require(
            problems,
            self.min_stride >= 1
            if is_int(self.min_stride)
            else is_one_of(self.min_stride, ["auto"]),
            f'`min_stride` must be "auto" or an int of at least 1, got {shown(self.min_stride)}.',
        )
        require(
            problems,
            0 <= self.min_depth <= 1
            if is_finite(self.min_depth)
            else is_one_of(self.min_depth, ["auto"]),
            f'`min_depth` must be "auto" or a number from 0 to 1, got {shown(self.min_depth)}.',
        )
        require(
            problems,
            is_int(self.kernel_size) and self.kernel_size in (1, 3),
            f"`kernel_size` must be 1 or 3, got {shown(self.kernel_size)}.",
        )
        refuse(problems)


_WEIGHT = 5.0  # where nothing else is said


@dataclass(frozen=True)
class GateConfig:
    """What is not computed; off by default.

    Args:
        target: The share to execute, in (0, 1]: of the whole network's FLOPs, by domain; of the
            hosts', by cell.
        weight: Weight of the budget loss that moves gates of cells there.
        noise: Logistic (Gumbel) noise on the logits of gates of cells while training, off for the
            last fifth of it. A `DA3Callback` tells the model how far training is; without one, call
            `set_progress`, or the target holds from the first step and there is no noise.
        by: ``"domain"``: a domain skips whole residual branches, the same ones for every sample,
            and so is a smaller network, which is faster in inference, in training and in exported
            files. They are chosen before it learns: by a `DA3Callback`, or by
            `DA3Model.choose_branches`. Adapters have no gates then. ``"cell"``: every sample has
            gates of its own, which say which cells of a host are computed at all, and are learned;
            training moves from 1 to the target over its first half. They save no time.
    """

    target: float = 0.65
    weight: float = _WEIGHT
    noise: bool = True
    by: Literal["domain", "cell"] = "domain"

    def __post_init__(self) -> None:
        """Check every field and report all problems at once."""
        problems: list[str] = []
        require(
            problems,
            is_finite(self.target) and 0.0 < self.target <= 1.0,
            f"`target` must lie in (0, 1], got {shown(self.target)}.",
        )
        require(
            problems,
            is_finite(self.weight) and self.weight >= 0.0,
            f"`weight` must be finite and at least 0, got {shown(self.weight)}.",
        )
        require(
            problems,
            isinstance(self.noise, bool),
            f"`noise` must be a bool, got {shown(self.noise)}.",
        )
        known = is_one_of(self.by, ("domain", "cell"))
        require(problems, known, f"`by` must be 'domain' or 'cell', got {shown(self.by)}.")
        learned = self.noise is False or (is_finite(self.weight) and self.weight != _WEIGHT)
        require(
            problems,
            not (known and self.by == "domain" and learned),
            "`weight` and `noise` are for gates that learn: say by='cell', or leave them out.",
        )
        refuse(problems)


@dataclass(frozen=True)
class MemoryConfig:
    """What the network may keep for the backward pass.

    Args:
        exact: Keep whatever the exact gradient needs. By default values are kept as 8-bit codes,
            whose error is at most 1/510 of the range of their group.
        weights: How frozen weights are stored: ``"same"``, in their own type, or ``"bfloat16"``, in
            half of float32's bytes. Each is copied to the activations' type when it is used, so
            computations are as exact as before, on a backbone that was rounded once. Biases,
            norms, heads, domains and what stays Python keep their types. A domain fits only the
            kind of weights that it was learned with. Code that `torch.compile` made may keep the
            copies for the backward.
        budget: What a training step may take at its peak, above the resting model: bytes, or a
            number with a unit such as ``"128MiB"``, or ``"auto"`` for what the device has free;
            None: as much as it takes. It is about a machine, not about what is learned: configs
            that differ in it are equal, and no file holds it.
        split: How a batch is split to stay within the budget. ``"pieces"``: inside the network,
            whose outputs come back whole; needs nothing of the training step. ``"accumulate"``: the
            training step runs on parts of the batch, whose gradients add up; its loss must be a
            mean over samples. It keeps less, and is for networks that cannot be split inside.
    """

    exact: bool = False
    weights: str = "same"
    budget: Budget | None = field(default=None, compare=False)
    split: Literal["pieces", "accumulate"] = field(default="pieces", compare=False)

    def __post_init__(self) -> None:
        """Check every field and report all problems at once."""
        problems: list[str] = []
        require(
            problems,
            isinstance(self.exact, bool),
            f"`exact` must be a bool, got {shown(self.exact)}.",
        )
        require(
            problems,
            is_one_of(self.weights, ("same", "bfloat16")),
            f"`weights` must be 'same' or 'bfloat16', got {shown(self.weights)}.",
        )
        require(
            problems,
            self.budget is None or is_one_of(self.budget, ["auto"]) or bytes_in(self.budget) > 0,
            f"`budget` must be bytes, a number with a unit of {', '.join(UNITS)} such as "
            f"'128MiB', 'auto' or None, got {shown(self.budget)}.",
        )
        require(
            problems,
            is_one_of(self.split, ("pieces", "accumulate")),
            f"`split` must be 'pieces' or 'accumulate', got {shown(self.split)}.",
        )
        refuse(problems)

    @property
    def stored_dtype(self) -> torch.dtype | None:
        """The type that weights are stored in; None: their own."""
        return torch.bfloat16 if self.weights == "bfloat16" else None


MACHINE = [f.name for f in dataclasses.fields(MemoryConfig) if not f.compare]


@dataclass(frozen=True)
class DA3Config:
    """Everything that `convert` decides by.

    Args:
        adapter: The adapters.
        gate: The gates; None, the default, for a network whose hosts always run. Half-closed
            gates of cells cost accuracy, and dense kernels compute closed cells all the same.
        memory: What may be kept for the backward pass.
        head: The classifier that every domain replaces by its own: ``"auto"`` finds it in the
            graph, a dotted module name takes that one, None keeps the backbone's own head.
    """

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    gate: GateConfig | None = None
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    head: str | None = "auto"

    def __post_init__(self) -> None:
        """Check the types of the parts; each part checked its own values."""
        problems: list[str] = []
        for name, kind in (("adapter", AdapterConfig), ("memory", MemoryConfig)):
            value = getattr(self, name)
            require(
                problems,
                isinstance(value, kind),
                f"`{name}` must be of type {kind.__name__}, got {shown(value)}.",
            )
        require(
            problems,
            self.gate is None or isinstance(self.gate, GateConfig),
            f"`gate` must be a GateConfig or None, got {shown(self.gate)}.",
        )
        require(
            problems,
            self.head is None or (isinstance(self.head, str) and bool(self.head)),
            f"`head` must be 'auto', a module name or None, got {shown(self.head)}.",
        )
        refuse(problems)

    @property
    def cell_gates(self) -> GateConfig | None:
        """The gates of cells; None: hosts that run, run for every cell."""
        return self.gate if self.gate is not None and self.gate.by == "cell" else None

    @classmethod
    def preset(cls, name: str) -> DA3Config:
        """A config by name.

        Args:
            name: ``"small"``: domain files of about a quarter. ``"default"``: ``DA3Config()``.
                ``"accurate"``: on a finer grid. ``"fast"``: domains skip a third of the network's
                FLOPs, in whole residual branches.

        Raises:
            ConfigError: There is no such preset.
        """
        if not is_one_of(name, [*PRESETS]):
            raise ConfigError(f"`name` must be one of {[*PRESETS]}, got {shown(name)}.")
        return cls(**PRESETS[name])

    def within(self, budget: Budget | None) -> DA3Config:
        """The same config with another budget; itself for None.

        Raises:
            ConfigError: It is not a budget.
        """
        if budget is None:
            return self
        return dataclasses.replace(self, memory=dataclasses.replace(self.memory, budget=budget))

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for files and loggers; `from_dict` is the way back.

        The budget is left out: it is about a machine, not about what is learned.
        """
        values = dataclasses.asdict(self)
        for name in MACHINE:
            del values["memory"][name]
        return {"version": CONFIG_VERSION, **values}

    @classmethod
    def of(cls, value: DA3Config | Mapping[str, Any] | None) -> DA3Config:
        """A config, from what stands for one.

        Args:
            value: A config; a dict, as `from_dict` takes it and YAML gives it; None: the defaults.

        Raises:
            ConfigError: It is none of these, or a field is unknown or wrong.
        """
        if isinstance(value, cls):
            return value
        return cls() if value is None else cls.from_dict(cast(Mapping[str, Any], value))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DA3Config:
        """Read what `to_dict` wrote, or a part of it: what is left out is as by default.

        Raises:
            ConfigError: It is no dict, the version is newer than this library's, or a field is
                unknown or wrong.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(
                "`config` must be a DA3Config, a dict of its fields or None, got "
                f"{shown(values)}, a {type(values).__name__}."
            )
        fields = dict(values)
        version = fields.pop("version", CONFIG_VERSION)
        if not is_int(version) or not 1 <= version <= CONFIG_VERSION:
            raise ConfigError(
                f"Config version {version!r} cannot be read here (versions 1 to {CONFIG_VERSION} "
                "can). Update lightning_da3."
            )
        if version < 2:
            gate = fields.get("gate", {})  # the default was to have them, and they were of cells
            fields["gate"] = {**_CELLS, **gate} if isinstance(gate, Mapping) else gate
            if isinstance(fields.get("adapter", {}), Mapping):
                fields["adapter"] = {"min_depth": 0, **fields.get("adapter", {})}  # anywhere
        parts = {"adapter": AdapterConfig, "gate": GateConfig, "memory": MemoryConfig}
        for name, kind in parts.items():
            if isinstance(fields.get(name), Mapping):
                fields[name] = _build(kind, _today(fields[name]))
        return _build(cls, fields)


_CELLS = {"target": 0.5, "by": "cell"}
PRESETS: dict[str, dict[str, Any]] = {
    "small": {"adapter": AdapterConfig(hidden_channels=16)},
    "default": {},
    "accurate": {"adapter": AdapterConfig(max_cells=196)},
    "fast": {"gate": GateConfig()},
}


def _today(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Fields without the bits of derivatives, which older files hold: now they are always 8."""
    if fields.get("derivative_bits", 8) != 8:
        raise ConfigError(
            f"`derivative_bits` is always 8 now, got {fields['derivative_bits']!r}. Remove it."
        )
    return {name: value for name, value in fields.items() if name != "derivative_bits"}


def _build(kind: type[_Config], fields: Mapping[str, Any]) -> _Config:
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    unknown = sorted(set(fields) - set(known), key=repr)
    if unknown:
        raise ConfigError(f"{kind.__name__} has no field {unknown}. It has {known}.")
    return kind(**fields)
