"""Pictures of what training keeps, layer by layer, and over a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_da3.errors import ConfigError
from lightning_da3.formatting import format_bytes
from lightning_da3.memory import StepPrediction
from lightning_da3.plotting.figure import new_figure
from lightning_da3.plotting.places import flat, place_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart by colour-blind people, and in grey
BEFORE = "#D55E00"
AFTER = "#0072B2"
KEPT = "#009E73"
WORTH_A_ROW = 1e-4  # of the largest row; a scalar kept somewhere would widen the axis for nothing


def plot_memory(
    before: Mapping[str, int],
    after: Mapping[str, int],
    *,
    head: str | None = None,
    max_rows: int = 24,
) -> Figure:
    """Saved activation bytes by layer, of fine-tuning and of DA3.

    Neighbouring layers are put together, as their names say, until `max_rows` rows are enough.

    Args:
        before: `SavedActivations.by_module` of the network as it was.
        after: The same bytes of the converted network; its layers are found by names in `before`.
        head: Name in `before` of the classifier that the domain replaced, such as ``plan.head``.
        max_rows: Most rows of the picture.

    Returns:
        A horizontal bar chart with a linear axis: lengths compare as bytes do.

    Raises:
        ConfigError: Nothing was kept before, or `max_rows` is less than 1.
    """
    if not sum(before.values()) or max_rows < 1:
        raise ConfigError(
            "Nothing to plot: `before` must hold bytes by module name, as "
            "`SavedActivations.by_module` does after a training forward pass, and `max_rows` be "
            f"at least 1; got {len(before)} modules and max_rows={max_rows}."
        )
    rows = memory_rows(before, after, head=head, max_rows=max_rows)
    least = WORTH_A_ROW * max(max(row) for row in rows.values())
    rows = {name: row for name, row in rows.items() if max(row) >= least}
    figure = new_figure(9.0, 1.6 + 0.31 * len(rows))
    axes = figure.add_subplot()
    _draw_bars(axes, rows)
    figure.suptitle(_memory_title(sum(before.values()), sum(after.values())), fontsize=12)
    return figure


def memory_rows(
    before: Mapping[str, int],
    after: Mapping[str, int],
    *,
    head: str | None = None,
    max_rows: int = 24,
) -> dict[str, tuple[int, int]]:
    """The bytes that `plot_memory` draws, by group of layers: (before, after).

    Args:
        before: See `plot_memory`.
        after: See `plot_memory`.
        head: See `plot_memory`.
        max_rows: Most groups. What fits no layer of `before` is one more, ``other``.
    """
    layers = list(before)
    depth = max((name.count(".") + 1 for name in layers), default=1)
    while depth > 1 and len({_cut(name, depth) for name in layers}) > max_rows:
        depth -= 1
    groups = list(dict.fromkeys(_cut(name, depth) for name in layers))
    if len(groups) > max_rows:  # a flat network: equal runs of layers
        size = -(-len(groups) // max_rows)
        runs = [groups[i : i + size] for i in range(0, len(groups), size)]
        group_of = {name: f"{run[0]} .. {run[-1]}" for run in runs for name in run}
    else:
        group_of = {name: name for name in groups}
    rows = {group_of[name]: [0, 0] for name in groups}
    for name, count in before.items():
        rows[group_of[_cut(name, depth)]][0] += count
    group_by_layer = {flat(name): group_of[_cut(name, depth)] for name in layers}
    for name, count in after.items():
        rows.setdefault(_group(name, group_by_layer, head), [0, 0])[1] += count
    return {name or "other": (row[0], row[1]) for name, row in rows.items() if any(row)}


def _cut(name: str, depth: int) -> str:
    return ".".join(name.split(".")[:depth])


def _group(name: str, groups: Mapping[str, str], head: str | None) -> str:
    """The group of the layer that `name` stands for, or of its nearest neighbour, or ``other``.

    Args:
        name: A module's name in the converted network.
        groups: The groups by flat layer name.
        head: The classifier's name in the network as it was.
    """
    place = place_of(name)
    part = flat(head) if place.kind == "head" and head is not None else place.name
    wanted = flat(place.outside + part).split("_")
    best = max(groups, key=lambda layer: _shared(wanted, layer.split("_")))
    return groups[best] if _shared(wanted, best.split("_")) else "other"


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """How many words two names begin with, both."""
    for count, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if mine != theirs:
            return count
    return min(len(one), len(other))


def _draw_bars(axes: Axes, rows: Mapping[str, tuple[int, int]]) -> None:
    high = max(count for row in rows.values() for count in row)
    unit, factor = unit_for(high)
    for offset, index, colour, label in ((-0.2, 0, BEFORE, "fine-tuning"), (0.2, 1, AFTER, "DA3")):
        counts = [row[index] for row in rows.values()]
        lengths = [count / factor for count in counts]
        places = [place + offset for place in range(len(rows))]
        axes.barh(places, lengths, height=0.38, color=colour, label=label)
        for place, length, count in zip(places, lengths, counts, strict=True):
            text = f" {format_bytes(count)}" if count else " nothing"
            axes.text(length, place, text, va="center", ha="left", fontsize=7, color=colour)
    axes.set_xlim(0, 1.15 * high / factor)  # room for the figures behind the bars
    axes.tick_params(axis="x", labelsize=8)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(f"kept for the backward pass, {unit}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", fontsize=9, framealpha=0.9)


def _memory_title(before: int, after: int) -> str:
    ours, theirs = format_bytes(after), format_bytes(before)
    if not after:
        return f"Nothing is kept for the backward pass: {ours} instead of {theirs}"
    less, more = before / after, after / before
    ratio = f"{less:.1f} times less" if less >= 1 else f"{more:.1f} times more"
    return f"DA3 keeps {ratio} for the backward pass: {ours} instead of {theirs}"


def plot_step(
    ours: StepPrediction,
    finetune: StepPrediction | None = None,
    *,
    measured_peak_bytes: int | None = None,
    measured_saved_bytes: int | None = None,
    title: str | None = None,
) -> Figure:
    """Memory over one training step: what operations hold above the resting model.

    The forward and the backward pass are each drawn with one width, as the steps have different
    numbers of operations. What was measured is dashed: the peak in dashes, what is kept in dots.

    Args:
        ours: The prediction for a converted network.
        finetune: The prediction for the network as it was; None leaves it out.
        measured_peak_bytes: The peak of a real step of the converted network; None leaves it out.
        measured_saved_bytes: What such a step kept for its backward pass; None leaves it out.
        title: The picture's title; by default the peak, and how much less that is.
    """
    figure = new_figure(9.0, 4.8)
    axes = figure.add_subplot()
    steps = [("DA3" if measured_peak_bytes is None else "DA3 predicted", ours, AFTER)]
    if finetune is not None:
        steps.insert(0, ("fine-tuning", finetune, BEFORE))
    top = max(measured_peak_bytes or 0, *(step.peak_bytes for _, step, _ in steps))
    unit, factor = unit_for(top)
    for name, step, colour in steps:
        x, y = _progress(step), [total / factor for total in step.timeline]
        kept, peak = format_bytes(step.saved_activation_bytes), format_bytes(step.peak_bytes)
        axes.fill_between(x, y, color=colour, alpha=0.18, linewidth=0)
        axes.plot(x, y, color=colour, linewidth=1.1, label=f"{name}: peak {peak}, kept {kept}")
        at = step.timeline.index(max(step.timeline))
        axes.plot(x[at], y[at], "o", color=colour, markersize=4)
        node = short(step.peak_node)
        axes.annotate(
            node,
            (x[at], y[at]),
            xytext=(-6 if x[at] > 1 else 6, 6),
            textcoords="offset points",
            ha="right" if x[at] > 1 else "left",
            fontsize=8,
            color=colour,
            bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "linewidth": 0},
        )
    if (found := measured_peak_bytes) is not None:
        label = f"measured: peak {format_bytes(found)}"
        axes.hlines(found / factor, 0, 2, "0.15", "--", linewidth=2, label=label)
    if (found := measured_saved_bytes) is not None:
        label = f"measured: kept {format_bytes(found)}"
        axes.hlines(found / factor, 0.8, 1.2, KEPT, ":", linewidth=2, label=label)
    axes.axvline(1.0, color="0.8", linewidth=0.8, zorder=0)
    axes.set_xticks([0.5, 1.5], ["forward", "backward"])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(0, 2)
    axes.set_ylim(0, 1.12 * top / factor)
    axes.set_ylabel(f"above the resting model, {unit}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, frameon=False, fontsize=9)
    figure.suptitle(title or _step_title(ours, finetune), fontsize=12)
    return figure


def _step_title(ours: StepPrediction, finetune: StepPrediction | None) -> str:
    peak = ours.peak_bytes
    phase = ours.peak_phase if ours.peak_phase == "optimizer" else f"{ours.peak_phase} pass"
    said = f"A training step peaks at {format_bytes(peak)} in the {phase}"
    if finetune is None or not peak:
        return said
    return f"{said}, {finetune.peak_bytes / peak:.1f} times below fine-tuning"


def short(node: str, most: int = 32) -> str:
    """The name of a node as a picture has room for it: its end."""
    name = node.removeprefix("backbone.") or "the loss"
    return name if len(name) <= most else f"...{name[-most:]}"


def unit_for(number: float) -> tuple[str, int]:
    """The unit in which an axis up to this number of bytes reads best, and its size."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return unit, size
    return "bytes", 1


def _progress(step: StepPrediction) -> list[float]:
    """Where in [0, 2] every operation lies: the forward pass in the first half."""
    forward, count = step.forward_end, len(step.timeline)
    behind = max(1, count - forward - 1)
    return [i / forward if i < forward else 1 + (i - forward) / behind for i in range(count)]
