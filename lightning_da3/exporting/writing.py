"""Programs as files, each checked before it takes its place."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from lightning_da3.errors import CheckpointError, ConfigError, ConversionError, DA3Error
from lightning_da3.exporting.executorch_file import write_executorch
from lightning_da3.exporting.manifest import KEY, NEW, SUFFIX
from lightning_da3.exporting.onnx_passes.graph import (
    OPSET,
    planned_peak_bytes,
    simplify_,
    standard_operations,
)
from lightning_da3.exporting.onnx_passes.size import compact_
from lightning_da3.exporting.program import Program
from lightning_da3.files.writing import replacing
from lightning_da3.formatting import shown

MOST_ONNX_BYTES = 2**31 - 2**20  # of weights: the graph needs some, too
TOLERANCE = 1e-3  # of the largest value; float32 leaves far less
EXECUTORCH, XNNPACK = "executorch", "executorch-xnnpack"
_EXTRAS = {  # what formats need, and the extra that installs it
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "export"),
    EXECUTORCH: (("executorch",), "executorch"),
    XNNPACK: (("executorch",), "executorch"),
}

Tensors = Sequence[Tensor]


class Example(NamedTuple):
    """What a program is checked with.

    Attributes:
        inputs: What goes in.
        expected: What the model gives for that.
        nearby: What the model gives for several inputs that are off by as much as rounding; empty:
            that makes no difference. A ReLU close to zero decides otherwise then, and a gradient
            that is a sum of many jumps, as it does between two kernels of one convolution.
    """

    inputs: Tensors
    expected: Tensors
    nearby: Sequence[Tensors] = ()


class Write(Protocol):
    """Writes a program and its manifest, and gives back what runs the file."""

    def __call__(
        self, program: Program, path: Path, manifest: dict[str, Any]
    ) -> Callable[[Tensors], Tensors]:
        """See the class."""


def check_format(format: str, dynamic_batch: bool) -> None:  # noqa: A002 - the public argument's
    """Refuse what is no format, and one whose packages are missing.

    Raises:
        ConfigError: There is no such format, or it has no batches of any size.
        DA3Error: A package is missing.
    """
    if not isinstance(format, str) or format not in WRITERS:
        raise ConfigError(f"`format` must be one of {list(WRITERS)}, got {shown(format)}.")
    if format in (EXECUTORCH, XNNPACK) and dynamic_batch:
        raise ConfigError(
            f"format={format!r} plans memory ahead, for batches of the examples' size alone. Say "
            "dynamic_batch=False (in the shell `--batch-size N`)."
        )
    packages, extra = _EXTRAS.get(format, ((), ""))
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        raise DA3Error(
            f"format={format!r} needs the packages {absent}. Install the extra: `pip install "
            f"'lightning-da3[{extra}]'`; or write format='pt2', which needs torch alone."
        )


def check_target(path: str | os.PathLike[str]) -> None:
    """Refuse what can be no file, before there is work to lose.

    Raises:
        CheckpointError: It is a folder, or lies in none.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir() or not target.parent.is_dir():
        why = "it is a folder" if target.is_dir() else f"there is no folder {str(target.parent)!r}"
        raise CheckpointError(
            f"Cannot write {str(path)!r}: {why}. Choose a path in a folder that exists."
        )


def write_program(
    program: Program,
    path: str | os.PathLike[str],
    format: str,  # noqa: A002 - the public argument's name
    manifest: Mapping[str, Any],
    examples: Sequence[Example],
    tolerance: float = TOLERANCE,
    also: Callable[[], None] | None = None,
) -> Path:
    """Write a program and its manifest beside it, both or neither.

    Args:
        program: What to write.
        path: The file; its folder must exist.
        format: One of `WRITERS`.
        manifest: What the file says of itself; JSON.
        examples: Inputs, and what must come out for them.
        tolerance: How far off that may be, for its largest value, or that of the input whose new
            value it is, beside what rounding does.
        also: Writes what else belongs to the file, before that takes its place.

    Returns:
        The file.

    Raises:
        CheckpointError: The files cannot be written.
        ConversionError: The file computes something else, or cannot be run.
    """
    target = Path(os.path.realpath(path))  # of a link, what it points to is replaced
    beside = target.with_name(target.name + SUFFIX)
    said = dict(manifest)
    try:
        with replacing(target) as file, replacing(beside) as text:
            run = WRITERS[format](program, file, said)
            for example in examples:
                _check(run(example.inputs), example, program, tolerance)
            text.write_text(json.dumps(said, indent=1, sort_keys=True), encoding="utf-8")
            if also is not None:
                also()
    except OSError as error:
        raise CheckpointError(
            f"Cannot write {str(path)!r}: {error}. Choose a path in a folder that exists and can "
            "be written to."
        ) from error
    return Path(path)


def _check(found: Tensors, example: Example, program: Program, tolerance: float) -> None:
    given = {port.name: x for port, x in zip(program.inputs, example.inputs, strict=True)}
    rows = zip(program.outputs, found, example.expected, *example.nearby, strict=True)
    for (name, *_), y, wanted, *nearby in rows:
        # a step may take a value to almost zero, and is no more exact there
        before = given.get(name.removeprefix(NEW), wanted)
        y, wanted, before, *nearby = (
            t.detach().cpu().double() for t in (y, wanted, before, *nearby)
        )
        largest = max(_largest(wanted), _largest(before))
        rounding = max((_largest(near - wanted) for near in nearby), default=0.0)
        allowed = tolerance * largest + rounding + 1e-6
        same = y.shape == wanted.shape and torch.allclose(y, wanted, 0.0, allowed, equal_nan=True)
        if not same:
            raise ConversionError(
                f"The exported program computes another {name!r} than the model does, and was not "
                "written. Please report the network; until that is mended, leave out the layers "
                "that are not standard."
            )


def _largest(x: Tensor) -> float:
    return float(x.abs().nan_to_num().max()) if x.numel() else 0.0


def _write_onnx(
    program: Program, path: Path, manifest: dict[str, Any]
) -> Callable[[Tensors], Tensors]:
    onnx: Any = importlib.import_module("onnx")
    names = [port.name for port in program.inputs]
    graph = _as_onnx(program, names)
    peak = planned_peak_bytes(graph)
    if peak is not None:
        manifest["planned_peak_bytes"] = peak
    model = importlib.import_module("onnx_ir").to_proto(graph)
    manifest["operations"] = standard_operations(model)
    manifest["opset"] = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    manifest["versions"] = {**manifest["versions"], "onnx": onnx.__version__}
    compact_(model)
    onnx.helper.set_model_props(model, {KEY: json.dumps(manifest, sort_keys=True)})
    onnx.save_model(model, str(path))
    return _onnx_run(path, names, [port.name for port in program.outputs])


def _as_onnx(program: Program, names: Sequence[str]) -> Any:
    """The program as an ir model."""
    held = sum(t.numel() * t.itemsize for t in program.exported.state_dict.values())
    if held >= MOST_ONNX_BYTES:
        raise ConversionError(
            f"ONNX files hold 2 GiB at most, and the network has {held / 2**30:.1f} GiB. Write "
            "format='pt2'."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's and onnxscript's own calls
        try:
            made: Any = torch.onnx.export(
                program.exported,
                dynamo=True,
                verbose=False,
                input_names=names,
                output_names=[port.name for port in program.outputs],
                opset_version=OPSET,
                optimize=False,  # to it, constants below 1e-8 are 0: they keep divisions safe
            )
        except Exception as error:  # of many kinds
            raise ConversionError(
                f"torch.onnx cannot translate the network: {error}. Write format='pt2', or replace "
                "the layers that it names."
            ) from error
    simplify_(made.model, [port.name for port in program.outputs])
    return made.model


def _onnx_run(
    path: Path, names: Sequence[str], outputs: Sequence[str]
) -> Callable[[Tensors], Tensors]:
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = runtime.InferenceSession(
            path.read_bytes(), options, providers=["CPUExecutionProvider"]
        )
    except RuntimeError as error:
        raise ConversionError(
            f"onnxruntime cannot run the exported network: {error}. Convert it in float32, or "
            "write format='pt2'."
        ) from error
    taken = {port.name for port in session.get_inputs()}

    def run(inputs: Tensors) -> Tensors:
        fed = {
            n: x.detach().cpu().numpy() for n, x in zip(names, inputs, strict=True) if n in taken
        }
        return [torch.from_numpy(y) for y in session.run(outputs, fed)]

    return run


def _write_pt2(
    program: Program, path: Path, manifest: dict[str, Any]
) -> Callable[[Tensors], Tensors]:
    text = json.dumps(manifest, sort_keys=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensors that do not lie in the order of their axes
        with path.open("wb") as file:  # by its name, torch would want another ending
            name = f"{KEY}{SUFFIX}"
            torch.export.save(program.exported, cast(Any, file), extra_files={name: text})
        with path.open("rb") as file:
            run = torch.export.load(cast(Any, file)).module()
    return lambda inputs: cast(Tensors, run(*inputs))


WRITERS: dict[str, Write] = {
    "onnx": _write_onnx,
    "pt2": _write_pt2,
    EXECUTORCH: write_executorch,
    XNNPACK: partial(write_executorch, xnnpack=True),
}
"""How every format is written."""
