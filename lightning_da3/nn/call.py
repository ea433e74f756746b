"""What one call of a network computes with, and what is noted of it on the way.

Calls may run beside each other in threads, and one domain may follow another while a call runs. So
modules hold nothing of a call: they ask for the one that runs in their thread. What is computed
again in the backward, in whichever thread, is bound to its call.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_da3.ops.bits import has_no_values
from lightning_da3.schedule import LEAST_CHANCE


class Executed(NamedTuple):
    """How much of one host ran.

    Attributes:
        gate: Zeros and ones, (N, 1, *grid).
        macs: Multiply-accumulates of the host for one sample if every gate is open.
    """

    gate: Tensor
    macs: float


class Noise:
    """Logistic noise on the gates of a batch: every sample has its own, however the batch is split.

    Args:
        total: The number of samples of the batch; 0 if it is not known.
    """

    def __init__(self, total: int) -> None:
        self.total = self.samples = total
        self.start = 0
        self._seed: list[int] = []  # drawn with the first number; parts share it

    def part(self, start: int, samples: int) -> Noise:
        """The noise of some of the samples, in the order of the batch."""
        part = Noise(self.total)
        part.start, part.samples, part._seed = self.start + start, samples, self._seed
        return part

    def draw(self, host: str, p: Tensor) -> Tensor:
        """The noise of one host: (N, G, 1) for p (N, C, *grid) of G cells."""
        rows, cells = len(p), p.shape[2:].numel()
        place: Any = {"dtype": p.dtype, "device": p.device}
        if torch.compiler.is_compiling() or has_no_values(p):
            uniform = torch.rand((rows, cells, 1), **place)
        else:
            each, rest = divmod(rows, self.samples) if self.samples else (0, rows)
            total, start = (rows, 0) if rest else (self.total * each, self.start * each)
            numbers = torch.Generator(p.device).manual_seed(self._seed_of(host))
            uniform = torch.rand((total, cells, 1), generator=numbers, **place).narrow(
                0, start, rows
            )
        return torch.logit(uniform.clamp(LEAST_CHANCE, 1 - LEAST_CHANCE))

    def _seed_of(self, host: str) -> int:
        if not self._seed:
            self._seed.append(int(torch.randint(2**32, ())))
        return zlib.crc32(host.encode(), self._seed[0])


class LossUnit:
    """In what unit the losses of one domain come: see `lightning_da3.nn.gate.with_loss`.

    Attributes:
        value: A scalar, zero before there was a loss; None before it was asked for.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None

    @property
    def number(self) -> float:
        """The value; 0 where there is none."""
        value = self.value
        if value is None or value.is_meta or has_no_values(value):
            return 0.0
        return float(value)

    def on(self, device: torch.device) -> Tensor:
        """The value, which lives on this device from now on."""
        if self.value is None:
            self.value = torch.zeros((), device=device)
        elif self.value.device != device:
            self.value = self.value.to(device)
        return self.value

    def beside(self, loss: Tensor) -> Tensor:
        """The value, where this loss is; a loss without values gets one without."""
        if has_no_values(loss) and not (self.value is not None and has_no_values(self.value)):
            return loss.detach().new_zeros((), dtype=torch.float32)
        return self.on(loss.device)


class Call:
    """What one call computes with; nothing of it changes.

    Args:
        adapters: What speaks for every host, by the host's name. Empty: the backbone alone.
        head: The classifier; None: the backbone's own.
        unit: That of the losses of the domain that computes, or None.
        noise: Noise on the gates, or None.
        features: To be filled with what the hosts of these names read, pooled.
        ledger: To be filled with how much of every host ran; None: nothing is noted.
        skipped: Names of residual branches that are skipped.
    """

    __slots__ = ("adapters", "features", "head", "ledger", "noise", "skipped", "unit")

    def __init__(
        self,
        adapters: Mapping[str, nn.Module] | None = None,
        head: nn.Module | None = None,
        unit: LossUnit | None = None,
        noise: Noise | None = None,
        features: dict[str, Tensor | None] | None = None,
        ledger: list[tuple[str, Executed]] | None = None,
        skipped: frozenset[str] = frozenset(),
    ) -> None:
        self.adapters, self.head, self.unit = adapters or {}, head, unit
        self.noise, self.features, self.ledger = noise, features, ledger
        self.skipped = skipped

    def with_noise(self, noise: Noise | None) -> Call:
        """This call, with other noise."""
        return self._with(noise, None)

    def part(self, start: int, samples: int) -> Call:
        """This call, for some samples of its batch."""
        return self if self.noise is None else self.with_noise(self.noise.part(start, samples))

    def noted_in(self, ledger: list[tuple[str, Executed]]) -> Call:
        """This call, with what is executed noted in `ledger`."""
        return self._with(self.noise, ledger)

    def _with(self, noise: Noise | None, ledger: list[tuple[str, Executed]] | None) -> Call:
        about = (self.adapters, self.head, self.unit)
        return Call(*about, noise, self.features, ledger, self.skipped)

    @property
    def alone(self) -> bool:
        """Whether the backbone computes alone."""
        return not self.adapters and self.head is None


class Calls:
    """The calls of one network, at most one in every thread, and what new ones compute with."""

    def __init__(self, resting: Call | None = None) -> None:
        self.everywhere = resting or Call()
        self.here = _Here()

    @property
    def resting(self) -> Call:
        """What a new call of this thread computes with."""
        return self.here.resting or self.everywhere

    @property
    def now(self) -> Call:
        """The call that runs in this thread."""
        return self.here.call or self.resting

    @contextmanager
    def running(self, call: Call) -> Iterator[None]:
        """Inside, `call` runs in this thread."""
        before, self.here.call = self.here.call, call
        try:
            yield
        finally:
            self.here.call = before

    def bound(self, piece: Callable[..., Any]) -> Callable[..., Any]:
        """`piece`, to be run any number of times, in any thread, as a part of the call of now."""
        call = self.now

        def run(*args: Any) -> Any:
            with self.running(call):
                return piece(*args)

        return run

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and files hold no thread's own."""
        return Calls, (self.everywhere,)


class _Here(threading.local):
    """What belongs to one thread."""

    def __init__(self) -> None:  # in every thread: a compiler asks what is there
        self.call: Call | None = None
        self.resting: Call | None = None
        self.noise: Noise | None = None
        self.executed: Tensor | None = None  # the share of FLOPs that the last call executed, and
        self.whole = False  # that it had nothing to decide: a domain's, without gates or skips


class Place(nn.Module):
    """Where a network reads something of the call that runs, or notes something of it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Calls()
