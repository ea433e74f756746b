"""What an exported file says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a device reads manifests without PyTorch
    from lightning_da3.exporting.program import Port, Program

VERSION = 1
KEY = "lightning_da3"  # in the file's own metadata
SUFFIX = ".json"  # of the copy beside the file
NEW = "new."  # in front of the name of what a training step changed
START = ".safetensors"  # of the domain that a training step begins with, beside the file


def manifest_of(
    about: Mapping[str, Any],
    kind: str,
    program: Program,
    dynamic_batch: bool,
) -> dict[str, Any]:
    """What JSON holds of a program.

    Args:
        about: What the domain's own file says of it, and of its model.
        kind: What the program does.
        program: What it takes and gives.
        dynamic_batch: The first axis of those with samples may be of any size.
    """
    return {
        "format": KEY,
        "format_version": VERSION,
        "kind": kind,
        **about,
        "inputs": [_described(port, dynamic_batch) for port in program.inputs],
        "outputs": [_described(port, dynamic_batch) for port in program.outputs],
        "versions": {"torch": version("torch")},
    }


def _described(port: Port, dynamic_batch: bool) -> dict[str, Any]:
    shape: list[int | str] = list(port.example.shape)
    if port.batched and dynamic_batch:
        shape[0] = "batch"
    return {"name": port.name, "shape": shape, "dtype": str(port.example.dtype).split(".")[-1]}
