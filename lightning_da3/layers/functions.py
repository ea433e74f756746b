"""Functions and methods. A name stands for PyTorch's functions, operators and methods of that name.

Those that do what a layer does name the layer, so that every rule is written once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lightning_da3.layers.facts import TABLE, UNKNOWN, Facts
from lightning_da3.nn.convolution import ConvOfWeights

# --- what the table says of names -----------------------------------------------------------------


def _names(names: str, **facts: Any) -> None:
    TABLE.update(dict.fromkeys(names.split(), Facts(**facts)))


_ELEMENTWISE: dict[str, Any] = {"elementwise": True, "keeps": "nothing"}
_names("add add_ radd", does="sum", **_ELEMENTWISE)
_names("iadd", does="sum", in_place=True, **_ELEMENTWISE)
_names("sub sub_ rsub neg", **_ELEMENTWISE)
_names("isub", in_place=True, **_ELEMENTWISE)
_names("mul mul_ rmul", elementwise=True, does="product")
_names("imul", elementwise=True, does="product", in_place=True)
_names("truediv div div_ divide true_divide", elementwise=True, does="quotient", steep=True)
_names("itruediv", elementwise=True, does="quotient", in_place=True, steep=True)
_names("pow float_power", steep=True)
_names("ipow", in_place=True, steep=True)
_names(
    "reciprocal sqrt rsqrt log log2 log10 log1p xlogy logit atan2 arctan2 acos arccos asin arcsin "
    "atanh arctanh lgamma digamma polygamma sin cos tan sinc hypot",
    steep=True,
)
_names("matmul bmm mm addmm einsum dot", does="product")
_names("cat concat concatenate", does="concatenation", keeps="nothing")
_names("softmax", does="softmax")

_VIEW: dict[str, Any] = {"view": True, "keeps": "nothing"}
_names("view", copying="reshape", **_VIEW)
_names("view_as", copying="reshape_as", **_VIEW)
_names("permute", does="permutation", **_VIEW)
_names(
    "getitem chunk split unbind reshape flatten unflatten transpose t movedim moveaxis swapaxes "
    "swapdims narrow select squeeze unsqueeze expand detach unsafe_chunk",
    **_VIEW,
)
_names("tensor_split hsplit vsplit diagonal real imag as_strided expand_as", view=True)
# where nothing is to be done, the argument itself
_names("contiguous to float half double bfloat16 type type_as", **_VIEW)

_names(
    "size dim ndimension numel len stride is_floating_point element_size",
    gives_number=True,
    keeps="nothing",
)

_names(
    "stack hstack vstack clone getattr repeat mean sum pad _assert "
    "roll flip interpolate upsample pixel_shuffle pixel_unshuffle unfold fold constant_pad_nd "
    "one_hot ones_like zeros_like linear index_select",
    keeps="nothing",
)

_names(
    "linalg_eig linalg_eigh linalg_eigvals linalg_eigvalsh linalg_svd linalg_svdvals linalg_qr "
    "linalg_inv linalg_pinv linalg_det linalg_slogdet linalg_cholesky linalg_solve linalg_lstsq "
    "linalg_lu linalg_solve_triangular svd qr inverse pinverse det logdet slogdet cholesky "
    "cholesky_inverse cholesky_solve lu_solve triangular_solve topk sort msort argsort kthvalue "
    "median nanmedian mode max min amax amin aminmax argmax argmin cummax cummin "
    "sign sgn angle frac round floor ceil trunc floor_divide remainder fmod "
    "abs absolute clamp clip clamp_min clamp_max maximum minimum fmax fmin copysign heaviside "
    "greater greater_equal less less_equal not_equal isclose signbit "
    "softshrink hardshrink prelu rrelu threshold",
    sensitive=True,
)
_names("floordiv mod eq ne lt le gt ge", keeps="nothing", sensitive=True)

# attributes of a tensor that are not tensors
NUMBERS = ("shape", "ndim", "dtype", "device")


# --- those that do what a layer does --------------------------------------------------------------


def _dropout(p: float = 0.5, training: bool = True, inplace: bool = False) -> nn.Module | None:
    del inplace
    return None if training else nn.Dropout(p)  # training=True is on in eval too: the user's wish


def _max_pool(kind: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def layer(
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> nn.Module:
        return kind(kernel_size, stride, padding, dilation, return_indices, ceil_mode)

    return layer


# what the layer takes from the arguments behind the input; the functions' own order
_LAYER_OF: dict[str, Callable[..., nn.Module | None]] = {
    "relu": lambda inplace=False: nn.ReLU(inplace),
    "relu_": lambda: nn.ReLU(inplace=True),
    "relu6": lambda inplace=False: nn.ReLU6(inplace),
    "hardtanh": nn.Hardtanh,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": lambda approximate="none": nn.GELU(approximate),
    "silu": lambda inplace=False: nn.SiLU(inplace),
    "mish": lambda inplace=False: nn.Mish(inplace),
    "hardswish": lambda inplace=False: nn.Hardswish(inplace),
    "hardsigmoid": lambda inplace=False: nn.Hardsigmoid(inplace),
    "elu": nn.ELU,
    "selu": lambda inplace=False: nn.SELU(inplace),
    "celu": nn.CELU,
    "softplus": nn.Softplus,
    "softsign": nn.Softsign,
    "log_sigmoid": nn.LogSigmoid,
    "_threshold": nn.Threshold,  # what torch.nn.functional.threshold is called
    "dropout": _dropout,
    "dropout2d": _dropout,
    "dropout3d": _dropout,
    "torchvision.ops.stochastic_depth.stochastic_depth": lambda p, _, training=True: _dropout(
        p, training
    ),
    "max_pool1d": _max_pool(nn.MaxPool1d),
    "max_pool2d": _max_pool(nn.MaxPool2d),
    "max_pool3d": _max_pool(nn.MaxPool3d),
    "avg_pool1d": nn.AvgPool1d,
    "avg_pool2d": nn.AvgPool2d,
    "avg_pool3d": nn.AvgPool3d,
    "adaptive_avg_pool1d": nn.AdaptiveAvgPool1d,
    "adaptive_avg_pool2d": nn.AdaptiveAvgPool2d,
    "adaptive_avg_pool3d": nn.AdaptiveAvgPool3d,
}
_DECIDES = ("relu", "relu_", "relu6", "hardtanh", "leaky_relu", "_threshold")
TABLE.update(
    {
        name: Facts(layer=layer, sensitive="max_pool" in name or name in _DECIDES)
        for name, layer in _LAYER_OF.items()
    }
)
_names(
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool1d_with_indices "
    "max_pool2d_with_indices max_pool3d_with_indices",
    sensitive=True,
)


# activations of libraries with a backward of their own, which keeps the whole input
_AS_PYTORCH = {
    "pytorchvideo.layers.swish.SwishFunction": F.silu,
    "monai.networks.blocks.activation.SwishImplementation": F.silu,
    "efficientnet_pytorch.utils.SwishImplementation": F.silu,
    "timm.layers.activations_me.SwishAutoFn": F.silu,
    "timm.layers.activations_me.MishAutoFn": F.mish,
    "timm.layers.activations_me.HardSwishAutoFn": F.hardswish,
    "timm.layers.activations_me.HardSigmoidAutoFn": F.hardsigmoid,
}


# --- looking up -----------------------------------------------------------------------------------

_PYTORCH = ("torch", "_operator", "builtins")  # where functions are known by their name


def facts_of_function(target: Any) -> Facts:
    """What is known of a function, or of the method of this name."""
    if isinstance(target, str):
        return TABLE.get(target, UNKNOWN)
    name, home = getattr(target, "__name__", ""), str(getattr(target, "__module__", None) or "")
    for key in (target, f"{home}.{name}"):
        if key in TABLE:
            return TABLE[key]
    if home.split(".")[0] in _PYTORCH or getattr(torch.Tensor, name, None) is target:
        return TABLE.get(name[2:-2] if name.startswith("__") else name, UNKNOWN)
    return UNKNOWN


def as_pytorch(function: Any) -> Callable[..., Any] | None:
    """PyTorch's function that computes what ``Function.apply`` of a library does; None: none."""
    owner = getattr(function, "__self__", None)
    name = f"{getattr(owner, '__module__', '')}.{getattr(owner, '__qualname__', '')}"
    return _AS_PYTORCH.get(name)


def layer_of(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module | None:
    """The layer that computes ``target(x, *args, **kwargs)``, or None if no layer does.

    Args:
        target: A function, or a method's name.
        args: What the call passes behind its input.
        kwargs: What it passes by name.
    """
    build = facts_of_function(target).layer
    computed: list[torch.fx.Node] = []  # such as sizes, alone or in tuples
    torch.fx.map_arg((args, kwargs), computed.append)
    if build is None or computed:
        return None
    try:
        return build(*args, **kwargs)
    except TypeError:  # arguments that the layer does not take
        return None


_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)  # the same as torch.conv1d and so on


def convolution_of(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[ConvOfWeights, tuple[Any, ...]] | None:
    """The module that computes a call like ``F.conv2d(*args, **kwargs)``, and its arguments.

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
