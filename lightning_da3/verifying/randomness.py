"""The state of the generators that a forward may draw from: torch's, numpy's and Python's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def same_randomness(seed: int | None = None) -> Iterator[None]:
    """Behind the block everything draws what it would have drawn without the block.

    Args:
        seed: Of all generators inside the block; None: they go on where they are.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # the user's forward
    with torch.random.fork_rng(devices=devices):
        try:
            if seed is not None:
                torch.random.manual_seed(seed)
                random.seed(seed)
                np.random.seed(seed)  # noqa: NPY002
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
