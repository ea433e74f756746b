"""Eight-bit codes of any floating tensor, in groups of elements that are neighbours in memory.

Shapes: x any, of n elements; codes uint8 (n,), low and step float32 (ceil(n / groups), 1). Elements
are taken in memory order, so that neither direction copies a channels_last tensor, and
``x ~ low + step * code`` with an error of at most ``step / 2 = (max - min) / 510`` of its group.
Kept: one byte an element and eight a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_da3.ops.bits import _flat, dense


def encode(x: Tensor, groups: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, lowest value and step of every group of `x`.

    A constant group is coded exactly. A group that holds an infinity or a NaN, or whose range
    overflows float32, has no finite code: `decode` gives infinities and NaN for all of it.

    Args:
        x: Any shape, of a floating type.
        groups: Elements of a group; the last one may be shorter.

    Returns:
        uint8 (n,) in the memory order of `dense(x)`, float32 and float32 (ceil(n / groups), 1).
    """
    flat = _flat(dense(x.detach())).float()
    whole = flat.numel() - flat.numel() % groups
    codes, low, step = _encode_rows(flat[:whole].view(-1, groups))
    if whole == flat.numel():
        return codes, low, step
    rest = _encode_rows(flat[whole:].view(1, -1))
    return torch.cat((codes, rest[0])), torch.cat((low, rest[1])), torch.cat((step, rest[2]))


def _encode_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # two passes: `aminmax` along an axis is not vectorised on CPU, and 20 times slower
    low, high = rows.amin(dim=1, keepdim=True), rows.amax(dim=1, keepdim=True)
    step = (high - low).div_(255.0).clamp_min_(torch.finfo(low.dtype).tiny)  # constant rows: 0
    codes = to_bytes(rows.sub(low).div_(step).round_())
    return codes.view(-1), low, step


def to_bytes(x: Tensor) -> Tensor:
    """uint8 of ``0 <= x < 256``, cut off behind the point, in the layout of `x`."""
    return x.to(torch.int16).to(torch.uint8)  # on CPU both casts are vectorised, the direct one not


def decode(
    codes: Tensor,
    low: Tensor,
    step: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
    groups: int = 256,
) -> Tensor:
    """What `encode` coded.

    Args:
        codes: What `encode` returned first, uint8 (n,).
        low: Then, float32 (ceil(n / groups), 1).
        step: And last, likewise.
        size: Shape of the coded tensor.
        stride: Strides of `dense` of it.
        dtype: Type of the result.
        groups: As `encode` was given.

    Returns:
        A new tensor of this shape, these strides and this type.
    """
    flat = codes.float()
    whole = flat.numel() - flat.numel() % groups
    count = whole // groups
    flat[:whole].view(-1, groups).mul_(step[:count]).add_(low[:count])
    if whole < flat.numel():
        flat[whole:].mul_(step[count]).add_(low[count])
    return flat.to(dtype).as_strided(size, stride)
