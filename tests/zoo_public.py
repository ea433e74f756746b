"""Public networks, converted: a table of what each reaches. Run it as a script.

    python tests/zoo_public.py [--small] [--unverified] [names ..]

It needs transformers, segmentation_models_pytorch, monai, open_clip, pytorchvideo, timm,
torchvision or torchaudio; what is not installed is left out. Weights are random, and nothing is
downloaded.
"""

# ruff: noqa: PERF203, T201

from __future__ import annotations

import argparse
import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from helpers.zoo_public_networks import CLASSES, ZOO
from torch import Tensor, nn

from lightning_da3 import DA3Model, convert
from lightning_da3.memory import measure_step, saved_activation_bytes


def build(name: str, small: bool) -> tuple[nn.Module, Any]:
    """A network in eval and its inputs; a tuple is several arguments.

    Raises:
        ImportError: Its library is not installed.
    """
    entry = ZOO[name]
    library = importlib.import_module(entry.library)
    torch.manual_seed(0)
    return entry.build(library, small).eval(), entry.batch(small)


def arguments(batch: Any) -> tuple[Any, ...]:
    """What a network is called with; a list of its own, into which some write."""
    several = batch if isinstance(batch, tuple) else (batch,)
    return tuple(list(x) if isinstance(x, list) else x for x in several)


def tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of any output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from (t for value in output.values() for t in tensors(value))
    elif isinstance(output, (list, tuple)):
        yield from (t for value in output for t in tensors(value))


def learn_(model: DA3Model, domain: str, batch: Any, method: str = "forward") -> None:
    """Train a new domain for one step."""
    model.add_domain(domain, num_classes=CLASSES if model.plan.head else None)
    model.set_domain(domain)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    loss_of(model, batch, method).backward()
    optimizer.step()
    optimizer.zero_grad()


def called(network: nn.Module, batch: Any, method: str) -> Any:
    # a module calls its hooks, by which what is kept is told apart
    called = network if method == "forward" else getattr(network, method)
    return called(*arguments(batch))


def loss_of(network: nn.Module, batch: Any, method: str) -> Any:
    output = called(network, batch, method)
    return sum(t.square().mean() for t in tensors(output) if t.requires_grad)


@torch.no_grad()
def outputs(model: nn.Module, batch: Any, method: str = "forward") -> list[Tensor]:
    return list(tensors(called(model.eval(), batch, method)))


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def lasts(
    model: DA3Model, again: DA3Model, batch: Any, method: str = "forward"
) -> tuple[bool, bool]:
    """Whether a file restores a domain bit for bit, and a second domain leaves the first alone."""
    learn_(model, "first", batch, method)
    before = outputs(model, batch, method)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "first.safetensors"
        model.save_domain("first", file)
        again.load_domain(file)
    again.set_domain("first")
    learn_(model, "second", batch, method)
    model.set_domain("first")
    restored = same(before, outputs(again, batch, method))
    return restored, same(before, outputs(model, batch, method))


def kept_bytes(network: nn.Module, batch: Any, method: str) -> int:
    fn = network if method == "forward" else getattr(network, method)
    return saved_activation_bytes(fn, *arguments(batch))


def peak_bytes(network: nn.Module, batch: Any, method: str) -> int:
    def step() -> None:
        loss_of(network, batch, method).backward()
        for parameter in network.parameters():
            parameter.grad = None

    return measure_step(step, warmup=1, repeats=0).peak_bytes


def row(name: str, small: bool, verify: bool | None) -> str:
    (network, batch), method = build(name, small), ZOO[name].method
    inputs = arguments(batch)
    # compared alike, or another plan might fit
    model, again = (convert(network, None, inputs, verify) for _ in range(2))
    restored, unchanged = lasts(model, again, batch, method)
    network.train()
    model.train()
    plain, kept = (kept_bytes(net, batch, method) for net in (network, model))
    peak = peak_bytes(network, batch, method) / peak_bytes(model, batch, method)
    plan = model.plan
    return (
        f"| {name} | {plan.head or 'none'} | {len(plan.hosts)} | {len(plan.python)} "
        f"| {plain / 2**20:.1f} | {kept / 2**20:.2f} | {plain / kept:.1f} "
        f"| {peak:.1f} | {'yes' if restored else 'NO'} | {'yes' if unchanged else 'NO'} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--small", action="store_true", help="small networks on small batches")
    parser.add_argument("--unverified", action="store_true", help="no comparison: quicker")
    parser.add_argument("names", nargs="*", help="which ones; by default all")
    options = parser.parse_args()
    names = options.names or list(ZOO)
    for package in dict.fromkeys(["torch", *(ZOO[name].library.split(".")[0] for name in names)]):
        try:
            version = getattr(importlib.import_module(package), "__version__", "?")
        except ImportError:
            version = "not installed"
        print(f"{package} {version}")
    columns = ["network", "head", "hosts", "stay Python", "fine-tuning keeps, MiB", "keeps, MiB"]
    columns += ["ratio", "ratio of peaks", "restored", "unchanged"]
    print(f"\n| {' | '.join(columns)} |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---|---|")
    for name in names:
        try:
            print(row(name, options.small, False if options.unverified else None), flush=True)
        except ImportError:
            continue
        except Exception as error:  # noqa: BLE001  # the table goes on
            print(f"| {name} | {type(error).__name__}: {str(error)[:150]} |", flush=True)


if __name__ == "__main__":
    main()
