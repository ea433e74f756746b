"""A function of the user's that a graph calls and does not look into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class PythonFunction(nn.Module):
    """Calls a function, whatever it does, each time.

    Args:
        function: The user's.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns."""
        return self.function(*args, **kwargs)

    def extra_repr(self) -> str:
        """The function's name."""
        return str(getattr(self.function, "__qualname__", self.function))
