"""What single kernels cost: FLOPs, and memory that PyTorch's allocator does not show."""

from __future__ import annotations

from typing import Any

import torch

from lightning_da3.torch_private.kernels import (
    LINEAR_POINTWISE,
    convolution_backward,
    flop_formula,
    kernel_of,
)


def flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """The FLOPs of one operation, two a multiply-accumulate."""
    kernel = kernel_of(func)
    if kernel is convolution_backward:
        # PyTorch's own count of the weight's gradient leaves out groups
        grad, x, weight, transposed, wanted = *args[:3], args[7], args[10]
        positions = (x if transposed else grad).numel()
        return int(2 * positions * weight[0].numel() * sum(wanted[:2]))
    if kernel is LINEAR_POINTWISE:
        return int(2 * args[0].numel() * len(args[1]))
    formula = flop_formula(kernel)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


def scratch_bytes(func: Any, args: tuple[Any, ...]) -> int:
    """What oneDNN's convolutions hold beside their inputs and results, in bytes.

    Single pixels need nothing. Others copy the weight, an input that is not channels_last, and a
    weight laid out otherwise than its input once more; found by measuring, with torch 2.15.
    """
    kernel = kernel_of(func)
    if kernel not in (torch.ops.aten.convolution, convolution_backward):
        return 0
    backward = kernel is convolution_backward
    grad, x, weight = args[:3] if backward else (None, *args[:2])
    if x.device.type != "cpu" or weight[0, 0].numel() == 1 or weight.dim() != 4:
        return 0
    last = torch.channels_last
    if not x.is_contiguous(memory_format=last):
        own = weight.nbytes + x.nbytes
        return int(max(weight.nbytes, x.nbytes + grad.nbytes) if backward else own)
    copies = (2 if backward else 1) + (not weight.is_contiguous(memory_format=last))
    return int(copies * weight.nbytes)
