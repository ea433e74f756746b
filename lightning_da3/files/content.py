"""The file of one domain as bytes: what a process without PyTorch needs to read and write it.

It is safetensors, never a pickle, and found out when damaged. Its string metadata holds four keys:
`format`, `format_version`, `metadata` (the caller's, as JSON) and `sha256` (of that JSON and of
the tensors' fingerprint, so that one flipped bit anywhere is noticed).
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from lightning_da3.errors import CheckpointError
from lightning_da3.files.reading import open_regular
from lightning_da3.files.stored import KINDS, Stored, fingerprint_of
from lightning_da3.files.writing import replacing

FORMAT = "lightning_da3"
FORMAT_VERSION = 1

_LENGTH_BYTES = 8  # a safetensors file opens with the length of its JSON header
_MOST_AXES = 64
_MOST_HEADER_BYTES = 2**23  # parsed JSON is larger than its text
_MOST_BYTES = 2**32  # a sparse file may be said to be as long as a disk
_REMEDY = "Restore the file from a copy, or train and save the domain again."
_NAMES = {kind.code: name for name, kind in KINDS.items()}


class Content(NamedTuple):
    """What a domain file holds.

    Attributes:
        tensors: By name.
        metadata: As it was written, tuples as lists.
        format_version: The version of the file's format.
    """

    tensors: dict[str, Stored]
    metadata: dict[str, Any]
    format_version: int


def write_content(
    path: str | os.PathLike[str],
    tensors: Iterable[tuple[str, Stored]],
    metadata: Mapping[str, Any],
) -> None:
    """Writes a domain file, whole or not at all.

    Whatever fails, a good file that was at `path` stays as it was.

    Args:
        path: Where to write; its folder must exist.
        tensors: By name. Values must be finite.
        metadata: What JSON can hold: str, int, finite float, bool, None, lists and dicts of them.

    Raises:
        CheckpointError: If a tensor or the metadata cannot be saved, or the file not be written.
    """
    with _explained(f"Cannot write the domain file {str(path)!r}"):
        target = Path(os.path.realpath(path))  # of a link, what it points to is replaced
        stored = dict(tensors)
        _check_names_and_values(stored)
        text = _json_of(metadata)
        with _as_checkpoint_error("safetensors cannot hold these tensors", "Give other tensors."):
            sizes = {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()}
            header, places = _laid_out(sizes, text, _checksum(stored, text))
        _check_header_bytes(len(header) - _LENGTH_BYTES)
        _check_bytes(len(header) + max((end for _, end in places.values()), default=0))
        with replacing(target) as temporary, temporary.open("wb") as file:
            file.write(header)
            for name in places:
                file.write(stored[name].content)


def content_bytes_of(
    sizes: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, Any]
) -> int:
    """The size of the file that `write_content` makes, in bytes.

    Args:
        sizes: Types and shapes of its tensors, by name.
        metadata: What JSON can hold.
    """
    header, places = _laid_out(sizes, _json_of(metadata), "0" * 64)
    return len(header) + max((end for _, end in places.values()), default=0)


def read_content(path: str | os.PathLike[str]) -> Content:
    """Reads a domain file and checks all of it.

    Its header must account for every byte of it before the rest is read, once, into memory that
    the tensors then share. It is not mapped: reading a map of a file that shrinks kills the
    process.

    Args:
        path: A file that `write_content` wrote.

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
        return Content(tensors, metadata, version)


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


def _check_names_and_values(tensors: Mapping[str, Stored]) -> None:
    bad = [name for name in tensors if not isinstance(name, str) or name == "__metadata__"]
    if bad:
        raise CheckpointError(f"{bad} cannot name tensors. Use other strings.")
    if bad := _not_finite(tensors):
        raise CheckpointError(
            f"NaN or infinite values in {bad}; the last good file is kept. "
            "Lower the learning rate or clip gradients, and train again from that file."
        )


def _not_finite(tensors: Mapping[str, Stored]) -> list[str]:
    return [n for n, tensor in tensors.items() if tensor.dtype in KINDS and not tensor.is_finite]


def _json_of(metadata: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(metadata), allow_nan=False, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"the metadata is not JSON ({error}). Give str, int, finite float, bool, None, lists "
            "and dicts of them."
        ) from error


def _checksum(tensors: Mapping[str, Stored], text: str) -> str:
    found = fingerprint_of((name, tensors[name]) for name in sorted(tensors))
    return hashlib.sha256(f"{found}\n{text}".encode()).hexdigest()


def _laid_out(
    sizes: Mapping[str, tuple[str, tuple[int, ...]]], text: str, checksum: str
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """What stands before the tensors, and where behind it each begins and ends, in order."""
    strings = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "metadata": text,
        "sha256": checksum,
    }
    header: dict[str, Any] = {"__metadata__": strings}
    places, end = {}, 0
    for name in sorted(sizes, key=lambda name: (-KINDS[sizes[name][0]].itemsize, name)):
        dtype, shape = sizes[name]
        kind = KINDS[dtype]
        start, end = end, end + math.prod(shape) * kind.itemsize
        header[name] = {"dtype": kind.code, "shape": list(shape), "data_offsets": [start, end]}
        places[name] = (start, end)
    said = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    said += b" " * (-len(said) % 8)  # tensors begin at multiples of 8
    return len(said).to_bytes(_LENGTH_BYTES, "little") + said, places


def _read(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
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
    whole = memoryview(content)
    return {
        name: Stored(dtype, shape, whole[start:end])
        for name, (dtype, shape, start, end) in places.items()
    }, strings


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
) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Type, shape, begin and end of every tensor: one behind the other, to the very end."""
    places, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = _NAMES[entry["dtype"]], tuple(int(n) for n in entry["shape"][:_MOST_AXES])
        start, end = end, end + math.prod(shape) * KINDS[dtype].itemsize
        if entry["data_offsets"] != [start, end] or min(shape, default=0) < 0:
            raise CheckpointError(f"tensor {name!r} is not where it should be. {_REMEDY}")
        if end > content_bytes:
            raise CheckpointError(f"tensor {name!r} ends behind the file. {_REMEDY}")
        places[name] = (dtype, shape, start, end)
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
