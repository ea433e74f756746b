"""The file of one domain, from and to tensors; `lightning_da3.files.content` has its bytes."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_da3.errors import CheckpointError
from lightning_da3.files.content import content_bytes_of, read_content, write_content
from lightning_da3.files.stored import Stored, fingerprint_of


@dataclasses.dataclass(frozen=True)
class DomainFile:
    """What a domain file holds.

    Attributes:
        tensors: By name, on the CPU.
        metadata: As it was written, tuples as lists.
        format_version: The version of the file's format.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    format_version: int


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Identifies named tensors by name, dtype, shape and value.

    The order of the mapping, devices, strides and memory formats make no difference.

    Args:
        tensors: Strided tensors by name, such as a state dict.

    Returns:
        A SHA-256 digest, 64 hexadecimal digits.

    Raises:
        CheckpointError: If a tensor has no values to read (sparse, quantized, meta).
    """
    return fingerprint_of((name, _stored(name, tensors[name])) for name in sorted(tensors))


def write_domain(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Writes a domain file, whole or not at all.

    Whatever fails, a good file that was at `path` stays as it was.

    Args:
        path: Where to write; its folder must exist.
        tensors: Dense tensors by name, on any device. Values must be finite.
        metadata: What JSON can hold: str, int, finite float, bool, None, lists and dicts of them.

    Raises:
        CheckpointError: If a tensor or the metadata cannot be saved, or the file not be written.
    """
    write_content(path, ((name, _stored(name, t)) for name, t in tensors.items()), metadata)


def domain_file_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> int:
    """The size of the file that `write_domain` makes of these, in bytes; values are not read.

    Args:
        tensors: By name; they may have no values.
        metadata: What JSON can hold.
    """
    sizes = {name: (_name_of(t.dtype), tuple(t.shape)) for name, t in tensors.items()}
    return content_bytes_of(sizes, metadata)


def read_domain(path: str | os.PathLike[str]) -> DomainFile:
    """Reads a domain file and checks all of it.

    Args:
        path: A file that `write_domain` wrote.

    Returns:
        Its tensors, which share the memory that the file was read into, and its metadata.

    Raises:
        CheckpointError: If the file is missing, damaged, foreign, or of a newer format, or holds
            NaN or infinite values.
    """
    file = read_content(path)
    tensors = {name: _tensor(stored) for name, stored in file.tensors.items()}
    return DomainFile(tensors, file.metadata, file.format_version)


def _stored(name: str, tensor: Tensor) -> Stored:
    """The bytes of a tensor, copied only if it is not on the CPU and contiguous."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "meta" if tensor.is_meta else f"{tensor.layout}, {tensor.dtype}"
        raise CheckpointError(f"tensor {name!r} is not dense ({kind}). Give a dense tensor.")
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    content = plain.reshape(-1).view(torch.uint8).numpy().data
    return Stored(_name_of(tensor.dtype), tuple(tensor.shape), content)


def _tensor(stored: Stored) -> Tensor:
    dtype: torch.dtype = getattr(torch, stored.dtype)
    if not stored.content:
        return torch.empty(stored.shape, dtype=dtype)
    return torch.frombuffer(stored.content, dtype=dtype).reshape(stored.shape)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
