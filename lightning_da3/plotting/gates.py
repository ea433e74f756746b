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

DIMMED = (0.05, 0.08, 0.20)
DARKEST = 0.3  # a black pixel is drawn so, or it would look skipped
DIM_BY = 0.78  # how much of the dim colour covers a skipped cell


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
        images: (N, 3, H, W) or (N, 1, H, W) of any range; each is scaled to [0, 1].
        maps: By host (N, 1, *grid) of zeros and ones; see `DA3Model.gate_maps`.
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
    figure = new_figure(1.75 * (1 + len(shown)) + 0.2, 1.75 * len(images) + 1.1)
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
