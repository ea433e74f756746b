"""A tensor as a file holds it: bytes, a type and a shape, for processes without PyTorch, too."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from lightning_da3.errors import CheckpointError


class Kind(NamedTuple):
    """A type of values: its code in files, bytes of a value, and the least infinity's bits."""

    code: str
    itemsize: int
    infinity: int | None = None


KINDS = {  # by PyTorch's names
    "bool": Kind("BOOL", 1),
    "uint8": Kind("U8", 1),
    "int8": Kind("I8", 1),
    "int16": Kind("I16", 2),
    "int32": Kind("I32", 4),
    "int64": Kind("I64", 8),
    "float8_e4m3fn": Kind("F8_E4M3", 1, 0x7F),
    "float8_e5m2": Kind("F8_E5M2", 1, 0x7C),
    "float16": Kind("F16", 2, 0x7C00),
    "bfloat16": Kind("BF16", 2, 0x7F80),
    "float32": Kind("F32", 4, 0x7F800000),
    "float64": Kind("F64", 8, 0x7FF0000000000000),
    "complex64": Kind("C64", 8, 0x7F800000),  # of each part
}


class Stored(NamedTuple):
    """A tensor as a file holds it.

    Attributes:
        dtype: PyTorch's name of its type, such as "float32".
        shape: Its shape.
        content: Its values, the last axis fastest, little end first.
    """

    dtype: str
    shape: tuple[int, ...]
    content: memoryview

    @classmethod
    def of(cls, array: np.ndarray[Any, Any]) -> "Stored":
        """An array of numpy; its bytes are shared where they lie in order."""
        ordered = np.ascontiguousarray(array)
        little = ordered.astype(ordered.dtype.newbyteorder("<"), copy=False)
        return cls(array.dtype.name, array.shape, little.reshape(-1).view(np.uint8).data)

    @property
    def array(self) -> np.ndarray[Any, Any]:
        """As an array that shares these bytes.

        Raises:
            CheckpointError: numpy has no such type.
        """
        try:
            dtype = np.dtype(self.dtype).newbyteorder("<")
        except TypeError as error:
            raise CheckpointError(
                f"numpy has no type {self.dtype}. Convert the network to another, such as float32."
            ) from error
        return np.frombuffer(self.content, dtype).reshape(self.shape)

    @property
    def is_finite(self) -> bool:
        """Whether no value is NaN or infinite."""
        kind = KINDS[self.dtype]
        if kind.infinity is None or not self.content:
            return True
        itemsize = 4 if self.dtype == "complex64" else kind.itemsize
        sign = 1 << 8 * itemsize - 1
        # read as integers values keep their order, and nothing is copied
        positive, negative = (np.frombuffer(self.content, f"<{i}{itemsize}").max() for i in "iu")
        return int(positive) < kind.infinity and int(negative) < kind.infinity + sign


def fingerprint_of(tensors: Iterable[tuple[str, Stored]]) -> str:
    """Identifies tensors by name, dtype, shape and value.

    Args:
        tensors: Sorted by name; each is needed but once.

    Returns:
        A SHA-256 digest, 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        # the length of what follows is in the header, so no two mappings give the same bytes
        header = json.dumps([name, f"torch.{tensor.dtype}", list(tensor.shape)])
        digest.update(header.encode() + b"\n")
        digest.update(tensor.content)
    return digest.hexdigest()
