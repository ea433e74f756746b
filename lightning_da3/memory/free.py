"""What a device has free."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

from lightning_da3.errors import ConfigError

GROUP = Path("/sys/fs/cgroup")  # of a container, on Linux


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on a device.

    On CPUs what the system says is available, and what a container's limit leaves; on CUDA devices
    what the driver says is free, and what PyTorch holds without using it.

    Raises:
        ConfigError: The system does not say.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    found = [*_of_the_system(), *_of_the_group()] if device.type == "cpu" else []
    if not found:
        raise ConfigError(
            f"budget='auto': what {device.type!r} has free is not known here. Give it in bytes, or "
            "as in '2GiB'."
        )
    return min(found)


def _of_the_system() -> list[int]:
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return [1024 * int(line.split()[1])]
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    return []


def _of_the_group() -> list[int]:
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        limit = int((GROUP / "memory.max").read_text())
        return [max(0, limit - int((GROUP / "memory.current").read_text()))]
    return []
