"""What goes into a converted network, and what is done to its output."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_da3.errors import InputError
from lightning_da3.nn.gate import with_loss
from lightning_da3.ops.bits import lies_channels_last
from lightning_da3.planning.plan import Plan
from lightning_da3.torch_private.trees import (
    tree_flatten,
    tree_leaves,
    tree_map_only,
    tree_unflatten,
)


def check_input(args: Sequence[Any], plan: Plan) -> None:
    """Refuse a batch that the first convolution could not take.

    Args:
        args: The network's positional arguments.
        plan: The network's plan.

    Raises:
        InputError: The batch's axes, channels or type do not fit.
    """
    x = args[0] if args else None
    if not isinstance(x, Tensor) or plan.input_channels is None:
        return
    axes, channels = plan.input_channels
    shape = ", ".join(["N", str(channels), *"DHW"[3 - axes :]])
    if not x.is_floating_point():
        raise InputError(
            f"{plan.network} takes floating-point batches of shape ({shape}), got {x.dtype}. "
            "Convert and normalise first: `batch.float() / 255`, say."
        )
    if x.dim() != axes + 2 or x.shape[1] != channels:
        raise InputError(f"{plan.network} takes batches of shape ({shape}), got {tuple(x.shape)}.")


def explain_types(inputs: Any, dtype: torch.dtype, network: str, error: RuntimeError) -> None:
    """Say what is wrong with inputs of another type than the network's, if there are any.

    Args:
        inputs: What the network was called with.
        dtype: The type that it computes in.
        network: Its name.
        error: What PyTorch says of them.

    Raises:
        InputError: There are some, and autocast is off.
    """
    for x in tree_leaves(inputs):
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == dtype:
            continue
        if not torch.is_autocast_enabled(x.device.type):
            raise InputError(
                f"{network} computes in {dtype}, got a batch of {x.dtype} ({error}). Convert it, "
                f"`batch.to({dtype})`; convert the network, `model.to({x.dtype})`; or compute "
                f"inside `torch.autocast({x.device.type!r}, dtype={x.dtype})`."
            ) from error


def tell_that_nothing_trains(output: Any, domains: Sequence[str]) -> bool:
    """Warn before PyTorch's backward says that there is no graph, which names no reason.

    Args:
        output: Of a call in train mode, with gradients, without an active domain.
        domains: The names of the domains.

    Returns:
        Whether it was said: not where the output requires a gradient, of its input say.
    """
    if any(isinstance(y, Tensor) and y.requires_grad for y in tree_leaves(output)):
        return False
    warnings.warn(
        f"No domain is active, so that nothing of the network can be trained. There are {domains}: "
        "`set_domain(name)` to train one. To compute the backbone alone, call `eval()` or use "
        "`torch.no_grad()`.",
        stacklevel=6,
    )
    return True


def laid_out(output: Any, inputs: Any) -> Any:
    """The output with contiguous maps if the inputs' are: what follows may take views of them."""
    if any(isinstance(x, Tensor) and lies_channels_last(x) for x in tree_leaves(inputs)):
        return output
    return tree_map_only(Tensor, lambda y: y.contiguous() if lies_channels_last(y) else y, output)


def carrying(output: Any, loss: Tensor, scale: float | Tensor | None) -> Any:
    """The output, whose first tensor that requires a gradient carries a loss into the backward.

    Args:
        output: Any nesting of tensors and dataclasses.
        loss: A scalar.
        scale: The loss's factor, as `with_loss` takes it.
    """
    leaves, structure = tree_flatten(output)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            leaves[i] = with_loss(leaf, loss, scale)
            return tree_unflatten(leaves, structure)
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            fields = {f.name: getattr(leaf, f.name) for f in dataclasses.fields(leaf) if f.init}
            changed = carrying(fields, loss, scale)
            if changed is not fields:
                leaves[i] = dataclasses.replace(leaf, **changed)
                return tree_unflatten(leaves, structure)
    return output
