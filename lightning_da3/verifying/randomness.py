"""The state of the generators that a forward may draw from: torch's, numpy's and Python's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_da3.torch_private.fake import TorchDispatchMode
from lightning_da3.torch_private.trees import tree_map_only


@contextmanager
def same_randomness(seed: int | None = None) -> Iterator[None]:
    """Behind the block everything draws what it would have drawn without the block.

    Args:
        seed: Of all generators inside the block; None: they go on where they are.
    """
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if used else ()
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


class DrawsInOrder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """In the block, an element's random number does not depend on how a tensor lies in memory.

    PyTorch draws in the order of memory, and a converted network lays its maps out otherwise.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        drawn = func(*tree_map_only(Tensor, _in_order, args), **kwargs)
        writes = args and isinstance(args[0], Tensor) and func.overloadpacket.__name__.endswith("_")
        return args[0].copy_(drawn) if writes else drawn


def _in_order(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)
