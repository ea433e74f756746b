"""Why a forward is not one graph."""

from __future__ import annotations

from types import CodeType

from torch import fx


class CannotTrace(fx.proxy.TraceError):
    """A graph cannot hold what a forward does."""


class NewLeaf(BaseException):  # no error of a user's forward
    """A function is to become a node: trace again, with it among the leaves.

    Args:
        code: The function's.
        reason: Why, in plain words.
    """

    def __init__(self, code: CodeType, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


def first_line(error: BaseException) -> str:
    """What an error says, in short."""
    return (str(error).split("\n") or [""])[0] or type(error).__name__
