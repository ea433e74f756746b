"""Which frozen layer stands in for which of PyTorch's: one table, by exact type.

Functions and methods are first read as the layer that does the same (`LAYER_OF`), so that every
rule is written once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from lightning_da3.errors import ConfigError
from lightning_da3.nn.frozen import (
    AdaptiveAvgPool,
    AvgPool,
    ConvOfWeights,
    FrozenConvTranspose,
    HardSigmoid,
    MaxPool,
    PiecewiseLinear,
    QuantizedGradActivation,
    numbers,
)
from lightning_da3.ops.activation import Slopes
from lightning_da3.ops.smooth import SMOOTH, Smooth, celu, elu, gelu, softplus
from lightning_da3.torch_private.fake import is_fake
from lightning_da3.torch_private.modules import BACKWARD_HOOKS, FORWARD_HOOKS, hooks_of

Builder = Callable[[bool], nn.Module]  # takes: may it overwrite its input?


@dataclass(frozen=True)
class Replacement:
    """What stands in for a layer.

    Attributes:
        build: Makes the module; its argument says whether the input may be overwritten. None
            removes the layer (dropout in eval).
        keeps: What its backward keeps: ``"nothing"``, ``"bits"`` (one an input element, or
            at most eight an output element; exact) or ``"codes"`` (one byte an input element,
            which rounds the derivative: not used in exact mode).
        inplace: It can overwrite its input, and the user's layer did so.
    """

    build: Builder | None
    keeps: str = "nothing"
    inplace: bool | None = None


Rule = Callable[[Any], Replacement | None]
_RULES: dict[type[nn.Module], Rule] = {}


def register(*kinds: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Say what stands in for layers of these exact types when a network is converted.

    The rule takes the layer (in eval) and returns a `Replacement`, or None to keep the layer as it
    is. The replacement must compute what the layer computes in eval.

    Args:
        kinds: Subclasses of `torch.nn.Module`; a type has one rule.

    Raises:
        ConfigError: A type has a rule already, or is no module type.
    """

    def add(rule: Rule) -> Rule:
        for kind in kinds:
            if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
                raise ConfigError(f"`register` takes types of torch.nn.Module, got {kind!r}.")
            if kind in _RULES:
                raise ConfigError(f"{kind.__name__} has a rule already: {_RULES[kind].__name__}.")
        _RULES.update(dict.fromkeys(kinds, rule))
        return rule

    return add


def is_registered(kind: type[nn.Module]) -> bool:
    """Whether a rule knows this exact type."""
    return kind in _RULES


def replacement_for(layer: nn.Module, exact: bool = False) -> Replacement | None:
    """What stands in for `layer`, or None if no rule knows its exact type.

    Args:
        layer: In eval.
        exact: Only what gives the exact gradient.
    """
    rule = _RULES.get(type(layer))
    if rule is None or has_hooks(layer):
        return None
    found = rule(layer)
    return None if found is None or (exact and found.keeps == "codes") else found


def has_hooks(layer: nn.Module) -> bool:
    """Whether the user's hooks hang on `layer`, which nothing else would run."""
    return any(hooks_of(layer, FORWARD_HOOKS + BACKWARD_HOOKS))


def has_frozen_form(layer: nn.Module) -> bool:
    """Whether conversion changes this layer at all."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return type(layer) in kinds or replacement_for(layer) is not None


def _piecewise_linear(low: float, high: float, slope: float, inplace: bool) -> Replacement:
    slopes = Slopes(low, high, slope)
    return Replacement(lambda over: PiecewiseLinear(slopes, over), "bits", inplace)


@register(nn.ReLU)
def _relu(layer: nn.ReLU) -> Replacement:
    return _piecewise_linear(0.0, math.inf, 0.0, layer.inplace)


@register(nn.ReLU6, nn.Hardtanh)
def _hardtanh(layer: nn.Hardtanh) -> Replacement:
    return _piecewise_linear(float(layer.min_val), float(layer.max_val), 0.0, layer.inplace)


@register(nn.LeakyReLU)
def _leaky_relu(layer: nn.LeakyReLU) -> Replacement | None:
    if layer.negative_slope < 0:  # the sign of the output no longer tells that of the input
        return None
    return _piecewise_linear(0.0, math.inf, float(layer.negative_slope), layer.inplace)


@register(nn.Threshold)
def _threshold(layer: nn.Threshold) -> Replacement | None:
    if layer.value != 0.0 or layer.threshold < 0.0:
        return None
    return None if layer.threshold else _piecewise_linear(0.0, math.inf, 0.0, layer.inplace)


@register(nn.PReLU)
def _prelu(layer: nn.PReLU) -> Replacement | None:
    if layer.weight.numel() != 1:
        return None
    slope = layer.init if is_fake(layer.weight) else float(layer.weight[0])
    return None if slope < 0.0 else _piecewise_linear(0.0, math.inf, slope, False)


def _coded(smooth: Smooth, inplace: bool = False) -> Replacement:
    return Replacement(lambda over: QuantizedGradActivation(smooth, over), "codes", inplace)


@register(nn.SiLU, nn.Mish, nn.Hardswish, nn.SELU)
def _smooth_inplace(layer: nn.SiLU) -> Replacement:
    return _coded(SMOOTH[type(layer).__name__.lower()], layer.inplace)


@register(nn.Sigmoid, nn.Tanh, nn.Softsign, nn.LogSigmoid, nn.Tanhshrink)
def _smooth(layer: nn.Module) -> Replacement:
    return _coded(SMOOTH[type(layer).__name__.lower()])


@register(nn.GELU)
def _gelu(layer: nn.GELU) -> Replacement:
    return _coded(gelu(layer.approximate))


@register(nn.ELU)
def _elu(layer: nn.ELU) -> Replacement | None:
    return None if layer.alpha <= 0 else _coded(elu(float(layer.alpha)), layer.inplace)


@register(nn.CELU)
def _celu(layer: nn.CELU) -> Replacement | None:
    return None if layer.alpha <= 0 else _coded(celu(float(layer.alpha)), layer.inplace)


@register(nn.Softplus)
def _softplus(layer: nn.Softplus) -> Replacement:
    return _coded(softplus(float(layer.beta), float(layer.threshold)))


@register(nn.Hardsigmoid)
def _hardsigmoid(layer: nn.Hardsigmoid) -> Replacement:
    del layer
    return Replacement(lambda _: HardSigmoid(), "bits")


@register(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _conv_transpose(layer: nn.ConvTranspose2d) -> Replacement:
    return Replacement(lambda _: FrozenConvTranspose(layer))


@register(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
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


@register(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
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


@register(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
def _adaptive_avg_pool(layer: nn.AdaptiveAvgPool2d) -> Replacement:
    grid = numbers(cast(Any, layer.output_size), _axes(layer))
    return Replacement(lambda _: AdaptiveAvgPool(grid))


@register(
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
def _identity(_: nn.Module) -> Replacement:
    return Replacement(None)


def _axes(layer: nn.Module) -> int:
    return int(type(layer).__name__[-2])  # MaxPool2d: 2


def _dropout(p: float = 0.5, training: bool = True, inplace: bool = False) -> nn.Module | None:
    del inplace
    return None if training else nn.Dropout(p)  # training=True is on in eval too: the user's wish


# what the layer takes from the arguments behind the input; the functions' own order
LAYER_OF: dict[Any, Callable[..., nn.Module | None]] = {
    F.relu: lambda inplace=False: nn.ReLU(inplace),
    torch.relu: nn.ReLU,
    torch.relu_: lambda: nn.ReLU(inplace=True),
    "relu": nn.ReLU,
    "relu_": lambda: nn.ReLU(inplace=True),
    F.relu6: lambda inplace=False: nn.ReLU6(inplace),
    F.hardtanh: nn.Hardtanh,
    F.leaky_relu: nn.LeakyReLU,
    "relu6": nn.ReLU6,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    torch.tanh: nn.Tanh,
    F.tanh: nn.Tanh,
    torch.sigmoid: nn.Sigmoid,
    F.sigmoid: nn.Sigmoid,
    F.gelu: lambda approximate="none": nn.GELU(approximate),
    F.silu: lambda inplace=False: nn.SiLU(inplace),
    F.mish: lambda inplace=False: nn.Mish(inplace),
    F.hardswish: lambda inplace=False: nn.Hardswish(inplace),
    F.hardsigmoid: lambda inplace=False: nn.Hardsigmoid(inplace),
    F.elu: nn.ELU,
    F.selu: lambda inplace=False: nn.SELU(inplace),
    F.celu: nn.CELU,
    F.softplus: nn.Softplus,
    F.softsign: nn.Softsign,
    F.logsigmoid: nn.LogSigmoid,
    F.threshold: nn.Threshold,
    F.dropout: _dropout,
    F.dropout2d: _dropout,
    F.dropout3d: _dropout,
    "torchvision.ops.stochastic_depth.stochastic_depth": lambda p, _, training=True: _dropout(
        p, training
    ),
    F.max_pool1d: lambda *args, **kwargs: _functional_max_pool(nn.MaxPool1d, *args, **kwargs),
    F.max_pool2d: lambda *args, **kwargs: _functional_max_pool(nn.MaxPool2d, *args, **kwargs),
    F.max_pool3d: lambda *args, **kwargs: _functional_max_pool(nn.MaxPool3d, *args, **kwargs),
    F.avg_pool1d: nn.AvgPool1d,
    F.avg_pool2d: nn.AvgPool2d,
    F.avg_pool3d: nn.AvgPool3d,
    F.adaptive_avg_pool1d: nn.AdaptiveAvgPool1d,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    F.adaptive_avg_pool3d: nn.AdaptiveAvgPool3d,
}


def _functional_max_pool(
    kind: Callable[..., nn.Module],
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> nn.Module:
    return kind(kernel_size, stride, padding, dilation, return_indices, ceil_mode)


_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)  # the same as torch.conv1d and so on


def convolution_of(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[ConvOfWeights, tuple[Any, ...]] | None:
    """What computes ``F.conv2d(*args, **kwargs)``, if that is what it is, with which arguments.

    Args:
        target: A function.
        args: What the call passes.
        kwargs: What it passes by name.

    Returns:
        The module, and input, weight and bias; or None.
    """
    if target not in _CONVOLUTIONS:
        return None
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    tensors = (call.pop("input"), call.pop("weight"), call.pop("bias", None))
    values = [v for v in call.values() for v in (v if isinstance(v, (tuple, list)) else (v,))]
    if not all(isinstance(value, (int, str)) for value in values):
        return None  # computed in forward
    return ConvOfWeights(**call), tensors


def layer_of(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module | None:
    """The layer that computes ``target(x, *args, **kwargs)``, or None if no layer does.

    Args:
        target: A function, or a method's name.
        args: What the call passes behind its input.
        kwargs: What it passes by name.
    """
    build = LAYER_OF.get(target)
    if build is None:  # by name: what belongs to packages that need not be there
        home = f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', '')}"
        build = LAYER_OF.get(home)
    values = (*args, *kwargs.values())
    if build is None or any(isinstance(value, torch.fx.Node) for value in values):
        return None
    try:
        return build(*args, **kwargs)
    except TypeError:  # arguments that the layer has no word for
        return None
