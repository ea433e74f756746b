"""The file of one domain: safetensors, never a pickle, and found out when damaged.

The tensors are the file's tensors. Its string metadata holds four keys: `format`,
`format_version`, `metadata` (the caller's, as JSON) and `sha256` (of that JSON and of the tensors'
fingerprint, so that one flipped bit anywhere is noticed).
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from lightning_da3.errors import CheckpointError
from lightning_da3.files.reading import open_regular
from lightning_da3.files.writing import replacing

FORMAT = "lightning_da3"
FORMAT_VERSION = 1

_LENGTH_BYTES = 8  # a safetensors file opens with the length of its JSON header
_MOST_AXES = 64
_MOST_HEADER_BYTES = 2**23  # parsed JSON is larger than its text
_MOST_BYTES = 2**32  # a sparse file may be said to be as long as a disk
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_REMEDY = "Restore the file from a copy, or train and save the domain again."


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
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = _plain(name, tensors[name])
        # the length of what follows is in the header, so no two mappings give the same bytes
        header = json.dumps([name, str(tensor.dtype), list(tensor.shape)])
        digest.update(header.encode() + b"\n")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
    with _explained(f"Cannot write the domain file {str(path)!r}"):
        target = Path(os.path.realpath(path))  # of a link, what it points to is replaced
        # clones: the format refuses tensors that share memory
        plain = {name: _plain(name, tensor).clone() for name, tensor in tensors.items()}
        _check_names_and_values(plain)
        strings = _string_metadata(plain, metadata)
        with _as_checkpoint_error("safetensors cannot hold these tensors", "Give other tensors."):
            content = save(plain, strings)
        _check_header_bytes(int.from_bytes(content[:_LENGTH_BYTES], "little"))
        _check_bytes(len(content))
        with replacing(target) as temporary:
            temporary.write_bytes(content)


def domain_file_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> int:
    """The size of the file that `write_domain` makes of these, in bytes; values are not read.

    Args:
        tensors: By name; they may have no values.
        metadata: What JSON can hold.
    """
    text = json.dumps(dict(metadata), allow_nan=False, sort_keys=True)
    strings = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "metadata": text,
        "sha256": "0" * 64,
    }
    header: dict[str, Any] = {"__metadata__": strings}
    codes, end = {dtype: code for code, dtype in _DTYPES.items()}, 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
        start, end = end, end + tensor.numel() * tensor.itemsize
        entry = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**entry, "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return _LENGTH_BYTES + math.ceil(length / 8) * 8 + end  # tensors begin at multiples of 8


def read_domain(path: str | os.PathLike[str]) -> DomainFile:
    """Reads a domain file and checks all of it.

    Its header must account for every byte of it before the rest is read, once, into memory that
    the tensors then share. It is not mapped: reading a map of a file that shrinks kills the
    process.

    Args:
        path: A file that `write_domain` wrote.

    Returns:
        Its tensors and metadata.

    Raises:
        CheckpointError: If the file is missing, damaged, foreign, or of a newer format, or holds
            NaN or infinite values.
    """
    with _explained(f"Cannot read the domain file {str(path)!r}"):
        with _as_checkpoint_error("it is damaged or no domain file", _REMEDY):
            tensors, strings = _read(Path(path))
            version = _format_version(strings)
            text = strings.get("metadata", "")
            if strings.get("sha256") != _checksum(tensors, text):
                raise CheckpointError(f"its content does not match its checksum. {_REMEDY}")
            if bad := _not_finite(tensors):
                raise CheckpointError(f"NaN or infinite values in {bad}. {_REMEDY}")
            metadata = json.loads(text)
        if not isinstance(metadata, dict):
            raise CheckpointError(f"its metadata is not a JSON object. {_REMEDY}")
        return DomainFile(tensors, metadata, version)


@contextlib.contextmanager
def _explained(context: str) -> Iterator[None]:
    """Adds what was attempted to an error, once, and makes every error a CheckpointError."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{context}: {error}") from error.__cause__
    except (OSError, ValueError) as error:  # ValueError: a path that no system could have
        reason = getattr(error, "strerror", None) or str(error)
        remedy = "Check that the path exists, and its permissions and free space."
        raise CheckpointError(f"{context}: {reason}. {remedy}") from error


@contextlib.contextmanager
def _as_checkpoint_error(what: str, remedy: str) -> Iterator[None]:
    """For a parser, which raises errors of many kinds over a bad file."""
    try:
        yield
    except (CheckpointError, OSError):
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise CheckpointError(f"{what} ({reason}). {remedy}") from error


def _plain(name: str, tensor: Tensor) -> Tensor:
    """The tensor on the CPU and contiguous."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "meta" if tensor.is_meta else f"{tensor.layout}, {tensor.dtype}"
        raise CheckpointError(f"tensor {name!r} is not dense ({kind}). Give a dense tensor.")
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


def _check_names_and_values(tensors: Mapping[str, Tensor]) -> None:
    bad = [name for name in tensors if not isinstance(name, str) or name == "__metadata__"]
    if bad:
        raise CheckpointError(f"{bad} cannot name tensors. Use other strings.")
    if bad := _not_finite(tensors):
        raise CheckpointError(
            f"NaN or infinite values in {bad}; the last good file is kept. "
            "Lower the learning rate or clip gradients, and train again from that file."
        )


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if not _is_finite(tensor)]


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.itemsize == 1:
        tensor = tensor.float()  # 8-bit floats have few operations
    # the extremes are NaN if one value is, and take no memory, as `isfinite` of each would
    return all(math.isfinite(extreme) for extreme in tensor.aminmax())


def _string_metadata(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, str]:
    try:
        text = json.dumps(dict(metadata), allow_nan=False, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"the metadata is not JSON ({error}). Give str, int, finite float, bool, None, lists "
            "and dicts of them."
        ) from error
    return {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "metadata": text,
        "sha256": _checksum(tensors, text),
    }


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    return hashlib.sha256(f"{fingerprint(tensors)}\n{text}".encode()).hexdigest()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        header = _header(file, size)
        strings = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in strings.values()):
            raise CheckpointError(f"its metadata are not strings. {_REMEDY}")
        content_bytes = size - file.tell()
        places = _places(header, content_bytes)
        content = bytearray(content_bytes)
        if file.readinto(content) != content_bytes:
            raise CheckpointError(f"it shrank while it was read. {_REMEDY}")
    return {name: _view(content, *place) for name, place in places.items()}, strings


def _header(file: BufferedReader, size: int) -> dict[str, Any]:
    """What stands before the tensors of a file of `size` bytes."""
    if size == 0:
        raise CheckpointError(f"it is empty. {_REMEDY}")
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if _LENGTH_BYTES + length > size:
        raise CheckpointError(
            f"it is {size} bytes long and declares a header of {length} bytes: it is truncated or "
            f"no domain file. {_REMEDY}"
        )
    _check_header_bytes(length)
    _check_bytes(size)
    header: dict[str, Any] = json.loads(file.read(length))
    return header


def _places(
    header: Mapping[str, Any], content_bytes: int
) -> dict[str, tuple[int, torch.dtype, list[int]]]:
    """Where every tensor starts, its type and its shape: one behind the other, to the very end."""
    places, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = _DTYPES[entry["dtype"]], [int(n) for n in entry["shape"][:_MOST_AXES]]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        if entry["data_offsets"] != [start, end] or min(shape, default=0) < 0:
            raise CheckpointError(f"tensor {name!r} is not where it should be. {_REMEDY}")
        if end > content_bytes:
            raise CheckpointError(f"tensor {name!r} ends behind the file. {_REMEDY}")
        places[name] = (start, dtype, shape)
    if end != content_bytes:
        raise CheckpointError(f"it is longer than its tensors. {_REMEDY}")
    return places


def _check_header_bytes(count: int) -> None:
    if count > _MOST_HEADER_BYTES:
        raise CheckpointError(
            f"its header, with the metadata, has {count} bytes; at most {_MOST_HEADER_BYTES} are "
            "allowed. Give less metadata."
        )


def _check_bytes(count: int) -> None:
    if count > _MOST_BYTES:
        raise CheckpointError(
            f"it has {count} bytes; at most {_MOST_BYTES} are allowed. Learn a smaller domain."
        )


def _view(content: bytearray, start: int, dtype: torch.dtype, shape: list[int]) -> Tensor:
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype, count=count, offset=start).reshape(shape)


def _format_version(strings: Mapping[str, str]) -> int:
    if strings.get("format") != FORMAT:
        raise CheckpointError(
            f"its format is {strings.get('format')!r}, not {FORMAT!r}. "
            "Give a file that `write_domain` wrote."
        )
    try:
        version = int(strings.get("format_version", ""))
    except ValueError:
        version = 0
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"it has format version {version}, this package reads up to {FORMAT_VERSION}. "
            "Upgrade lightning-da3."
        )
    if version < 1:
        given = strings.get("format_version")
        raise CheckpointError(f"it has no valid format version ({given!r}). {_REMEDY}")
    return version
