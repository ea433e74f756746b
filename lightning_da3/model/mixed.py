"""A batch whose samples belong to different domains: what goes in, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_da3.budget.microbatches import cut
from lightning_da3.errors import InputError
from lightning_da3.model.domain import Domain
from lightning_da3.model.holder import Holder
from lightning_da3.model.outside import tensors_of
from lightning_da3.torch_private.trees import tree_flatten, tree_unflatten

Domains = Sequence[str | None] | Literal["nearest"]
NEAREST = "nearest"


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


def check_outside(domains: Sequence[Domain | None], holder: Holder | None) -> None:
    """Refuse samples of several domains where something outside of the network is of one at a time.

    Raises:
        InputError: It is so.
    """
    if holder is None or len(set(domains)) < 2:
        return
    names = sorted({key for d in domains if d is not None for key in tensors_of(d.outside)})
    if names:
        raise InputError(
            f"{type(holder.root).__name__} has {names} outside of the network, which are of one "
            "domain at a time: call `set_domain(name)`, then compute the samples of that domain."
        )


def alike(domains: Sequence[Domain | None]) -> list[list[int]]:
    """The positions of samples in groups that skip the same branches."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, domain in enumerate(domains):
        groups.setdefault(() if domain is None else domain.skipped, []).append(i)
    return list(groups.values())


def chosen(batch: tuple[Any, Any], samples: Sequence[int], count: int) -> Any:
    """Some samples of a batch.

    Args:
        batch: Arguments and named arguments. Tensors with all samples along axis 0 count, whatever
            holds them; lists with one entry for every sample where the first argument is one.
        samples: Their positions.
        count: The number of samples of the batch.
    """
    listed = isinstance(next(iter([*batch[0], *batch[1].values()]), None), (list, tuple))

    def is_of_samples(x: Any) -> bool:
        if isinstance(x, Tensor):
            return x.dim() > 0 and len(x) == count
        is_list = isinstance(x, (list, tuple)) and len(x) == count
        return listed and is_list and x is not batch and x is not batch[0]

    leaves, structure = tree_flatten(batch, is_leaf=is_of_samples)
    some: list[Any] = []
    for x in leaves:
        if isinstance(x, Tensor) and is_of_samples(x):
            some.append(x[torch.tensor(samples, device=x.device)])
        elif isinstance(x, (list, tuple)):
            some.append(type(x)(x[i] for i in samples))
        else:
            some.append(x)
    return tree_unflatten(some, structure)


def by_sample(
    output: Any, count: int, classes: Sequence[int], class_axis: int, *, listed: bool
) -> list[Any]:
    """Cut a network's output into one for every sample.

    Args:
        output: The output for the whole batch; any nesting of tensors with samples along axis 0.
        count: The number of samples of the batch.
        classes: The number of classes of every sample's head; empty without heads. Where they
            differ, the first tensor with as many classes as the longest is cut to each sample's.
        class_axis: The axis of the classes in that tensor.
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
    samples = []
    for part, own in zip(cut(leaves, [1] * count), classes or [0] * count, strict=True):
        if scores is not None:
            part[scores] = part[scores].narrow(class_axis, 0, own)
        part = [leaf[0] if isinstance(leaf, Tensor) else leaf for leaf in part]
        samples.append(tree_unflatten(part, structure))
    return samples


def _scores(leaves: Sequence[Any], classes: Sequence[int], axis: int) -> int | None:
    """The position of the tensor with all heads' scores; None if all heads have as many."""
    if len(set(classes)) < 2:
        return None
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.dim() > 1 and leaf.shape[axis] == max(classes):
            return i
    raise InputError(
        f"The domains' heads have {sorted(set(classes))} classes, and no output of the network has "
        "an axis of classes to cut. Call it for one domain at a time: `set_domain(name)`."
    )
