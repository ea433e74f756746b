"""The first two steps of a training: what they keep and peak at, measured and predicted.

Nothing here logs.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_da3.budget.microbatches import batch_size
from lightning_da3.formatting import format_bytes
from lightning_da3.memory import PeakBytes, SavedActivations, StepPrediction, StepPredictor
from lightning_da3.torch_private.fake import is_fake, new_fake_mode
from lightning_da3.torch_private.modules import is_compiled
from lightning_da3.torch_private.trees import tree_leaves, tree_map_only

OFF_BY_FRACTION, OFF_BY_BYTES = 0.2, 2**20  # a prediction that is off by more than both is wrong
NO_EFFECT = 2  # times less than fine-tuning is what should be saved at least
WORTH_IT_BYTES = 2**20  # of less, nobody asks how much is saved
MOST_CALLS = 4  # of a network in a step, of which it is predicted what fine-tuning would keep


class FirstSteps:
    """Measures the first step's kept bytes, and the second's peak: the first with optimizer state.

    Before the second, its peak is predicted from what the network was called with in the first.

    Args:
        network: The network whose step is predicted.
        predict: Whether to make one; it takes a few seconds for a large network.

    Attributes:
        saved_activation_bytes: Kept for the backward pass in the first step; None: not measured.
        saved_by_module: The same by module.
        peak_bytes: Peak of the second step above its start; None: not measured.
        predicted: What the network's step was predicted to cost; None where that is not known: it
            is called several times in a step, is compiled, or asks for values of its tensors.
        surprising: Whether the measured peak is far from the predicted one.
        samples: The size of the first batch that the network was called with; None: not known.
        finetune_kept_bytes: What a first step that fine-tuned the whole network would have kept
            for its backward, by prediction; None: not known, for the same reasons.
        finetune_by_module: The same by module of the network as it was; empty: not known.
        finetune_peak_bytes: Its peak, which is only asked for where little is saved.
    """

    def __init__(self, network: nn.Module, *, predict: bool = True) -> None:
        self.saved_activation_bytes: int | None = None
        self.saved_by_module: dict[str, int] = {}
        self.peak_bytes: int | None = None
        self.predicted: StepPrediction | None = None
        self.surprising = False
        self.samples: int | None = None
        self.finetune_kept_bytes: int | None = None
        self.finetune_by_module: dict[str, int] = {}
        self.finetune_peak_bytes: int | None = None
        self._network: nn.Module | None = network
        self._predicts = predict and not is_compiled(network)
        self._calls: list[list[_Call]] = []  # of every step
        self._exit = contextlib.ExitStack()
        self._watching: SavedActivations | PeakBytes | None = None

    def begin(self, module: nn.Module, batch: Any, *, peak_on: torch.device | None) -> None:
        """A step begins.

        Args:
            module: Holds the network and whatever else the step uses.
            batch: The batch of the step; its tensors are activations.
            peak_on: Device on which the peak can be measured, or None.
        """
        step = len(self._calls)
        if step >= 2:
            return
        self._calls.append([])
        if self._predicts and self._network is not None:
            self._exit.enter_context(_calls_of(self._network, self._calls[-1]))
        if step == 0:
            self._watching = self._exit.enter_context(SavedActivations(module, inputs=batch))
        elif peak_on is not None:
            self._watching = self._exit.enter_context(PeakBytes(peak_on))

    def forward_ended(self) -> bool:
        """The step's backward pass comes next; whether kept bytes are measured now."""
        watching = self._watching
        if not isinstance(watching, SavedActivations):
            return False
        self._stop()
        self.saved_activation_bytes, self.saved_by_module = watching.bytes, watching.by_module
        return True

    def end(self) -> bool:
        """The step is over; whether its peak is measured now."""
        watching = self._stop()
        if isinstance(watching, PeakBytes):
            self.peak_bytes = watching.bytes
            self.surprising = self._is_surprising(watching.bytes)
        elif self._network is not None and self._predicts and len(self._calls) == 1:
            self.predicted = _prediction(self._network, self._calls[0])
            self._compare(self._network, self._calls[0])
        if len(self._calls) == 2:
            self._network = None
        return isinstance(watching, PeakBytes)

    def _compare(self, network: nn.Module, calls: list[_Call]) -> None:
        """See what fine-tuning would take."""
        original = getattr(getattr(network, "original", None), "network", None)
        if original is None or not calls:
            return
        self.samples = batch_size(calls[0].args, calls[0].kwargs)
        counted = [_kept(original, call) for call in calls[:MOST_CALLS]]
        kept = [by_module for by_module in counted if by_module is not None]
        if len(kept) < len(calls):
            return
        for name, count in (item for by_module in kept for item in by_module.items()):
            self.finetune_by_module[name] = self.finetune_by_module.get(name, 0) + count
        self.finetune_kept_bytes = sum(self.finetune_by_module.values())
        peak = None if self.predicted is None else self.predicted.peak_bytes
        if peak is not None and peak * NO_EFFECT > self.finetune_kept_bytes >= WORTH_IT_BYTES:
            found = _prediction(original, calls)  # takes as long as the model's own
            self.finetune_peak_bytes = None if found is None else found.peak_bytes

    @property
    def kept_bytes(self) -> int | None:
        """What the network keeps: predicted if that is known, else all that was measured."""
        if self.predicted is not None:
            return self.predicted.saved_activation_bytes
        return self.saved_activation_bytes

    @property
    def no_effect(self) -> str:
        """What is hardly less than that of fine-tuning, in words; "" if all is."""
        kept, tuned = self.kept_bytes, self.finetune_kept_bytes
        if kept is None or tuned is None or tuned < WORTH_IT_BYTES:
            return ""
        if kept * NO_EFFECT > tuned:
            return (
                f"A step keeps {format_bytes(kept)} for its backward, fine-tuning the whole "
                f"network {format_bytes(tuned)}. Most is kept by {self._most_kept}."
            )
        peak, theirs = self.predicted, self.finetune_peak_bytes
        if peak is not None and theirs is not None and peak.peak_bytes * NO_EFFECT > theirs:
            node = peak.peak_node.removeprefix("backbone.") or "the loss"
            return (
                f"A step peaks at {format_bytes(peak.peak_bytes)}, fine-tuning the whole network "
                f"at {format_bytes(theirs)}. The peak is at {node}, in the {peak.peak_phase}."
            )
        return ""

    @property
    def _most_kept(self) -> str:
        by_node = self.saved_by_module
        if self.predicted is not None:
            by_node = {node.name: node.saved_bytes for node in self.predicted.nodes}
        most = sorted(by_node.items(), key=lambda item: -item[1])[:3]
        return ", ".join(
            f"{name.replace('backbone.', '', 1) or 'the loss'} ({format_bytes(count)})"
            for name, count in most
            if count
        )

    def abort(self) -> None:
        """Stop watching, in the midst of a step."""
        self._stop()

    def __getstate__(self) -> dict[str, Any]:
        """What was found, without the network and its inputs."""
        return {
            **vars(self),
            "_network": None,
            "_calls": [],
            "_exit": contextlib.ExitStack(),
            "_watching": None,
        }

    def _is_surprising(self, peak_bytes: int) -> bool:
        if self.predicted is None or self._calls[0] != self._calls[1]:
            return False
        predicted = self.predicted.peak_bytes
        return abs(peak_bytes - predicted) > max(OFF_BY_BYTES, OFF_BY_FRACTION * predicted)

    def _stop(self) -> SavedActivations | PeakBytes | None:
        watching, self._watching = self._watching, None
        self._exit.close()
        return watching


@dataclasses.dataclass(frozen=True)
class _Call:
    """What a network was called with. Equal are calls that cost the same."""

    shapes: tuple[Any, ...]
    autocast: torch.dtype | None
    args: tuple[Any, ...] = dataclasses.field(compare=False)
    kwargs: dict[str, Any] = dataclasses.field(compare=False)

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        """A call as it happens, without the values of its tensors."""
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        kind = tensors[0].device.type if tensors else "cpu"
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        args, kwargs = tree_map_only(Tensor, _without_values, (args, kwargs))
        return cls(tuple((*x.shape, x.dtype) for x in tensors), autocast, args, kwargs)

    def prepare(self, twin: nn.Module) -> None:
        """Let a network compute as it did in this call."""
        getattr(twin, "settle_", _nothing)()  # a DA3Model
        if self.autocast is not None:
            kind = next(twin.parameters()).device.type
            twin.forward = torch.autocast(kind, self.autocast)(twin.forward)


def _nothing() -> None:
    pass


def _without_values(x: Tensor) -> Tensor:
    with new_fake_mode():
        like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return like.requires_grad_(x.requires_grad)


def _kept(network: nn.Module, call: _Call) -> dict[str, int] | None:
    """What this call of the network keeps by module, by prediction."""
    with contextlib.suppress(Exception), torch.random.fork_rng(devices=[]):
        predictor = StepPredictor(network, prepare=call.prepare)
        return predictor.kept_by_module(*call.args, **call.kwargs)
    return None


@contextlib.contextmanager
def _calls_of(network: nn.Module, calls: list[_Call]) -> Iterator[None]:
    """Notes every call that builds a graph."""

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        predicting = any(is_fake(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        if torch.is_grad_enabled() and not predicting:  # copies of the network have its hooks
            calls.append(_Call.of(args, kwargs))

    hook = network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _prediction(network: nn.Module, calls: list[_Call]) -> StepPrediction | None:
    if len(calls) != 1:
        return None
    (call,) = calls
    policy = getattr(network, "budget_policy", None)
    if policy is not None and policy.predicted is not None:  # to split the batch, it was needed
        return cast(StepPrediction, policy.predicted)

    # whatever a network does with fake tensors, training goes on, with the random numbers it had
    with contextlib.suppress(Exception), torch.random.fork_rng(devices=[]):
        return StepPredictor(network, prepare=call.prepare)(*call.args, **call.kwargs)
    return None
