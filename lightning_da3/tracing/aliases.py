"""Which values of a graph share memory, and which of them were written to behind a reader's back.

``y = x.view(-1); y.relu_(); f(x)``: eager PyTorch gives f what was written through y. In a graph,
whose layers are replaced by others that do not write, x would be what it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx, nn

from lightning_da3.layers import (
    attribute_is_number,
    facts_of_call,
    is_in_place,
    layer_of,
    may_share,
)
from lightning_da3.tracing.graphs import module_in
from lightning_da3.tracing.items import puts_back, with_item
from lightning_da3.tracing.probes import PROBED, storages

# whose results share memory with what they are made of, and not with one another
_DISJOINT = ("chunk", "split", "unbind", "tensor_split", "unsafe_chunk", "split_with_sizes")


class Aliases:
    """The groups of nodes that share memory.

    Args:
        whole: What is written into the inputs, nobody else reads.
    """

    def __init__(self, *, whole: bool) -> None:
        self.whole = whole
        self._group: dict[fx.Node, int] = {}
        self._of_storage: dict[int, int] = {}
        self._stale: dict[fx.Node, fx.Node] = {}

    def copy(self) -> Aliases:
        """One that goes its own way."""
        twin = Aliases(whole=self.whole)
        twin._group, twin._stale = dict(self._group), dict(self._stale)
        twin._of_storage = dict(self._of_storage)
        return twin

    def add(self, node: fx.Node, root: nn.Module, changed: Iterable[fx.Node] = ()) -> str:
        """Take a new node.

        Args:
            node: The node.
            root: The module that is traced.
            changed: The arguments that the call wrote into, on the probes.

        Returns:
            What a graph cannot hold; "" if it is fine.
        """
        if not _asks_for_number(node):
            for i in node.all_input_nodes:
                if i in self._stale and not puts_back(node, self._stale[i]):
                    by = self._stale[i].name
                    return f"it reads {i.name} after {by} wrote to it through another name"
        self._join(node, root)
        target = written(node, root)
        if target is not None:
            problem = self._write(node, target)
            if problem:
                return problem
            changed = [i for i in changed if self._group[i] != self._group[target]]
        for i in changed:
            problem = self._touch(node, i)
            if problem:
                return problem
        return ""

    def _join(self, node: fx.Node, root: nn.Module) -> None:
        keys = list(storages(node.meta.get(PROBED, ())))
        groups = [self._of_storage[key] for key in keys if key in self._of_storage]
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and may_share(node, module_in(root, node)):
            groups.append(self._group[source])
        group = groups[0] if groups else len(self._group)
        for other in set(groups[1:]) - {group}:  # what two groups share makes them one
            for member, of in self._group.items():
                if of == other:
                    self._group[member] = group
        self._group[node] = group
        self._of_storage.update(dict.fromkeys(keys, group))

    def _write(self, node: fx.Node, target: fx.Node) -> str:
        self._group[node] = self._group[target]
        layer = node.op == "call_module" or layer_of(node.target, (), {}) is not None
        members = [m for m in self._group if self._group[m] == self._group[target]]
        if any(m.op == "get_attr" for m in members):
            return f"it writes into {next(m for m in members if m.op == 'get_attr').target}"
        if not self.whole and not layer and any(m.op == "placeholder" for m in members):
            return "it writes into its input"
        for member in members:
            if member not in (node, target) and not _apart(member, target):
                self._stale.setdefault(member, node)
        self._stale.pop(target, None)
        return ""

    def _touch(self, node: fx.Node, argument: fx.Node) -> str:
        """A call wrote into what shares memory with one of its arguments."""
        for member in self._group:
            if self._group[member] == self._group[argument] and member is not node:
                if member.op == "get_attr":
                    return f"{node.name} writes into {member.target}"
                self._stale.setdefault(member, node)
        return ""


def written(node: fx.Node, root: nn.Module) -> fx.Node | None:
    """The value that a node writes its result into."""
    x = node.args[0] if node.args else None
    if node.op == "call_module":
        writes = bool(getattr(module_in(root, node), "inplace", False)) or is_in_place(node)
    elif node.op in ("call_function", "call_method"):
        x = node.kwargs.get("out", x)
        made = layer_of(node.target, node.args[1:], dict(node.kwargs))
        writes = is_in_place(node) or "out" in node.kwargs or bool(node.kwargs.get("inplace"))
        writes = writes or bool(getattr(made, "inplace", False)) or node.target is with_item
    else:
        return None
    return x if writes and isinstance(x, fx.Node) else None


def _apart(one: fx.Node, other: fx.Node) -> bool:
    """Whether two values are different items of what cuts a tensor into parts."""

    def source(node: fx.Node) -> Any:
        item = getattr(node.target, "__name__", "") == "getitem"
        return node.args[0] if item and isinstance(node.args[1], int) else None

    whole = source(one)
    if whole is None or whole is not source(other) or one.args[1] == other.args[1]:
        return False
    return str(getattr(whole.target, "__name__", whole.target)) in _DISJOINT


def _asks_for_number(node: fx.Node) -> bool:
    attribute = node.target is getattr and attribute_is_number(node.args[1])
    return attribute or facts_of_call(node).gives_number
