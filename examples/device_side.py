"""What runs on a device: it learns domains from arrays, where PyTorch cannot be imported.

`learn_without_torch.py` prepares the folder that it is given, and starts it.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment]  # from here on, `import torch` fails

from lightning_da3.device import Learner


def rate_at(progress: float, most: float) -> float:
    """A tenth of training up to `most`, then down to nothing by a cosine."""
    if progress < 0.1:
        return most * (0.1 + 9 * progress)
    return most * 0.5 * (1 + math.cos(math.pi * (progress - 0.1) / 0.9))


def learn(folder: Path, domain: str, seed: int, recipe: dict[str, Any]) -> dict[str, Any]:
    """One domain: its arrays lie in the folder, and what is learned is saved there."""
    data = np.load(folder / f"{domain}.npz")
    learner = Learner(
        folder / "step.onnx",
        folder / f"{domain}.start.safetensors",
        folder / "inference.onnx",
        seed=seed,
    )
    start = time.perf_counter()
    learner.fit(
        data["train_images"],
        data["train_labels"],
        epochs=recipe["epochs"],
        batch_size=recipe["batch_size"],
        learning_rate=lambda progress: rate_at(progress, recipe["learning_rate"]),
    )
    seconds = time.perf_counter() - start
    scores = learner.predict(data["test_images"])
    accuracy = float((scores.argmax(1) == data["test_labels"]).mean())
    learner.save(folder / f"{domain}.{seed}.safetensors", accuracy=accuracy)
    np.save(folder / f"{domain}.{seed}.npy", scores)
    return {"accuracy": accuracy, "ms": 1000 * seconds / learner.steps}


def main() -> None:
    folder = Path(sys.argv[1])
    recipe = json.loads((folder / "recipe.json").read_text())
    found = {
        domain: [learn(folder, domain, seed, recipe) for seed in range(recipe["seeds"])]
        for domain in recipe["domains"]
    }
    (folder / "learned.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
