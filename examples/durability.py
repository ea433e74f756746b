"""Does anything ever get lost? Kills, damaged files, many domains, full disks: counted and printed.

    python examples/durability.py                # all of it, some minutes
    python examples/durability.py kills damage   # two parts
    python examples/durability.py --quick        # all of it on a small scale, seconds

Linux only: processes are forked, and killed with signal 9. Exits with 1 if a figure is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import random
import resource
import shutil
import signal
import statistics
import struct
import sys
import tempfile
import time
import traceback
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_da3 import (
    AdapterConfig,
    CheckpointError,
    DA3Callback,
    DA3Config,
    DA3Model,
    DomainFolder,
    convert,
    fit_sequence,
)
from lightning_da3.files.domain_file import fingerprint, read_domain, write_domain
from lightning_da3.memory import PeakBytes

CONFIG = DA3Config(adapter=AdapterConfig(hidden_channels=4, min_stride=2))
CLASSES = 3
NETWORK = "resnet50"  # of the checkpoints whose size is measured
PYTHON_BYTES = 128 * 1024  # for the error, and for modules without values that shapes are read from


@dataclasses.dataclass
class Scale:
    """How much of everything, in full or with --quick."""

    kills: int = 200
    damaged: int = 1000
    domains: int = 100
    races: int = 200
    saves: int = 5


QUICK = Scale(kills=6, damaged=39, domains=4, races=10, saves=1)


def check(name: str, value: object, good: bool) -> bool:
    """One printed figure and whether it is as it should be."""
    print(f"  {'yes' if good else 'NO '}  {name}: {value}")
    return good


# --- a small network and its domains --------------------------------------------------------------


class Classifier(L.LightningModule):
    """A small network with its weights made from a seed, in place of a pretrained one."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def training_step(self, batch: Any, _: int) -> Tensor:
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def network(channels: int = 8) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, 5),
        )


def batches(seed: int) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(24, 3, 12, 12, generator=generator)
    labels = torch.randint(CLASSES, (24,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=4, shuffle=True)


def trainer(callbacks: list[L.Callback], epochs: int = 2) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        deterministic=True,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def trained(channels: int = 8, config: DA3Config = CONFIG) -> DA3Model:
    """A converted network with a domain whose every value is random."""
    model = convert(network(channels), config)
    model.add_domain("a", CLASSES)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.domain("a").parameters():
            parameter.normal_(generator=generator)
    return model


def outputs(model: DA3Model, name: str) -> Tensor:
    model.eval().set_domain(name)
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 2 * 3 * 12 * 12).reshape(2, 3, 12, 12))


# --- processes ------------------------------------------------------------------------------------


def fork(work: Callable[[], object]) -> int:
    """A process that has everything imported already, runs `work` and ends: 0 if it succeeded."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        work()
        code = 0
    except CheckpointError as error:
        print(f"       {error}")
        code = 2
    except BaseException:
        traceback.print_exc()
        raise  # no further than to the exit
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(process: int) -> int:
    """Its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


# --- kill -9 --------------------------------------------------------------------------------------

NAMES = ("a", "b", "c")


def sequence(folder: Path) -> None:
    tempfile.tempdir = str(folder.parent)  # where what Lightning leaves is removed at the end
    tasks = {name: (CLASSES, batches(seed)) for seed, name in enumerate(NAMES)}
    fit_sequence(Classifier, tasks, trainer, folder, config=CONFIG, save_every_n_steps=1)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in folder.glob("*.safetensors")}


def weights(folder: Path) -> dict[str, str]:
    files = {name: read_domain(folder / f"{name}.safetensors") for name in NAMES}
    return {name: fingerprint(file.tensors) for name, file in files.items()}


def kills(scale: Scale, work: Path) -> bool:
    """Processes killed at random moments of a sequence of three domains, until it is through."""
    start = time.monotonic()
    assert wait(fork(lambda: sequence(work / "whole"))) == 0
    duration = time.monotonic() - start
    expected = weights(work / "whole")
    dice = random.Random(0)
    killed = writing = sequences = unreadable = lost = different = 0
    while killed < scale.kills:
        folder = work / f"killed{sequences}"
        sequences += 1
        finished: dict[str, bytes] = {}
        while True:
            process = fork(lambda folder=folder: sequence(folder))
            if killed < scale.kills:
                time.sleep(dice.uniform(0, 0.6 * duration))
                os.kill(process, signal.SIGKILL)
            if (code := wait(process)) != -signal.SIGKILL:
                break
            killed += 1
            unreadable += count_unreadable(folder)
            now = contents(folder)
            lost += sum(now.get(name) != content for name, content in finished.items())
            finished = now
            writing += any(path.suffix == ".tmp" for path in folder.glob("*"))
        different += code != 0 or weights(folder) != expected
        shutil.rmtree(folder)
    print(f"kill -9 at random moments of a run of {duration:.1f} s over {len(NAMES)} domains")
    print(f"  {killed} kills, {writing} of them while a file was written, in {sequences} sequences")
    return all(
        [
            check("unreadable files", unreadable, unreadable == 0),
            check("lost or changed finished domains", lost, lost == 0),
            check(
                "sequences that ended with other bits than the uninterrupted one",
                f"{different} of {sequences}",
                different == 0,
            ),
        ]
    )


def count_unreadable(folder: Path) -> int:
    return sum(not is_readable(path) for path in folder.glob("*"))


def is_readable(path: Path) -> bool:
    """Whether a file is what its name says; what a killed process left half written has none."""
    try:
        if path.suffix == ".safetensors":
            read_domain(path)
        elif path.suffix == ".ckpt":
            torch.load(path, weights_only=True)
    except Exception as error:  # noqa: BLE001 - whatever it is, the file is unreadable
        print(f"       {path}: {error}")
        return False
    return True


# --- damaged files --------------------------------------------------------------------------------


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
        other = dice.choice([torch.int64, torch.int8, torch.bool, torch.complex64])
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


# --- many domains ---------------------------------------------------------------------------------


class Record(L.Callback):
    """What a domain computes right after it was learned, and what it took to learn it."""

    def __init__(self, records: list[tuple[Tensor, float, int]]) -> None:
        self.records = records

    def on_fit_start(self, *_: Any) -> None:
        self.start = time.perf_counter()

    def on_fit_end(self, _: L.Trainer, pl_module: L.LightningModule) -> None:
        seconds = time.perf_counter() - self.start
        model: DA3Model = pl_module.network
        resident_bytes = (
            int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        )
        self.records.append((outputs(model, model.active_domain), seconds, resident_bytes))
        model.train()


def domains(scale: Scale, work: Path) -> bool:
    """Domains learned one after the other, in one process."""
    records: list[tuple[Tensor, float, int]] = []
    tasks = {f"domain{i}": (CLASSES, batches(i)) for i in range(scale.domains)}
    module = fit_sequence(
        Classifier,
        tasks,
        lambda callbacks: trainer([*callbacks, Record(records)], epochs=1),
        work / "domains",
        config=CONFIG,
    )
    same = sum(
        torch.equal(outputs(module.network, name), records[i][0]) for i, name in enumerate(tasks)
    )
    part = max(1, scale.domains // 5)
    early, late = records[1 : part + 1], records[-part:]
    times = [statistics.median(record[1] for record in some) * 1e3 for some in (early, late)]
    memory = [statistics.median(record[2] for record in some) / 2**20 for some in (early, late)]
    print(f"{scale.domains} domains one after the other, medians of {part} early and late ones")
    return all(
        [
            check("bit-identical at the end", f"{same} of {len(tasks)}", same == len(tasks)),
            check(
                "time of one, ms",
                f"{times[0]:.0f} -> {times[1]:.0f}",
                times[1] < 1.3 * times[0] + 100,
            ),
            check(
                "memory of the process, MiB",
                f"{memory[0]:.1f} -> {memory[1]:.1f}",
                memory[1] < memory[0] + 16,
            ),
        ]
    )


# --- size of Lightning's checkpoints --------------------------------------------------------------


class Stepped(L.LightningModule):
    """One step of AdamW on a torchvision network, so that the optimizer has its state."""

    def __init__(self) -> None:
        super().__init__()
        import torchvision

        self.network = torchvision.models.get_model(NETWORK)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def checkpoints(scale: Scale, work: Path) -> bool:
    """Lightning's own checkpoint, of full fine-tuning and of one domain."""
    data = DataLoader(TensorDataset(torch.randn(2, 3, 64, 64), torch.tensor([0, 1])), batch_size=2)
    sizes, times = {}, {}
    for method in ("full", "DA3"):
        callbacks = [DA3Callback("flowers", 102)] if method == "DA3" else []
        fitter = L.Trainer(
            accelerator="cpu",
            max_steps=1,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        fitter.fit(Stepped(), data)
        for weights_only in (False, True):
            path = work / "size.ckpt"
            taken = []
            for _ in range(scale.saves):
                start = time.perf_counter()
                fitter.save_checkpoint(path, weights_only)
                taken.append(time.perf_counter() - start)
            sizes[method, weights_only] = path.stat().st_size
            times[method, weights_only] = statistics.median(taken) * 1e3
    print(f"checkpoint that Lightning writes for {NETWORK} with one domain of 102 classes")
    good = []
    for weights_only, what in ((False, "with optimizer"), (True, "weights only")):
        full, ours = sizes["full", weights_only], sizes["DA3", weights_only]
        share = f"{ours:,} of {full:,} bytes, {ours / full:.1%}"
        good.append(check(what, share, ours <= 0.05 * full))
        slow, fast = times["full", weights_only], times["DA3", weights_only]
        print(f"       saved in {fast:.0f} of {slow:.0f} ms, {fast / slow:.1%}")
    return all(good)


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
    import subprocess

    small = work / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(small)]
    try:
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            return None
    except FileNotFoundError:
        return None
    try:
        path = small / "a.safetensors"
        model.save_domain("a", path)
        good = path.read_bytes()
        code = wait(fork(lambda: model.save_domain("a", path, note="x" * 8192)))
        kept = path.read_bytes() == good and list(small.iterdir()) == [path]
        return code if kept else 1
    finally:
        subprocess.run(["umount", str(small)], check=True)


# --- the command ----------------------------------------------------------------------------------

PARTS = {
    "kills": kills,
    "damage": damage,
    "domains": domains,
    "checkpoints": checkpoints,
    "disk": disk,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all of them")
    parser.add_argument("--quick", action="store_true", help="on a small scale")
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers")
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated", FutureWarning)
    torch.set_num_threads(1)  # of those that a forked process would wait for
    good = True
    for part in options.parts or PARTS:
        with tempfile.TemporaryDirectory() as work:
            good &= PARTS[part](QUICK if options.quick else Scale(), Path(work))
    return 0 if good else 1


def silence_profiler() -> None:
    """Leave the error stream to Python: PyTorch's profiler has a line to say in every fit."""
    sys.stderr = os.fdopen(os.dup(2), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


if __name__ == "__main__":
    silence_profiler()
    sys.exit(main())
