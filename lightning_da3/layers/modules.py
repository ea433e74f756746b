"""Layers of PyTorch: what is known of each exact type, and what takes its place."""

from __future__ import annotations

import math
from typing import Any, cast

import torch.nn.functional as F
from torch import nn

from lightning_da3.layers.facts import Replacement, register
from lightning_da3.nn.activation import HardSigmoid, PiecewiseLinear, QuantizedGradActivation
from lightning_da3.nn.convolution import FrozenConvTranspose
from lightning_da3.nn.frozen import numbers
from lightning_da3.nn.pooling import AdaptiveAvgPool, AvgPool, MaxPool
from lightning_da3.ops.activation import Slopes
from lightning_da3.ops.smooth import SMOOTH, Smooth, celu, elu, gelu, softplus
from lightning_da3.torch_private.fake import is_fake

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
ADAPTIVE_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)

_ELEMENTWISE: dict[str, Any] = {"by_sample": True, "elementwise": True}


# --- layers with weights: what becomes of them, the plan decides ----------------------------------

for _conv, _function, _rank in zip(CONVS, (F.conv1d, F.conv2d, F.conv3d), (3, 4, 5), strict=True):
    register(
        _conv,
        by_sample=True,
        mixes_channels=True,
        rank=_rank,
        function=_function,
        arguments=("weight", "bias", "stride", "padding", "dilation", "groups"),
    )
for _norm, _rank in zip(BATCH_NORMS, (0, 4, 5), strict=True):
    register(
        _norm,
        elementwise=True,
        has_modes=True,
        rank=_rank,
        function=F.batch_norm,
        arguments=("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    )
register(
    nn.Linear,
    keeps="nothing",
    by_sample=True,
    mixes_channels=True,
    function=F.linear,
    arguments=("weight", "bias"),
)
register(
    nn.LayerNorm,
    by_sample=True,
    function=F.layer_norm,
    arguments=("normalized_shape", "weight", "bias", "eps"),
)
register(
    nn.GroupNorm,
    by_sample=True,
    function=F.group_norm,
    arguments=("num_groups", "weight", "bias", "eps"),
)
register(nn.MultiheadAttention, mixes_channels=True, has_modes=True)

# --- layers that stay as they are -----------------------------------------------------------------

register(nn.ZeroPad2d, nn.Upsample, nn.PixelShuffle, keeps="nothing", by_sample=True)
register(
    *(nn.ZeroPad1d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    *(nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.PixelUnshuffle, nn.ChannelShuffle),
    *(nn.Flatten, nn.Unflatten, nn.Embedding),
    keeps="nothing",
)
register(
    *(nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.RReLU, nn.RNN, nn.LSTM, nn.GRU, nn.TransformerEncoderLayer, nn.TransformerEncoder),
    has_modes=True,
)

register(
    nn.FractionalMaxPool2d, nn.FractionalMaxPool3d, random=True, sensitive=True, by_sample=True
)
register(
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    sensitive=True,
    by_sample=True,
)
register(nn.Softshrink, nn.Hardshrink, sensitive=True, by_sample=True, elementwise=True)

# --- layers with a replacement --------------------------------------------------------------------


def _piecewise_linear(low: float, high: float, slope: float, inplace: bool) -> Replacement:
    slopes = Slopes(low, high, slope)
    return Replacement(lambda over: PiecewiseLinear(slopes, over), "bits", inplace)


@register(nn.ReLU, sensitive=True, **_ELEMENTWISE)
def _relu(layer: nn.ReLU) -> Replacement:
    return _piecewise_linear(0.0, math.inf, 0.0, layer.inplace)


@register(nn.ReLU6, nn.Hardtanh, sensitive=True, **_ELEMENTWISE)
def _hardtanh(layer: nn.Hardtanh) -> Replacement:
    return _piecewise_linear(float(layer.min_val), float(layer.max_val), 0.0, layer.inplace)


@register(nn.LeakyReLU, sensitive=True, **_ELEMENTWISE)
def _leaky_relu(layer: nn.LeakyReLU) -> Replacement | None:
    if layer.negative_slope < 0:  # the sign of the output no longer tells that of the input
        return None
    return _piecewise_linear(0.0, math.inf, float(layer.negative_slope), layer.inplace)


@register(nn.Threshold, sensitive=True, **_ELEMENTWISE)
def _threshold(layer: nn.Threshold) -> Replacement | None:
    if layer.value != 0.0 or layer.threshold < 0.0:
        return None
    return None if layer.threshold else _piecewise_linear(0.0, math.inf, 0.0, layer.inplace)


@register(nn.PReLU, sensitive=True, **_ELEMENTWISE)
def _prelu(layer: nn.PReLU) -> Replacement | None:
    if layer.weight.numel() != 1:
        return None
    slope = layer.init if is_fake(layer.weight) else float(layer.weight[0])
    return None if slope < 0.0 else _piecewise_linear(0.0, math.inf, slope, False)


def _coded(smooth: Smooth, inplace: bool = False) -> Replacement:
    return Replacement(lambda over: QuantizedGradActivation(smooth, over), "codes", inplace)


@register(nn.SiLU, nn.Mish, nn.Hardswish, nn.SELU, **_ELEMENTWISE)
def _smooth_inplace(layer: nn.SiLU) -> Replacement:
    return _coded(SMOOTH[type(layer).__name__.lower()], layer.inplace)


@register(nn.Sigmoid, nn.Tanh, nn.Softsign, nn.LogSigmoid, nn.Tanhshrink, **_ELEMENTWISE)
def _smooth(layer: nn.Module) -> Replacement:
    return _coded(SMOOTH[type(layer).__name__.lower()])


@register(nn.GELU, **_ELEMENTWISE)
def _gelu(layer: nn.GELU) -> Replacement:
    return _coded(gelu(layer.approximate))


@register(nn.ELU, **_ELEMENTWISE)
def _elu(layer: nn.ELU) -> Replacement | None:
    return None if layer.alpha <= 0 else _coded(elu(float(layer.alpha)), layer.inplace)


@register(nn.CELU, **_ELEMENTWISE)
def _celu(layer: nn.CELU) -> Replacement | None:
    return None if layer.alpha <= 0 else _coded(celu(float(layer.alpha)), layer.inplace)


@register(nn.Softplus, **_ELEMENTWISE)
def _softplus(layer: nn.Softplus) -> Replacement:
    return _coded(softplus(float(layer.beta), float(layer.threshold)))


@register(nn.Hardsigmoid, **_ELEMENTWISE)
def _hardsigmoid(layer: nn.Hardsigmoid) -> Replacement:
    del layer
    return Replacement(lambda _: HardSigmoid(), "bits")


@register(*TRANSPOSED, by_sample=True)
def _conv_transpose(layer: nn.ConvTranspose2d) -> Replacement:
    return Replacement(lambda _: FrozenConvTranspose(layer))


@register(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, sensitive=True, by_sample=True)
def _max_pool(layer: nn.MaxPool2d) -> Replacement | None:
    if layer.return_indices:
        return None
    axes = _axes(layer)
    kernel = numbers(layer.kernel_size, axes)
    stride = numbers(layer.stride, axes)
    padding, dilation = numbers(layer.padding, axes), numbers(layer.dilation, axes)
    return Replacement(
        lambda _: MaxPool(kernel, stride, padding, dilation, layer.ceil_mode), "bits"
    )


@register(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, by_sample=True)
def _avg_pool(layer: nn.AvgPool2d) -> Replacement:
    axes = _axes(layer)
    kernel, stride = numbers(layer.kernel_size, axes), numbers(layer.stride, axes)
    padding = numbers(layer.padding, axes)
    divisor = getattr(layer, "divisor_override", None)
    return Replacement(
        lambda _: AvgPool(
            kernel, stride, padding, layer.ceil_mode, layer.count_include_pad, divisor
        )
    )


@register(*ADAPTIVE_POOLS, by_sample=True)
def _adaptive_avg_pool(layer: nn.AdaptiveAvgPool2d) -> Replacement:
    grid = numbers(cast(Any, layer.output_size), _axes(layer))
    return Replacement(lambda _: AdaptiveAvgPool(grid))


@register(nn.Identity, **_ELEMENTWISE)
@register(
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
    has_modes=True,
    **_ELEMENTWISE,
)
def _identity(_: nn.Module) -> Replacement:
    return Replacement(None)


def _axes(layer: nn.Module) -> int:
    return int(type(layer).__name__[-2])  # MaxPool2d: 2
