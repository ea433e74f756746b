"""One pass through a network, under conditions that another network can be put to as well."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_da3.torch_private.trees import tree_leaves, tree_map_only
from lightning_da3.tracing.autocast import Precision, in_precision
from lightning_da3.verifying.randomness import DrawsInOrder, same_randomness

_DEEPEST = 8  # objects in objects


@dataclass(frozen=True)
class Conditions:
    """How a network is run.

    Attributes:
        name: For people.
        inputs: The network's arguments.
        gradients: A backward pass follows.
        training: The converted network is in train mode; the original never is.
        draws: It draws random numbers.
        own: Networks run in the types that they have, and outputs may differ by so much; None: in
            the types that all are compared in.
        precision: Where autocast is on.
    """

    name: str
    inputs: tuple[Any, ...]
    gradients: bool = False
    training: bool = False
    draws: bool = False
    own: float | None = None
    precision: Precision = ()


@dataclass
class Outcome:
    """What a network did.

    Attributes:
        outputs: The tensors that it returned, in order.
        gradients: Of its floating-point inputs; of what embeddings returned, if it has none.
        changed: It wrote into its arguments.
        drew: It drew random numbers.
        error: What it raised; None: it returned.
        no_gradients: What the backward pass raised.
    """

    outputs: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    changed: bool = False
    drew: bool = False
    error: Exception | None = None
    no_gradients: Exception | None = None


_BACKWARD = ContextVar("_BACKWARD", default=True)


@contextmanager
def forward_only() -> Iterator[None]:
    """In the block networks are compared without gradients.

    A process that has computed gradients cannot be forked where there is an accelerator.
    """
    token = _BACKWARD.set(False)
    try:
        yield
    finally:
        _BACKWARD.reset(token)


def run(
    network: nn.Module, conditions: Conditions, mode: AbstractContextManager[Any] | None = None
) -> Outcome:
    """Run a network once, forward and, if asked for, backward.

    Generators are seeded the same for every call, and draw on outside as if nothing had run.

    Args:
        network: A copy that nobody else uses, in the mode that it should run in.
        conditions: How.
        mode: A context that it runs in.
    """
    sources: list[Tensor] = []  # of which gradients are asked for

    def given(x: Tensor) -> Tensor:
        x = x.detach().clone()
        if conditions.gradients and x.is_floating_point():
            sources.append(x.requires_grad_())
            return x * 1.0  # no leaf: the forward may write into it
        return x

    outcome = Outcome()
    arguments = tree_map_only(Tensor, given, conditions.inputs)
    needed = conditions.gradients and not sources
    embeddings = _Embedded(network) if needed else nullcontext(list[Tensor]())
    layouts = DrawsInOrder() if conditions.draws else nullcontext()  # type: ignore[no-untyped-call]
    with (
        same_randomness(seed=0),
        in_precision(conditions.precision),
        layouts,
        mode or nullcontext(),
        embeddings as embedded,
    ):
        before = torch.random.get_rng_state()
        try:
            with torch.enable_grad() if conditions.gradients else torch.no_grad():
                output = network(*arguments)
        except Exception as error:  # noqa: BLE001  # the user's own forward: anything can come
            outcome.error = error
        outcome.drew = not torch.equal(before, torch.random.get_rng_state())
        if outcome.error is not None:
            return outcome
        found = list(tensors_in(output))
        outcome.outputs = [x.detach().clone() for x in found]
        outcome.changed = _differ(arguments, conditions.inputs)
        if conditions.gradients and _BACKWARD.get():
            try:
                outcome.gradients = _gradients(found, sources or embedded)
            except Exception as error:  # noqa: BLE001
                outcome.no_gradients = error
    return outcome


class _Embedded:
    """In the block, what embeddings return is noted, and requires a gradient."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.handles = network, list[RemovableHandle]()
        self.found: list[Tensor] = []

    def __enter__(self) -> list[Tensor]:
        kinds = (nn.Embedding, nn.EmbeddingBag)
        layers = [m for m in self.network.modules() if isinstance(m, kinds)]
        self.handles = [layer.register_forward_hook(self._note) for layer in layers]
        return self.found

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _note(self, layer: nn.Module, args: Any, y: Tensor) -> Tensor:
        del layer, args
        source = y.detach().requires_grad_()
        self.found.append(source)
        return source * 1.0


def _gradients(outputs: list[Tensor], sources: list[Tensor]) -> list[Tensor]:
    """Of a sum in which every element of the outputs has a weight of its own."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    pairs = [(y, w) for y, w in zip(outputs, weights, strict=True) if y.requires_grad]
    if not (pairs and sources):
        return [torch.zeros_like(x) for x in sources]
    found = torch.autograd.grad(
        [y for y, _ in pairs], sources, [w for _, w in pairs], allow_unused=True
    )
    pairs_of = zip(sources, found, strict=True)
    return [torch.zeros_like(x) if g is None else g.detach() for x, g in pairs_of]


def tensors_in(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """The tensors of a network's output, in order: in containers, dataclasses and objects, too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from tensors_in(entry, depth + 1)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from tensors_in(entry, depth + 1)
    elif hasattr(value, "__dict__") and not callable(value) and depth < _DEEPEST:
        yield from tensors_in(vars(value), depth + 1)


def _differ(after: Any, before: Any) -> bool:
    pairs = zip(tree_leaves(after), tree_leaves(before), strict=True)
    return any(not _equal(x, y) for x, y in pairs if isinstance(x, Tensor))


def _equal(x: Tensor, y: Tensor) -> bool:
    same = x.shape == y.shape and x.dtype == y.dtype
    return same and torch.equal(x.nan_to_num(), y.nan_to_num())
