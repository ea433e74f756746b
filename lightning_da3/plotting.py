"""Pictures of what training keeps, where gates run and what was learned. No pyplot, no state.

Needs matplotlib, which only the functions import: ``pip install lightning-da3[plot]``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_da3.errors import ConfigError, DA3Error
from lightning_da3.formatting import format_bytes
from lightning_da3.memory import StepPrediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# of Okabe and Ito: told apart by colour-blind people, and in grey
BEFORE, AFTER = "#D55E00", "#0072B2"
DIMMED = (0.05, 0.08, 0.20)
DARKEST = 0.3  # a black pixel is drawn so, or it would look skipped
DIM_BY = 0.78  # how much of the dim colour covers a skipped cell
WORTH_A_ROW = 1e-4  # of the largest row; a scalar kept somewhere would region the axis for nothing

_CONVERTED = re.compile(
    r"(?P<outside>(?:.*\.)?)(?:"
    r"bank\.[^.]+\.(?:adapters\.(?P<adapter>[^.]+)(?:\..*)?|(?P<head>head)(?:\..*)?)"
    r"|backbone\.(?:host_inputs|host_outputs)\.(?P<host>[^.]+)"
    r"|backbone\.frozen_(?P<node>[^.]+)"
    r"|backbone\.(?P<layer>.+))"
)


# --- memory ---------------------------------------------------------------------------------------


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
        after: The same of the converted network; its layers are found by their names in `before`.
        head: Name in `before` of the classifier that the domain replaced, such as ``plan.head``.
        max_rows: Most rows of the picture.

    Returns:
        A horizontal bar chart with a logarithmic axis.

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
    figure = _figure(9.0, 1.6 + 0.31 * len(rows))
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
        before: As in `plot_memory`.
        after: Likewise.
        head: Likewise.
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


class Place(NamedTuple):
    """Which part of the user's network a module of the converted one stands for.

    Attributes:
        kind: ``"layer"``, ``"host"`` (its adapter and gate), ``"head"``, or ``""``: none.
        name: Of that part, as `flat` writes it.
        outside: Name of the module that holds the converted network, with a dot behind, or empty.
    """

    kind: str
    name: str
    outside: str = ""


def place_of(name: str) -> Place:
    """Where in the user's network the module `name` of a converted network is.

    ``backbone.frozen_layer1_0_relu`` is the layer ``layer1_0_relu``, and
    ``bank.digits.adapters.layer1__0__conv1.norm`` the host ``layer1_0_conv1``.
    """
    found = _CONVERTED.fullmatch(name)
    if found is None:
        return Place("", flat(name))
    outside = found["outside"]
    if found["head"]:
        return Place("head", "head", outside)
    host = found["adapter"] or found["host"]
    if host:
        return Place("host", flat(host), outside)
    return Place("layer", flat(found["node"] or found["layer"]), outside)


def flat(name: str) -> str:
    """A name with underscores for all else: dotted names, fx nodes and host keys become alike."""
    return re.sub(r"[\W_]+", "_", name)


def _cut(name: str, depth: int) -> str:
    return ".".join(name.split(".")[:depth])


def _group(name: str, groups: Mapping[str, str], head: str | None) -> str:
    """The group of the layer that `name` stands for, or of its nearest neighbour, or ``other``.

    Args:
        name: Of a module in the converted network.
        groups: By flat layer name.
        head: Name of the classifier before.
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
    low = min(count for row in rows.values() for count in row if count) / 2
    high = max(count for row in rows.values() for count in row)
    for offset, index, colour, label in ((-0.2, 0, BEFORE, "fine-tuning"), (0.2, 1, AFTER, "DA3")):
        counts = [row[index] for row in rows.values()]
        places = [place + offset for place in range(len(rows))]
        axes.barh(places, counts, height=0.38, color=colour, label=label)
        for place, count in zip(places, counts, strict=True):
            text = f" {format_bytes(count)}" if count else " nothing"
            at = max(count, low)
            axes.text(at, place, text, va="center", ha="left", fontsize=7, color=colour)
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high * 4)  # room for the figures behind the bars
    ticks = [4.0**power for power in range(20) if low <= 4.0**power <= high * 2]
    axes.set_xticks(ticks, [format_bytes(tick) for tick in ticks], fontsize=8)
    axes.minorticks_off()
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("kept for the backward pass (logarithmic)", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False, fontsize=9)


def _memory_title(before: int, after: int) -> str:
    ratio = f"{before / after:.1f} times less" if after else "nothing is kept"
    return f"Activations kept by layer: {format_bytes(before)} to {format_bytes(after)}, {ratio}"


# --- a step ---------------------------------------------------------------------------------------


def plot_step(
    ours: StepPrediction,
    finetune: StepPrediction | None = None,
    *,
    measured_peak_bytes: int | None = None,
    measured_saved_bytes: int | None = None,
    title: str | None = None,
) -> Figure:
    """Memory over one training step: what operations hold above the resting model.

    The forward and the backward pass are each stretched to one width, whatever their number of
    operations, as the steps have different ones. What was measured is dashed.

    Args:
        ours: Of a converted network.
        finetune: Of the network as it was; None leaves it out.
        measured_peak_bytes: Of a real step of the converted network; None leaves it out.
        measured_saved_bytes: What such a step kept for its backward pass; likewise.
        title: Of the picture.
    """
    figure = _figure(9.0, 4.8)
    axes = figure.add_subplot()
    steps = [("DA3" if measured_peak_bytes is None else "DA3 predicted", ours, AFTER)]
    if finetune is not None:
        steps.insert(0, ("fine-tuning", finetune, BEFORE))
    top = max(measured_peak_bytes or 0, *(step.peak_bytes for _, step, _ in steps))
    unit, factor = (
        ("GiB", 2**30) if top >= 2**30 else ("MiB", 2**20) if top >= 2**20 else ("KiB", 2**10)
    )
    for name, step, colour in steps:
        x, y = _progress(step), [total / factor for total in step.timeline]
        kept, peak = format_bytes(step.saved_activation_bytes), format_bytes(step.peak_bytes)
        axes.fill_between(x, y, color=colour, alpha=0.18, linewidth=0)
        axes.plot(x, y, color=colour, linewidth=1.1, label=f"{name}: peak {peak}, kept {kept}")
        at = step.timeline.index(max(step.timeline))
        axes.plot(x[at], y[at], "o", color=colour, markersize=4)
        node = step.peak_node.removeprefix("backbone.") or "the loss"
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
    measured = (("peak", measured_peak_bytes, (0, 2)), ("kept", measured_saved_bytes, (0.9, 1.1)))
    for what, found, (start, end) in measured:
        if found is not None:
            label = f"measured: {what} {format_bytes(found)}"
            axes.hlines(found / factor, start, end, colors="0.2", linestyles="--", label=label)
    axes.axvline(1.0, color="0.6", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axes.set_xticks([0.5, 1.5], ["forward", "backward"])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(0, 2)
    axes.set_ylim(0, 1.12 * top / factor)
    axes.set_ylabel(f"above the resting model, {unit}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, frameon=False, fontsize=9)
    figure.suptitle(title or "Memory over one training step", fontsize=12)
    return figure


def _progress(step: StepPrediction) -> list[float]:
    """Where in [0, 2] every operation lies: the forward pass in the first half."""
    forward, count = step.forward_end, len(step.timeline)
    behind = max(1, count - forward - 1)
    return [i / forward if i < forward else 1 + (i - forward) / behind for i in range(count)]


# --- gates ----------------------------------------------------------------------------------------


def plot_gate_maps(
    images: Tensor,
    maps: Mapping[str, Tensor],
    *,
    max_images: int = 4,
    max_hosts: int = 4,
) -> Figure:
    """Where the network looks: executed cells bright, skipped ones dimmed.

    One row an image: the image, the mean over all hosts, and some hosts from early to late.

    Args:
        images: (N, 3, H, W) or (N, 1, H, W) of any range; each is stretched to its own.
        maps: As of `DA3Model.gate_maps` for these images: (N, 1, *grid) of zeros and ones by host.
        max_images: Most rows.
        max_hosts: Most hosts, spread over the network.

    Raises:
        ConfigError: There is no map, or one does not fit the images.
    """
    _check_maps(images, maps)
    images = _stretched(images[:max_images].detach().float().cpu())
    size = images.shape[-2:]
    gates = {name: gate[:max_images].detach().float().cpu() for name, gate in maps.items()}
    shown = {"all hosts, mean": torch.stack([_laid_over(g, size) for g in gates.values()]).mean(0)}
    shown |= {name: _laid_over(gates[name], size) for name in _spread(list(gates), max_hosts)}
    figure = _figure(1.75 * (1 + len(shown)) + 0.2, 1.75 * len(images) + 1.1)
    grid = figure.subplots(len(images), 1 + len(shown), squeeze=False)
    for i, image in enumerate(images):
        _show(grid[i][0], image, "input" if i == 0 else "")
        for axes, (name, mask) in zip(grid[i][1:], shown.items(), strict=True):
            heading = f"{_wrapped(name)}\n" if i == 0 else ""
            _show(axes, _dimmed(image, mask[i]), f"{heading}{float(mask[i].mean()):.0%} executed")
    figure.suptitle("Gates: bright cells are executed, dark ones skipped", fontsize=12)
    return figure


def _check_maps(images: Tensor, maps: Mapping[str, Tensor]) -> None:
    if not maps:
        raise ConfigError(
            "There is no gate map. `DA3Model.gate_maps(images)` gives them while a domain with "
            "gates is active: call `set_domain` first, and convert with gate=GateConfig()."
        )
    wrong = {
        name: tuple(gate.shape)
        for name, gate in maps.items()
        if gate.dim() != 4 or gate.shape[:2] != (len(images), 1)
    }
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not len(images) or wrong:
        raise ConfigError(
            "`images` must be (N, 3, H, W) or (N, 1, H, W) and every map (N, 1, h, w), got "
            f"{tuple(images.shape)} and {wrong or 'fitting maps'}."
        )


def _stretched(images: Tensor) -> Tensor:
    low = images.amin(dim=(1, 2, 3), keepdim=True)
    high = images.amax(dim=(1, 2, 3), keepdim=True)
    images = (images - low) / (high - low).clamp(min=1e-6)  # 0 to 1
    return (DARKEST + (1 - DARKEST) * images).expand(-1, 3, -1, -1)


def _laid_over(gate: Tensor, size: torch.Size) -> Tensor:
    """(N, 1, *grid) to (N, *size), by nearest neighbours."""
    return F.interpolate(gate, size=list(size), mode="nearest")[:, 0]


def _dimmed(image: Tensor, mask: Tensor) -> Tensor:
    dark = torch.tensor(DIMMED)[:, None, None]
    return torch.lerp(image, dark.expand_as(image), DIM_BY * (1 - mask))


def _spread(names: Sequence[str], most: int) -> list[str]:
    """At most `most` of the names, the first and the last among them."""
    if len(names) <= most:
        return list(names)
    step = (len(names) - 1) / max(1, most - 1)
    return [names[round(i * step)] for i in range(most)]


def _wrapped(name: str, width: int = 18) -> str:
    """A dotted name in lines of at most about `width` characters, broken at dots."""
    lines = [""]
    for word in re.split(r"(?<=[.,])", name):
        if lines[-1] and len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += word
    return "\n".join(lines)


def _show(axes: Axes, image: Tensor, title: str) -> None:
    axes.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
    axes.set_title(title, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


# --- accuracies -----------------------------------------------------------------------------------


def plot_accuracy_matrix(matrix: Tensor, domains: Sequence[str]) -> Figure:
    """Accuracy on every domain, after each domain was learned.

    Args:
        matrix: (D, D) of fractions: rows after a domain, columns on a domain, NaN stays blank; as
            of `lightning_da3.metrics.AccuracyMatrix.compute`.
        domains: Their D names.

    Raises:
        ConfigError: The shapes do not fit.
    """
    matrix = matrix.detach().float().cpu()
    count = len(domains)
    if matrix.dim() == 0:
        matrix = matrix.reshape(1, 1)  # what torchmetrics makes of one domain
    if matrix.shape != (count, count):
        raise ConfigError(
            f"`matrix` must be ({count}, {count}) for the domains {list(domains)}, got "
            f"{tuple(matrix.shape)}."
        )
    figure = _figure(2.6 + 0.95 * count, 1.9 + 0.75 * count)
    axes = figure.add_subplot()
    known = matrix[~matrix.isnan()]
    low = min(0.5, float(known.min())) if known.numel() else 0.0
    shown = axes.imshow(matrix.numpy(), cmap="cividis", vmin=low, vmax=1.0)
    for row in range(count):
        for column in range(count):
            value = float(matrix[row, column])
            if value == value:  # not NaN
                colour = "black" if value > (low + 1) / 2 else "white"
                axes.text(column, row, f"{100 * value:.1f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(count), list(domains), rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(count), list(domains))
    axes.set_xlabel("accuracy on")
    axes.set_ylabel("after learning")
    bar = figure.colorbar(shown, ax=axes, format=lambda value, _: f"{100 * value:.0f} %")
    bar.outline.set_visible(False)
    figure.suptitle("Accuracy by domain, in percent", fontsize=12)
    return figure


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DA3Error(
            "Pictures need matplotlib, which is not installed: pip install lightning-da3[plot]"
        ) from error
    return Figure(figsize=(width, height), dpi=120, layout="constrained")
