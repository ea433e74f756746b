"""Eight-bit codes of any floating tensor, in groups of elements that are neighbours in memory.

Shapes: x any, of n elements; codes uint8 (n,), low and step float32 (ceil(n / groups), 1). Elements
are taken in memory order, so that neither direction copies a channels_last tensor, and
``x ~ low + step * code`` with an error of at most ``step / 2 = (max - min) / 510`` of its group.
Kept: one byte an element and eight a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_da3.ops.bits import dense, flat

GROUP = 256  # elements that share one range: 8 bytes a group


def encode(x: Tensor, groups: int = GROUP) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, lowest value and step of every group of `x`.

    A constant group is coded exactly. A group that holds an infinity or a NaN, or whose range
    overflows float32, has no finite code: `decode` gives infinities and NaN for all of it.

    Args:
        x: Any shape, of a floating type.
        groups: Elements of a group; the last one may be shorter.

    Returns:
        uint8 (n,) in the memory order of `dense(x)`, float32 and float32 (ceil(n / groups), 1).
    """
    elements = flat(dense(x.detach())).float()
    whole = elements.numel() - elements.numel() % groups
    codes, low, step = _encode_groups(elements[:whole].view(-1, groups))
    if whole == elements.numel():
        return codes, low, step
    rest = _encode_groups(elements[whole:].view(1, -1))
    return torch.cat((codes, rest[0])), torch.cat((low, rest[1])), torch.cat((step, rest[2]))


def _encode_groups(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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
    groups: int = GROUP,
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


def _largest_divisor(number: int, most: int) -> int:
    return next(d for d in range(min(most, number), 0, -1) if number % d == 0)


def sample_group(x: Tensor) -> int:
    """Elements of a group such that none reaches into two samples of (N, ..), if at all possible.

    So the codes of a sample do not depend on the rest of its batch.
    """
    whole = x[0].numel() if x.dim() and x.numel() else 1
    divisor = _largest_divisor(whole, GROUP)
    return divisor if divisor >= 32 or whole < 32 else GROUP


class Rows(NamedTuple):
    """Codes of cells (N, C, *grid), in groups whose values are of one kind.

    Cells in the order of their axes share a range by channel, tokens (one axis, channels last in
    memory) by token: a class token may be far from the others.

    Attributes:
        tokens: Groups lie within tokens.
        group: Elements that share a range; none reaches into two samples.
        size: Of the cells.
        dtype: Of the cells.
    """

    tokens: bool
    group: int
    size: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        """How to code `x`."""
        tokens = x.dim() == 3 and x.shape[2] > 1 and x.stride(1) == 1 and x.shape[1] > 1
        if tokens:
            return cls(True, _largest_divisor(x.shape[1], GROUP), x.size(), x.dtype)
        cells = max(1, x[0, 0].numel()) if x.numel() else 1
        group = cells * _largest_divisor(max(1, x.shape[1]), max(1, 128 // cells))
        return cls(False, group, x.size(), x.dtype)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `encode`."""
        x = x.detach()
        return encode((x.transpose(1, 2) if self.tokens else x).contiguous(), self.group)

    def decode(self, codes: Tensor, low: Tensor, step: Tensor) -> Tensor:
        """What `encode` coded."""
        n, c, *grid = self.size
        size = [n, *grid, c] if self.tokens else [n, c, *grid]
        stride = torch.empty(size, device="meta").stride()
        x = decode(codes, low, step, size, stride, self.dtype, self.group)
        return x.transpose(1, 2) if self.tokens else x
