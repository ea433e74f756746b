"""What a training step will cost, known before it runs.

The step itself runs, forward, backward and optimizer, on fake tensors: shapes, types and layouts
without values, so that it takes seconds at most and next to no memory. Bytes are those of every
storage that PyTorch's operations return, from its first use to its last. What a kernel allocates
and frees inside of itself cannot be seen so. Of the largest such, the copies that convolutions on
CPUs make in a layout of their own, the size is known (`_scratch_bytes`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from lightning_da3.errors import DA3Error, InputError
from lightning_da3.memory.fake import (
    fake_mode_of,
    quiet,
    resized,
    tensors_of,
    without_values,
)
from lightning_da3.memory.names import Names, SavedByName
from lightning_da3.memory.saved import SavedActivations

Loss = Callable[[Any], Tensor]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZER = "optimizer"  # the name that stands for all of it


@dataclasses.dataclass(frozen=True)
class NodeCost:
    """What one node of a graph, or one module of a network that is no graph, costs.

    Attributes:
        name: The node's, with the path of its graph in front where that is not the whole network;
            or the module's. Empty: what belongs to none, such as the loss.
        saved_bytes: Kept for the backward pass.
        flops_forward: Multiplications and additions of its matrix products and convolutions.
        flops_backward: Likewise, those computed a second time among them.
    """

    name: str
    saved_bytes: int = 0
    flops_forward: int = 0
    flops_backward: int = 0


@dataclasses.dataclass(frozen=True)
class StepPrediction:
    """What one training step will cost.

    Attributes:
        saved_activation_bytes: Kept for the backward pass, right after the forward one.
        peak_bytes: Largest total alive at one time, above the resting model.
        peak_node: Where that is: as `NodeCost.name`.
        peak_phase: ``"forward"``, ``"backward"`` or ``"optimizer"``.
        flops_forward: Of matrix products and convolutions, two a multiply-accumulate.
        flops_backward: Likewise, what is computed again among them.
        nodes: In the order in which they first ran.
        timeline: Bytes above the resting model behind every operation.
        forward_end: Index in `timeline` of the first operation behind the forward pass.
        backward_end: Likewise, of the first behind the backward pass.
    """

    saved_activation_bytes: int
    peak_bytes: int
    peak_node: str
    peak_phase: str
    flops_forward: int
    flops_backward: int
    nodes: tuple[NodeCost, ...]
    timeline: tuple[int, ...] = dataclasses.field(repr=False)
    forward_end: int
    backward_end: int
    names: tuple[str, ...] = dataclasses.field(repr=False, compare=False)

    def phase_at(self, index: int) -> str:
        """The phase of an index in `timeline`."""
        if index < self.forward_end:
            return "forward"
        return "backward" if index < self.backward_end else "optimizer"


class Microbatched(nn.Module):
    """A module that takes a large batch in pieces.

    Attributes:
        account: Of the prediction at work, if one is. Tell it of every batch that could be cut; and
            from the third on, pieces may run together and aside.
    """

    account: Account | None

    def __init__(self) -> None:
        super().__init__()
        self.account = None


class Account(Protocol):
    """What a prediction offers to modules that cut their batch."""

    def met(self, samples: int, count: int) -> None:
        """A batch of `count`, of which pieces take so many samples at most."""

    def aside(self) -> AbstractContextManager[None]:
        """FLOPs alone count inside; tensors must not outlive it, nor take more than others did."""


def _cutting(network: nn.Module) -> Iterator[Microbatched]:
    return (module for module in network.modules() if isinstance(module, Microbatched))


class StepPredictor:
    """Predicts training steps of one network.

    Holds a copy of the network without values, and so nearly without memory. What the network is
    told later, such as another active domain, it does not know.

    Args:
        network: Of which something requires a gradient; left unchanged. Its tensors may be on the
            meta device or fake themselves: these count as if on the CPU.
        loss: From the network's output to a scalar. By default the cross entropy over axis 1, of
            every tensor that has one and requires a gradient, and the mean of others.
        optimizer: Makes one for the parameters that train; its state belongs to the resting model.
            By default plain SGD, which has none.
        prepare: Edits the copy.
        name: Of the network, for errors; by default its class.

    Attributes:
        twin: The copy.

    Raises:
        DA3Error: The network cannot be copied.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        loss: Loss | None = None,
        optimizer: MakeOptimizer | None = None,
        prepare: Callable[[Any], None] | None = None,
        name: str = "",
    ) -> None:
        self._loss, self._make_optimizer = loss or default_loss, optimizer
        self._mode = fake_mode_of(network) or FakeTensorMode()
        self.twin = without_values(network, self._mode).train()
        if prepare is not None:
            prepare(self.twin)
        self._name = name or type(network).__name__
        self._cuts: frozenset[tuple[int, int]] = frozenset()

    def __call__(self, *inputs: Any, **kwargs: Any) -> StepPrediction:
        """What a step on these inputs costs.

        Args:
            inputs: As the network takes them. Of tensors only shapes, types and strides matter.
            kwargs: Likewise.

        Raises:
            InputError: The network cannot take them.
            DA3Error: Nothing requires a gradient, or the network asks for values of tensors.
        """
        inputs, kwargs = tree_map_only(Tensor, self._fake, (inputs, kwargs))
        trained = [p for p in self.twin.parameters() if p.requires_grad]
        if not trained:
            raise DA3Error(
                f"Nothing of {self._name} requires a gradient, so there is no training step to "
                "predict. Activate a domain with `set_domain(name)`, or unfreeze parameters."
            )
        make = self._make_optimizer
        with self._mode:
            optimizer = make(trained) if make else torch.optim.SGD(trained, lr=1e-3)
        if make is not None:
            self._step(inputs, kwargs, optimizer)  # makes the optimizer's state
        return self._step(inputs, kwargs, optimizer)

    def by_batch(self, *inputs: Any) -> BatchPrediction:
        """Predictions for every size of the batch, from a few steps.

        Args:
            inputs: As the network takes them; axis 0 of every tensor is the batch, of any size.
        """

        def some(count: int) -> tuple[Any, ...]:
            return tree_map_only(Tensor, lambda x: resized(x, count), inputs)  # type: ignore[no-any-return]

        return BatchPrediction(lambda count: self(*some(count)), self.cuts)

    def cuts(self) -> Iterable[tuple[int, int]]:
        """Of the step predicted last: samples of a piece, and the batch that could be cut."""
        return self._cuts

    def _fake(self, x: Tensor) -> Tensor:
        device = "cpu" if x.device.type == "meta" else x.device
        with self._mode:
            like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
        return like.requires_grad_(x.requires_grad)

    def _step(
        self, inputs: tuple[Any, ...], kwargs: dict[str, Any], optimizer: torch.optim.Optimizer
    ) -> StepPrediction:
        names = Names()
        state = [s for s in tree_leaves(list(optimizer.state.values())) if isinstance(s, Tensor)]
        given = [t for t in tree_leaves((inputs, kwargs)) if isinstance(t, Tensor)]
        account = _Account(names, [*tensors_of(self.twin), *state, *given])
        aside = account.used_by(self.twin)
        with quiet(), self._mode, names.of(self.twin), aside, self._explained(given):
            saved = SavedByName(self.twin, (inputs, kwargs), names)
            with account:
                with saved:
                    loss = self._loss(self.twin(*inputs, **kwargs))
                account.forward_end = len(account.timeline)
                loss.backward()  # type: ignore[no-untyped-call]
                del loss
                account.backward_end = len(account.timeline)
                with names.inside(OPTIMIZER):
                    optimizer.step()
                    optimizer.zero_grad()
        self._cuts = frozenset(account.cuts)
        return account.prediction(saved)

    @contextlib.contextmanager
    def _explained(self, given: Sequence[Tensor]) -> Iterator[None]:
        try:
            yield
        except DA3Error:
            raise
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise DA3Error(
                f"{self._name} decides by values of its tensors ({error}), which are not known "
                "before a step. Measure it instead: `lightning_da3.memory.measure_step`."
            ) from error
        except Exception as error:
            shapes = ", ".join(str(tuple(x.shape)) for x in given)
            reason = str(error).split("\n")[0]
            raise InputError(
                f"{self._name} cannot make a training step on inputs of shape {shapes}: {reason}"
            ) from error
        finally:
            for parameter in self.twin.parameters():
                parameter.grad = None


class BatchPrediction:
    """Predictions of one step by the size of its batch.

    Every total of the step is a constant and so much a sample, so that two steps tell all others:
    the peak is the largest of thousands of such lines. Where the start of a network begins to cut
    its batch, other lines begin; where operations are chosen by its size, every size is a step of
    its own.

    Args:
        predict: A step with so many samples.
        cuts: As of `StepPredictor`, of the step predicted last.
    """

    SIZES = (2, 4)

    def __init__(
        self,
        predict: Callable[[int], StepPrediction],
        cuts: Callable[[], Iterable[tuple[int, int]]] = tuple,
    ) -> None:
        self._predict = functools.cache(predict)
        least = self.SIZES[0]
        self._predict(least)  # so that the cuts are known
        # a second piece grows until it is as large as the first, the third takes no more memory
        self._edges = {n * part * least // count for part, count in cuts() for n in (1, 2)}

    def at(self, batch_size: int) -> StepPrediction:
        """A step with so many samples."""
        low = max((edge for edge in self._edges if edge < batch_size), default=0)
        first, second = (low + size for size in self.SIZES)
        if any(low < edge < second for edge in self._edges):
            return self._predict(batch_size)
        small, large = self._predict(first), self._predict(second)
        alike = small.names == large.names and [n.name for n in small.nodes] == [
            n.name for n in large.nodes
        ]
        if not alike:
            return self._predict(batch_size)

        def line(one: int, other: int) -> int:
            return round(one + (other - one) * (batch_size - first) / (second - first))

        def lines(one: Any, other: Any) -> Any:
            pairs = ((f.name, getattr(one, f.name), getattr(other, f.name)) for f in _fields(one))
            return dataclasses.replace(one, **{name: line(a, b) for name, a, b in pairs})

        timeline = [line(a, b) for a, b in zip(small.timeline, large.timeline, strict=True)]
        peak = max(range(len(timeline)), key=timeline.__getitem__)
        whole: StepPrediction = lines(small, large)
        return dataclasses.replace(
            whole,
            peak_bytes=timeline[peak],
            peak_node=small.names[peak],
            peak_phase=small.phase_at(peak),
            timeline=tuple(timeline),
            nodes=tuple(lines(a, b) for a, b in zip(small.nodes, large.nodes, strict=True)),
        )

    def largest(self, peak_bytes: int) -> int:
        """The largest batch whose step stays within so many bytes at its peak; 0 if none does."""
        low, high = 0, 1
        while self.at(high).peak_bytes <= peak_bytes and high < 2**30:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (
                (middle, high) if self.at(middle).peak_bytes <= peak_bytes else (low, middle)
            )
        return low


def _fields(value: Any) -> list[dataclasses.Field[Any]]:
    """Those that grow with the batch."""
    return [f for f in dataclasses.fields(value) if f.name.split("_")[0] in ("saved", "flops")]


def predict_step(
    network: nn.Module,
    *inputs: Any,
    loss: Loss | None = None,
    optimizer: MakeOptimizer | None = None,
) -> StepPrediction:
    """What one training step of `network` on these inputs will cost; see `StepPredictor`.

    Args:
        network: As of `StepPredictor`.
        inputs: As the network takes them. Of tensors only shapes, types and strides matter.
        loss: As of `StepPredictor`.
        optimizer: Likewise.

    Raises:
        InputError: The network cannot take the inputs.
        DA3Error: Nothing requires a gradient, or the network asks for values of tensors.
    """
    return StepPredictor(network, loss=loss, optimizer=optimizer)(*inputs)


def default_loss(output: Any) -> Tensor:
    """The cross entropy over axis 1 of every tensor that trains and has one; means of others."""
    trained = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    losses = [
        F.cross_entropy(t, t.new_zeros((len(t), *t.shape[2:]), dtype=torch.long))
        if t.dim() > 1
        else t.mean()
        for t in trained
    ]
    if not losses:
        raise DA3Error("the output does not depend on anything that trains")
    return torch.stack(losses).sum() if len(losses) > 1 else losses[0]


# --- the account ----------------------------------------------------------------------------------


class _Account(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operations return, while they live, and counts FLOPs."""

    def __init__(self, names: Names, resting: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = names
        self.resting = {t.untyped_storage()._cdata: t for t in resting}  # held: keys stay theirs
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
            self.timeline.append(self.total + _scratch_bytes(func, args))
            self.named.append(name)
        flops = self.flops.setdefault(name, [0, 0])
        flops[len(self.timeline) > self.forward_end] += _flops(func, args, kwargs, result)
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
        """What takes its batch in pieces knows of this account in the block."""
        try:
            for module in _cutting(network):
                module.account = self
            yield
        finally:
            for module in _cutting(network):
                module.account = None

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.resting or key in self.alive:
            return
        self.alive[key] = storage.nbytes()
        self.total += storage.nbytes()
        weakref.finalize(storage, self._free, key).atexit = False

    def _free(self, key: int) -> None:
        self.total -= self.alive.pop(key)

    def prediction(self, saved: SavedActivations) -> StepPrediction:
        """All of it, once the step is over."""
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


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    packet = func._overloadpacket
    if packet is torch.ops.aten.convolution_backward:
        # PyTorch's own count of the weight's gradient leaves out groups
        grad, x, weight, transposed, wanted = *args[:3], args[7], args[10]
        positions = (x if transposed else grad).numel()
        return int(2 * positions * weight[0].numel() * sum(wanted[:2]))
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=result))
    if str(packet) == "mkldnn._linear_pointwise":
        return int(2 * args[0].numel() * len(args[1]))
    return 0


def _scratch_bytes(func: Any, args: tuple[Any, ...]) -> int:
    """What oneDNN's convolutions hold beside their inputs and results, in bytes.

    Single pixels need nothing. Others copy the weight, an input that is not channels_last, and a
    weight laid out otherwise than its input once more; found by measuring, with torch 2.15.
    """
    packet, aten = func._overloadpacket, torch.ops.aten
    if packet not in (aten.convolution, aten.convolution_backward):
        return 0
    backward = packet is aten.convolution_backward
    grad, x, weight = args[:3] if backward else (None, *args[:2])
    if x.device.type != "cpu" or weight[0, 0].numel() == 1 or weight.dim() != 4:
        return 0
    last = torch.channels_last
    if not x.is_contiguous(memory_format=last):
        own = weight.nbytes + x.nbytes
        return int(max(weight.nbytes, x.nbytes + grad.nbytes) if backward else own)
    copies = (2 if backward else 1) + (not weight.is_contiguous(memory_format=last))
    return int(copies * weight.nbytes)
