"""Functions of the user that are nodes of a graph."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from types import CodeType
from typing import Any

from torch import nn

from lightning_da3.layers import register
from lightning_da3.nn.python import PythonFunction

register(PythonFunction, random=True)  # for all that anybody knows


class PythonFunctions:
    """The modules that call functions, while a graph is traced.

    Args:
        root: The module that is traced, which gets them.
        reasons: Why functions are nodes, by their code.
    """

    def __init__(self, root: nn.Module, reasons: Mapping[CodeType, str]) -> None:
        self.root, self.reasons = root, reasons
        self._names: dict[Callable[..., Any], str] = {}

    def name_of(self, function: Callable[..., Any]) -> str:
        """The name of the module that calls a function."""
        if function not in self._names:
            owner = getattr(function, "__self__", function)  # of a bound `apply`
            name = re.sub(r"\W", "", str(getattr(owner, "__name__", ""))) or "function"
            while hasattr(self.root, name):
                name += "_"
            self.root.add_module(name, PythonFunction(function))
            self._names[function] = name
        return self._names[function]

    def reasons_by_name(self) -> dict[str, str]:
        """Why each is a node, in plain words, by the name of its module."""
        return {name: self._reason(function) for function, name in self._names.items()}

    def forget(self) -> None:
        """Take all of them away: there is no graph that calls them."""
        for name in self._names.values():
            delattr(self.root, name)

    def _reason(self, function: Any) -> str:
        owner = getattr(function, "__self__", None)
        if owner is not None:
            return f"{owner.__name__}: its backward is its own"
        return self.reasons.get(inspect.unwrap(function).__code__, "")
