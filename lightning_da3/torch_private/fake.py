"""Fake tensors, which have no values, and modes that see every operation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_da3.torch_private.finding import found, needed

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeCopyMode,
        FakeTensor,
        FakeTensorMode,
    )
    from torch.utils._python_dispatch import TorchDispatchMode
else:
    _PLACE, _USE = "torch._subclasses.fake_tensor", "planning, and predicting a training step,"
    DataDependentOutputException = needed(f"{_PLACE}:DataDependentOutputException", _USE)
    DynamicOutputShapeException = needed(f"{_PLACE}:DynamicOutputShapeException", _USE)
    FakeCopyMode = needed(f"{_PLACE}:FakeCopyMode", _USE)
    FakeTensor = needed(f"{_PLACE}:FakeTensor", _USE)
    FakeTensorMode = needed(f"{_PLACE}:FakeTensorMode", _USE)
    TorchDispatchMode = needed("torch.utils._python_dispatch:TorchDispatchMode", _USE)

__all__ = [
    "LOGGER",
    "READ_ONE_VALUE",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeCopyMode",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "is_fake",
    "is_wrapper",
    "new_fake_mode",
    "proxy_mode",
    "without_modes",
]

LOGGER = "torch._subclasses.fake_tensor"  # the name of the log that fake tensors write to
without_modes: Any = found("torch.utils._python_dispatch:_disable_current_modes", nullcontext)
"""A context in which no mode sees what is called."""

READ_ONE_VALUE = found("torch:ops.aten._local_scalar_dense.default", None)  # what `item` calls


class _Mode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Leaves devices that are not there alone.

    PyTorch's own gives a machine without GPUs eight that do nothing, once and for all. Autograd
    would start a thread for each, and no process forked later could compute gradients.
    """

    @property
    def avoid_device_init(self) -> bool:
        return False


def new_fake_mode(*, allow_non_fake_inputs: bool = False, shape_env: Any = None) -> FakeTensorMode:
    """A mode in which tensors have no values.

    Args:
        allow_non_fake_inputs: Tensors that have values may be used beside.
        shape_env: What knows sizes that are symbols; None: all are numbers.
    """
    return _Mode(allow_non_fake_inputs=allow_non_fake_inputs, shape_env=shape_env)


def _is_instance(x: Any) -> bool:
    return isinstance(x, FakeTensor)


def _flattens(x: Any) -> bool:
    return hasattr(x, "__tensor_flatten__") and hasattr(x, "__tensor_unflatten__")


is_fake: Callable[[Any], bool] = found("torch._subclasses.fake_tensor:is_fake", _is_instance)
"""Whether a tensor has no values; so is one that wraps or views such a tensor."""

is_wrapper: Callable[[Tensor], bool] = found(
    "torch.utils._python_dispatch:is_traceable_wrapper_subclass", _flattens
)
"""Whether a tensor is made of others, which ``__tensor_flatten__`` names."""

proxy_mode: Callable[[], Any] = found(
    "torch.fx.experimental.proxy_tensor:get_proxy_mode", lambda: None
)
"""The mode that records operations as a graph, as `make_fx` does; None where nothing does."""
