"""Frozen convolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_da3.errors import CheckpointError, InputError
from lightning_da3.nn.frozen import frozen, numbers
from lightning_da3.nn.normalization import BatchNorm, BatchNormStatistics, fold
from lightning_da3.ops.convolution import (
    conv_input_gradient,
    frozen_conv,
    frozen_conv_transpose,
    pad_mode,
)

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


def pad_of(conv: Conv) -> list[int]:
    """The padding of a convolution, last axis first, as `torch.nn.functional.pad` takes it."""
    axes = conv.weight.dim() - 2
    if conv.padding == "same":
        kernel, dilation = conv.weight.shape[2:], numbers(conv.dilation, axes)
        totals = [step * (side - 1) for step, side in zip(dilation, kernel, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    elif isinstance(conv.padding, str):  # "valid"
        sides = [(0, 0)] * axes
    else:
        sides = [(side, side) for side in numbers(conv.padding, axes)]
    return [side for pair in reversed(sides) for side in pair]


def pads_zeros_alike(conv: Conv) -> bool:
    """Whether the kernel pads by itself: with zeros, as many on both sides of every axis."""
    pad = pad_of(conv)
    return conv.padding_mode == "zeros" and pad[::2] == pad[1::2]


class FrozenConv(nn.Module):
    """A frozen convolution with the batch norm behind it folded in.

    ``y = bn(conv(x))`` becomes ``y = conv'(x)``.

    Args:
        conv: The convolution; its weight is copied.
        norm: The batch norm (with running statistics) that alone reads its output, if any.
        name: The convolution's name in the user's network.
        norm_name: The batch norm's name there.
        stored_dtype: The type that the weight is stored in; by default its own.

    Attributes:
        symmetric_padding: The padding on both sides of every axis; None where the sides differ.
        pads_zeros_alike: The kernel pads by itself: zeros, as many on both sides.
    """

    def __init__(
        self,
        conv: Conv,
        norm: BatchNorm | None = None,
        name: str = "",
        norm_name: str | None = None,
        stored_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        axes = conv.weight.dim() - 2
        self.name, self.norm_name, self.eps = name, norm_name, 0.0 if norm is None else norm.eps
        self.derived = bool(getattr(conv, "weights_are_derived", False))
        self.stride = numbers(conv.stride, axes)
        self.dilation = numbers(conv.dilation, axes)
        self.groups = conv.groups
        self.padding_mode = conv.padding_mode
        self.pad = pad_of(conv)
        before, after = self.pad[::2], self.pad[1::2]
        self.symmetric_padding = tuple(reversed(before)) if before == after else None
        self.pads_zeros_alike = pads_zeros_alike(conv)
        weight, bias = fold(
            conv.weight, conv.bias, None if norm is None else BatchNormStatistics.of(norm)
        )
        # activations follow the weight's layout; channels_last is the one CPUs are fastest in
        layout = torch.channels_last if axes == 2 else torch.contiguous_format
        dtype = conv.weight.dtype
        self.weight = frozen(weight.to(stored_dtype or dtype).contiguous(memory_format=layout))
        has_bias = conv.bias is not None or norm is not None
        self.bias = frozen(bias.to(dtype)) if has_bias else None

    def translate(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This layer's own state from that of the user's network.

        Raises:
            KeyError: A tensor is missing.
            CheckpointError: The network computes this weight from others.
        """
        if self.derived:
            raise CheckpointError(
                f"The weight of {self.name!r} is computed from other tensors, so it is not in the "
                "network's own state. Load that state into the network, and convert it again."
            )
        norm = (
            None
            if self.norm_name is None
            else BatchNormStatistics.read(state, self.norm_name, self.eps)
        )
        weight, bias = fold(state[f"{self.name}.weight"], state.get(f"{self.name}.bias"), norm)
        return {"weight": weight} if self.bias is None else {"weight": weight, "bias": bias}

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *in) to (N, O, *out)."""
        padding = self.symmetric_padding
        if padding is None or not self.pads_zeros_alike:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = pad_mode(x, self.pad, mode)
            padding = (0,) * len(self.stride)
        return frozen_conv(
            x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups
        )

    def input_gradient(self, grad: Tensor, size: torch.Size) -> Tensor:
        """dL/dx, of this size, from dL/dy, for a layer that pads both sides alike."""
        padding = self.symmetric_padding
        assert padding is not None
        return conv_input_gradient(
            grad, self.weight, size, self.stride, padding, self.dilation, self.groups
        )

    def extra_repr(self) -> str:
        """Shapes, as PyTorch's own layers print them."""
        return f"{tuple(self.weight.shape)}, stride={self.stride}, groups={self.groups}"


class ConvOfWeights(nn.Module):
    """A convolution of frozen weights that are passed to it, as ``F.conv2d(x, weight)``.

    Args:
        stride: An int, or one for every axis.
        padding: An int, one for every axis, ``"same"`` or ``"valid"``.
        dilation: The kernel's dilation, an int or one for every axis.
        groups: The number of groups of channels.
    """

    def __init__(
        self,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """(N, C, *in) to (N, O, *out)."""
        axes = weight.dim() - 2
        dilation = numbers(self.dilation, axes)
        if isinstance(self.padding, str):
            padding = (0,) * axes
            if self.padding == "same":
                more = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
                sides = [side for m in reversed(more) for side in (m // 2, m - m // 2)]
                x = nn.functional.pad(x, sides)
        else:
            padding = numbers(self.padding, axes)
        stride = numbers(self.stride, axes)
        return frozen_conv(x, weight, bias, stride, padding, dilation, self.groups)


class FrozenConvTranspose(nn.Module):
    """A frozen transposed convolution that keeps nothing.

    Args:
        conv: The layer; its weight is copied.
    """

    def __init__(self, conv: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d) -> None:
        super().__init__()
        axes = conv.weight.dim() - 2
        self.name = ""  # the layer's name in the user's network
        self.stride, self.padding = numbers(conv.stride, axes), numbers(conv.padding, axes)  # type: ignore[arg-type]
        self.output_padding = numbers(conv.output_padding, axes)
        self.dilation, self.groups = numbers(conv.dilation, axes), conv.groups
        self.weight = frozen(conv.weight)
        self.bias = None if conv.bias is None else frozen(conv.bias)

    def translate(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This layer's own state from that of the user's network.

        Raises:
            KeyError: A tensor is missing.
        """
        return {key: state[f"{self.name}.{key}"] for key in self.state_dict()}

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """(N, C, *in) to (N, O, *out); `output_size` is out, or all of the shape, if given."""
        return frozen_conv_transpose(
            x,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.output_padding if output_size is None else self._padding_for(x, output_size),
            self.groups,
            self.dilation,
        )

    def _padding_for(self, x: Tensor, output_size: Sequence[int]) -> tuple[int, ...]:
        """What is added to one side, so that the output has this size.

        Raises:
            InputError: No padding gives that size.
        """
        axes = len(self.stride)
        wanted, kernel = tuple(output_size)[-axes:], self.weight.shape[2:]
        least = [
            (n - 1) * s - 2 * p + d * (k - 1) + 1
            for n, s, p, d, k in zip(
                x.shape[2:], self.stride, self.padding, self.dilation, kernel, strict=True
            )
        ]
        most = [n + s - 1 for n, s in zip(least, self.stride, strict=True)]
        fits = len(output_size) in (axes, axes + 2)
        if not fits or not all(a <= n <= b for a, n, b in zip(least, wanted, most, strict=True)):
            raise InputError(
                f"`output_size` of a transposed convolution must be {axes} numbers from {least} to "
                f"{most} for an input of shape {tuple(x.shape)}, got {tuple(output_size)}."
            )
        return tuple(n - a for n, a in zip(wanted, least, strict=True))
