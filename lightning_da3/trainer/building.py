"""When a LightningModule has its network, and so when it can be converted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightning_da3.trainer.lightning_private import overrides

HOOKS = ("setup", "configure_model")  # in the order in which Lightning calls them


def builds_later(pl_module: Any) -> bool:
    """Whether the network may be made, or made anew, after `Callback.setup`."""
    return any(overrides(pl_module, hook) for hook in HOOKS)


def when_built(pl_module: Any, then: Callable[[], None]) -> None:
    """Call `then` once, as soon as the LightningModule has its network.

    That is now, or after its own ``setup`` and ``configure_model``: those of the instance are
    wrapped until they are called, as Lightning calls no hook of callbacks behind them.

    Args:
        pl_module: The LightningModule; called in `Callback.setup`.
        then: Called outside the default dtype and device that Lightning sets in `configure_model`.
    """
    stop_waiting(pl_module)
    if not builds_later(pl_module):
        then()
        return
    dtype = torch.get_default_dtype()

    def built() -> None:
        with torch.device("cpu"), _default_dtype(dtype):
            then()

    def is_set_up() -> None:
        # not before: callbacks may call `configure_model` in a `setup` of theirs
        if overrides(pl_module, "configure_model"):
            _after(pl_module, "configure_model", built)
        else:
            then()

    _after(pl_module, "setup", is_set_up)


def stop_waiting(pl_module: Any) -> None:
    """Take away what `when_built` left on a LightningModule whose hooks were never called."""
    for hook in HOOKS:
        if getattr(vars(pl_module).get(hook), "__name__", "") == _after.__name__:
            delattr(pl_module, hook)


def _after(pl_module: Any, hook: str, then: Callable[[], None]) -> None:
    """Wrap a hook of the instance; the wrapper removes itself, as a closure cannot be pickled."""

    def call(*args: Any, **kwargs: Any) -> None:
        delattr(pl_module, hook)
        getattr(pl_module, hook)(*args, **kwargs)
        then()

    call.__name__ = _after.__name__
    setattr(pl_module, hook, call)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
