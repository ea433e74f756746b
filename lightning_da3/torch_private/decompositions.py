"""Kernels of PyTorch that other runtimes lack, in those that they have.

Shapes: see `lightning_da3.ops`. Each takes what the kernel takes and gives what it gives.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_da3.torch_private.finding import found

_aten = torch.ops.aten

# --- convolutions


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    del bias_sizes, output_padding
    axes = len(stride)
    grad_x = grad_weight = grad_bias = None
    if wanted[0] and transposed:
        grad_x = _aten.convolution(
            grad, weight, None, stride, padding, dilation, False, [0] * axes, groups
        )
    elif wanted[0]:
        rest = _rest(x.shape[2:], grad.shape[2:], weight.shape[2:], stride, padding, dilation)
        grad_x = _aten.convolution(
            grad, weight, None, stride, padding, dilation, True, rest, groups
        )
    if wanted[1]:
        ends = (grad, x) if transposed else (x, grad)
        grad_weight = _weight_gradient(*ends, weight, stride, padding, dilation, groups)
    if wanted[2]:
        grad_bias = grad.sum([0, *range(2, grad.dim())])
    return grad_x, grad_weight, grad_bias


def _rest(
    size: Sequence[int],
    out: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """What no window reached at the end of every axis."""
    sides = zip(size, out, kernel, stride, padding, dilation, strict=True)
    return [n - ((o - 1) * s - 2 * p + d * (k - 1) + 1) for n, o, k, s, p, d in sides]


def _weight_gradient(
    x: Tensor,
    grad: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """A convolution of x with dL/dy as the kernel, in which the batch is the axis summed over."""
    axes = len(stride)
    parts = [
        _aten.convolution(
            xs.transpose(0, 1),
            gs.transpose(0, 1),
            None,
            dilation,
            padding,
            stride,
            False,
            [0] * axes,
            1,
        )
        for xs, gs in zip(x.chunk(groups, 1), grad.chunk(groups, 1), strict=True)
    ]
    whole = torch.cat([part.transpose(0, 1) for part in parts]) if groups > 1 else parts[0]
    whole = whole if groups > 1 else whole.transpose(0, 1)
    for axis, side in enumerate(weight.shape[2:]):
        whole = whole.narrow(axis + 2, 0, side)
    return whole


# --- cells: along every axis a product with a matrix of shares


def _along(x: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """x with its axis of n in the place of k: the product with a matrix (n, k)."""
    matrix = matrix.to(x.dtype)
    if axis == x.dim() - 1:
        return x @ matrix.t()
    if axis == x.dim() - 2:
        return matrix @ x
    return (x.movedim(axis, -1) @ matrix.t()).movedim(-1, axis)


def _window_shares(size: int, cells: int) -> list[list[float]]:
    """(cells, size): what adaptive average pooling takes of every position."""
    ends = [(i * size // cells, -(-(i + 1) * size // cells)) for i in range(cells)]
    return [[(a <= j < b) / (b - a) for j in range(size)] for a, b in ends]


def _nearest(size: int, cells: int) -> list[list[float]]:
    """(cells, size): the positions that nearest neighbours copy every cell to."""
    scale = np.float32(cells) / np.float32(size)
    own = [min(int(np.floor(np.float32(j) * scale)), cells - 1) for j in range(size)]
    return [[float(own[j] == i) for j in range(size)] for i in range(cells)]


def _adaptive_backward(grad: Tensor, x: Tensor) -> Tensor:
    axes = 2 if grad.dim() == x.dim() == 4 or grad.dim() == 3 else grad.dim() - 2
    for axis in range(grad.dim() - axes, grad.dim()):
        shares = torch.tensor(_window_shares(x.shape[axis], grad.shape[axis]))
        grad = _along(grad, axis, shares.t())
    return grad


def adaptive_pool(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Means of cells of any sizes: (N, C, *in) to (N, C, *grid)."""
    for axis, cells in zip(range(x.dim() - len(grid), x.dim()), grid, strict=True):
        if x.shape[axis] != cells:
            x = _along(x, axis, torch.tensor(_window_shares(x.shape[axis], cells)))
    return x


def _nearest_backward(
    grad: Tensor, out: Sequence[int], size: Sequence[int], *scales: float | None
) -> Tensor:
    del scales
    for axis in range(2, grad.dim()):
        grad = _along(grad, axis, torch.tensor(_nearest(out[axis - 2], size[axis])))
    return grad


# --- other pools


def _avg_pool_backward(
    grad: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Along every axis a product with the windows' ones; divided by the windows' counts before."""
    axes = len(kernel)
    size, out = x.shape[-axes:], grad.shape[-axes:]
    stride = stride or kernel
    windows = [
        [range(o * s - p, o * s - p + k) for o in range(count)]
        for count, k, s, p in zip(out, kernel, stride, padding, strict=True)
    ]
    ones = [
        [[float(j in w) for j in range(n)] for w in along]
        for along, n in zip(windows, size, strict=True)
    ]
    del ceil_mode
    if divisor_override:
        grad = grad / divisor_override
    else:
        for i, along in enumerate(windows):
            last = size[i] + padding[i] if count_include_pad else size[i]
            first = -padding[i] if count_include_pad else 0
            counts = [min(w.stop, last) - max(w.start, first) for w in along]
            shape = [-1] + [1] * (axes - 1 - i)
            grad = grad / torch.tensor(counts, dtype=grad.dtype).view(shape)
    for i, matrix in enumerate(ones):
        grad = _along(grad, grad.dim() - axes + i, torch.tensor(matrix).t())
    return grad


def _avg_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """Without a divisor, which torch's exporter leaves out silently."""
    del count_include_pad  # the divisor says it all
    if divisor_override is None or ceil_mode:
        return NotImplemented
    pool = {2: F.avg_pool2d, 3: F.avg_pool3d}[len(kernel)]
    mean = pool(x, list(kernel), list(stride) or None, list(padding), False, True)
    return mean * (math.prod(kernel) / divisor_override)


def _max_pool_backward(grad: Tensor, x: Tensor, kernel: Sequence[int], *how: Any) -> Tensor:
    index, axes = how[-1], len(kernel)
    shape = [*x.shape[:-axes], math.prod(x.shape[-axes:])]
    flat = grad.new_zeros(shape)
    flat = flat.scatter_add(-1, index.flatten(-axes), grad.flatten(-axes))
    return flat.reshape(x.shape)


_KNOWN: dict[Any, Callable[..., Any]] = found("torch._decomp:decomposition_table", {})

VIEWS = (_aten.view.default, _aten._unsafe_view.default)
"""Kernels whose result lies where their input does, if that is possible."""

_LACKING = re.compile("backward|nll_loss")

TABLE: dict[Any, Callable[..., Any]] = {
    # and of the losses of classes: torch's exporter takes the weight of a batch for 1
    **{kernel: known for kernel, known in _KNOWN.items() if _LACKING.search(str(kernel))},
    _aten.convolution_backward.default: _convolution_backward,
    _aten._adaptive_avg_pool2d_backward.default: _adaptive_backward,
    _aten._adaptive_avg_pool3d_backward.default: _adaptive_backward,
    _aten._adaptive_avg_pool2d.default: adaptive_pool,
    _aten._adaptive_avg_pool3d.default: adaptive_pool,
    _aten.upsample_nearest1d_backward.default: _nearest_backward,
    _aten.upsample_nearest2d_backward.default: _nearest_backward,
    _aten.upsample_nearest3d_backward.default: _nearest_backward,
    _aten.avg_pool2d.default: _avg_pool,
    _aten.avg_pool3d.default: _avg_pool,
    _aten.avg_pool2d_backward.default: _avg_pool_backward,
    _aten.avg_pool3d_backward.default: _avg_pool_backward,
    _aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
    _aten.max_pool3d_with_indices_backward.default: _max_pool_backward,
}
"""Kernels, and what computes the same."""
