"""The classifier of a network that stays Python: it runs once, and its output is followed back."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_da3.layers import CONVS
from lightning_da3.memory import fake_mode_of
from lightning_da3.memory.fake import quiet
from lightning_da3.memory.names import mutable
from lightning_da3.torch_private.fake import new_fake_mode
from lightning_da3.torch_private.trees import tree_leaves
from lightning_da3.tracing.graph_modules import LAYER
from lightning_da3.tracing.guessing import first_guesses, first_sample
from lightning_da3.tracing.watching import unchanged

# backward nodes of activations between layers, by the start of their names
_ACTIVATIONS = ("Relu", "Gelu", "Silu", "Hardswish", "Hardtanh", "LeakyRelu", "Elu", "Mish")


def head_by_running(root: nn.Module, examples: Sequence[Any] | None) -> str | None:
    """The name of the last layer with weights that alone leads to the logits, or None.

    Args:
        root: The traced network, in eval and frozen.
        examples: Its arguments, if they are known.
    """
    fake = fake_mode_of(root) or new_fake_mode(allow_non_fake_inputs=True)
    given = [] if examples is None else [first_sample(examples)]
    for inputs in (*given, *(() if given else first_guesses(root))):
        for mode in (fake, contextlib.nullcontext()):  # one that decides on values needs some
            # the user's own forward on a guess: anything can go wrong, and then nothing is known
            with quiet(), contextlib.suppress(Exception), mode, unchanged(root):
                return _run(root, mutable([_input(i) for i in inputs]))
    return None


def _input(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return torch.zeros(x.shape, dtype=x.dtype, requires_grad=x.is_floating_point())


def _run(root: nn.Module, inputs: Sequence[Any]) -> str | None:
    made: dict[Any, str] = {}  # backward nodes of what layers with tensors of their own give
    layers = dict(root.named_modules())
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        for name, layer in layers.items():
            if next(layer.children(), None) is not None or not _holds_tensors(layer):
                continue

            def note(_: nn.Module, args: Any, y: Any, name: str = name) -> None:
                del args
                for leaf in tree_leaves(y):
                    if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                        made[leaf.grad_fn] = name

            stack.callback(layer.register_forward_hook(note).remove)
            if isinstance(layer, nn.Embedding):  # ids have no gradient
                stack.callback(layer.weight.requires_grad_, False)
                layer.weight.requires_grad_(True)
        output = root(*inputs)
    logits = [t for t in _values(output) if t.grad_fn is not None]
    readers = _readers({t.grad_fn: None for t in logits})
    for value in logits:
        name = _follow(value.grad_fn, made, readers)
        layer = layers.get(name or "")
        if isinstance(layer, nn.Linear) or (isinstance(layer, CONVS) and layer.groups == 1):
            return str(name).removesuffix(f".{LAYER}")
    return None


def _holds_tensors(layer: nn.Module) -> bool:
    return any(True for _ in (*layer.parameters(), *layer.buffers()))


def _values(output: Any) -> Iterator[Tensor]:
    """The tensors of an output, what is called the logits first."""
    named = output if isinstance(output, dict) else getattr(output, "__dict__", {})
    for name in ("logits", "out"):
        if isinstance(named.get(name), Tensor):
            yield named[name]
    yield from (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


def _readers(roots: dict[Any, None]) -> Counter[Any]:
    """How often every backward node's value is read."""
    found: Counter[Any] = Counter(dict.fromkeys(roots, 1))
    waiting, seen = list(roots), set(roots)
    while waiting:
        for other, _ in waiting.pop().next_functions:
            if other is not None:
                found[other] += 1
                if other not in seen:
                    seen.add(other)
                    waiting.append(other)
    return found


def _follow(node: Any, made: dict[Any, str], readers: Counter[Any]) -> str | None:
    while node is not None and readers[node] == 1:
        if node in made:
            return made[node]
        before = [other for other, _ in node.next_functions if other is not None]
        if len(before) != 1 or str(node.name()).startswith(_ACTIVATIONS):
            return None
        node = before[0]
    return None
