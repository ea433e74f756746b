"""Eight-bit codes of any floating tensor, in groups of elements that are neighbours in memory.

Shapes: x any, of n elements; codes uint8 (n + 8 * ceil(n / groups),): of every group its bytes,
then its step and its lowest value, float32. Elements are taken in memory order, so that neither
direction copies a channels_last tensor, and ``x ~ low + step * byte`` with an error of at most
``(max - min) / 510`` in its group. A group that holds infinities or NaN codes these by bytes of
their own, and the others in the rest; it is marked by a step below zero.
Kept: one byte an element and eight a group.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_da3.ops.bits import dense, flat, has_no_values, is_recorded, memory_order, reshaped
from lightning_da3.ops.exportable import is_exportable
from lightning_da3.ops.exportable_codes import (
    EXTRA,
    FBGEMM_SMALL,
    SMALL,
    decode_elements,
    decode_rows,
    encode_elements,
    encode_rows,
)
from lightning_da3.torch_private.autograd import transform
from lightning_da3.torch_private.kernels import DECODE_ROWS, ENCODE_ROWS

GROUP = 256  # elements that share one range
# the most elements of a range inside one token or one channel's cells, which may lie far from the
# next one's; and the fewest of a row, and of a token, that get ranges of their own
ROW, LEAST_ROW, LEAST_TOKEN = 64, 48, 16

_LEAST_STEP = FBGEMM_SMALL  # smaller ranges than 255 of these are lost to it
_LARGEST = 2.0**126  # numbers beyond count as infinite, or a range might be
_MINUS_INF, _NAN = 253, 254  # bytes in a marked group; 255 is infinity
_AT_ONCE = 2**15  # elements
_HAS_FBGEMM = ENCODE_ROWS is not None and DECODE_ROWS is not None


def encode(x: Tensor, groups: int = GROUP) -> Tensor:
    """Codes of `x`; a constant group is coded exactly.

    On CPU, NaN among numbers is coded as a number of its group: a search for it would take a third
    of the time, and it shows in what the forward pass makes of it.

    Args:
        x: Any shape, of a floating type.
        groups: Elements of a group; the last one may be shorter.

    Returns:
        uint8 (n + 8 * ceil(n / groups),), in the memory order of `dense(x)`.
    """
    x = x.detach() if x.requires_grad else x
    if is_exportable():
        return encode_elements(x, memory_order(dense(x).stride()), groups)
    elements = flat(dense(x)).float()
    whole = elements.numel() - elements.numel() % groups
    if whole == elements.numel():
        return _encode_rows(elements.view(-1, groups))
    rows = _encode_rows(elements[:whole].view(-1, groups))
    return torch.cat((rows, _encode_rows(elements[whole:].view(1, -1))))


def _encode_rows(rows: Tensor) -> Tensor:
    if not len(rows):
        return rows.new_empty(0, dtype=torch.uint8)
    if has_no_values(rows):
        return rows.new_empty(len(rows) * (rows.shape[1] + EXTRA), dtype=torch.uint8)
    if not _by_fbgemm(rows):
        return _encode_any(rows).view(-1)
    codes: Tensor = ENCODE_ROWS(rows)  # row-wise codes of embeddings: one vectorised pass
    steps = _ends(codes)[:, 0]
    low, high = steps.aminmax()
    if not (low >= _LEAST_STEP and high < math.inf):
        odd = (steps > 0) & (steps < _LEAST_STEP) | ~steps.isfinite()
        for some in _in_parts(odd, rows.shape[1]):
            codes[some] = _encode_any(rows[some])
    return codes.view(-1)


def _encode_any(rows: Tensor) -> Tensor:
    """Codes of groups of numbers, NaN and infinities, in arithmetic that a compiler fuses."""
    strange = ~(rows.abs() < _LARGEST)
    numbers = torch.where(strange, 0.0, rows)
    low, high = numbers.amin(dim=1, keepdim=True), numbers.amax(dim=1, keepdim=True)
    marked = strange.any(1, keepdim=True)
    span = (high - low).clamp_min(SMALL)
    last = torch.where(marked, _MINUS_INF - 1.0, 255.0)
    codes = numbers.sub(low).mul_(last / span).round_()
    others = (rows > 0).to(torch.uint8) - (rows < 0).to(torch.uint8) + _NAN
    codes = torch.where(strange, others, codes.to(torch.uint8))
    step = torch.where(marked, -span, span) / last
    ends = torch.cat((step, low), 1).view(torch.uint8)
    return torch.cat((codes.to(torch.uint8), ends), 1)


def _in_parts(chosen: Tensor, elements: int) -> Sequence[Tensor]:
    """The rows that are chosen, in parts: arithmetic on all of them might be the peak of a step."""
    return torch.split(chosen.nonzero()[:, 0], max(1, _AT_ONCE // elements))


def _ends(rows: Tensor) -> Tensor:
    """Step and lowest value of every group, (groups, 2)."""
    ends = rows[:, -EXTRA:].clone(memory_format=torch.contiguous_format)  # aligned
    return ends.view(torch.float32)


def _by_fbgemm(rows: Tensor) -> bool:
    # compiled code fuses plain arithmetic; and PyTorch's rule for the type of the result is wrong;
    # no value can be looked at inside of a functorch transform
    plain = is_recorded() or transform() is not None
    return rows.device.type == "cpu" and _HAS_FBGEMM and not plain


def to_bytes(x: Tensor) -> Tensor:
    """uint8 of ``0 <= x < 256``, rounded down, in the layout of `x`."""
    if is_exportable():
        return x.to(torch.uint8)
    return x.to(torch.int16).to(torch.uint8)  # on CPU both casts are vectorised, the direct one not


def decode(
    codes: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
    groups: int = GROUP,
) -> Tensor:
    """The tensor that `encode` coded.

    Args:
        codes: What `encode` returned.
        size: Shape of the coded tensor.
        stride: Strides of its dense form (see `dense`).
        dtype: Type of the result.
        groups: The `groups` that `encode` was given.

    Returns:
        A new tensor of this shape, these strides and this type.
    """
    if is_exportable():
        return decode_elements(codes, torch.Size(size), memory_order(stride), groups).to(dtype)
    whole = codes.numel() - codes.numel() % (groups + EXTRA)
    if whole == codes.numel():
        elements = _decode_rows(codes.view(-1, groups + EXTRA))
    else:
        parts = codes[:whole].view(-1, groups + EXTRA), codes[whole:].view(1, -1)
        elements = torch.cat([_decode_rows(part) for part in parts])
    return elements.to(dtype).as_strided(size, stride)


def _decode_rows(rows: Tensor) -> Tensor:
    if not len(rows):
        return rows.new_empty(0, dtype=torch.float32)
    if not _by_fbgemm(rows):
        return _decode_any(rows).view(-1)
    elements: Tensor = DECODE_ROWS(rows)
    marks = rows[:, -5]  # of a step, the byte of its sign
    if not has_no_values(rows) and marks.amax() > 127:
        for some in _in_parts(marks > 127, rows.shape[1]):
            elements[some] = _decode_any(rows[some])
    return elements.view(-1)


def _decode_any(rows: Tensor) -> Tensor:
    step, low = _ends(rows).unsqueeze(-1).unbind(1)
    codes = rows[:, :-EXTRA].float()
    strange = (step < 0) & (codes >= _MINUS_INF)
    return torch.where(strange, (codes - _NAN) * math.inf, torch.addcmul(low, codes, step.abs()))


def _largest_divisor(number: int, most: int) -> int:
    if is_recorded():  # a compiler warns of caches, and its sizes may be symbols
        return _first_divisor(number, most)
    return _known_divisor(number, most)


def _first_divisor(number: int, most: int) -> int:
    return next(d for d in range(min(most, number), 0, -1) if number % d == 0)


_known_divisor = functools.cache(_first_divisor)


def _smallest_divisor(number: int, least: int) -> int:
    return next(d for d in range(least, number + 1) if number % d == 0)


def sample_group(x: Tensor) -> int:
    """The elements of a group, such that none reaches into two samples of (N, ..), if possible.

    So the codes of a sample do not depend on the rest of its batch. If possible, no group reaches
    into two rows of at least `LEAST_ROW` elements either; and none into two tokens of (N, T, D) of
    at least `LEAST_TOKEN`: the norm of one far smaller than its neighbours would divide by nothing.
    """
    row = max(
        (n for n, step in zip(x.shape[1:], x.stride()[1:], strict=True) if step == 1), default=1
    )
    part = _largest_divisor(row, ROW) if row else 1
    if part >= LEAST_ROW:
        return part
    if x.dim() == 3 and row >= LEAST_TOKEN:
        return row if row < LEAST_ROW else _smallest_divisor(row, LEAST_ROW)
    whole = x[0].numel() if x.dim() and x.numel() else 1
    divisor = _largest_divisor(whole, GROUP)
    return divisor if divisor >= 32 or whole < 32 else GROUP


class Code(NamedTuple):
    """How one activation is coded, by `encode` in groups of `sample_group`.

    Attributes:
        size: The activation's shape.
        stride: The strides of its dense form (see `dense`).
        dtype: The activation's type.
        group: Elements that share a range.
    """

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    group: int

    @classmethod
    def of(cls, x: Tensor) -> Code:
        """How to code `x`."""
        return cls(x.size(), dense(x.detach()).stride(), x.dtype, sample_group(x))

    def encode(self, x: Tensor) -> Tensor:
        """See `encode`."""
        return encode(dense(x.detach()), self.group)

    def decode(self, codes: Tensor) -> Tensor:
        """See `decode`."""
        return decode(codes, *self)


def kept_of(x: Tensor, exact: bool, codes: Tensor | None = None) -> tuple[Tensor, Code | None]:
    """What is kept of `x`: its codes and how they are made; if `exact`, `x` itself and None.

    Args:
        x: An activation.
        exact: Keep `x`.
        codes: The codes of `x`, if they exist already.
    """
    if exact:
        return x, None
    code = Code.of(x)
    return code.encode(x) if codes is None else codes, code


class Rows(NamedTuple):
    """Codes of cells (N, C, *grid), in groups whose values are of one kind.

    Cells share a range by channel, tokens (one axis, channels last in memory) by token: a class
    token may be far from the others.

    Attributes:
        last: Channels lie last in memory, and groups within one position.
        group: Elements that share a range; none reaches into two samples.
        size: The cells' shape.
        dtype: The cells' type.
    """

    last: bool
    group: int
    size: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        """How to code `x`."""
        size, dtype = x.size(), x.dtype
        cells, channels = max(1, math.prod(size[2:])), max(1, size[1])
        if x.dim() == 3 and x.stride(1) == 1 and min(cells, channels) > 1:
            return cls(True, _largest_divisor(channels, ROW), size, dtype)
        group = cells * _largest_divisor(channels, max(1, ROW // cells))
        return cls(False, group, size, dtype)

    def encode(self, x: Tensor) -> Tensor:
        """See `encode`."""
        x = x.detach()
        x = x.movedim(1, -1) if self.last else x
        if is_exportable():
            groups = math.prod(self.size[1:]) // self.group
            return encode_rows(x.contiguous().reshape(x.shape[0], groups, self.group))
        return _encode_rows(reshaped(x, -1, self.group).float())  # no group is shorter

    def decode(self, codes: Tensor) -> Tensor:
        """The cells that `encode` coded."""
        n, c, *grid = self.size
        if is_exportable():
            x = decode_rows(codes).to(self.dtype)
            x = x.reshape(n, *grid, c) if self.last else x.reshape(self.size)
            return x.movedim(-1, 1) if self.last else x
        x = _decode_rows(codes.view(-1, self.group + EXTRA)).to(self.dtype)
        return x.view(n, *grid, c).movedim(-1, 1) if self.last else x.view(self.size)


class Reader(Protocol):
    """What tells how codes are made."""

    def decode(self, codes: Tensor) -> Tensor:
        """The values that they stand for."""


def read_back(kept: Tensor, how: Reader | None) -> Tensor:
    """The values of what is kept: decoded by `how`; None: as they are."""
    return kept if how is None else how.decode(kept)
