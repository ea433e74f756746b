"""``linear(x)`` and ``attention(x, x, x)`` become the same with quicker products."""

from __future__ import annotations

from torch import nn

from lightning_da3.config import DA3Config
from lightning_da3.nn.linear import freeze_layers_
from lightning_da3.nn.python import PythonFunction
from lightning_da3.planning.plan import Plan
from lightning_da3.tracing.graphs import Traced


def freeze_linear_layers_(traced: Traced, plan: Plan, config: DA3Config) -> None:
    """Let every linear layer and attention be its frozen twin, in graphs and in Python parts.

    What must itself stay Python stays what it is.
    """
    del plan, config
    python = [traced.root.get_submodule(path) for path in traced.python]
    functions = [m.function for m in python if isinstance(m, PythonFunction)]
    layers = [function for function in functions if isinstance(function, nn.Module)]
    freeze_layers_(traced.root, {*python, *layers})
