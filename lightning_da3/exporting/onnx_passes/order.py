"""The order of a training step in runtimes that choose it themselves.

ONNX Runtime computes what a result needs, and that late: it would run the whole forward, and pack
masks and codes only when the backward reads them. Until then every activation that they are made
from would be held, as in plain training.
"""

from __future__ import annotations

import math
from typing import Any

from lightning_da3.exporting.onnx_passes.nodes import Nodes

SMALL = 4096  # elements of a sample; where an activation has no more, nothing is gained


def keep_before_going_on_(model: Any, loss: str, constant: set[int]) -> None:
    """Let the forward go on from an activation only when what is kept of it is there.

    ::

        k = pack(x); y = f(x)   becomes   k = pack(x); y = f(reshape(x, 0 * k[:1]))

    To copy every side of the input is what a zero says to `Reshape`, which takes no time.

    Args:
        model: An ir model with shapes, edited in place; its order is the one to keep.
        loss: The name of the output that the forward gives.
        constant: Values that no input decides.
    """
    nodes = list(model.graph)
    (end,) = (v.producer() for v in model.graph.outputs if v.name == loss)
    place = {id(n): i for i, n in enumerate(nodes)}
    forward = _needed_by(end)
    aside = [n for n in nodes[: place[id(end)]] if id(n) not in forward]
    kept: dict[int, tuple[Any, list[Any]]] = {}
    sources: dict[int, dict[int, Any]] = {}  # activations that a value aside is made from
    for node in aside:
        found: dict[int, Any] = {}
        for v in node.inputs:
            made = None if v is None else v.producer()
            if v is None or id(v) in constant or made is None:
                continue
            found.update(sources.get(id(made), {}) if id(made) not in forward else {id(v): v})
        sources[id(node)] = found
        for k in node.outputs:
            if any(place[id(user)] > place[id(end)] for user in k.consumers()):
                for x in found.values():
                    kept.setdefault(id(x), (x, []))[1].append(k)
    for x, values in kept.values():
        last = max(place[id(k.producer())] for k in values)
        later = [u for u in x.uses() if id(u.node) in forward and place[id(u.node)] > last]
        if later and _large(x):
            _go_on_after_(model, x, values, later)


def _needed_by(end: Any) -> set[int]:
    """The nodes that a node's results depend on, and itself."""
    found: set[int] = set()
    waiting = [end]
    while waiting:
        node = waiting.pop()
        if node is not None and id(node) not in found:
            found.add(id(node))
            waiting += [v.producer() for v in node.inputs if v is not None]
    return found


def _large(x: Any) -> bool:
    sides = [] if x.shape is None else list(x.shape)[1:]
    return all(isinstance(n, int) for n in sides) and math.prod(sides) > SMALL


def _go_on_after_(model: Any, x: Any, values: list[Any], later: list[Any]) -> None:
    nodes = Nodes(model, f"{x.name}.on")
    flat, first = nodes.constant([-1]), nodes.constant([0])
    shape = nodes.constant([0] * len(x.shape))
    for k in values:
        number = nodes.call("Gather", nodes.call("Reshape", k, flat), first)
        shape = nodes.call("Mul", nodes.call("Cast", number, to=nodes.ir.DataType.INT64), shape)
    on = nodes.call("Reshape", x, shape)
    on.shape, on.dtype, on.type = x.shape, x.dtype, x.type
    anchor = min((u.node for u in later), key=[*model.graph].index)
    model.graph.insert_before(anchor, nodes.made)
    for use in later:
        use.node.replace_input_with(use.idx, on)
