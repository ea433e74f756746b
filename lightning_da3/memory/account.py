"""The account of a step: the storages alive after every operation, and FLOPs."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from lightning_da3.memory.costs import NodeCost, StepPrediction
from lightning_da3.memory.kernels import flops, scratch_bytes
from lightning_da3.memory.names import Names
from lightning_da3.memory.saved import SavedActivations
from lightning_da3.torch_private.autograd import storage_key
from lightning_da3.torch_private.fake import TorchDispatchMode
from lightning_da3.torch_private.trees import tree_leaves


class Microbatched(nn.Module):
    """A module that splits a large batch into microbatches.

    Attributes:
        account: The account of a prediction while one runs, else None. The module tells it of every
            batch that could be split; from the third on, microbatches may run together and aside.
    """

    account: Account | None

    def __init__(self) -> None:
        super().__init__()
        self.account = None


class Account(Protocol):
    """What a prediction offers to modules that split their batch."""

    def met(self, samples: int, count: int) -> None:
        """A batch of `count` samples came, of which a microbatch has `samples` at most."""

    def aside(self) -> AbstractContextManager[None]:
        """Only FLOPs count inside. Its tensors end there, and take no more than earlier ones."""


def _splitting(network: nn.Module) -> Iterator[Microbatched]:
    return (module for module in network.modules() if isinstance(module, Microbatched))


class StepAccount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operations return, while they live, and counts FLOPs.

    Args:
        names: Names what runs.
        resting: Tensors that are there before the step and do not count.

    Attributes:
        forward_end: Set it to the length of `timeline` after the forward pass.
        backward_end: Set it to the length of `timeline` after the backward pass.
        timeline: Bytes alive after every operation.
        cuts: The samples of a microbatch and of its batch, for every batch that could be split.
    """

    def __init__(self, names: Names, resting: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = names
        # held, so that no other storage gets their keys
        self.resting = {storage_key(t.untyped_storage()): t for t in resting}
        self.alive: dict[int, int] = {}
        self.total = 0
        self.timeline: list[int] = []
        self.named: list[str] = []
        self.flops: dict[str, list[int]] = {}  # forward, backward
        self.cuts: set[tuple[int, int]] = set()
        self._aside = False
        self.forward_end = self.backward_end = 2**62

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = self.names.now
        if not self._aside:
            for value in tree_leaves(result):
                if isinstance(value, Tensor):
                    self._see(value)
            self.timeline.append(self.total + scratch_bytes(func, args))
            self.named.append(name)
        counts = self.flops.setdefault(name, [0, 0])
        counts[len(self.timeline) > self.forward_end] += flops(func, args, kwargs, result)
        return result

    def met(self, samples: int, count: int) -> None:
        """See `Account`."""
        self.cuts.add((samples, count))

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """See `Account`."""
        self._aside = True
        try:
            yield
        finally:
            self._aside = False

    @contextlib.contextmanager
    def used_by(self, network: nn.Module) -> Iterator[None]:
        """Modules that split their batch know this account in the block."""
        try:
            for module in _splitting(network):
                module.account = self
            yield
        finally:
            for module in _splitting(network):
                module.account = None

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        if key in self.resting or key in self.alive:
            return
        self.alive[key] = storage.nbytes()
        self.total += storage.nbytes()
        weakref.finalize(storage, self._free, key).atexit = False

    def _free(self, key: int) -> None:
        self.total -= self.alive.pop(key)

    def prediction(self, saved: SavedActivations) -> StepPrediction:
        """What the step cost, once it is over."""
        peak = max(range(len(self.timeline)), key=self.timeline.__getitem__)
        names = dict.fromkeys([*self.flops, *saved.by_module])
        nodes = [
            NodeCost(name, saved.by_module.get(name, 0), *self.flops.get(name, (0, 0)))
            for name in names
        ]
        result = StepPrediction(
            saved_activation_bytes=saved.bytes,
            peak_bytes=self.timeline[peak],
            peak_node=self.named[peak],
            peak_phase="",
            flops_forward=sum(node.flops_forward for node in nodes),
            flops_backward=sum(node.flops_backward for node in nodes),
            nodes=tuple(nodes),
            timeline=tuple(self.timeline),
            forward_end=self.forward_end,
            backward_end=self.backward_end,
            names=tuple(self.named),
        )
        return dataclasses.replace(result, peak_phase=result.phase_at(peak))
