"""``len(x)`` of what is traced, which Python allows to be a number alone.

A traced forward sees another `len`: its module's class is, for the time, a subclass whose methods
are copies that look names up in the same globals, but for `len`. No class, module or builtin of
anybody is edited.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

Length = Callable[[Any], Any]


@contextmanager
def measured_by(length: Length, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, methods of these modules that take the `len` of something call `length`.

    Args:
        length: It takes whatever `len` takes.
        modules: Ours to change; they are as before afterwards.
    """
    copies = _Copies(length)
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
    """The globals of a function, but for `len` and for functions that use it.

    They are read when a name is looked up: `torch.fx` puts other functions there while it traces.
    """

    def __init__(self, own: dict[str, Any], copies: _Copies) -> None:
        super().__init__(len=copies.length)
        self.own, self.copies = own, copies

    def __missing__(self, name: str) -> Any:
        return self.copies.value(self.own[name])

    def items(self) -> Any:  # where torch.fx looks for functions to wrap, such as math.sqrt
        return self.own.items()


class _Copies:
    """Copies of functions and classes, each made once."""

    def __init__(self, length: Length) -> None:
        self.length = length
        self.functions: dict[FunctionType, FunctionType] = {}
        self.kinds: dict[type, type] = {}

    def kind(self, kind: type) -> Any:
        """A subclass of `kind` whose methods, inherited ones too, call our `len`; or itself."""
        if kind not in self.kinds:
            bases = [base for base in kind.__mro__[1:] if self._methods(base)]
            if not (bases or self._methods(kind)):
                return kind
            # before every base its copies, where super() of the class before looks
            copies = [_subclass((base,), self._methods(base)) for base in bases]
            self.kinds[kind] = _subclass((kind, *copies), self._methods(kind))
        return self.kinds[kind]

    def _methods(self, kind: type) -> dict[str, Any]:
        """Copies of the methods that a class itself defines and that use `len`."""
        copies = {name: self.value(value) for name, value in vars(kind).items()}
        return {name: copy for name, copy in copies.items() if copy is not vars(kind)[name]}

    def value(self, value: Any) -> Any:
        """A copy of a function that uses `len`; anything else is itself."""
        if isinstance(value, staticmethod):
            copy = self.value(value.__func__)
            return value if copy is value.__func__ else staticmethod(copy)
        if isinstance(value, MethodType):
            copy = self.value(value.__func__)
            return value if copy is value.__func__ else MethodType(copy, value.__self__)
        if not isinstance(value, FunctionType):
            return value
        if value not in self.functions:
            self.functions[value] = value
            if _uses_length(value, set()):
                self._copy(value)
        return self.functions[value]

    def _copy(self, function: FunctionType) -> None:
        cells = function.__closure__ or ()
        # the same cells, which the original may write into, unless they hold what is copied
        ours = [CellType() if _uses_length(_held(cell), set()) else cell for cell in cells]
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


def _uses_length(function: Any, seen: set[FunctionType]) -> bool:
    """Whether a function, or one of its module's that it names, takes the `len` of something."""
    if not isinstance(function, FunctionType) or function in seen:
        return False
    seen.add(function)
    home = function.__globals__
    if str(home.get("__name__")).split(".")[0] == "torch":  # it handles what is traced by itself
        return False
    names = set(_names(function.__code__))
    if "len" in names and home.get("len", builtins.len) is builtins.len:
        return True
    used = [home.get(name) for name in names]
    used += [_held(cell) for cell in function.__closure__ or ()]
    return any(_uses_length(other, seen) for other in used)


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
