"""What traced code calls: other functions stand in for some, and nothing of anybody's is edited.

A traced forward sees another `len`, as Python allows it to be a number alone, and functions that a
graph must not look into are nodes. For that a module's class is, for the time, a subclass whose
methods are copies that look names up in the same globals, but for those that others stand in for.
No class, module or builtin of anybody is edited.
"""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import BuiltinMethodType, CellType, CodeType, FunctionType, MethodType
from typing import Any, TypeGuard

import torch
from torch import nn

from lightning_da3.tracing.autocast import ASKED

AsNode = Callable[[Callable[..., Any]], Callable[..., Any]]

# of torch, made of numbers alone: such as torch.arange(x.shape[1])
FACTORIES = ("arange", "empty", "eye", "full", "linspace", "ones", "zeros", "tensor")
_NAMES = frozenset((*FACTORIES, *ASKED))
_ASKED = [getattr(torch, name) for name in ASKED if hasattr(torch, name)]


@contextmanager
def intercepted(
    as_node: AsNode, leaves: Collection[CodeType], modules: Iterable[nn.Module]
) -> Iterator[None]:
    """Inside, methods of these modules call other functions than they name.

    Args:
        as_node: Makes the function that is called in the place of `len`, of PyTorch's functions
            that make tensors or ask for autocast, of ``Function.apply`` and of what `leaves` names.
        leaves: The code of functions that are not looked into.
        modules: Ours to change; they are as before afterwards.
    """
    copies = _Copies(as_node, leaves)
    before: list[tuple[nn.Module, type[nn.Module], dict[str, Any]]] = []
    try:
        for module in modules:
            own = vars(module)
            before.append((module, type(module), {k: v for k, v in own.items() if callable(v)}))
            own.update({name: copies.value(value) for name, value in before[-1][2].items()})
            module.__class__ = copies.kind(type(module))
        yield
    finally:
        for module, kind, attributes in before:
            module.__class__ = kind
            vars(module).update(attributes)


class _Globals(dict[str, Any]):
    """The globals of a function, but for what others stand in for.

    They are read when a name is looked up: `torch.fx` puts other functions there while it traces.
    """

    def __init__(self, own: dict[str, Any], copies: _Copies) -> None:
        # which Python itself asks for, to import, warn and define classes
        super().__init__({k: v for k, v in own.items() if k.startswith("__")})
        if own.get("len", builtins.len) is builtins.len:
            self["len"] = copies.value(builtins.len)
        self.own, self.copies = own, copies

    def __missing__(self, name: str) -> Any:
        return self.copies.value(self.own[name])

    def items(self) -> Any:  # where torch.fx looks for functions to wrap, such as math.sqrt
        return self.own.items()


class _Torch:
    """What the name `torch` stands for: others stand in for some of its functions."""

    def __init__(self, as_node: AsNode) -> None:
        self._as_node = as_node

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        return self._as_node(value) if name in _NAMES else value


class _Copies:
    """Copies of functions and classes, each made once."""

    def __init__(self, as_node: AsNode, leaves: Collection[CodeType]) -> None:
        self.as_node, self.leaves = as_node, leaves
        self.length, self.torch = as_node(builtins.len), _Torch(as_node)
        self.functions: dict[Any, Any] = {}
        self.kinds: dict[type, type] = {}

    def kind(self, kind: type) -> Any:
        """A subclass of `kind` whose methods, inherited ones too, are copies; or itself."""
        if kind not in self.kinds:
            bases = [base for base in kind.__mro__[1:] if self._methods(base)]
            if not (bases or self._methods(kind)):
                return kind
            # before every base its copies, where super() of the class before looks
            copies = [_subclass((base,), self._methods(base)) for base in bases]
            self.kinds[kind] = _subclass((kind, *copies), self._methods(kind))
        return self.kinds[kind]

    def _methods(self, kind: type) -> dict[str, Any]:
        """Copies of the methods that a class itself defines."""
        copies = {name: self.value(value) for name, value in vars(kind).items()}
        return {name: copy for name, copy in copies.items() if copy is not vars(kind)[name]}

    def value(self, value: Any) -> Any:
        """What is called for a function or class; anything else is itself."""
        if value is builtins.len:
            return self.length
        if value is torch:
            return self.torch
        if isinstance(value, staticmethod):
            copy = self.value(value.__func__)
            return value if copy is value.__func__ else staticmethod(copy)
        if isinstance(value, partial):
            copy = self.value(value.func)
            return value if copy is value.func else partial(copy, *value.args, **value.keywords)
        if _is_apply(value) or _is_asked(value):
            return self.as_node(value)
        if isinstance(value, MethodType):
            copy = self.value(value.__func__)
            return value if copy is value.__func__ else MethodType(copy, value.__self__)
        if not (isinstance(value, FunctionType) or _is_function_class(value)):
            return value
        if value not in self.functions:
            self.functions[value] = value
            if not isinstance(value, FunctionType):
                apply = staticmethod(self.as_node(value.apply))
                kind: Any = type(value)
                self.functions[value] = kind(value.__name__, (value,), {"apply": apply})
            elif self._is_leaf(value):
                self.functions[value] = self.as_node(value)
            elif self._is_concerned(value, set()):
                self._copy(value)
        return self.functions[value]

    def _is_leaf(self, function: FunctionType) -> bool:
        return bool(self.leaves) and inspect.unwrap(function).__code__ in self.leaves

    def _is_concerned(self, value: Any, seen: set[FunctionType]) -> bool:
        """Whether something stands in for a value, or for one that a function names."""
        if value is builtins.len or _is_apply(value) or _is_function_class(value):
            return True
        if _is_asked(value):
            return True
        if isinstance(value, (MethodType, staticmethod)):
            value = value.__func__
        if isinstance(value, partial):
            value = value.func
        if not isinstance(value, FunctionType) or value in seen:
            return False
        if self._is_leaf(value):
            return True
        seen.add(value)
        home = value.__globals__
        if str(home.get("__name__")).split(".")[0] == "torch":  # it handles what is traced itself
            return False
        names = set(_names(value.__code__))
        if home.get("torch") is torch and names & _NAMES:
            return True
        used = [home.get(name, getattr(builtins, name, None)) for name in names]
        used += [_held(cell) for cell in value.__closure__ or ()]
        return any(self._is_concerned(other, seen) for other in used)

    def _copy(self, function: FunctionType) -> None:
        cells = function.__closure__ or ()
        # the same cells, which the original may write into, unless they hold what is copied
        ours = [CellType() if self._is_concerned(_held(cell), set()) else cell for cell in cells]
        own, name, defaults = function.__globals__, function.__name__, function.__defaults__
        globals_ = _Globals(own, self)
        copy = FunctionType(function.__code__, globals_, name, defaults, tuple(ours))
        self.functions[function] = copy
        for cell, original in zip(ours, cells, strict=True):
            if cell is not original:
                cell.cell_contents = self.value(_held(original))
        copy.__kwdefaults__ = function.__kwdefaults__
        copy.__annotations__ = function.__annotations__
        copy.__qualname__, copy.__module__ = function.__qualname__, function.__module__
        copy.__dict__.update(function.__dict__)


def _subclass(bases: tuple[type, ...], methods: dict[str, Any]) -> type:
    """A subclass of the same name that no class hears of through ``__init_subclass__``."""
    first = bases[0]
    silent = {"__init_subclass__": classmethod(lambda *_, **__: None)}
    silence = type("Silence", (), silent)
    names = {"__module__": first.__module__, "__qualname__": first.__qualname__}
    return type(first)(first.__name__, (silence, *bases), {**methods, **names})


def _is_apply(value: Any) -> bool:
    if not isinstance(value, (MethodType, BuiltinMethodType)):
        return False
    return value.__name__ == "apply" and _is_function_class(value.__self__)


def _is_asked(value: Any) -> bool:
    return any(value is function for function in _ASKED)


def _is_function_class(value: Any) -> TypeGuard[type[torch.autograd.Function]]:
    return isinstance(value, type) and issubclass(value, torch.autograd.Function)


def names_asked(kind: type[nn.Module]) -> frozenset[str]:
    """The names that a module's forward asks for, in methods and functions that it calls, too."""
    found: set[str] = set()
    seen: set[Any] = set()
    waiting: list[Any] = [getattr(kind, "forward", None)]
    while waiting:
        value = inspect.unwrap(waiting.pop())
        function = getattr(value, "__func__", value)
        if not isinstance(function, FunctionType) or function in seen:
            continue
        seen.add(function)
        home = function.__globals__
        if str(home.get("__name__")).split(".")[0] == "torch":
            continue
        names = set(_names(function.__code__))
        found |= names
        waiting += [inspect.getattr_static(kind, name, None) for name in names]
        waiting += [home.get(name) for name in names]
        waiting += [_held(cell) for cell in function.__closure__ or ()]
    return frozenset(found)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # a function in the function
            yield from _names(constant)


def _held(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None
