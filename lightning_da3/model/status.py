"""What a model is and trains, in a few lines for people, or as a value."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_da3.formatting import format_bytes, format_count


@dataclasses.dataclass(frozen=True)
class StepFigures:
    """What one training step takes.

    Attributes:
        samples: The size of the batch; None: not known.
        kept_bytes: Kept for the backward pass.
        finetune_kept_bytes: The same of fine-tuning the whole network; None: not known.
        peak_bytes: The peak above the resting model; None: not known.
        predicted: They are predicted, not measured.
    """

    samples: int | None
    kept_bytes: int
    finetune_kept_bytes: int | None = None
    peak_bytes: int | None = None
    predicted: bool = True

    def __str__(self) -> str:
        """A phrase for people."""
        said = f"keeps {format_bytes(self.kept_bytes)} for the backward"
        if self.finetune_kept_bytes is not None:
            said += f", fine-tuning {format_bytes(self.finetune_kept_bytes)}"
        if self.peak_bytes is not None:
            said += f"; peaks at {format_bytes(self.peak_bytes)}"
        how = "predicted" if self.predicted else "measured"
        return f"{said} ({how}{'' if self.samples is None else f', batch {self.samples}'})"


@dataclasses.dataclass(frozen=True)
class Status:
    """What a model is and trains. Printed, it is a few lines.

    Attributes:
        name: Where the network is, such as ``net``; "" is not known.
        network: The name of its class.
        head: The classifier that domains replace, or None.
        domains: Numbers of classes by the names of the domains that train, or of the active one.
        others: The names of the other domains.
        hosts: The number of hosts.
        first_host: The name of the first; "" if there is none.
        trained: The number of parameters that train.
        parameters: The number of all parameters, of the backbone and of the domains that train.
        outside: Numbers of parameters outside the network that train with the domain, by name.
        python: The number of modules and functions that stay Python.
        again: The number of regions that are computed again.
        step: What a training step takes; None: not known.
        shares: Shares of the network's FLOPs that are left, by the names of those of `domains` that
            skip branches.
    """

    name: str
    network: str
    head: str | None
    domains: Mapping[str, int | None]
    others: tuple[str, ...]
    hosts: int
    first_host: str
    trained: int
    parameters: int
    outside: Mapping[str, int]
    python: int
    again: int
    step: StepFigures | None = None
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for programs and loggers; bytes and counts."""
        values = dataclasses.asdict(self)
        return {**values, "others": list(self.others)}

    def __str__(self) -> str:
        """Lines for people."""
        return "DA3: " + "\n     ".join(self._lines)

    @property
    def _lines(self) -> Iterator[str]:
        name = f"{self.name} ({self.network})" if self.name else self.network
        said = [f"{name}, {self._said_of_domains}, head {self.head or 'its own'}"]
        said.append(
            f"{_counted(self.hosts, 'host')} from {self.first_host}" if self.hosts else "no hosts"
        )
        if self.outside:
            parts = [f"{part} ({format_count(count)})" for part, count in self.outside.items()]
            said.append(f"outside, with the domain: {', '.join(parts)}")
        yield "; ".join(said)
        trains = f"trains {format_count(self.trained)} of {format_count(self.parameters)}"
        yield trains if self.step is None else f"{trains}; {self.step}"
        notes = []
        if self.python:
            plan = f"print({f'module.{self.name}' if self.name else 'model'}.plan)"
            notes.append(f"stays Python: {_counted(self.python, 'module')} ({plan} says why)")
        if self.again:
            notes.append(f"computes again: {_counted(self.again, 'region')}")
        if notes:
            yield "; ".join(notes)

    @property
    def _said_of_domains(self) -> str:
        if not self.domains:
            count = len(self.others)
            return "no domain" if not count else f"no active domain of {list(self.others)}"
        said = []
        for name, classes in self.domains.items():
            parts = [f"{name!r}"] if classes is None else [f"{name!r}, {classes} classes"]
            if name in self.shares:
                parts.append(f"{self.shares[name]:.0%} of the FLOPs")
            said.append(", ".join(parts))
        return f"domain{'s' if len(said) > 1 else ''} {'; '.join(said)}"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def percentage(part: int, whole: int) -> float:
    """How many percent `part` is."""
    return 100 * part / whole if whole else 0.0
