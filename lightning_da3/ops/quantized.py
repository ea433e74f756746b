"""Eight-bit codes of rows.

Shapes: x (N, C, *grid) is read as N*C rows; codes uint8 (N*C, cells), low and step (N*C, 1).
``x ~ low + step * code`` with an error of at most ``step / 2 = (max - min) / 510`` of its row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, lowest value and step of every row of `x`, (N, C, *grid)."""
    rows = x.detach().flatten(2).flatten(0, 1).float()  # (N*C, cells)
    if rows.numel() == 0:
        low = step = rows.new_zeros(rows.shape[0], 1)
        return rows.to(torch.uint8), low, step
    low, high = rows.aminmax(dim=1, keepdim=True)
    step = (high - low).div_(255.0).clamp_min_(torch.finfo(low.dtype).tiny)  # constant rows: 0
    codes = rows.sub(low).div_(step).round_().to(torch.uint8)
    return codes, low, step


def dequantize_rows(
    codes: Tensor, low: Tensor, step: Tensor, size: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """What `quantize_rows` coded, of shape `size` and type `dtype`."""
    return torch.addcmul(low, codes.to(step.dtype), step).view(size).to(dtype)
