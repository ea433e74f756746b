"""What was made for the latest of many keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """What was made for the latest keys.

    Args:
        most: The number of keys; the one not asked for longest is forgotten.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.entries: dict[Any, Value] = {}

    def get(self, key: Any, make: Callable[[], Value]) -> Value:
        """What was made for a key, or is made now."""
        value = self.entries.pop(key) if key in self.entries else make()
        self.entries[key] = value  # the latest stands last
        while len(self.entries) > self.most:
            del self.entries[next(iter(self.entries))]
        return value
