"""What shape every value of a graph has, on fake tensors of a guessed input."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from lightning_da3.layers import ADAPTIVE_POOLS, CONVS
from lightning_da3.memory import fake_mode_of
from lightning_da3.memory.fake import quiet
from lightning_da3.memory.names import mutable
from lightning_da3.nn.frozen import numbers
from lightning_da3.planning.layers import layer_called
from lightning_da3.torch_private.fake import new_fake_mode
from lightning_da3.tracing.graphs import Traced, module_of
from lightning_da3.tracing.guards import GUARDS
from lightning_da3.tracing.guessing import first_sample, guesses
from lightning_da3.tracing.probes import UNKNOWN, call_layer
from lightning_da3.tracing.watching import unchanged

Shapes = dict[fx.Node, tuple[int, ...]]


class _Unknown:
    """Stands for a value that follows from the values of the network's input."""


_MASKS = ("key_padding_mask", "attn_mask")  # of attention, whose result has the queries' shape


class _Recorder(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.graph_module = gm
        self.shapes: Shapes = {}

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        # the graph's own code passes new lists, which functions may write into
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return mutable(args), mutable(kwargs)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The next argument; nobody gives one that has no name."""
        return {} if target.startswith("**") else super().placeholder(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        if n.target in GUARDS:  # one sample may be decided on otherwise
            return None
        if self._needs_unknown(n):
            return _Unknown
        try:
            result = super().run_node(n)
        except UNKNOWN:
            return _Unknown
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
        return result

    def _needs_unknown(self, n: fx.Node) -> bool:
        unknown = {i for i in n.all_input_nodes if self.env.get(i) is _Unknown}
        if unknown and type(module_of(self.graph_module, n)) is nn.MultiheadAttention:
            unknown -= {n.kwargs.get(name) for name in _MASKS}
        return bool(unknown)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = {name: None if x is _Unknown else x for name, x in kwargs.items()}
        return call_layer(self.fetch_attr(target), args, kwargs)


def find_shapes(
    gm: fx.GraphModule, examples: Sequence[Any] | None = None, samples: int = 1
) -> Shapes:
    """Shapes of one sample's values, by node; empty if no guess fits the network.

    Args:
        gm: A traced network.
        examples: Its arguments, if they are known: of tensors the first sample counts.
        samples: How often that sample is taken.
    """
    mode = fake_mode_of(gm) or new_fake_mode(allow_non_fake_inputs=True)
    given = [] if examples is None else [first_sample(examples, samples), list(examples)]
    for inputs in itertools.chain(given, guesses(gm, samples)):
        # the user's own forward on a guess: anything can go wrong, and then nothing is known
        with quiet(), contextlib.suppress(Exception), mode, unchanged(gm):
            recorder = _Recorder(gm)
            with torch.no_grad():
                recorder.run(*mutable([_without_values(i) for i in inputs]))
            return recorder.shapes
    return {}


def _without_values(x: Any) -> Any:
    return torch.zeros(x.shape, dtype=x.dtype) if isinstance(x, Tensor) else x


class InputSize(NamedTuple):
    """How large a network's input is.

    Attributes:
        axes: Of the first convolution.
        whole: Positions of the first argument, by axis; empty if it is not known.
        samples: How many samples the network's parts are called with, see `Part.inputs`.
    """

    axes: int = 0
    whole: tuple[int, ...] = ()
    samples: int = 0

    def positions(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The axes of an input that are no samples, nor channels, which sound may not have."""
        return shape[1:] if len(shape) == 1 + self.axes else shape[2:]


def input_size(traced: Traced) -> InputSize:
    """How large the input of a traced network is, as far as it is known or was guessed."""
    convs = (m for m in traced.root.modules() if isinstance(m, CONVS))
    axes = next((conv.weight.dim() - 2 for conv in convs), 0)
    first = traced.inputs[0] if traced.inputs else None
    if not isinstance(first, Tensor) or not first.dim():
        return InputSize(axes)
    shape = tuple(first.shape)
    return InputSize(axes, InputSize(axes).positions(shape), shape[0] + 1)


def sizes(gm: fx.GraphModule, shapes: Shapes) -> dict[fx.Node, float]:
    """Elements of every node's value for one sample; in relation to each other without shapes."""
    found: dict[fx.Node, float] = {}
    for node in gm.graph.nodes:
        before = max((found[i] for i in node.all_input_nodes), default=1.0)
        if node in shapes:
            found[node] = float(math.prod(shapes[node]))
        elif shapes:
            found[node] = before  # a tuple, say
        else:
            found[node] = before * _growth(layer_called(gm, node))
    return found


def _growth(layer: nn.Module | None) -> float:
    if isinstance(layer, CONVS):
        return layer.out_channels / layer.in_channels / math.prod(layer.stride)
    if isinstance(layer, nn.Linear):
        return layer.out_features / layer.in_features
    if isinstance(layer, ADAPTIVE_POOLS):
        return 1e-3
    return 1.0


def reductions(gm: fx.GraphModule) -> dict[fx.Node, float]:
    """By how much strides make every node's map smaller than the network's input, on one axis."""
    found: dict[fx.Node, float] = {}
    for node in gm.graph.nodes:
        before = max((found[i] for i in node.all_input_nodes), default=1.0)
        layer = layer_called(gm, node)
        stride = getattr(layer, "stride", 1) if layer is not None else 1
        found[node] = before * (max(numbers(stride, 1)) if stride else 1)
    return found
