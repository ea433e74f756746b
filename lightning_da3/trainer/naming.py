"""What a LightningModule logs while several domains take turns: each under a name of its own."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

FRACTION = "da3/executed_flops_fraction"


class DomainNames:
    """Adds the domain to the names that a LightningModule logs by, and keeps its metrics apart.

    In training ``loss`` is logged as before, of all domains, and as ``loss/flowers``; in
    evaluation as ``loss/flowers`` instead of ``loss/dataloader_idx_1``. Metrics of torchmetrics
    are modules with a state: of each, every domain has a copy in its place while it computes. When
    a loop ends the module's own have seen what all of them have.
    """

    def __init__(self) -> None:
        self._module: Any = None
        self._domain: str | None = None
        self._loops: list[_Loop] = []  # a validation runs inside of a training

    def __getstate__(self) -> dict[str, Any]:
        """As new: a run begins with none."""
        return {"_module": None, "_domain": None, "_loops": []}

    def begin(self, pl_module: Any, *, training: bool) -> None:
        """A loop begins, or the next epoch of it.

        Args:
            pl_module: The LightningModule.
            training: Whether it trains.
        """
        if not self._loops:
            self._module = pl_module
            pl_module.log = self._log  # of the instance
        else:
            self._loops[-1].show(self._module, None)
        self._loops.append(_Loop(pl_module, training))
        self._domain = None

    def step(self, domain: str) -> None:
        """A batch of a domain comes next, in the loop that began last."""
        if self._loops:
            self._domain = domain
            self._loops[-1].show(self._module, domain)

    def pause(self) -> None:
        """An epoch of the loop ends: what is logged from here on is of no domain."""
        self._domain = None
        if self._loops:
            self._loops[-1].show(self._module, None)
            self._loops[-1].merge()

    def end(self) -> None:
        """The loop that began last ends; one that it ran inside goes on with its next batch."""
        if self._loops:
            self._loops.pop().show(self._module, None)
        self._domain = None
        if not self._loops and self._module is not None:
            del self._module.log  # what the class says is back
            self._module = None

    def abort(self) -> None:
        """The run has failed."""
        while self._loops:
            self.end()

    def _log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        log = type(self._module).log.__get__(self._module)
        if self._domain is None or (name.startswith("da3/") and name != FRACTION):
            log(name, value, *args, **kwargs)
            return
        loop, own = self._loops[-1], f"{name}/{self._domain}"
        if _is_metric(value):
            kwargs.setdefault("metric_attribute", _name_of(self._module, value))
        elif loop.training:
            log(name, value, *args, **kwargs)
            if not args:
                kwargs["prog_bar"] = False
        if not loop.training:
            kwargs["add_dataloader_idx"] = False
        log(own, value, *args, **kwargs)


class _Loop:
    """The metrics of a LightningModule, and the copies of the domains of one loop."""

    def __init__(self, module: nn.Module, training: bool) -> None:
        self.training = training
        self.own = dict(_metrics_of(module))
        self.copies: dict[str, dict[str, Any]] = {}

    def show(self, module: nn.Module, domain: str | None) -> None:
        """Put a domain's copies in the places of the metrics; None: the metrics themselves."""
        if domain is not None and domain not in self.copies:
            self.copies[domain] = {name: _fresh(metric) for name, metric in self.own.items()}
        shown = self.own if domain is None else self.copies[domain]
        for name, metric in shown.items():
            module.set_submodule(name, metric)

    def merge(self) -> None:
        """Let the metrics know what the copies do."""
        for name, metric in self.own.items():
            seen = [_parts(copies[name]) for copies in self.copies.values()]
            for own, *others in zip(_parts(metric), *seen, strict=True):
                _become_(own, [other for other in others if other.update_called])
        self.copies = {}


def _become_(metric: Any, others: list[Any]) -> None:
    """Let a metric have seen what others have; some have states that cannot be merged."""
    if not others:
        return
    merged = copy.deepcopy(others[0])
    with contextlib.suppress(RuntimeError):
        for other in others[1:]:
            merged.merge_state(other)
        state = {**merged.__getstate__(), "_computed": None}  # that was of one domain
        vars(metric).clear()  # as if it were unpickled
        metric.__setstate__(state)


def _metrics_of(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, child in module.named_children():
        if _is_metric(child):
            yield prefix + name, child
        else:
            yield from _metrics_of(child, f"{prefix}{name}.")


def _is_metric(thing: Any) -> bool:
    """By name: torchmetrics is not imported here."""
    kinds = type(thing).__mro__
    return any(
        kind.__name__ in ("Metric", "MetricCollection")
        and kind.__module__.startswith("torchmetrics")
        for kind in kinds
    )


def _fresh(metric: Any) -> Any:
    copied = copy.deepcopy(metric)
    copied.reset()
    return copied


def _parts(metric: Any) -> list[Any]:
    """A metric, or those of a collection."""
    return list(metric.values()) if isinstance(metric, Mapping | nn.ModuleDict) else [metric]


def _name_of(module: nn.Module, metric: Any) -> str | None:
    return next((name for name, child in module.named_modules() if child is metric), None)
