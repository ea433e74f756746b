"""An exported file that is open in ONNX Runtime: what it takes is checked before it runs."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lightning_da3.errors import CheckpointError, DA3Error, InputError
from lightning_da3.exporting.manifest import KEY, VERSION
from lightning_da3.files.reading import check_readable

Array = np.ndarray[Any, Any]
Arrays = Array | Sequence[Array]

_WRITES = {"training": "model.export_training(...)", "inference": "model.export(...)"}


class Port(NamedTuple):
    """An array that goes in or comes out.

    Attributes:
        shape: Its shape; None for a first axis of any number of samples.
        dtype: The name of its type.
    """

    shape: tuple[int | None, ...]
    dtype: str

    def for_samples(self, count: int | None) -> Port:
        """The same for a number of samples; None: for any."""
        return Port((count, *self.shape[1:]), self.dtype)

    def checked(self, array: object, name: str) -> Array:
        """An array as it goes in, of this port's type.

        Args:
            array: What was given.
            name: What the user calls it.

        Raises:
            InputError: Its shape or its kind of numbers is another.
        """
        found = np.asarray(array)
        wanted = np.dtype(self.dtype)
        if (found.dtype.kind == "f") != (wanted.kind == "f") or not np.can_cast(
            found.dtype, wanted, "same_kind"
        ):
            raise InputError(
                f"`{name}` must be of {self.dtype}, got {found.dtype}. Prepare it as for the "
                "network that was exported."
            )
        pairs = zip(found.shape, self.shape, strict=False)
        same = all(expected in (None, side) for side, expected in pairs)
        if len(found.shape) != len(self.shape) or not same or not found.size:
            axes = ", ".join("N" if side is None else str(side) for side in self.shape)
            raise InputError(
                f"`{name}` must have the shape ({axes}), got {found.shape}. Prepare it as for the "
                "network that was exported, at least one sample."
            )
        return found.astype(wanted, copy=False)


class Session:
    """An exported file, open.

    Args:
        path: The file, in ONNX.
        kind: "training" or "inference".
        options: An `onnxruntime.SessionOptions`; None: as ONNX Runtime has it by default.

    Attributes:
        manifest: What the file says of itself.
        inputs: What goes in, by name.
        outputs: Names of what comes out.

    Raises:
        CheckpointError: The file is missing, damaged, foreign, or of another kind or a newer
            version.
        DA3Error: ONNX Runtime is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str, options: Any = None) -> None:
        self.path = os.fspath(path)
        self._runtime = _opened(self.path, options)
        text = self._runtime.get_modelmeta().custom_metadata_map.get(KEY)
        self.manifest = _manifest(self.path, text, kind)
        taken = {port.name for port in self._runtime.get_inputs()}
        self.inputs = {
            port["name"]: Port(_shape(port["shape"]), port["dtype"])
            for port in self.manifest["inputs"]
            if port["name"] in taken
        }
        self.outputs = [port["name"] for port in self.manifest["outputs"]]

    @property
    def network_inputs(self) -> list[str]:
        """Names of what the network takes, in order."""
        return [n for n in self.inputs if n == "input" or n.removeprefix("input_").isdecimal()]

    @property
    def samples(self) -> int | None:
        """How many samples it takes at once; None: any number."""
        return self.inputs[self.network_inputs[0]].shape[0]

    def images(self, images: Any) -> dict[str, Array]:
        """What the network takes, by the names of its inputs; as many samples in each.

        Args:
            images: An array, or a tuple of the network's arguments.

        Raises:
            InputError: They do not fit the network.
        """
        names = self.network_inputs
        given = images if isinstance(images, (tuple, list)) else (images,)
        if len(given) != len(names):
            raise InputError(f"The network takes {len(names)} arrays, got {len(given)}.")
        found = {}
        for i, (name, x) in enumerate(zip(names, given, strict=True)):
            called = "images" if len(names) == 1 else f"images[{i}]"
            found[name] = self.inputs[name].for_samples(None).checked(x, called)
        counts = {len(x) for x in found.values()}
        if len(counts) > 1:
            raise InputError(f"`images` must be as many in every array, got {sorted(counts)}.")
        return found

    def run(self, given: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name.

        Args:
            given: All inputs, as they were checked.
        """
        fed = {name: given[name] for name in self.inputs}
        return dict(zip(self.outputs, self._runtime.run(self.outputs, fed), strict=True))


def parts_of(given: Mapping[str, Array], size: int) -> Iterator[dict[str, Array]]:
    """Arrays of samples, some at a time."""
    count = len(next(iter(given.values())))
    for start in range(0, count, size):
        yield {name: x[start : start + size] for name, x in given.items()}


def _opened(path: str, options: Any) -> Any:
    try:
        runtime: Any = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise DA3Error(
            f"ONNX Runtime cannot be imported ({error}): `pip install onnxruntime`."
        ) from error
    if not check_readable(path, "exported file"):
        raise CheckpointError(f"Cannot read the exported file {path!r}: there is none.")
    if options is None:
        options = runtime.SessionOptions()
        options.log_severity_level = 3
    try:
        return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of many kinds, none of which has a public name
        raise CheckpointError(
            f"ONNX Runtime cannot open the exported file {path!r}: {error}. Give a file that was "
            "exported with format='onnx', and restore it from a copy if it is damaged."
        ) from error


def _manifest(path: str, text: str | None, kind: str) -> dict[str, Any]:
    try:
        found = json.loads(text or "")
        version, its_kind = found["format_version"], found["kind"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path!r} does not say what it is: it was not exported by lightning_da3. Give a file "
            f"that `{_WRITES[kind]}` wrote."
        ) from error
    if version > VERSION:
        raise CheckpointError(
            f"{path!r} has format version {version}, and this package reads up to {VERSION}. "
            "Upgrade lightning-da3."
        )
    if its_kind != kind:
        raise CheckpointError(
            f"{path!r} is for {its_kind}, and one for {kind} is needed. Give a file that "
            f"`{_WRITES[kind]}` wrote."
        )
    return dict(found)


def _shape(said: Sequence[int | str]) -> tuple[int | None, ...]:
    return tuple(None if isinstance(side, str) else side for side in said)
