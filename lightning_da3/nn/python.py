"""A function of the user's that a graph calls and does not look into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class PythonFunction(nn.Module):
    """Calls a function, whatever it does, each time.

    Args:
        function: The user's.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns. Maps lie in memory as the user's layers would leave them."""
        return self.function(
            *map(_contiguous, args), **{k: _contiguous(v) for k, v in kwargs.items()}
        )

    def extra_repr(self) -> str:
        """The function's name."""
        return str(getattr(self.function, "__qualname__", self.function))


def _contiguous(x: Any) -> Any:
    """``x.contiguous()`` is x itself to who writes into it, but our convolutions' maps are not."""
    return x.contiguous() if isinstance(x, Tensor) and x.dim() > 3 else x
