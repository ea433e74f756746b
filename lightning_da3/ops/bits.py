"""One bit an element: pack a boolean condition, unpack it as a 0/1 mask.

Elements are taken in memory order, so that neither direction copies a channels_last tensor. On CPU
numpy packs and compares in one vectorised pass; elsewhere, and under torch.compile, torch
arithmetic does the same with eight bit planes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_da3.ops.exportable import is_exportable
from lightning_da3.torch_private.fake import is_fake, proxy_mode

_NUMPY_DTYPES = (torch.float32, torch.float64, torch.float16)
AT_ONCE = 1 << 17  # elements, a multiple of 8, that stay in a core's cache from step to step


def dense(x: Tensor) -> Tensor:
    """`x` itself if its elements fill one block of memory without gaps, else a contiguous copy."""
    return x if _is_dense(x) else x.contiguous()


def _is_dense(x: Tensor) -> bool:
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return True
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def lies_channels_last(x: Tensor) -> bool:
    """Whether `x`, a map of two or three axes, is channels_last and not contiguous as well."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return layout is not None and not x.is_contiguous() and x.is_contiguous(memory_format=layout)


def layout_of(x: Tensor) -> torch.memory_format:
    """How `x` lies in memory: what gradients of it should be like.

    PyTorch's own backward of instance norm takes it for granted on CPUs.
    """
    if not lies_channels_last(x):
        return torch.contiguous_format
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


def has_no_values(x: Tensor) -> bool:
    """Whether `x` is fake, a shape without values, and no program is made of what is done to it."""
    return not is_recorded() and is_fake(x)


def is_recorded() -> bool:
    """Whether operations become a program, for other values: only PyTorch's own will do then."""
    return torch.compiler.is_compiling() or proxy_mode() is not None or is_exportable()


def may_lie_otherwise(x: Tensor) -> bool:
    """Whether values may have other strides than `x`, which is fake, in a program made with it.

    PyTorch does not know for every kernel how its result lies in memory.
    """
    program = not torch.compiler.is_compiling() and proxy_mode() is not None
    return program and not is_exportable() and is_fake(x)


def reshaped(x: Tensor, *shape: int) -> Tensor:
    """`x.reshape(*shape)`; a copy where a view of what is fake may be none of what has values."""
    if may_lie_otherwise(x):
        return x.clone(memory_format=torch.contiguous_format).view(shape)
    return x.reshape(shape)


def memory_order(stride: Sequence[int]) -> list[int]:
    """Axes as they lie in memory, the slowest first."""
    return sorted(range(len(stride)), key=lambda axis: -stride[axis])


def flat(x: Tensor) -> Tensor:
    """Elements of a dense tensor in memory order, a view."""
    if is_recorded():
        return reshaped(x.permute(memory_order(x.stride())), -1)
    return x.view(-1) if x.is_contiguous() else x.as_strided((x.numel(),), (1,))


def pack_between(x: Tensor, low: float, high: float) -> Tensor:
    """Bits of ``low < x < high``.

    Args:
        x: Any shape; dense (see `dense`).
        low: Lower bound, excluded; may be ``-inf``.
        high: Upper bound, excluded; may be ``inf``.

    Returns:
        uint8 of ``ceil(x.numel() / 8)`` bytes, in the memory order of `x`.
    """
    if has_no_values(x):
        return _pack_fake(x)
    if _use_numpy(x):
        return _pack_numpy(x, low, high)
    inside = x > low if math.isinf(high) else (x > low) & (x < high)
    if is_exportable():
        return _pack_samples(inside)
    flat = reshaped(inside.permute(memory_order(x.stride())), -1)
    flat = torch.nn.functional.pad(flat.to(torch.uint8), (0, -flat.numel() % 8)).view(8, -1)
    bits = flat[0].clone()
    for plane in range(1, 8):
        bits |= flat[plane] << plane
    return bits


def unpack(bits: Tensor, size: torch.Size, stride: tuple[int, ...]) -> Tensor:
    """The 0/1 mask that `pack_between` packed.

    Args:
        bits: What `pack_between` returned.
        size: Shape of the packed tensor.
        stride: Strides of the packed tensor.

    Returns:
        uint8, or bool if exportable, of shape `size`, in the same memory order.
    """
    if is_exportable():
        return _unpack_samples(bits, size)
    count = math.prod(size)
    if has_no_values(bits):
        flat = bits.new_empty(count)
    elif _use_numpy(bits):
        flat = torch.from_numpy(np.unpackbits(bits.numpy(), count=count))
    else:
        planes = torch.arange(8, dtype=torch.uint8, device=bits.device).unsqueeze(1)
        flat = ((bits >> planes) & 1).view(-1)[:count]
    if not torch.compiler.is_compiling():
        return flat.as_strided(size, stride)
    order = memory_order(stride)
    places = [order.index(axis) for axis in range(len(order))]
    return flat.view([size[axis] for axis in order]).permute(places)


def _use_numpy(x: Tensor) -> bool:
    return x.device.type == "cpu" and not is_recorded()


def _pack_numpy(x: Tensor, low: float, high: float) -> Tensor:
    elements = flat(x.detach())
    bits = torch.empty((elements.numel() + 7) // 8, dtype=torch.uint8)  # kept: PyTorch's own memory
    packed = bits.numpy()
    for start in range(0, elements.numel(), AT_ONCE):
        part = elements[start : start + AT_ONCE]
        if x.dtype in _NUMPY_DTYPES:
            values = part.numpy()
            inside = values > low
            if not math.isinf(high):
                inside &= values < high
        else:  # bfloat16 has no numpy type
            inside = torch.logical_and(part > low, part < high).numpy()
        found = np.packbits(inside)
        packed[start // 8 : start // 8 + len(found)] = found
    return bits


def _pack_samples(inside: Tensor) -> Tensor:
    """Bits of a condition (N, ..), sample by sample, so that N may be any number: (N, bytes).

    Runtimes shift no bytes: a byte is a product of eight bits with the powers of two, exact as
    floats. Files of ONNX hold it in integers (`lightning_da3.exporting.onnx_passes.bits`).
    """
    rows = inside.flatten(1) if inside.dim() > 1 else inside.reshape(-1, 1)
    if odd := -rows.shape[1] % 8:
        rows = torch.nn.functional.pad(rows, (0, odd))
    planes = rows.reshape(rows.shape[0], 8, rows.shape[1] // 8).to(torch.float32)
    numbers = torch.tensor([[[float(1 << k) for k in range(8)]]], device=inside.device)
    packed = torch.bmm(numbers.expand(rows.shape[0], 1, 8), planes).to(torch.uint8)
    return packed.reshape(rows.shape[0], rows.shape[1] // 8)


def _unpack_samples(bits: Tensor, size: torch.Size) -> Tensor:
    """The mask that `_pack_samples` packed, as bool: another conversion would be another pass."""
    numbers = torch.tensor([1 << k for k in range(8)], dtype=torch.uint8, device=bits.device)
    planes = (bits.unsqueeze(1) & numbers.view(1, 8, 1)).to(torch.bool)
    rows = planes.flatten(1)[:, : math.prod(size[1:])]
    return rows.reshape(size)


def _pack_fake(x: Tensor) -> Tensor:
    return x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)


def pack_pairs(codes: Tensor) -> Tensor:
    """Codes below 16, two a byte: the second half of the tensor above the first.

    Args:
        codes: uint8 of any shape; dense.

    Returns:
        uint8 of ``ceil(codes.numel() / 2)`` bytes, in the memory order of `codes`.
    """
    if is_exportable():
        return codes
    elements = flat(codes)
    half = (elements.numel() + 1) // 2
    pairs = elements[:half].clone()
    pairs[: elements.numel() - half] |= elements[half:] << 4
    return pairs


def unpack_pairs(pairs: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """The codes that `pack_pairs` packed, of shape `size` with these dense strides."""
    if is_exportable():
        return pairs
    return torch.cat((pairs & 15, pairs >> 4)).as_strided(size, stride)
