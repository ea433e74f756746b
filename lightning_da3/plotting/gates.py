"""Pictures of where gates let the network run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_da3.errors import ConfigError
from lightning_da3.plotting.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NO_MAP = (
    "There is no gate map. `DA3Model.gate_maps(images)` gives them while a domain with gates is "
    "active: call `set_domain` first, and convert with gate=GateConfig(by='cell')."
)
BAR = "#0072B2"
DIMMED = (0.05, 0.08, 0.20)
DARKEST = 0.3  # a black pixel is drawn so, or it would look skipped
DIM_BY = 0.78  # how much of the dim colour covers a skipped cell


def plot_gate_maps(
    images: Tensor,
    maps: Mapping[str, Tensor],
    *,
    captions: Sequence[str] | None = None,
    max_images: int = 4,
    max_hosts: int = 4,
) -> Figure:
    """Where the network looks: executed cells bright, skipped ones dimmed.

    One row an image: the image, the mean over all hosts, and some hosts from early to late.

    Args:
        images: (N, 3, H, W) or (N, 1, H, W) of any range; each is scaled to [0, 1].
        maps: By host (N, 1, *grid) of zeros and ones; see `DA3Model.gate_maps`.
        captions: What to write above each image, such as its class and what it was taken for; None:
            nothing.
        max_images: Most rows.
        max_hosts: Most hosts, spread over the network.

    Raises:
        ConfigError: There is no map, or one does not fit the images; or there are fewer captions.
        DA3Error: Matplotlib is not installed.
    """
    _check_maps(images, maps)
    if captions is not None and len(captions) != len(images):
        raise ConfigError(
            f"`captions` must be one str for each of the {len(images)} images, got {len(captions)}."
        )
    images = _stretched(images[:max_images].detach().float().cpu())
    size = images.shape[-2:]
    gates = {name: gate[:max_images].detach().float().cpu() for name, gate in maps.items()}
    shown = {"all hosts, mean": torch.stack([_laid_over(g, size) for g in gates.values()]).mean(0)}
    shown |= {name: _laid_over(gates[name], size) for name in _spread(list(gates), max_hosts)}
    figure = new_figure(1.75 * (1 + len(shown)) + 0.2, 1.75 * len(images) + 1.1)
    grid = figure.subplots(len(images), 1 + len(shown), squeeze=False)
    for i, image in enumerate(images):
        caption = "" if captions is None else captions[i]
        _show(grid[i][0], image, "\n".join(filter(None, ["" if i else "input", caption])))
        for axes, (name, mask) in zip(grid[i][1:], shown.items(), strict=True):
            heading = f"{_wrapped(name)}\n" if i == 0 else ""
            _show(axes, _dimmed(image, mask[i]), f"{heading}{float(mask[i].mean()):.0%} executed")
    share = float(torch.stack([gate.mean() for gate in maps.values()]).mean())
    figure.suptitle(f"{share:.0%} of the cells are executed", fontsize=12)
    _add_key(figure)
    return figure


def _add_key(figure: Figure) -> None:
    """What bright, dim and dark mean, on a grey pixel."""
    from matplotlib.patches import Patch

    grey = torch.full((3, 1, 1), 0.8)
    said = ((1.0, "executed"), (0.5, "by half of the hosts"), (0.0, "skipped"))
    patches = []
    for share, label in said:
        r, g, b = _dimmed(grey, torch.full((1, 1), share)).flatten().tolist()
        patches.append(Patch(facecolor=(r, g, b), edgecolor="0.5", label=label))
    figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False, fontsize=8)


def plot_executed_shares(maps: Mapping[str, Tensor], *, bins: int = 10) -> Figure:
    """How much of its cells a host executes for an image: how often which share.

    Args:
        maps: By host (N, 1, *grid) of zeros and ones; see `DA3Model.gate_maps`.
        bins: The number of bars.

    Raises:
        ConfigError: There is no map.
        DA3Error: Matplotlib is not installed.
    """
    shares = executed_shares(maps)
    figure = new_figure(6.0, 3.2)
    axes = figure.add_subplot()
    axes.hist(shares.flatten().tolist(), bins=bins, range=(0.0, 1.0), color=BAR, rwidth=0.92)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.locator_params(axis="y", integer=True)
    axes.set_xlabel("cells executed by a host for an image")
    axes.set_ylabel("hosts x images")
    axes.spines[["top", "right"]].set_visible(False)
    by_host = shares.mean(0)
    always, never = int((by_host == 1).sum()), int((by_host == 0).sum())
    said = f"{float(shares.mean()):.0%} of the cells are executed"
    said += f"; of {len(by_host)} hosts {always} run everywhere, {never} nowhere"
    figure.suptitle(said, fontsize=11)
    return figure


def executed_shares(maps: Mapping[str, Tensor]) -> Tensor:
    """The share (N, hosts) of its cells that every host executes for every image.

    Args:
        maps: By host (N, 1, *grid) of zeros and ones.

    Raises:
        ConfigError: There is no map.
    """
    if not maps:
        raise ConfigError(NO_MAP)
    return torch.stack(
        [gate.detach().float().cpu().flatten(1).mean(1) for gate in maps.values()], 1
    )


def _check_maps(images: Tensor, maps: Mapping[str, Tensor]) -> None:
    if not maps:
        raise ConfigError(NO_MAP)
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


def _wrapped(name: str, width: int = 24) -> str:
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
