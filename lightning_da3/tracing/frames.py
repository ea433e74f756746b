"""Which of the user's functions runs, told by the stack."""

from __future__ import annotations

import dis
import functools
import inspect
import linecache
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch
import torch.nn.utils.rnn
import torch.utils.checkpoint
from torch import nn

_TORCH = str(Path(inspect.getfile(torch)).parent) + os.sep
_NUMPY = str(Path(inspect.getfile(np)).parent) + os.sep
_CHECKPOINT = inspect.getfile(torch.utils.checkpoint)
_PACKING = inspect.getfile(torch.nn.utils.rnn)
_HERE = str(Path(__file__).parents[1]) + os.sep


def frames_above(frame: FrameType | None) -> list[FrameType]:
    """This frame and those that called it, innermost first."""
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def frames_of(error: BaseException) -> list[FrameType]:
    """The frames between who caught an error and where it was raised, innermost first."""
    found = []
    trace = error.__traceback__
    while trace is not None:
        found.append(trace.tb_frame)
        trace = trace.tb_next
    return found[::-1]


def innermost_module(frames: list[FrameType], code: CodeType) -> list[FrameType]:
    """The frames up to the first one that runs `code`."""
    for i, frame in enumerate(frames):
        if frame.f_code is code:
            return frames[:i]
    return frames


def forwards_of_functions() -> dict[CodeType, str]:
    """The names of custom functions of autograd, by the code of their forward."""
    found: dict[CodeType, str] = {}
    kinds: list[type] = [torch.autograd.Function]
    for kind in kinds:
        kinds += kind.__subclasses__()
        forward: Any = getattr(kind, "forward", None)
        code = getattr(inspect.unwrap(forward), "__code__", None)
        if code is not None and kind is not torch.autograd.Function:
            found[code] = kind.__name__
    return found


def leafable(
    frames: list[FrameType], known: Collection[CodeType], forwards: Collection[CodeType] = ()
) -> CodeType | None:
    """The innermost function of the user that may become a node of its own.

    Args:
        frames: Innermost first, of one module's forward.
        known: Functions that are nodes already, which did not help.
        forwards: Of custom functions of autograd, which are not called by the user.
    """
    applied = [i for i, frame in enumerate(frames) if frame.f_code in forwards]
    for frame in frames[applied[-1] + 1 :] if applied else frames:
        if is_user(frame) and not _takes_module(frame) and frame.f_code not in known:
            return frame.f_code
    return None


def is_user(frame: FrameType) -> bool:
    """Whether a frame runs a function that is neither PyTorch's, NumPy's nor ours."""
    code = frame.f_code
    hidden = code.co_name.startswith("<") and code.co_name != "<lambda>"  # comprehensions
    return not hidden and not code.co_filename.startswith((_TORCH, _NUMPY, _HERE, "<frozen"))


def _takes_module(frame: FrameType) -> bool:
    code = frame.f_code
    count = code.co_argcount + code.co_kwonlyargcount
    count += bool(code.co_flags & 4) + bool(code.co_flags & 8)  # *args, **kwargs
    values = [frame.f_locals.get(name) for name in code.co_varnames[:count]]
    values += [frame.f_locals.get(name) for name in code.co_freevars]
    return any(isinstance(value, nn.Module) for value in _flat(values))


def _flat(values: list[object]) -> Iterator[object]:
    for value in values:
        if type(value) in (list, tuple):
            yield from value  # type: ignore[misc]
        elif type(value) is dict:
            yield from value.values()
        else:
            yield value


def may_ask_is(frame: FrameType) -> bool:
    """Whether a function of the user's asks what `is` the same as something else than a constant.

    Nothing is told of `is`, so a traced forward gets a wrong answer.
    """
    return is_user(frame) and _asks_is(frame.f_code)


@functools.cache
def _asks_is(code: CodeType) -> bool:
    before = None
    for each in dis.get_instructions(code):
        if each.opname == "IS_OP" and before != "LOAD_CONST":
            return True
        before = each.opname
    return False


def in_checkpoint(frame: FrameType) -> bool:
    """Whether gradient checkpointing asks, which keeps states of tensors that a graph has not."""
    return frame.f_code.co_filename == _CHECKPOINT


def what_packs(frames: list[FrameType]) -> str:
    """What to say where sequences are packed, whose lengths are values; "" if they are not."""
    if not any(frame.f_code.co_filename == _PACKING for frame in frames):
        return ""
    return (
        "it packs sequences, whose lengths are values, so its LSTM and GRU keep what PyTorch "
        "keeps; called with padded sequences they keep less"
    )


def place(frames: list[FrameType]) -> str:
    """The line of the user's that runs, for messages; "" if there is none."""
    for frame in frames:
        if is_user(frame):
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            return f"`{line}` in {frame.f_code.co_name}" if line else frame.f_code.co_name
    return ""
