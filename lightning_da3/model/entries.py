"""What is called of the user's network: a method of a part, and its arguments but tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_da3.torch_private.trees import tree_flatten, tree_leaves, tree_unflatten


@dataclass(frozen=True)
class Entry:
    """A method of a part of the network, with all that it is called with but tensors.

    Attributes:
        path: The part's dotted name; "" is the whole network.
        method: The method's name.
        structure: Of its arguments.
        others: What is no tensor among them, by position among their leaves.
        tensors: The number of tensors.
        skipped: Names of branches of the network that are skipped.
    """

    path: str
    method: str
    structure: Any
    others: tuple[tuple[int, Any], ...]
    tensors: int
    skipped: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        path: str,
        method: str,
        args: Any,
        kwargs: Any,
        skipped: frozenset[str] = frozenset(),
    ) -> tuple[Entry, list[Tensor]]:
        """The entry of a call, and the call's tensors."""
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        others = tuple((i, x) for i, x in enumerate(leaves) if not isinstance(x, Tensor))
        return cls(path, method, structure, others, len(tensors), skipped), tensors

    @property
    def name(self) -> str:
        """What the user's code calls it."""
        return str(MethodOf(self.path, self.method))

    @property
    def key(self) -> Any:
        """Equal for calls that one graph serves."""
        others = tuple((i, type(x), x if _is_plain(x) else repr(x)) for i, x in self.others)
        return self.path, self.method, str(self.structure), others, self.skipped

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[Any, Any]:
        """Arguments and named arguments with these tensors among them."""
        given, others = iter(tensors), dict(self.others)
        count = len(tensors) + len(others)
        leaves = [others[i] if i in others else next(given) for i in range(count)]
        args, kwargs = tree_unflatten(leaves, self.structure)
        return args, kwargs

    def call(self, network: nn.Module, tensors: Sequence[Tensor]) -> Any:
        """Call the method of this part of `network`."""
        args, kwargs = self.arguments(tensors)
        part = network.get_submodule(self.path) if self.path else network
        if self.method == "forward":
            return part(*args, **kwargs)
        return getattr(part, self.method)(*args, **kwargs)


@dataclass(frozen=True)
class MethodOf:
    """A method of a part of a model's network, whatever it is called with.

    Attributes:
        path: See `Entry`.
        method: See `Entry`.
    """

    path: str
    method: str

    def __str__(self) -> str:
        """What the user's code calls it."""
        whole = f"{self.path}.{self.method}" if self.path else self.method
        return whole.removesuffix(".forward")

    def __call__(self, model: Any) -> Callable[..., Any]:
        """The method, of this model."""
        return lambda *args, **kwargs: model.run_method(self.path, self.method, args, kwargs)


def _is_plain(value: object) -> bool:
    return isinstance(value, (bool, int, float, str, bytes, type(None)))


def has_tensors(*arguments: Any) -> bool:
    """Whether a tensor is among arguments."""
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(arguments))
