"""Kernels of PyTorch: the backward of its functions, products of oneDNN, codes of FBGEMM.

Where a backward is missing, autograd of the public function gives the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_da3.torch_private.finding import found, missing

_aten = torch.ops.aten
Kernel = Callable[..., Tensor]


def _kernel(name: str, otherwise: Any) -> Any:
    return found(f"torch:ops.aten.{name}", otherwise)


def _gradient(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Tensor:
    """dL/dx, by autograd, of ``y = function(x)``."""
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        x = x.detach().requires_grad_()
        y = function(x)
    return torch.autograd.grad(y, x, grad)[0]


# --- elementwise functions; each takes dL/dy and x, or y


def _of(function: Callable[..., Tensor]) -> Kernel:
    def backward(grad: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _gradient(lambda t: function(t, *args, **kwargs), x, grad)

    return backward


def _elu(
    grad: Tensor, alpha: float, scale: float, input_scale: float, _is_result: bool, x: Tensor
) -> Tensor:
    below = alpha * scale * input_scale * torch.exp(input_scale * x.clamp(max=0.0))
    return grad * torch.where(x > 0.0, scale, below)


silu_backward: Kernel = _kernel("silu_backward", _of(F.silu))
gelu_backward: Kernel = _kernel("gelu_backward", _of(F.gelu))
hardswish_backward: Kernel = _kernel("hardswish_backward", _of(F.hardswish))
mish_backward: Kernel = _kernel("mish_backward", _of(F.mish))
softplus_backward: Kernel = _kernel("softplus_backward", _of(F.softplus))
elu_backward: Kernel = _kernel("elu_backward", _elu)
sigmoid_backward: Kernel = _kernel("sigmoid_backward", lambda grad, y: grad * y * (1.0 - y))
tanh_backward: Kernel = _kernel("tanh_backward", lambda grad, y: grad * (1.0 - y * y))


# --- pools, by their number of axes; each takes dL/dy and a tensor of the shape of x


def _max_pool(grad: Tensor, x: Tensor, *args: Any) -> Tensor:
    kernel, index = args[0], args[-1]
    last = len(kernel)
    grad_x = grad.new_zeros(*x.shape[:-last], x.shape[-last:].numel())
    return grad_x.scatter_add_(-1, index.flatten(-last), grad.flatten(-last)).view(x.shape)


def _adaptive(pool: Callable[..., Tensor], axes: int) -> Kernel:
    return lambda grad, x: _gradient(lambda t: pool(t, grad.shape[-axes:]), x, grad)


MAX_POOL_BACKWARD: Mapping[int, Kernel] = {
    axes: _kernel(f"max_pool{axes}d_with_indices_backward", _max_pool) for axes in (2, 3)
}
AVG_POOL_BACKWARD: Mapping[int, Kernel] = {
    2: _kernel("avg_pool2d_backward", _of(F.avg_pool2d)),
    3: _kernel("avg_pool3d_backward", _of(F.avg_pool3d)),
}
ADAPTIVE_AVG_POOL_BACKWARD: Mapping[int, Kernel] = {
    2: _kernel("_adaptive_avg_pool2d_backward", _adaptive(F.adaptive_avg_pool2d, 2)),
    3: _kernel("_adaptive_avg_pool3d_backward", _adaptive(F.adaptive_avg_pool3d, 3)),
}


# --- resampling, by the number of axes


def _upsample(grad: Tensor, out: Sequence[int], size: Sequence[int]) -> Tensor:
    """Takes dL/dy, the spatial size of y and the size of x."""
    return _gradient(lambda t: F.interpolate(t, size=list(out)), grad.new_empty(size), grad)


def _sample(
    grad: Tensor, x: Tensor, grid: Tensor, mode: int, padding: int, align: bool, _wanted: Any
) -> tuple[Tensor, None]:
    """Takes dL/dy, a tensor of the shape of x, and the points; their gradient is left out."""
    modes, paddings = ("bilinear", "nearest"), ("zeros", "border", "reflection")

    def sample(t: Tensor) -> Tensor:
        return F.grid_sample(t, grid, modes[mode], paddings[padding], align)

    return _gradient(sample, x, grad), None


UPSAMPLE_NEAREST_BACKWARD: Mapping[int, Kernel] = {
    axes: _kernel(f"upsample_nearest{axes}d_backward", _upsample) for axes in (1, 2, 3)
}
GRID_SAMPLE_BACKWARD: Mapping[int, Callable[..., tuple[Tensor, Tensor | None]]] = {
    axes: _kernel(f"grid_sampler_{axes}d_backward", _sample) for axes in (2, 3)
}


# --- convolutions and norms


def _convolution(
    grad: Tensor, x: Tensor, weight: Tensor, _bias_size: Any, *how: Any
) -> tuple[Tensor | None, Tensor | None, None]:
    """Gradients of x and the weight, as far as the last argument asks for them."""
    *geometry, wanted = how
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        pairs = zip((x, weight), wanted, strict=False)
        leaves = [t.detach().requires_grad_(need) for t, need in pairs]
        y = _aten.convolution(*leaves, None, *geometry)
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    grads = iter(torch.autograd.grad(y, asked, grad) if asked else ())
    grad_x, grad_weight = [next(grads) if leaf.requires_grad else None for leaf in leaves]
    return grad_x, grad_weight, None


def _group_norm(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    samples: int,
    channels: int,
    pixels: int,
    groups: int,
    _wanted: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (N, C, ..), scale (C,) and shift (C,); mean and rstd are of each group."""
    rows = (samples, groups, channels // groups, pixels)
    normal = (x.reshape(rows) - mean.view(samples, groups, 1, 1)) * rstd.view(samples, groups, 1, 1)
    grad = grad.reshape(rows)
    grad_scale, grad_shift = (grad * normal).sum((0, 3)), grad.sum((0, 3))
    grad = grad * scale.view(1, groups, -1, 1)
    along = normal * (grad * normal).mean((2, 3), keepdim=True)
    grad_x = (grad - grad.mean((2, 3), keepdim=True) - along) * rstd.view(samples, groups, 1, 1)
    return grad_x.reshape(x.shape), grad_scale.view(-1), grad_shift.view(-1)


convolution_backward: Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]] = _kernel(
    "convolution_backward", _convolution
)
native_group_norm_backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = _kernel(
    "native_group_norm_backward", _group_norm
)


# --- other libraries' kernels; None where they are missing, and other code does the same

LINEAR_POINTWISE: Any = found("torch:ops.mkldnn._linear_pointwise", None)
"""``x matrix^T + bias`` of oneDNN; takes these and what follows them."""

ENCODE_ROWS: Any = found("torch:ops.quantized.embedding_bag_byte_prepack", None)
"""Codes of the rows of a float32 matrix, a byte an element, then each row's step and minimum."""

DECODE_ROWS: Any = found("torch:ops.quantized.embedding_bag_byte_unpack", None)
"""The rows that `ENCODE_ROWS` coded."""


# --- what is known of kernels

_FORMULAS = "torch.utils.flop_counter:flop_registry"
_formulas: Any = found(_FORMULAS, None)


def flop_formula(kernel: Any) -> Callable[..., Any] | None:
    """The function that counts the FLOPs of a kernel of PyTorch; None if it counts as none."""
    if _formulas is None:
        missing(_FORMULAS, "counting FLOPs")()
    formula: Callable[..., Any] | None = _formulas.get(kernel)
    return formula


def kernel_of(overload: Any) -> Any:
    """The kernel, such as ``torch.ops.aten.mm``, that an overload of it belongs to."""
    packet = getattr(overload, "_overloadpacket", None)
    if packet is not None:
        return packet
    namespace, name = overload.name().split("::")
    return getattr(getattr(torch.ops, namespace), name.split(".")[0])
