"""The memory that PyTorch's profiler saw."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch.profiler import profile

from lightning_da3.torch_private.finding import found

_Allocation = found("torch._C._profiler:_ExtraFields_Allocation", None)
_CPU = 0  # the number of this kind of device in a profiler's file


def _unknown() -> bool:
    return True


is_profiling: Callable[[], bool] = found("torch._C._autograd:_profiler_enabled", _unknown)
"""Whether a profiler runs, beside which no other one can; where nobody tells, there may be one."""


def allocations(profiler: profile) -> list[tuple[int, int]]:
    """What was allocated and freed on the CPU while a profiler ran, in the order of time.

    Args:
        profiler: Has run with `profile_memory`.

    Returns:
        The address and the bytes of each block; bytes below 0 where it is freed.
    """
    events = _from_file(profiler) if _Allocation is None else _from_tree(profiler)
    return [(address, size) for _, address, size in sorted(events, key=lambda event: event[0])]


def _from_tree(profiler: profile) -> list[tuple[float, int, int]]:
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    pending = profiler.profiler.kineto_results.experimental_event_tree()
    events: list[tuple[float, int, int]] = []
    while pending:
        event = pending.pop()
        pending += event.children
        block = event.typed[1]
        if isinstance(block, _Allocation) and block.device.type == "cpu":
            events.append((event.start_time_ns, block.ptr, block.alloc_size))
    return events


def _from_file(profiler: profile) -> list[tuple[float, int, int]]:
    """What the public file says, which takes longer to write and to read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        found_there = json.loads(path.read_text())["traceEvents"]
    blocks = [
        (event["ts"], event["args"]) for event in found_there if event.get("name") == "[memory]"
    ]
    return [
        (time, args["Addr"], args["Bytes"]) for time, args in blocks if args["Device Type"] == _CPU
    ]
