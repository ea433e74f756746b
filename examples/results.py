"""What one run of learn_domains.py found: kept in a file as it goes, printed as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import DOMAINS
from learning import BATCH_SIZE
from lightning.pytorch.loggers import CSVLogger, Logger
from measure import Cost, processor

PROBE, TUNED, DA3 = METHODS = ("linear probe", "fine-tuning", "DA3")


@dataclass
class Run:
    """One seed of the demonstration: its settings, its folder and what is finished."""

    folder: Path
    settings: dict[str, Any]
    tracker: Logger | None
    accuracy: dict[str, dict[str, float]] = field(
        default_factory=lambda: {method: {} for method in METHODS}
    )
    executed: dict[str, float] = field(default_factory=dict)
    file_bytes: dict[str, int] = field(default_factory=dict)
    change: dict[str, float] = field(default_factory=dict)

    @property
    def loggers(self) -> list[Logger]:
        files = CSVLogger(self.folder, name="", version="")  # pictures and tables lie in the folder
        return [files] if self.tracker is None else [files, self.tracker]

    @property
    def record(self) -> Path:
        return self.folder / "finished.json"

    def path(self, domain: str) -> Path:
        return self.folder / "domains" / f"{domain}.safetensors"

    def finished(self, method: str, domain: str) -> bool:
        return domain in self.accuracy[method] and (method != DA3 or self.path(domain).exists())

    def save(self) -> None:
        """After everything that is finished, so that nothing finished is lost."""
        state = {"settings": self.settings, "accuracy": self.accuracy}
        written = self.record.with_suffix(".tmp")
        written.write_text(json.dumps(state, indent=2))
        written.replace(self.record)  # whole or not at all

    def resume(self, *, fresh: bool = False) -> None:
        """Read what an earlier run with the same settings finished; or forget it."""
        path = self.record
        if fresh:
            path.unlink(missing_ok=True)
        if not path.exists():
            return
        state = json.loads(path.read_text())
        if state["settings"] != self.settings:
            raise SystemExit(
                f"{path} was made with {state['settings']}, this run is {self.settings}: "
                "give the same options, another --output, or --fresh to begin anew."
            )
        self.accuracy |= state["accuracy"]


def report(runs: Sequence[Run], cost: Mapping[str, Cost]) -> None:
    """The table; accuracies are means over the runs."""
    mean = {method: _means(runs, method) for method in METHODS}
    print(f"\n{'accuracy on test images, %':32}" + "".join(f"{method:>16}" for method in METHODS))
    for domain in (*DOMAINS, "mean"):
        print(f"  {domain:30}" + "".join(f"{100 * mean[m][domain]:16.1f}" for m in METHODS))
    print(f"\none training step, batch of {BATCH_SIZE} (in brackets: fine-tuning / this)")
    print(processor())
    _costs("saved activations, MiB", {m: cost[m].saved_bytes / 2**20 for m in METHODS})
    _costs("peak above the start, MiB", {m: cost[m].peak_bytes / 2**20 for m in METHODS})
    _costs("time, ms", {m: cost[m].time_ms for m in METHODS})
    _costs("FLOPs, 1e9", {m: cost[m].flops / 1e9 for m in METHODS})
    print(f"\n{'the domains of DA3':32}" + "".join(f"{domain:>16}" for domain in DOMAINS))
    print(f"  {'file, bytes':30}" + "".join(f"{runs[0].file_bytes[d]:16,}" for d in DOMAINS))
    if runs[0].settings["gates"]:
        print(f"  {'hosts FLOPs executed, %':30}" + "".join(_executed(runs, d) for d in DOMAINS))
    changes = {d: max(run.change[d] for run in runs) for d in DOMAINS[:-1]}
    cells = [f"{change:g}" for change in changes.values()] + ["-"]  # nothing follows the last one
    print(f"  {'outputs changed later by':30}" + "".join(f"{cell:>16}" for cell in cells))
    ours, probe, tuned = (mean[m]["mean"] for m in (DA3, PROBE, TUNED))
    print(f"\nmeans of {len(runs)} seed(s), all domains:")
    _verdict(f"DA3 {ours:.1%} >= fine-tuning {tuned:.1%} - 2 points", ours >= tuned - 0.02)
    _verdict(f"DA3 {ours:.1%} > linear probe {probe:.1%}", ours > probe)
    _verdict("outputs of earlier domains are bit-identical", not any(changes.values()))


def headline(run: Run, cost: Mapping[str, Cost] | None) -> dict[str, float]:
    values = {f"accuracy/{m}/{d}": a for m in run.accuracy for d, a in run.accuracy[m].items()}
    values |= {f"executed_flops_fraction/{d}": share for d, share in run.executed.items()}
    values |= {f"file_bytes/{d}": float(count) for d, count in run.file_bytes.items()}
    values |= {f"output_change/{d}": change for d, change in run.change.items()}
    for method, paid in (cost or {}).items():
        values[f"saved_activation_bytes/{method}"] = float(paid.saved_bytes)
        values[f"peak_bytes/{method}"] = float(paid.peak_bytes)
        values[f"step_ms/{method}"] = paid.time_ms
        values[f"step_flops/{method}"] = float(paid.flops)
    return values


def _means(runs: Sequence[Run], method: str) -> dict[str, float]:
    means = {d: sum(run.accuracy[method][d] for run in runs) / len(runs) for d in DOMAINS}
    return {**means, "mean": sum(means.values()) / len(means)}


def _costs(what: str, values: dict[str, float]) -> None:
    cells = [f"{value:.2f} ({values[TUNED] / value:.1f}x)" for value in values.values()]
    print(f"  {what:30}" + "".join(f"{cell:>16}" for cell in cells))


def _executed(runs: Sequence[Run], domain: str) -> str:
    return f"{100 * sum(run.executed[domain] for run in runs) / len(runs):16.1f}"


def _verdict(claim: str, holds: bool) -> None:
    print(f"  {'yes' if holds else 'NO ':3}  {claim}")
