"""The results as rows, and rows as text, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain

from comparison.methods import METHODS, TUNED
from comparison.rates import rates_to_try
from comparison.records import Records
from comparison.scores import decathlon_score

MIB = 2**20


@dataclass
class Row:
    """What was found of one method; accuracies are fractions.

    Args:
        method: Its name.
        accuracy: By domain, one a seed.
        values: Figures by their column's name.
        rates: The learning rate that was chosen, by domain.
        tried: All rates that were, by domain, ascending.
        curve: (seconds of training, mean accuracy) after every epoch, over all domains and seeds;
            the time is that of the steps.
    """

    method: str
    accuracy: dict[str, list[float]]
    values: dict[str, float]
    rates: dict[str, float]
    tried: dict[str, list[float]]
    curve: list[tuple[float, float]] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return statistics.mean(self._by_seed())

    @property
    def spread(self) -> float:
        """Standard deviation over seeds of the mean over domains; 0 of one seed."""
        return _spread(self._by_seed())

    def _by_seed(self) -> list[float]:
        return [statistics.mean(seed) for seed in zip(*self.accuracy.values(), strict=True)]


FORMATS: dict[str, Callable[[float], str]] = {
    "decathlon score": "{:.0f}".format,
    "forgetting, points": "{:.1f}".format,
    "stored parameters": "{:,.0f}".format,
    "stored MiB": "{:.2f}".format,
    "kept MiB": "{:.2f}".format,
    "peak MiB": "{:.1f}".format,
    "step ms": "{:.0f}".format,
    "step GFLOP": "{:.2f}".format,
    "inference ms": "{:.0f}".format,
}


def rows_of(records: Records, methods: Sequence[str], domains: Sequence[str]) -> list[Row]:
    """What is finished; a method of which not all domains are learned is left out."""
    found = [_row(records, method, domains) for method in methods]
    rows = [row for row in found if row is not None]
    tuned = next((row for row in rows if row.method == TUNED), None)
    if tuned is not None:
        images = {d: records["learn", TUNED, d, "0"]["test_images"] for d in domains}
        mark = {d: statistics.mean(shares) for d, shares in tuned.accuracy.items()}
        for row in rows:
            means = {d: statistics.mean(shares) for d, shares in row.accuracy.items()}
            row.values["decathlon score"] = decathlon_score(means, mark, images)
    return rows


def _row(records: Records, method: str, domains: Sequence[str]) -> Row | None:
    source = METHODS[method].learns_as or method
    learned = {d: _seeds(records, source, d) for d in domains}
    count = min(map(len, learned.values()))
    if not count:
        return None
    learned = {d: found[:count] for d, found in learned.items()}
    firsts = [found[0] for found in learned.values()]
    values = {
        "stored parameters": statistics.mean(f["stored_parameters"] for f in firsts),
        "stored MiB": statistics.mean(f["stored_bytes"] for f in firsts) / MIB,
    }
    forgotten, paid = records.get("forget", source, ", ".join(domains)), records.get("cost", method)
    if forgotten is not None:
        values["forgetting, points"] = 100 * forgotten["forgetting"]
    if paid is not None:
        values |= {
            "kept MiB": paid["kept_bytes"] / MIB,
            "peak MiB": paid["peak_bytes"] / MIB,
            "step ms": paid["step_ms"],
            "step GFLOP": paid["step_flops"] / 1e9,
            "inference ms": paid["inference_ms"],
        }
    row = Row(
        method,
        {d: [f["accuracy"] for f in found] for d, found in learned.items()},
        values,
        {d: found[0]["rate"] for d, found in learned.items()},
        {d: _tried(records, source, d) for d in domains},
    )
    if paid is not None:
        curves = [f["curve"] for found in learned.values() for f in found]
        seconds = sum(f["steps"] for f in firsts) * paid["step_ms"] / 1e3
        row.curve = [
            ((epoch + 1) * seconds, statistics.mean(shares))
            for epoch, shares in enumerate(zip(*curves, strict=True))
        ]
    return row


def _tried(records: Records, method: str, domain: str) -> list[float]:
    most = records.settings.get("rates", len(METHODS[method].rates))
    grid = METHODS[method].grid(most)
    return rates_to_try(grid, most, lambda rate: records.get("rate", method, domain, f"{rate:g}"))


def _seeds(records: Records, method: str, domain: str) -> list[dict]:
    """The records of seeds 0, 1, ... as far as they are finished."""
    found: list[dict] = []
    while (record := records.get("learn", method, domain, str(len(found)))) is not None:
        found.append(record)
    return found


def processor_of(records: Records, methods: Sequence[str]) -> str:
    """On what the times were taken; all that took part, if they are several."""
    named = [records.get("cost", method) for method in methods]
    return "; ".join(dict.fromkeys(paid["processor"] for paid in named if paid is not None))


# --- as text --------------------------------------------------------------------------------------


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: accuracies in percent, with their spread if there are several seeds."""
    domains = list(rows[0].accuracy)
    columns = [name for name in FORMATS if any(name in row.values for row in rows)]
    header = ["method", *(f"{d} %" for d in domains), "mean %", *columns]
    lines = []
    for row in rows:
        means = [_percent(statistics.mean(a), _spread(a), len(a)) for a in row.accuracy.values()]
        seeds = len(next(iter(row.accuracy.values())))
        values = [FORMATS[c](row.values[c]) if c in row.values else "-" for c in columns]
        lines.append([row.method, *means, _percent(row.mean, row.spread, seeds), *values])
    return header, lines


def as_text(rows: Sequence[Row]) -> str:
    header, lines = cells(rows)
    widths = [max(len(x) for x in column) for column in zip(header, *lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (header, *lines)
    )


def as_markdown(rows: Sequence[Row]) -> str:
    header, lines = cells(rows)
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


def as_csv(rows: Sequence[Row]) -> str:
    """Unrounded: accuracies are fractions, one a domain and seed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "domain", "seed", "accuracy", "learning rate", *FORMATS])
    for row in rows:
        for domain, accuracies in row.accuracy.items():
            for seed, accuracy in enumerate(accuracies):
                values = [row.values.get(name, "") for name in FORMATS]
                writer.writerow([row.method, domain, seed, accuracy, row.rates[domain], *values])
    return text.getvalue()


def rates_text(rows: Sequence[Row]) -> str:
    """The learning rates that were chosen; those at an end of what was tried are marked."""
    lines = []
    for row in rows:
        ends = {domain: (tried[0], tried[-1]) for domain, tried in row.tried.items()}
        chosen = [f"{d} {rate:g}{'*' * (rate in ends[d])}" for d, rate in row.rates.items()]
        tried = ", ".join(f"{rate:g}" for rate in sorted({*chain(*row.tried.values())}))
        lines.append(f"{row.method} (of {tried}): {', '.join(chosen)}")
    return "\n".join(lines)


def _percent(mean: float, spread: float, seeds: int) -> str:
    return f"{100 * mean:.1f}" + (f" ± {100 * spread:.1f}" if seeds > 1 else "")


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
