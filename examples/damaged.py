"""Trials of durability.py: damaged files, full disks, read-only folders, writers that race."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import struct
import subprocess
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from trials import Scale, check, fork, network, trained, wait

from lightning_da3 import (
    AdapterConfig,
    CheckpointError,
    DA3Config,
    DA3Model,
    DomainFolder,
    convert,
)
from lightning_da3.files.domain_file import read_domain, write_domain
from lightning_da3.memory import PeakBytes

PYTHON_BYTES = 128 * 1024  # for the error, and for modules without values that shapes are read from


class Payload:
    """What a pickle would run."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def damaged_files(path: Path, marker: Path, dice: random.Random) -> Iterator[tuple[str, Any]]:
    """Endless: a kind of damage, and what writes a file so damaged to a path."""
    good = path.read_bytes()
    file = read_domain(path)
    names = sorted(file.tensors)
    tricks = ("../../a", "/etc/passwd", "a/../../b", "..", "a\0b", "C:\\a", "~/a", "", "a" * 10_000)

    def bytes_of(content: bytes) -> Callable[[Path], object]:
        return lambda target: target.write_bytes(content)

    def signed(tensors: dict[str, Tensor], about: dict[str, Any]) -> Callable[[Path], object]:
        """Well-formed and with a good checksum: written by someone with this library."""
        return lambda target: write_domain(target, tensors, {**file.metadata, **about})

    def header(entry: dict[str, Any]) -> bytes:
        text = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}})
        return struct.pack("<Q", len(text)) + text.encode() + bytes(8)

    while True:
        name = dice.choice(names)
        tensor = file.tensors[name]
        yield "truncated", bytes_of(good[: dice.randrange(len(good))])
        flipped = bytearray(good)
        for _ in range(dice.randint(1, 8)):
            flipped[dice.randrange(len(good))] ^= 1 << dice.randrange(8)
        yield "bits flipped", bytes_of(bytes(flipped) if flipped != good else good[:-1])
        other = dice.choice([torch.int64, torch.int8, torch.bool, torch.uint8])
        yield "wrong dtype", signed({**file.tensors, name: tensor.to(other)}, {})
        shape = dice.choice([tensor[:0], tensor[None], tensor.repeat(2, *[1] * (tensor.dim() - 1))])
        yield "wrong shape", signed({**file.tensors, name: shape}, {})
        size = dice.choice([2**30, 2**40, 2**62, 2**63 - 1])
        yield "huge header", bytes_of(struct.pack("<Q", size) + good[8:])
        yield "huge tensor", bytes_of(header({"shape": [size]}))
        yield "huge offsets", bytes_of(header({"data_offsets": [0, size]}))
        yield "huge class count", signed(file.tensors, {"num_classes": size * dice.choice([1, 2])})
        tensors = {f"layer{i}.weight": torch.zeros(dice.randint(1, 99)) for i in range(3)}
        yield "foreign safetensors", lambda target, tensors=tensors: save_file(tensors, target)
        yield "pickle", lambda target: torch.save(Payload(marker), target)
        trick = dice.choice(tricks)
        yield "path as domain", signed(file.tensors, {"domain": trick})
        yield "path as tensor", signed({**file.tensors, f"{trick}/x": tensor}, {})
        yield "noise", bytes_of(dice.randbytes(dice.randrange(4096)))


def damage(scale: Scale, work: Path) -> bool:
    """Every damaged file must be a CheckpointError, and take no more memory than it is long."""
    config = DA3Config(adapter=AdapterConfig(hidden_channels=128, min_stride=2))
    model = trained(channels=256, config=config)
    path, marker = work / "x" / "y" / "a.safetensors", work / "executed"
    path.parent.mkdir(parents=True)
    model.save_domain("a", path)
    limit = path.stat().st_size
    fresh = convert(network(256), config)
    files = damaged_files(path, marker, random.Random(0))
    bad = path.with_name("bad.safetensors")
    refused = wrong = 0
    kinds: dict[str, int] = {}
    most = (-limit, "")
    before = sorted(work.rglob("*"))
    for warm_up in [True] * 13 + [False] * scale.damaged:  # the first ones import and cache
        kind, write = next(files)
        write(bad)
        with traced() as peak:
            try:
                fresh.load_domain(bad)
                outcome = "accepted"
            except CheckpointError as error:
                outcome = "" if str(bad) in str(error) else f"unclear: {error}"
            except Exception as error:  # noqa: BLE001 - what it must not be
                outcome = f"{type(error).__name__}: {error}"
        size = bad.stat().st_size
        bad.unlink()
        if warm_up:
            continue
        kinds[kind] = kinds.get(kind, 0) + 1
        most = max(most, (peak[0] - size, kind))
        refused += not outcome
        if outcome:
            wrong += 1
            print(f"       {kind}: {outcome[:200]}")
    clean = sorted(work.rglob("*")) == before and fresh.domains == []
    print(f"damaged files ({', '.join(f'{count} {kind}' for kind, count in kinds.items())})")
    return all(
        [
            check("refused with a CheckpointError", f"{refused} of {scale.damaged}", not wrong),
            check("executed", int(marker.exists()), not marker.exists()),
            check("files or domains that came into being", "none" if clean else "some", clean),
            check(
                f"bytes allocated beyond the length of the file (a good one has {limit:,})",
                f"at most {most[0]:,} ({most[1]})",
                most[0] <= PYTHON_BYTES,
            ),
        ]
    )


@contextlib.contextmanager
def traced() -> Iterator[list[int]]:
    """Most bytes alive at one time in the block, above its start: PyTorch's and Python's."""
    peak = [0]
    tracemalloc.start()
    try:
        with PeakBytes() as tensors:
            yield peak
    finally:
        peak[0] = tensors.bytes + tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


# --- full disks, read-only folders, races ---------------------------------------------------------


def disk(scale: Scale, work: Path) -> bool:
    """Where a file cannot be written, or two write it at once."""
    model = trained()
    folder = DomainFolder(work / "disk")
    path = folder.save(model, "a")
    good = path.read_bytes()
    files = sorted(folder.path.iterdir())

    def untouched() -> bool:
        return path.read_bytes() == good and sorted(folder.path.iterdir()) == files

    def on_a_full_disk() -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2, hard))
        try:
            folder.save(model, "a", note="larger")
        finally:  # what is printed may go into a larger file
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def without_permission() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)  # root may write everywhere
        folder.save(model, "a")

    def again(value: float) -> None:
        with torch.no_grad():
            for parameter in model.domain("a").parameters():
                parameter.fill_(value)
        for _ in range(scale.races):
            folder.save(model, "a", value=value)

    print("disk")
    code = wait(fork(on_a_full_disk))
    results = [
        check("file cannot grow: CheckpointError, old file kept", code, code == 2 and untouched())
    ]
    if (code := full_file_system(model, work)) is not None:
        results.append(check("file system full: CheckpointError, old file kept", code, code == 2))
    work.chmod(0o755)
    folder.path.chmod(0o555)
    code = wait(fork(without_permission))
    folder.path.chmod(0o755)
    results.append(
        check("read-only folder: CheckpointError, old file kept", code, code == 2 and untouched())
    )
    writers = [fork(lambda value=value: again(value)) for value in (1.0, 2.0)]
    reads = mixed = 0
    codes: list[int] = []
    while writers:
        for process in list(writers):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                writers.remove(process)
                codes.append(os.waitstatus_to_exitcode(status))
        reads += 1
        try:
            file = read_domain(path)
        except CheckpointError:  # half a file
            mixed += 1
            continue
        values = {float(value) for tensor in file.tensors.values() for value in tensor.unique()}
        mixed += "value" in file.metadata["extra"] and values != {file.metadata["extra"]["value"]}
    results.append(check("two processes that save one domain: exit codes", codes, codes == [0, 0]))
    results.append(check("half files, or of both at once", f"{mixed} of {reads} reads", mixed == 0))
    results.append(
        check(
            "files left behind",
            len(sorted(folder.path.iterdir())) - len(files),
            sorted(folder.path.iterdir()) == files,
        )
    )
    return all(results)


def full_file_system(model: DA3Model, work: Path) -> int | None:
    """The exit code of a save onto a file system too small for it; None if none can be mounted."""
    small, file = work / "small", work / "a.safetensors"
    small.mkdir()
    model.save_domain("a", file)
    pages = 2 * -(-file.stat().st_size // resource.getpagesize()) - 1  # one too few for two files
    size = pages * resource.getpagesize()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(small)]
    try:
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            return None
    except FileNotFoundError:
        return None
    try:
        path = small / "a.safetensors"
        model.save_domain("a", path)
        good = path.read_bytes()
        code = wait(fork(lambda: model.save_domain("a", path)))
        kept = path.read_bytes() == good and list(small.iterdir()) == [path]
        return code if kept else 1
    finally:
        subprocess.run(["umount", str(small)], check=True)
