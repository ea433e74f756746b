"""How far apart two tensors are."""

from __future__ import annotations

import torch
from torch import Tensor


def has_norm(x: Tensor) -> bool:
    """Whether a tensor's elements may be nearly the same as others."""
    return x.is_floating_point() or x.is_complex()


def share_of_others(x: Tensor, y: Tensor) -> float:
    """How many elements differ, of all, of tensors of the same shape."""
    return (x != y).double().mean().item() if x.numel() else 0.0


def difference(x: Tensor, y: Tensor) -> float:
    """How far x is from y, of the same shape and type, relative to the norm of y."""
    if x.is_sparse or not x.numel():
        return 0.0
    dtype = y.dtype
    x, y = (t.to(torch.complex128 if t.is_complex() else torch.double) for t in (x, y))
    odd = [torch.where(t.isfinite(), 0, t) for t in (x, y)]
    if not torch.equal(*(torch.nan_to_num(t.abs(), 1.0, 2.0) for t in odd)):
        return torch.inf  # infinite or not a number in other places
    x, y = (torch.where(t.isfinite(), t, 0) for t in (x, y))
    noise = 10 * torch.finfo(dtype).eps * y.numel() ** 0.5  # of what should be zero
    return float((x - y).norm().item() / max(y.norm().item(), noise))
