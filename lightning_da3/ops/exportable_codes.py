"""Codes of rows as one op each way, for programs in which bytes cannot be read as numbers.

Shapes: rows (.., g) of any floating type, codes uint8 (.., g + 8): a row's bytes, its step and its
lowest value. A program of tensors of one type each holds the three apart: whoever exports replaces
these ops by `code_parts` and `from_parts`. A row that holds infinities or NaN decodes to NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

EXTRA = 8  # bytes of a row's step and lowest value
SMALL = 1e-36  # what a range counts as that is smaller, before it divides
FBGEMM_SMALL = 1e-8  # what FBGEMM adds; its results are used where a step is no smaller


def code_parts(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes (.., g), steps (.., 1) and lowest values (.., 1) of `rows`."""
    rows = rows.float()
    low, high = rows.amin(dim=-1, keepdim=True), rows.amax(dim=-1, keepdim=True)
    span = high - low
    own = span < 255 * FBGEMM_SMALL  # to round as eager mode does
    divisor = torch.where(own, span.clamp_min(SMALL), span + FBGEMM_SMALL)
    codes = rows.sub(low).mul_(255.0 / divisor).round_().to(torch.uint8)
    return codes, torch.where(own, divisor, span) / 255.0, low


def from_parts(codes: Tensor, step: Tensor, low: Tensor) -> Tensor:
    """The rows that `code_parts` coded, in float32."""
    return codes.float().mul_(step).add_(low)


def _encode(rows: Tensor) -> Tensor:
    codes, step, low = code_parts(rows)
    return torch.cat((codes, torch.cat((step, low), -1).view(torch.uint8)), -1)


def _encode_fake(rows: Tensor) -> Tensor:
    return rows.new_empty((*rows.shape[:-1], rows.shape[-1] + EXTRA), dtype=torch.uint8)


def _decode(codes: Tensor) -> Tensor:
    ends = codes[..., -EXTRA:].clone(memory_format=torch.contiguous_format)  # aligned
    step, low = ends.view(torch.float32).unsqueeze(-1).unbind(-2)
    return from_parts(codes[..., :-EXTRA], step, low)


def _decode_fake(codes: Tensor) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], codes.shape[-1] - EXTRA), dtype=torch.float32)


_encode_op = torch.library.custom_op("lightning_da3::encode_rows", _encode, mutates_args=())
_encode_op.register_fake(_encode_fake)
_decode_op = torch.library.custom_op("lightning_da3::decode_rows", _decode, mutates_args=())
_decode_op.register_fake(_decode_fake)
encode_rows: Callable[[Tensor], Tensor] = _encode_op
decode_rows: Callable[[Tensor], Tensor] = _decode_op


def encode_elements(x: Tensor, order: list[int], group: int) -> Tensor:
    """Codes of a tensor, in groups of elements that are neighbours in memory.

    Args:
        x: Any shape.
        order: Its axes as they lie in memory, the slowest first.
        group: Elements of a group; where the last one is shorter, it is coded with its last
            element repeated.

    Returns:
        uint8 (N, groups, group + 8) if the first axis is the slowest and no group reaches into two
        samples, so that N may be any number; else (groups, group + 8).
    """
    rows = x.permute(order)
    if _apart(x.shape, order, group):
        return encode_rows(rows.reshape(x.shape[0], math.prod(x.shape[1:]) // group, group))
    elements = rows.reshape(-1)
    rest = -elements.numel() % group
    if rest or not isinstance(rest, int):  # of another batch it may be none, or some
        elements = torch.cat((elements, elements[-1:].expand(rest)))
    return encode_rows(elements.view(-1, group))


def decode_elements(codes: Tensor, size: torch.Size, order: list[int], group: int) -> Tensor:
    """What `encode_elements` coded, of this shape, in float32."""
    sizes = [size[axis] for axis in order]
    rows = decode_rows(codes)
    if not _apart(size, order, group):
        rows = rows.reshape(-1)[: math.prod(size)]
    return rows.reshape(sizes).permute([order.index(axis) for axis in range(len(order))])


def _apart(size: torch.Size, order: list[int], group: int) -> bool:
    return bool(size) and order[0] == 0 and math.prod(size[1:]) % group == 0
