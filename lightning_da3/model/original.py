"""The network that a model was made from: what fine-tuning it costs, and what else it has."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from lightning_da3.errors import DA3Error
from lightning_da3.memory import StepPredictor, without_values
from lightning_da3.memory.fake import left_by_forward
from lightning_da3.model.identity import uncompiled_name
from lightning_da3.nn.convolution import FrozenConv, FrozenConvTranspose
from lightning_da3.nn.normalization import BatchNormStatistics, FrozenAffine
from lightning_da3.torch_private.fake import new_fake_mode
from lightning_da3.torch_private.modules import original_of
from lightning_da3.tracing.autocast import Precision, precision_now
from lightning_da3.tracing.graph_modules import is_of_layer

_INNER = ("layer", "function", "original")  # what holds a layer of the user's by another name
_DERIVED = ("parametrizations.", "weight_g", "weight_v", "weight_orig", "num_batches_tracked")


class Original:
    """A copy of the user's network without values, and so nearly without memory.

    Copies of a model share it. Processes that get the model by pickle have it, if the network's
    class is known there; no domain file or checkpoint holds it.

    Args:
        network: Left unchanged; None: the network is forgotten.

    Attributes:
        network: The copy; None if there is none, or if the network cannot be copied.
        inputs: What the conversion was told that the network takes, without values; None: nothing.
        precision: Where autocast was on as the network was traced: traced again it is as it was.
        spare: Tensors of the network that its rewritten form does not hold, by their names: folded
            statistics, and layers that `forward` does not use.
    """

    def __init__(self, network: nn.Module | None = None) -> None:
        self.network: nn.Module | None = None
        self.inputs: tuple[Any, ...] | None = None
        self.precision: Precision = precision_now()
        self.spare: dict[str, Tensor] = {}
        if network is not None:
            with suppress(DA3Error):  # then only the figures of fine-tuning are missing
                copied = _uncompiled_(StepPredictor(network).twin)
                self.network = copied.requires_grad_(True) if _can_train(copied) else copied

    def keep(self, network: nn.Module, backbone: nn.Module) -> None:
        """Take copies of what the rewritten network does not hold."""
        held = {user_name(path, key) for path, _, key, _ in tensors_in(backbone)}
        tensors = (*network.named_parameters(), *network.named_buffers())
        named = {uncompiled_name(name): value for name, value in tensors}
        self.spare = {
            name: value.detach().clone()
            for name, value in named.items()
            if name not in held and not any(part in name for part in _DERIVED)
        }

    def renew(self, state: Mapping[str, Any]) -> None:
        """Take the tensors of another state of the network."""
        for name in self.spare:
            if name in state:
                self.spare[name] = state[name].detach().clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> Original:
        del memo
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        network = None if self.network is None else _pickled(self.network)
        return _unpickled, (network, self.spare, self.inputs, self.precision)


def _pickled(network: nn.Module) -> bytes | None:
    """The network on the meta device; None if it cannot be pickled."""
    memo = left_by_forward(network)
    for tensor in (*network.parameters(), *network.buffers()):
        like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(like, tensor.requires_grad) if is_parameter else like
    with suppress(Exception):  # the user's own class: anything can come
        return pickle.dumps(copy.deepcopy(network, memo))
    return None


def _unpickled(
    network: bytes | None,
    spare: dict[str, Tensor],
    inputs: tuple[Any, ...] | None = None,
    precision: Precision = (),
) -> Original:
    found = Original()
    found.spare, found.inputs, found.precision = spare, inputs, precision
    if network is not None:
        with suppress(Exception):  # its class may be unknown here: then it is forgotten
            found.network = without_values(pickle.loads(network), new_fake_mode())
    return found


def _uncompiled_(network: nn.Module) -> nn.Module:
    """A copy without what `torch.compile` put around its parts."""
    for module in [*network.modules()]:
        for name, child in module.named_children():
            setattr(module, name, original_of(child) or child)
    return original_of(network) or network


def _can_train(network: nn.Module) -> bool:
    return all(p.is_floating_point() or p.is_complex() for p in network.parameters())


def tensors_in(network: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Everything that a rewritten network holds: (path, the module, the tensor's name there, it).

    Args:
        network: The network, or a part of it.
        path: What the user's network calls the part.
    """
    for held in (network._parameters, network._buffers):
        for key, value in held.items():
            if value is not None:
                yield path, network, key, value
    ours = is_of_layer(network) or type(network).__module__.startswith("lightning_da3.")
    for name, child in network._modules.items():
        if child is not None:
            is_inner = ours and name in _INNER
            yield from tensors_in(child, path if is_inner else f"{path}.{name}".lstrip("."))


def user_name(path: str, key: str) -> str:
    """What the user's network calls a tensor of the rewritten one."""
    return f"{path}.{key}" if path else key


class UserState(Mapping[str, Tensor]):
    """The state of the user's network, as far as it can be told from the rewritten one.

    Args:
        backbone: The rewritten network.
        spare: What it does not hold.
    """

    def __init__(self, backbone: nn.Module, spare: Mapping[str, Tensor]) -> None:
        self.spare = spare
        self.place = next(backbone.parameters()).device
        self.convolutions: dict[str, FrozenConv] = {}
        self.held: dict[str, tuple[nn.Module, str]] = {}
        for path, module, key, _ in tensors_in(backbone):
            if isinstance(module, FrozenConv) and module.norm_name is not None:
                self.convolutions[f"{module.name}.{key}"] = module
            elif not isinstance(module, FrozenAffine):
                self.held.setdefault(user_name(path, key), (module, key))

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of this name, as it was before anything was folded.

        Raises:
            KeyError: It cannot be told.
        """
        if name in self.held:
            module, key = self.held[name]
            return getattr(module, key)  # type: ignore[no-any-return]
        if name in self.convolutions:
            return self._unfolded(self.convolutions[name], name)
        return self.spare[name].to(self.place)

    def _unfolded(self, conv: FrozenConv, name: str) -> Tensor:
        assert conv.norm_name is not None
        norm = BatchNormStatistics.read(self, conv.norm_name, conv.eps)
        scale, shift = norm.affine()
        if bool((scale.abs() < 1e-6).any()):
            raise KeyError(name)  # what was multiplied by nothing is gone
        if name.endswith(".weight"):
            return conv.weight.double() / scale.view(-1, *[1] * (conv.weight.dim() - 1))
        if conv.bias is None:
            raise KeyError(name)
        return (conv.bias.double() - shift) / scale

    def __iter__(self) -> Iterator[str]:
        return iter({**self.held, **self.convolutions, **self.spare})

    def __len__(self) -> int:
        return len({**self.held, **self.convolutions, **self.spare})


def identity_of(path: str, module: nn.Module, key: str) -> tuple[Any, ...]:
    """What is the same of tensors, of two rewritten forms of one network, that are the same."""
    if isinstance(module, FrozenConv):
        return "convolution", module.name, module.norm_name, key
    if isinstance(module, FrozenConvTranspose):
        return "transposed", module.name, key
    if isinstance(module, FrozenAffine):
        return "affine", module.name, key
    return "as it was", user_name(path, key)
