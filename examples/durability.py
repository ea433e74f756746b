"""Does anything ever get lost? Kills, damaged files, many domains, full disks: counted and printed.

    python examples/durability.py                # all of it, some minutes
    python examples/durability.py kills damage   # two parts
    python examples/durability.py --quick        # all of it on a small scale, seconds

Linux only: processes are forked, and killed with signal 9. Exits with 1 if a figure is missed.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from damaged import damage, disk
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from trials import (
    CLASSES,
    CONFIG,
    QUICK,
    Classifier,
    Scale,
    batches,
    check,
    fork,
    outputs,
    trainer,
    wait,
)

from lightning_da3 import DA3Callback, DA3Model, fit_sequence
from lightning_da3.files.domain_file import read_domain

NETWORK = "resnet50"  # of the checkpoints whose size is measured

# --- kill -9 --------------------------------------------------------------------------------------

NAMES = ("a", "b", "c")


def sequence(folder: Path) -> None:
    tempfile.tempdir = str(folder.parent)  # where what Lightning leaves is removed at the end
    tasks = {name: (CLASSES, batches(seed)) for seed, name in enumerate(NAMES)}
    fit_sequence(Classifier, tasks, trainer, folder, config=CONFIG, save_every_n_steps=1)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in folder.glob("*.safetensors")}


def weights(folder: Path) -> dict[str, bytes]:
    """The bytes of every domain's tensors, as they lie behind the header of its file."""
    return {name: content[8 + _header(content) :] for name, content in contents(folder).items()}


def _header(content: bytes) -> int:
    return int.from_bytes(content[:8], "little")


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
        ended = weights(folder) if code == 0 else {}
        if ended != expected:
            different += 1
            others = [name for name in NAMES if ended.get(name) != expected[name]]
            print(f"       sequence {sequences} ended with exit code {code}, other: {others}")
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
    """Each read in a process of its own: forks of one that has computed were aborted at times."""
    return sum(wait(fork(lambda path=path: read(path))) != 0 for path in folder.glob("*"))


def read(path: Path) -> None:
    """Fails unless a file is what its name says; what was left half written has no such name."""
    if path.suffix == ".safetensors":
        read_domain(path)
    elif path.suffix == ".ckpt":
        torch.load(path, weights_only=True)


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
