"""Peak bytes and time of a training step."""

import dataclasses
import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile

from lightning_da3.errors import ConfigError
from lightning_da3.torch_private.profiling import allocations


@dataclasses.dataclass(frozen=True)
class StepMeasurement:
    """What one training step costs.

    Attributes:
        peak_bytes: The largest total of memory allocated in the step and alive at one time.
        time_ms: The median wall time of a step, in milliseconds; NaN if none was timed.
    """

    peak_bytes: int
    time_ms: float


def measure_step(
    step: Callable[[], object],
    *,
    warmup: int = 1,
    repeats: int = 1,
    device: torch.device | str | None = None,
) -> StepMeasurement:
    """Measure the peak memory and the time of a training step.

    Memory from before the step counts as zero, whether or not the step frees it. Let the step end
    with `zero_grad(set_to_none=True)`: gradients then belong to it on every device.

    Args:
        step: Runs forward, backward, optimizer step and `zero_grad`, once per call. It is called
            `warmup + 1 + repeats` times.
        warmup: Calls before anything is measured; the first one makes the optimizer's state.
        repeats: Timed calls, apart from the one whose memory is measured, which is slower.
        device: Where the step computes, a CPU or a CUDA device. None: the CPU.

    Returns:
        Peak bytes above the start of the step, and its median time.

    Raises:
        ConfigError: A count is negative, or the device is neither a CPU nor a CUDA device.
    """
    for name, count in (("warmup", warmup), ("repeats", repeats)):
        if count < 0:
            raise ConfigError(f"`{name}` must be at least 0, got {count}.")
    watch = PeakBytes(device)
    for _ in range(warmup):
        step()
    gc.collect()  # garbage of earlier steps would be freed at any moment of this one
    with watch:
        step()
    times_ms = [_time_ms(step, watch.device) for _ in range(repeats)]
    return StepMeasurement(watch.bytes, statistics.median(times_ms) if times_ms else math.nan)


class PeakBytes:
    """The largest total of memory allocated in a `with` block and alive at one time.

    Memory from before the block counts as zero, whether or not the block frees it.

    Args:
        device: Where the block computes, a CPU or a CUDA device. None: the CPU.

    Attributes:
        bytes: The peak, once the block ended.

    Raises:
        ConfigError: The device is neither a CPU nor a CUDA device.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.device = torch.device("cpu" if device is None else device)
        if self.device.type not in ("cpu", "cuda"):
            raise ConfigError(f"`device` must be a CPU or a CUDA device, got {str(self.device)!r}.")
        self.bytes = 0
        self._start = 0

    def __enter__(self) -> "PeakBytes":
        """Starts to watch."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
            return self
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its log would break progress bars
        self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profiler.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stops watching and takes the peak."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._start
            return
        self._profiler.__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        if error is None:
            self.bytes = _highest_sum(allocations(self._profiler))
        del self._profiler


def resident_bytes() -> int | None:
    """The largest resident set of this process so far, in bytes; None where nobody tells."""
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest


def _highest_sum(blocks: list[tuple[int, int]]) -> int:
    sizes: dict[int, int] = {}  # of the blocks allocated in the block and alive, by address
    total = peak = 0
    for address, size in blocks:
        if size > 0:
            sizes[address] = size
            total += size
        else:
            # the profiler knows only some of the blocks from before: count none of them
            total -= sizes.pop(address, 0)
        peak = max(peak, total)
    return peak


def _time_ms(step: Callable[[], object], device: torch.device) -> float:
    def now_ms() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() * 1e3

    start = now_ms()
    step()
    return now_ms() - start
