"""Looks up private parts of PyTorch, and says which are missing."""

import pkgutil
from typing import Any

import torch

from lightning_da3.errors import DA3Error


def found(path: str, otherwise: Any) -> Any:
    """The part of PyTorch at ``"module:name.name"``, or what stands in its place."""
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        return otherwise


def missing(path: str, use: str) -> Any:
    """What stands for a part that nothing can replace: a class without instances.

    It can be called, subclassed, and asked for in `isinstance` and `except`.

    Args:
        path: As `found` takes it.
        use: What needs the part, for the error.

    Returns:
        A class that raises a `DA3Error` when it is called.
    """

    def refuse(*_: Any, **__: Any) -> None:
        raise DA3Error(
            f"torch {torch.__version__} has no `{path.replace(':', '.')}`, which {use} needs. "
            "Install a version of torch that has it, such as 2.6."
        )

    return type("Missing", (Exception,), {"__init__": refuse})


def needed(path: str, use: str) -> Any:
    """The part at `path`, or a class that raises a `DA3Error` when it is called."""
    return found(path, missing(path, use))
