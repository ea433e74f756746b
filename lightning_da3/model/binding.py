"""Another rewritten form of a network computes with the tensors of the first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_da3.errors import DA3Error
from lightning_da3.model.modes import set_mode_
from lightning_da3.model.original import Original, UserState, identity_of, tensors_in
from lightning_da3.model.slots import connect_
from lightning_da3.nn.call import Calls
from lightning_da3.nn.convolution import FrozenConv, FrozenConvTranspose
from lightning_da3.nn.frozen import frozen
from lightning_da3.nn.normalization import FrozenAffine
from lightning_da3.planning.plan import Plan
from lightning_da3.torch_private.fake import is_fake

Place = tuple[dict[str, Any], str, nn.Module, str]


class Bound:
    """A rewritten form of a network without values, which gets those of the first.

    Args:
        root: The form; its tensors are put in.
        plan: Its plan.
        backbone: The rewritten network whose tensors are used.
        original: Of the model.
        calls: What it computes with.
        name: What the user's code calls it.

    Raises:
        DA3Error: It needs tensors that nobody has any more.
    """

    def __init__(
        self,
        root: nn.Module,
        plan: Plan,
        backbone: nn.Module,
        original: Original,
        calls: Calls,
        name: str,
    ) -> None:
        self.root, self.plan = root, plan
        self._places = list(_bound(name, root, backbone, original))
        connect_(root, calls)
        set_mode_(root, plan, backbone.training)

    def follow(self, backbone: nn.Module) -> None:
        """Take over what became of the rewritten network: other tensors, and its mode."""
        for held, key, module, name in self._places:
            value = getattr(module, name)
            if held[key] is not value:
                held[key] = value
        if self.root.training != backbone.training:
            set_mode_(self.root, self.plan, backbone.training)


def _bound(name: str, root: nn.Module, backbone: nn.Module, original: Original) -> Iterator[Place]:
    """Put the rewritten network's tensors in; says where, and which of its modules holds them."""
    theirs: dict[tuple[Any, ...], tuple[nn.Module, str]] = {}
    for path, module, key, _ in tensors_in(backbone):
        theirs.setdefault(identity_of(path, module, key), (module, key))
    state = UserState(backbone, original.spare)
    found: dict[int, Tensor | tuple[nn.Module, str]] = {}
    for path, module, key, value in tensors_in(root):
        same = theirs.get(identity_of(path, module, key))
        found[id(value)] = _own(name, path, module, key, state) if same is None else same
    for held, key in _all_places(root):
        source = found.get(id(held[key]))
        if isinstance(source, tuple):
            held[key] = getattr(*source)
            yield held, key, *source
        elif source is not None:
            held[key] = source


def _own(name: str, path: str, module: nn.Module, key: str, state: UserState) -> Tensor:
    """A tensor that the rewritten network does not hold."""
    like = getattr(module, key)
    try:
        if isinstance(module, (FrozenConv, FrozenConvTranspose, FrozenAffine)):
            value = module.translate(state)[key]
        else:
            value = state[identity_of(path, module, key)[1]]
    except KeyError as error:
        raise DA3Error(
            f"`{name}` cannot be called: it needs {error.args[0]!r} by itself, which was "
            "folded into another layer or computed from others. Call a larger part of the network, "
            "or keep an unconverted copy for this."
        ) from error
    layout = torch.channels_last if value.dim() == 4 else torch.contiguous_format
    value = value.to(like.dtype)
    is_conv = isinstance(module, FrozenConv)
    return frozen(value.contiguous(memory_format=layout) if is_conv else value)


def _all_places(root: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Everywhere in a rewritten network where a tensor without values is held."""
    waiting: list[nn.Module] = [root]
    seen: set[int] = set()
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        waiting += [child for child in module._modules.values() if child is not None]
        waiting += [owned for owned in vars(module).values() if isinstance(owned, nn.Module)]
        for held in (module._parameters, module._buffers, vars(module)):
            for key, value in [*held.items()]:
                if isinstance(value, Tensor) and is_fake(value):
                    yield held, key


def without_values_of(x: Tensor, network: nn.Module, backbone: nn.Module) -> Tensor:
    """A tensor as the copy of a network without values takes it, wherever the model is by now.

    Args:
        x: What the model is called with.
        network: The copy.
        backbone: The rewritten network.
    """
    own, ours = next(network.parameters()), {p.dtype for p in backbone.parameters()}
    dtype = own.dtype if x.dtype in ours and x.is_floating_point() else x.dtype
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=own.device)
