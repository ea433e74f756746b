"""A convolution with a frozen weight as one op that a compiler does not look into.

Shapes: x (N, C, *in), weight (O, C/groups, *kernel) or transposed (C, O/groups, *kernel), y
(N, O, *out), two spatial axes. Kept: nothing but the weight, which lives in the model.

Inductor lays out what convolutions read, weights included, with the channels last, and returns that
copy of a weight from the forward where the backward reads the weight: the whole backbone would be
kept. For an op like this one it leaves weights as they lie. Their copies in another type are made
for one use and stay inside.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_da3.ops.bits import lies_channels_last

_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # since torch 2.7


def is_opaque(weight: Tensor) -> bool:
    """Whether a convolution with this weight is to be such an op; never in an exported graph."""
    return torch.compiler.is_compiling() and not _is_exporting() and weight.dim() == 4


def lowered(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or what autocast makes of it when `x` enters a convolution."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    dtype: torch.dtype,
) -> Tensor:
    layout = _layout(x, weight)
    x, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        y = torch.convolution(
            *(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
        )
    return y.contiguous(memory_format=layout)


def _layout(x: Tensor, weight: Tensor) -> torch.memory_format:
    """The layout of y, from axes longer than 1: the compiler may not know other strides."""
    last = lies_channels_last(x) or lies_channels_last(weight)
    return torch.channels_last if last else torch.contiguous_format


_op = torch.library.custom_op(
    "lightning_da3::convolution",
    _convolution,
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding,"
        " SymInt[] dilation, bool transposed, SymInt[] output_padding, SymInt groups,"
        " ScalarType dtype) -> Tensor"
    ),
)
_op.register_fake(_convolution)  # it computes shapes as well as values


def opaque_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtype: torch.dtype,
    output_padding: Sequence[int] | None = None,
) -> Tensor:
    """`torch.convolution` without a graph.

    Args:
        x: (N, C, *in).
        weight: Its type may differ from that of `x`; its copy is freed afterwards.
        bias: (O,) or None.
        stride: The convolution's stride, one number an axis.
        padding: Zeros on both sides, one number an axis.
        dilation: The kernel's dilation, one number an axis.
        groups: The number of groups of channels.
        dtype: The result's type.
        output_padding: The output padding of a transposed convolution; None for others.

    Returns:
        (N, O, *out), with the channels last in memory if those of `x` or `weight` are.
    """
    transposed, more = output_padding is not None, output_padding or [0] * len(stride)
    y: Tensor = _op(x, weight, bias, stride, padding, dilation, transposed, more, groups, dtype)
    return y
