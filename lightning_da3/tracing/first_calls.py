"""What a forward sets up when it is first called, and finds later: that is no state of it.

Such a forward hangs hooks on its layers, say, and notes that it did. It is traced twice, the second
time as the first has left it; what gives the same graph, and leaves nothing more, does so ever
after.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_da3.torch_private.modules import FORWARD_HOOKS
from lightning_da3.tracing.hooks import kinds_of

_PLAIN = (bool, int, float, str, type(None))
_ABSENT = object()


def is_plain(value: Any) -> bool:
    """Whether a value is one that a first call may leave in an attribute: no traced one is."""
    return type(value) in _PLAIN


@dataclass(frozen=True)
class Left:
    """What a call left behind.

    Attributes:
        attributes: Modules, the names of their attributes, and plain values.
        hooks: What hooks are held in, and those that were left in it.
    """

    attributes: Sequence[tuple[nn.Module, str, Any]] = ()
    hooks: Sequence[tuple[dict[int, Any], dict[int, Any]]] = ()

    def __bool__(self) -> bool:
        return bool(self.attributes or self.hooks)

    def put(self) -> Left:
        """Make modules as the call left them; gives what that replaced."""
        before = [(m, name, vars(m).get(name, _ABSENT)) for m, name, _ in self.attributes]
        held = [(hooks, dict(hooks)) for hooks, _ in self.hooks]
        for module, name, value in self.attributes:
            if value is _ABSENT:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = value
        for hooks, left in self.hooks:
            hooks.clear()
            hooks.update(left)
        return Left(before, held)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, modules are as the call left them."""
        before = self.put()
        try:
            yield
        finally:
            before.put()


# what libraries leave: the home of the hooks, and the attribute which says that they hang
_KNOWN = {"transformers.utils.output_capturing": "_output_capturing_hooks_installed"}


def as_never_called_(network: nn.Module) -> Left:
    """Take off the hooks that a library's own forward hangs on its layers whenever they are absent.

    They do nothing unless that forward asks for what they collect, and then it hangs them again.

    Args:
        network: A copy that nobody else uses.

    Returns:
        What it was; `Left.put` puts it back.
    """
    attributes, hooks = [], {}
    for home, note in _KNOWN.items():
        noted = [m for m in network.modules() if vars(m).get(note) is True]
        attributes += [(module, note, _ABSENT) for module in noted]
        for module in {inner for outer in noted for inner in outer.modules()}:
            theirs = {
                number
                for kind, held in kinds_of(module)
                for number, hook in held.items()
                if kind in FORWARD_HOOKS and getattr(hook, "__module__", None) == home
            }
            for _, held in kinds_of(module) if theirs else ():
                hooks[id(held)] = held, {n: h for n, h in held.items() if n not in theirs}
    return Left(attributes, list(hooks.values())).put()


def alike(one: fx.Graph, other: fx.Graph, root: nn.Module) -> bool:
    """Whether two graphs of `root` compute the same by the same nodes, whatever their names."""
    same: dict[fx.Node, fx.Node] = {}
    for a, b in zip_longest(one.nodes, other.nodes):
        if a is None or b is None or a.op != b.op:
            return False
        if a.target != b.target and not (a.op == "get_attr" and _is_equal(a, b, root)):
            return False
        given = fx.map_arg((a.args, a.kwargs), lambda node: same.get(node, node))
        try:
            if not bool(given == (b.args, b.kwargs)):
                return False
        except Exception:  # noqa: BLE001  # the user's own kind of value
            return False
        same[a] = b
    return True


def _is_equal(a: fx.Node, b: fx.Node, root: nn.Module) -> bool:
    """Whether two constants, made anew in every call, are the same."""
    first, second = (getattr(root, str(node.target), None) for node in (a, b))
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        return False
    return first.dtype == second.dtype and torch.equal(first, second)
