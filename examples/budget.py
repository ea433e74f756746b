"""Training steps held to a budget, beside fine-tuning at the same batch, all measured in this run.

Peak: highest total of memory that one step allocates and holds above the resting model; for DA3 the
larger one of what the allocator saw and what was predicted, as masks of bits lie outside of it on
CPUs. Time: medians of steps that take turns, beside the DA3 step without a budget.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import torch
import torchvision
from measure import CLASSES, Step, alternate, processor, step_flops, with_domain
from torch import nn

from lightning_da3 import (
    ConfigError,
    DA3Config,
    DA3Model,
    MemoryConfig,
    accumulated,
    step_costs,
)
from lightning_da3.memory import measure_step

MIB = 2**20
LEAST, AIM = 19.0, 37.0  # times less than fine-tuning's peak


@dataclass(frozen=True)
class Case:
    """One network, the size of its batch, and budgets in MiB; None: as `LEAST` or `AIM` asks."""

    name: str
    batch_size: int
    budget: float | None
    slower: float  # at most so many times the unbudgeted step


CASES = {
    "resnet50": Case("resnet50", 32, 128, 1.15),
    "vit_b_16": Case("vit_b_16", 16, None, 1.6),
    "efficientnet_b0": Case("efficientnet_b0", 16, None, 1.6),
}


class Accumulated(Step):
    """The step in parts, whose gradients add up."""

    def forward(self) -> torch.Tensor:
        def step(part: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return nn.functional.cross_entropy(self.network(part[0]), part[1])

        return accumulated(self.network, step, (self.images, self.labels))


def held(network: nn.Module, budget: float | None, split: str = "pieces") -> nn.Module:
    memory = MemoryConfig(budget=None if budget is None else int(budget), split=split)
    return with_domain(network, DA3Config(memory=memory))


def peak_of(step: Step) -> float:
    """In bytes; of a converted network no less than predicted."""
    measured = measure_step(step, repeats=0).peak_bytes
    if not isinstance(step.network, DA3Model):
        return measured
    return max(measured, step_costs(step.network, inputs=step.images).ours.peak_bytes)


def measure(case: Case, image_size: int, rounds: int, fast: bool) -> bool:
    """Prints the rows of one network; whether all that was asked is reached."""
    torch.manual_seed(0)
    images = torch.randn(case.batch_size, 3, image_size, image_size)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (case.batch_size,))
    network = torchvision.models.get_model(case.name, num_classes=CLASSES)
    network.to(memory_format=torch.channels_last)

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=1e-4)

    tuned = peak_of(Step(network.train(), images, labels, sgd))
    print(f"\n{case.name}, batch {case.batch_size} at {image_size}x{image_size}")
    print(f"  {'fine-tuning':38}{tuned / MIB:10.1f} MiB")

    asked = tuned / LEAST if case.budget is None else case.budget * MIB
    ways = {
        "asked, pieces": (asked, "pieces", LEAST, case.slower),
        "asked, accumulated": (asked, "accumulate", LEAST, case.slower),
        "37 times less, pieces": (tuned / AIM, "pieces", AIM, None),
        "37 times less, accumulated": (tuned / AIM, "accumulate", AIM, None),
    }
    steps = {"no budget": Step(held(network, None), images, labels, sgd)}
    for name, (budget, split, *_) in ways.items():
        kind = Accumulated if split == "accumulate" else Step
        try:
            step = kind(held(network, budget, split), images, labels, sgd)
            step()
        except ConfigError as error:
            print(f"  {name}: {error}")
            continue
        steps[name] = step
    peaks = {name: peak_of(step) for name, step in steps.items()}
    counts = {name: step_flops(step) for name, step in steps.items()}
    times = alternate(steps, rounds)
    good = True
    for name, peak in peaks.items():
        slower = times[name].wall_ms / times["no budget"].wall_ms
        more = counts[name] / counts["no budget"]
        row = f"  {name:38}{peak / MIB:10.1f} MiB{tuned / peak:8.1f}x less{slower:8.2f}x the time"
        row += f"{more:8.2f}x the FLOPs"
        if name in ways and not fast:
            budget, _, least, most = ways[name]
            fits = peak <= budget and tuned / peak >= least and (most is None or slower <= most)
            good &= fits or most is None
            row += "  pass" if fits else "  FAIL"
        print(row)
        if name in ways:
            costs = step_costs(steps[name].network, inputs=images)
            print(f"    {costs.summary.split('held to ')[-1]}".split("\n")[0])
    good &= all(name in peaks for name in ways if name.startswith("asked"))
    return good


def main() -> int:
    """Measures every network asked for; the exit code tells whether all figures are reached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=5, help="timed steps of every contestant")
    parser.add_argument("--quick", action="store_true", help="small images; nothing is asked")
    given = parser.parse_args()
    print(processor())
    if given.quick:
        quick = Case("mobilenet_v2", 8, 8, 1.6)
        return 0 if measure(quick, 96, 1, fast=True) else 1
    good = [measure(CASES[name], 224, given.steps, fast=False) for name in given.models]
    print("\nall figures reached" if all(good) else "\nnot all figures reached")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
