"""The package as it is where PyTorch has none of its private parts."""

import importlib
import importlib.util
import pkgutil
import sys


def refuse(path):
    raise AttributeError(path)


def without_private_parts(name, monkeypatch):
    """A second copy of `lightning_da3.<name>`, which finds no private part of PyTorch.

    What it imports from `lightning_da3.torch_private` is such a copy, too, if it was copied before.
    """
    dotted = f"lightning_da3.{name}"
    original = importlib.import_module(dotted)
    spec = importlib.util.spec_from_file_location(dotted, original.__file__)
    copy = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.setattr(pkgutil, "resolve_name", refuse)
        spec.loader.exec_module(copy)
    monkeypatch.setitem(sys.modules, dotted, copy)
    return copy
