"""Pretrains the examples' network on printed characters: ten minutes on one CPU core, once."""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from datasets import TEST_FONTS, TRAIN_FONTS, draw_characters
from network import WEIGHTS, build_network
from safetensors.torch import save_file
from torch import Tensor, nn


def main() -> None:
    """Draws fresh characters for every step, trains, and writes the weights as float16."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    test_images, test_labels = draw_characters(TEST_FONTS, 2000, seed=2**31)
    network = build_network(pretrained=False).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=arguments.learning_rate, total_steps=arguments.steps, pct_start=0.15
    )
    start = time.perf_counter()
    for step in range(1, arguments.steps + 1):
        images, labels = draw_characters(TRAIN_FONTS, arguments.batch_size, seed=step)
        loss = F.cross_entropy(network.train()(_channels_last(images)), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == arguments.steps:
            test_accuracy = accuracy(network, test_images, test_labels)
            report = f"step {step}  loss {loss:.3f}  unseen fonts {test_accuracy:.1%}"
            print(f"{report}  {time.perf_counter() - start:.0f} s", flush=True)

    WEIGHTS.parent.mkdir(exist_ok=True)
    state = {
        name: value.half() if value.is_floating_point() else value
        for name, value in network.to(memory_format=torch.contiguous_format).state_dict().items()
    }
    save_file(state, WEIGHTS)
    stored = accuracy(build_network(), test_images, test_labels)
    print(f"{WEIGHTS.name}: {WEIGHTS.stat().st_size / 2**20:.2f} MiB, unseen fonts {stored:.1%}")


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images that get their right class, the network in eval."""
    network.eval()
    right = [
        (network(_channels_last(batch)).argmax(1) == target).sum()
        for batch, target in zip(images.split(256), labels.split(256), strict=True)
    ]
    return float(sum(right) / len(images))


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


if __name__ == "__main__":
    main()
