"""A batch whose samples belong to different domains: what goes in, and what comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from lightning_da3.errors import InputError
from lightning_da3.torch_private.trees import tree_flatten, tree_leaves, tree_unflatten

Domains = Sequence[str | None] | Literal["nearest"]
NEAREST = "nearest"


def samples_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """How many samples a network's first argument holds: entries of a list, or of axis 0.

    Raises:
        InputError: It holds none.
    """
    first = next(iter([*args, *kwargs.values()]), None)
    if isinstance(first, (list, tuple)):
        return len(first)
    tensor = next((leaf for leaf in tree_leaves(first) if isinstance(leaf, Tensor)), None)
    if tensor is None or tensor.dim() == 0:
        raise InputError(
            "The first argument must be a batch, a tensor with samples along axis 0 or a list of "
            f"them, got {type(first).__name__}."
        )
    return len(tensor)


def check_domains(domains: Sequence[str | None], count: int) -> None:
    """Refuse anything but one name or None a sample.

    Raises:
        InputError: It is no sequence, or of another length.
    """
    if isinstance(domains, str) or not isinstance(domains, Sequence):
        raise InputError(
            f"`domains` must be a list with a name or None for every sample, or {NEAREST!r}, got "
            f"{domains!r}. For one domain of the whole batch: `set_domain(name)`."
        )
    if len(domains) != count:
        raise InputError(
            f"`domains` has {len(domains)} entries and the batch {count} samples. Give one name, "
            "or None for the backbone alone, for every sample."
        )


def by_sample(
    output: Any, count: int, classes: Sequence[int], class_axis: int, *, listed: bool
) -> list[Any]:
    """Cut a network's output into one for every sample.

    Args:
        output: Of the whole batch; any nesting of tensors with samples along axis 0.
        count: Samples of the batch.
        classes: Of every sample's head; empty without heads. Where they differ, the first tensor
            with as many classes as the longest has each sample's cut to its own.
        class_axis: Of that tensor.
        listed: The batch was a list: if the output is one, it is cut already.

    Returns:
        For every sample what the network would return for it alone, without axis 0.

    Raises:
        InputError: The output cannot be cut.
    """
    if listed and isinstance(output, (list, tuple)) and len(output) == count:
        return list(output)
    leaves, structure = tree_flatten(output)
    for leaf in leaves:
        whole = isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == count
        if not whole and not isinstance(leaf, (type(None), bool, int, float, str)):
            what = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
            raise InputError(
                f"The network returns {what} for {count} samples, which cannot be told apart. "
                "Call it for one domain at a time: `set_domain(name)`."
            )
    scores = _scores(leaves, classes, class_axis)
    return [
        tree_unflatten(
            [
                _sample(leaf, i, classes[i] if leaf is scores else None, class_axis)
                for leaf in leaves
            ],
            structure,
        )
        for i in range(count)
    ]


def _scores(leaves: Sequence[Any], classes: Sequence[int], axis: int) -> Tensor | None:
    """The tensor that holds scores of heads of different lengths, or None if all have one."""
    if len(set(classes)) < 2:
        return None
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.dim() > 1 and leaf.shape[axis] == max(classes):
            return leaf
    raise InputError(
        f"The domains' heads have {sorted(set(classes))} classes, and no output of the network has "
        "an axis of classes to cut. Call it for one domain at a time: `set_domain(name)`."
    )


def _sample(leaf: Any, i: int, classes: int | None, axis: int) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return (leaf if classes is None else leaf.narrow(axis, 0, classes))[i]
