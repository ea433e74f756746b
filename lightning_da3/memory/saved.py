"""Saved activation bytes: what autograd holds for the backward pass."""

import bisect
import contextlib
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import saved_tensors_hooks

from lightning_da3.errors import DA3Error
from lightning_da3.torch_private.autograd import (
    base_of,
    indices_of,
    next_node_number,
    node_number,
    storage_key,
    values_of,
    version_of,
)
from lightning_da3.torch_private.fake import is_wrapper
from lightning_da3.torch_private.modules import is_compiled

_Storages = dict[int, torch.UntypedStorage]  # by address, all of them alive
# the number of the node, the fqn of the module, the saved tensor, and its parameter
_Found = tuple[int, str, Tensor, Tensor | None]


def saved_activation_bytes(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Bytes that autograd keeps for the backward pass right after `fn(*args, **kwargs)`.

    Args:
        fn: A module, or any callable that runs a forward pass.
        *args: What `fn` takes. Its tensors are activations: they count where they are saved.
        **kwargs: What `fn` takes by name. Its tensors are activations, too.

    Returns:
        The sum over the storages alive at that moment, in bytes.
    """
    module = fn if isinstance(fn, nn.Module) else None
    with SavedActivations(module, inputs=(args, kwargs)) as saved:
        output = fn(*args, **kwargs)
    del output  # held until here: the graph, and so what it keeps, lives as long as the output
    return saved.bytes


class SavedActivations:
    """Measures the bytes that autograd keeps of what runs inside a `with` block.

    The figures are taken when the block ends, of what is alive then: keep the output, and call
    `backward` after the block.

        with SavedActivations(net) as saved:
            loss = net(x).sum()
        saved.bytes, saved.by_module["layer1.0.conv2"]

    A tensor with `requires_grad=True` that existed before the block counts as a parameter unless
    it was given to `module` or is named in `inputs`.

    Args:
        module: The module whose submodules the bytes are attributed to. None: everything belongs
            to `""`, and all modules of the process are searched for parameters, which is slower.
        inputs: Tensors, or containers of them, that are activations though they require a gradient.

    Attributes:
        bytes: Saved activation bytes.
        by_module: The same bytes by fqn. Each storage belongs to the innermost submodule whose
            forward ran when it was first saved; `""` is `module` itself and all that runs outside.
    """

    def __init__(self, module: nn.Module | None = None, *, inputs: Any = ()) -> None:
        self.bytes = 0
        self.by_module: dict[str, int] = {}
        self._module = module
        self._declared_inputs = inputs

    def __enter__(self) -> "SavedActivations":
        """Starts to watch."""
        self._packed: list[tuple[int, str, weakref.ref[_Packed]]] = []
        self._stack = [""]
        self._timeline = [(next_node_number(), "")]  # which module creates nodes from there on
        self._inputs = _storages_of(_tensors_in(self._declared_inputs))
        self._constants = _storages_of(
            tensor for module in self._modules() for tensor in _own_constants(module)
        )
        with contextlib.ExitStack() as stack:
            if gc.get_freeze_count() == 0:
                # sets aside all that exists: what the block makes is then found in no time
                gc.freeze()
                stack.callback(gc.unfreeze)
            self._hook_modules(stack)
            stack.enter_context(saved_tensors_hooks(self._pack, _unpack))
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Counts what is alive, if the block succeeded, and stops watching."""
        with self._exit:
            if error is None:
                self._count()
        self._packed, self._inputs, self._constants = [], {}, {}

    def _modules(self) -> Iterator[nn.Module]:
        """The submodules of the module; without one, every module that is alive."""
        if self._module is not None:
            yield from self._module.modules()
            return
        for candidate in gc.get_objects():
            # not isinstance, which would ask every proxy in the process for its `__class__`
            if issubclass(type(candidate), nn.Module) and hasattr(candidate, "training"):
                yield candidate  # one whose __init__ has run

    def _hook_modules(self, stack: contextlib.ExitStack) -> None:
        if self._module is None:
            return
        compiled = {id(m) for m in self._modules() if is_compiled(m) for m in m.modules()}
        for name, module in self._module.named_modules():
            if id(module) in compiled:
                continue  # its hooks would be compiled with it

            def enter(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                if module is self._module:
                    self._inputs |= _storages_of(_tensors_in((args, kwargs)))
                self._stack.append(name)
                self._timeline.append((next_node_number(), name))

            def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
                self._stack.pop()
                self._timeline.append((next_node_number(), self._stack[-1]))

            before = module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
            stack.callback(before.remove)
            # a forward that raises, and whose error the parent catches, must leave the stack too
            after = module.register_forward_hook(leave, always_call=True)
            stack.callback(after.remove)

    def _pack(self, tensor: Tensor) -> "_Packed":
        packed = _Packed(tensor)
        self._packed.append((next_node_number() - 1, self._stack[-1], weakref.ref(packed)))
        return packed

    def _count(self) -> None:
        gc.collect()  # what only a reference cycle holds is not kept by autograd
        made_inside = gc.get_objects()
        found = [
            (number, name, packed.tensor, packed.leaf)
            for number, name, reference in self._packed
            if (packed := reference()) is not None
        ]
        found += self._hidden(made_inside)
        found.sort(key=lambda item: item[0])
        inside = {id(thing) for thing in made_inside}
        constants = self._constants | _storages_of(
            leaf for *_, leaf in found if leaf is not None and self._is_parameter(leaf, inside)
        )
        counted = set(constants)
        self.by_module = {}
        for _, name, tensor, _ in found:
            for key, storage in _storages_of([tensor]).items():
                if key not in counted:
                    counted.add(key)
                    self.by_module[name] = self.by_module.get(name, 0) + storage.nbytes()
        self.bytes = sum(self.by_module.values())

    def _is_parameter(self, leaf: Tensor, inside: set[int]) -> bool:
        if isinstance(leaf, nn.Parameter):
            return True
        return id(leaf) not in inside and not _storages_of([leaf]).keys() & self._inputs.keys()

    def _hidden(self, made_inside: list[Any]) -> list[_Found]:
        """Tensors in attributes of the Python nodes that were created inside the block."""
        starts = [start for start, _ in self._timeline]
        hidden = []
        for node in made_inside:
            if not issubclass(type(node), BackwardCFunction):
                continue
            number = node_number(node)
            if number >= starts[0]:
                name = self._timeline[bisect.bisect_right(starts, number) - 1][1]
                hidden += [(number, name, t, _leaf_of(t)) for t in _tensors_in(vars(node))]
        return hidden


class _Packed:
    """A saved tensor. It lives as long as the node that saved it, which its storage need not."""

    __slots__ = ("__weakref__", "leaf", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # not the tensor itself: an output would hold its own node, a cycle that is never freed
        self.tensor = tensor.detach()
        self.version = version_of(tensor)
        self.leaf = _leaf_of(tensor)


def _unpack(packed: _Packed) -> Tensor:
    # autograd leaves this check out for tensors that went through hooks
    version = version_of(packed.tensor)
    if version != packed.version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: the saved tensor of shape {tuple(packed.tensor.shape)} is at version "
            f"{version}; expected version {packed.version} instead."
        )
    return packed.tensor


def _own_constants(module: nn.Module) -> list[Tensor]:
    """Its parameters and buffers without those of submodules."""
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _leaf_of(tensor: Tensor) -> Tensor | None:
    """The parameter, or plain leaf that requires a gradient, that a tensor is or is a view of."""
    base = base_of(tensor)
    owner = tensor if base is None else base
    if isinstance(owner, nn.Parameter) or (owner.is_leaf and owner.requires_grad):
        return owner
    return None


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a tensor, list, tuple, set or dict, nested in any way."""
    pending, seen = [value], set()
    while pending:
        item = pending.pop()
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, (list, tuple, set, frozenset, dict)) and id(item) not in seen:
            seen.add(id(item))
            pending += item.values() if isinstance(item, dict) else item


def _storages_of(tensors: Iterable[Tensor]) -> _Storages:
    return {storage_key(s): s for tensor in tensors for s in _storages(tensor)}


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    if nn.parameter.is_lazy(tensor):
        return
    parts = _parts(tensor)
    if parts:
        for part in parts:
            yield from _storages(part)
        return
    try:
        yield tensor.untyped_storage()
    except (NotImplementedError, RuntimeError) as error:
        raise DA3Error(
            f"Cannot measure a tensor of layout {tensor.layout} and shape {tuple(tensor.shape)}: "
            "it has no storage to count. Use strided or sparse tensors."
        ) from error


def _parts(tensor: Tensor) -> list[Tensor]:
    """The tensors that another is made of; empty for one with a storage of its own."""
    wrapper: Any = tensor
    if is_wrapper(wrapper):
        names, _ = wrapper.__tensor_flatten__()
        return [getattr(wrapper, name) for name in names]
    if tensor.layout == torch.sparse_coo:
        return [indices_of(tensor), values_of(tensor)]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []
