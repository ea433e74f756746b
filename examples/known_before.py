"""Training memory as predicted without running anything, beside what one real step measures.

For every torchvision model: DA3 by default, DA3 exact and fine-tuning. Kept bytes must agree within
1 %, the peak of a step above the resting model within 10 %; the exit code says whether they do.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torchvision
from measure import CLASSES, Step, with_domain
from torch import nn

from lightning_da3 import DA3Config, MemoryConfig
from lightning_da3.memory import SavedActivations, StepPredictor, measure_step

MODELS = "resnet50 mobilenet_v2 efficientnet_b0 convnext_tiny vit_b_16 densenet121".split()
SAVED_WITHIN, PEAK_WITHIN = 0.01, 0.10


def contestants(name: str) -> dict[str, nn.Module]:
    network = torchvision.models.get_model(name, num_classes=CLASSES)
    exact = DA3Config(memory=MemoryConfig(exact=True))
    return {
        "DA3": with_domain(network),
        "DA3 exact": with_domain(network, exact),
        "fine-tuning": network.train(),
    }


def compare(name: str, method: str, network: nn.Module, images: torch.Tensor) -> bool:
    """Prints one row; whether both figures agree."""
    predicted = StepPredictor(network)(images)
    labels = torch.randint(CLASSES, (len(images),))
    step = Step(network, images, labels, lambda p: torch.optim.SGD(p, lr=1e-4))
    with SavedActivations(network, inputs=images) as saved:
        loss = step.forward()
    del loss  # the graph lived until here
    peak = measure_step(step, repeats=0).peak_bytes
    pairs = [
        (predicted.saved_activation_bytes, saved.bytes, SAVED_WITHIN),
        (predicted.peak_bytes, peak, PEAK_WITHIN),
    ]
    good = all(abs(said / found - 1) <= within for said, found, within in pairs)
    figures = "".join(
        f"{said / 2**20:12.2f}{found / 2**20:10.2f}{said / found - 1:+9.2%}"
        for said, found, _ in pairs
    )
    print(f"{name:18}{method:12}{figures}  {'pass' if good else 'FAIL'}", flush=True)
    return good


def main() -> int:
    """Compares all models; 0 if every figure agrees."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=224)
    given = parser.parse_args()
    torch.manual_seed(0)
    images = torch.randn(given.batch_size, 3, given.image_size, given.image_size)
    print(f"batch {given.batch_size} at {given.image_size}x{given.image_size}, MiB\n")
    print(f"{'':30}{'kept, said':>12}{'found':>10}{'':9}{'peak, said':>12}{'found':>10}")
    good = [
        compare(name, method, network, images)
        for name in given.models
        for method, network in contestants(name).items()
    ]
    print("\nall figures agree" if all(good) else "\nnot all figures agree")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
