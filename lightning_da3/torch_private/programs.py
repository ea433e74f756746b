"""Recording what a function does as a graph, for batches of any size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from lightning_da3.torch_private.fake import new_fake_mode
from lightning_da3.torch_private.finding import needed

_USE = "exporting"
_make_fx: Any = needed("torch.fx.experimental.proxy_tensor:make_fx", _USE)
_SYMBOLS = "torch.fx.experimental.symbolic_shapes"
_ShapeEnv: Any = needed(f"{_SYMBOLS}:ShapeEnv", _USE)
_Context: Any = needed(f"{_SYMBOLS}:StatelessSymbolicContext", _USE)
_in_python: Any = needed("torch._dispatch.python:enable_python_dispatcher", _USE)
_DimDynamic: Any = needed(f"{_SYMBOLS}:DimDynamic", _USE)


def recorded(
    function: Callable[..., Any],
    tensors: Sequence[Tensor],
    batched: Sequence[bool],
    decompositions: Mapping[Any, Callable[..., Any]],
) -> fx.GraphModule:
    """The graph of ``function(*tensors)``, in PyTorch's kernels and custom ops.

    Args:
        function: Takes tensors and returns a sequence of tensors.
        tensors: Examples; only shapes, types and strides matter.
        batched: Which of them have a first axis that may be of any size.
        decompositions: What to record instead of some kernels.
    """
    mode: Any = new_fake_mode(allow_non_fake_inputs=True, shape_env=_ShapeEnv())
    inputs = [_fake(mode, t, b) for t, b in zip(tensors, batched, strict=True)]
    with mode, _in_python():  # kernels in Python know sizes that are symbols
        return _make_fx(function, dict(decompositions))(*inputs)  # type: ignore[no-any-return]


def _fake(mode: Any, tensor: Tensor, batched: bool) -> Tensor:
    if not batched:
        return mode.from_tensor(tensor, static_shapes=True)  # type: ignore[no-any-return]
    sizes = [_DimDynamic.DYNAMIC] + [_DimDynamic.STATIC] * (tensor.dim() - 1)
    return mode.from_tensor(  # type: ignore[no-any-return]
        tensor, symbolic_context=_Context(dynamic_sizes=sizes)
    )
