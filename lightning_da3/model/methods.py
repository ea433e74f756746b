"""Other methods of the user's network than `forward`, and its parts by themselves, rewritten.

They are traced, planned and rewritten like `forward` when they are first called, from the copy of
the network without values; what they compute with are the tensors of the rewritten network itself.
"""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_da3.config import DA3Config
from lightning_da3.errors import DA3Error
from lightning_da3.memory import fake_mode_of
from lightning_da3.model.entries import Entry
from lightning_da3.model.modes import set_mode_
from lightning_da3.model.original import Original, UserState, identity_of, tensors_in
from lightning_da3.model.slots import connect_
from lightning_da3.nn.call import Call, Calls
from lightning_da3.nn.convolution import FrozenConv, FrozenConvTranspose
from lightning_da3.nn.frozen import frozen
from lightning_da3.nn.normalization import FrozenAffine
from lightning_da3.passes.rewriting import rewrite
from lightning_da3.planning.plan import PartPlan, Plan
from lightning_da3.planning.planner import make_plan
from lightning_da3.torch_private.fake import is_fake
from lightning_da3.tracing.guards import GuardError
from lightning_da3.tracing.islands import trace

_running = threading.local()


class Method:
    """One rewritten method.

    Args:
        entry: What is called.
        original: Of the model.
        backbone: The rewritten network, whose tensors are used.
        plan: Its plan.
        config: The user's choices.
        calls: What it computes with.
        tensors: The arguments of a call, whose shapes are looked at.
        python: Why it stays Python, or None.

    Raises:
        DA3Error: It cannot be rewritten, or needs tensors that nobody has any more.
    """

    def __init__(
        self,
        entry: Entry,
        original: Original,
        backbone: nn.Module,
        plan: Plan,
        config: DA3Config,
        calls: Calls,
        tensors: Sequence[Tensor],
        python: str | None = None,
    ) -> None:
        self.entry = entry
        network = original.network
        if network is None:
            raise DA3Error(
                f"`{entry.name}` cannot be called: a model that was saved forgets the methods of "
                "the network it was made from. Convert the network here, and load the domains."
            )
        stays = {path: why for path, why in plan.python if path}
        if python is not None:
            stays[""] = python
        with warnings.catch_warnings(), fake_mode_of(network) or nullcontext():
            warnings.simplefilter("ignore")  # of PyTorch, about copies of what has no values
            given = [_without_values(x, network, backbone) for x in tensors]
            traced = trace(_entering(network, entry), given, stays)
            head = plan.head if _has(traced.root, plan.head) else None
            known = dataclasses.replace(config, head=head)
            self.plan = make_plan(traced, known, None, hosts_of=plan)
            self.root = rewrite(traced, self.plan, known)
        if not isinstance(self.root, fx.GraphModule):
            self.root.__class__ = type(network)  # it stays Python: called as it is
        self.apart = dict(_apart(plan, self.plan, network))
        self._places = list(_bound(entry, self.root, backbone, original))
        connect_(self.root, calls)
        set_mode_(self.root, self.plan, backbone.training)

    def __call__(self, backbone: nn.Module, call: Call, tensors: Sequence[Tensor]) -> Any:
        """What the method returns."""
        if call.adapters and self.apart:
            layer, host = next(iter(self.apart.items()))
            raise DA3Error(
                f"`{self.entry.name}` computes {layer!r} without the rest of the host {host!r}, "
                "whose adapter could not act there. Call the part of the network that holds all of "
                "it, such as the block or the stage; or the backbone alone, inside `with "
                "model.disable_adapters():`."
            )
        for held, key, module, name in self._places:
            value = getattr(module, name)
            if held[key] is not value:
                held[key] = value
        if self.root.training != backbone.training:
            set_mode_(self.root, self.plan, backbone.training)
        if isinstance(self.root, fx.GraphModule):
            return self.root(*tensors)
        return self.entry.call(self.root, tensors)


def _has(root: nn.Module, path: str | None) -> bool:
    try:
        return path is not None and root.get_submodule(path) is not None
    except AttributeError:
        return False


def _without_values(x: Tensor, network: nn.Module, backbone: nn.Module) -> Tensor:
    """A tensor of the copy's device and type, wherever the model is by now."""
    own, ours = next(network.parameters()), {p.dtype for p in backbone.parameters()}
    dtype = own.dtype if x.dtype in ours and x.is_floating_point() else x.dtype
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=own.device)


class _Silent:
    """No class of the user's hears of what is derived from it with this."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Tell nobody."""


def _entering(network: nn.Module, entry: Entry) -> nn.Module:
    """The network, whose `forward` is the entry, and takes its tensors."""
    kind: Any = type(network)

    def run(self: nn.Module, *tensors: Tensor) -> Any:
        if getattr(_running, "entered", False):  # the method calls the whole network
            return kind.forward(self, *tensors)
        if not entry.path and entry.method == "forward":
            args, kwargs = entry.arguments(tensors)
            return kind.forward(self, *args, **kwargs)
        _running.entered = True
        try:
            return entry.call(self, tensors)
        finally:
            _running.entered = False

    names = ", ".join(f"x{i}" for i in range(entry.tensors))
    forward = eval(f"lambda self, {names}: run(self, {names})", {"run": run})
    about = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "forward": forward}
    entering: Any = object.__new__(type(kind)(kind.__name__, (_Silent, kind), about))
    vars(entering).update(vars(network))
    return entering  # type: ignore[no-any-return]


def _apart(whole: Plan, plan: Plan, network: nn.Module) -> Iterator[tuple[str, str]]:
    """(layer, host) for layers that a method computes without the rest of their host."""
    there = {host.name for host in plan.hosts}
    computed = {place for part in plan.parts for place in _places(part)}
    for part in whole.parts:
        order, places = {node.name: i for i, node in enumerate(part.nodes)}, _places(part)
        for host in part.hosts:
            if host.name not in there:
                for place in places[order[host.readers[0]] : order[host.last] + 1]:
                    if place in computed and _has_weights(network, place):
                        yield place, host.name


def _places(part: PartPlan) -> list[str]:
    return [f"{part.path}.{node.place}".lstrip(".") for node in part.nodes]


def _has_weights(network: nn.Module, path: str) -> bool:
    return _has(network, path) and any(True for _ in network.get_submodule(path).parameters())


Place = tuple[dict[str, Any], str, nn.Module, str]


def _bound(
    entry: Entry, root: nn.Module, backbone: nn.Module, original: Original
) -> Iterator[Place]:
    """Put the rewritten network's tensors in; says where, and which of its modules holds them."""
    theirs: dict[tuple[Any, ...], tuple[nn.Module, str]] = {}
    for path, module, key, _ in tensors_in(backbone):
        theirs.setdefault(identity_of(path, module, key), (module, key))
    state = UserState(backbone, original.spare)
    found: dict[int, Tensor | tuple[nn.Module, str]] = {}
    for path, module, key, value in tensors_in(root):
        same = theirs.get(identity_of(path, module, key))
        found[id(value)] = _own(entry, path, module, key, state) if same is None else same
    for held, key in _all_places(root):
        source = found.get(id(held[key]))
        if isinstance(source, tuple):
            held[key] = getattr(*source)
            yield held, key, *source
        elif source is not None:
            held[key] = source


def _own(entry: Entry, path: str, module: nn.Module, key: str, state: UserState) -> Tensor:
    """A tensor that the rewritten network does not hold."""
    like = getattr(module, key)
    try:
        if isinstance(module, (FrozenConv, FrozenConvTranspose, FrozenAffine)):
            value = module.translate(state)[key]
        else:
            value = state[identity_of(path, module, key)[1]]
    except KeyError as error:
        raise DA3Error(
            f"`{entry.name}` cannot be called: it needs {error.args[0]!r} by itself, which was "
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


_MOST_WAYS = 8  # in which one method decides; what decides in more stays Python
_MANY_WAYS = f"it decides on its inputs in more than {_MOST_WAYS} ways"


class Methods:
    """The rewritten methods of one model, made when they are first called. Copies have none.

    Attributes:
        made: The methods by the key of their entry: one for every way in which it decides on its
            inputs, as far as they came.
        view: The view of the whole network, once it was asked for.
    """

    def __init__(self) -> None:
        self.made: dict[Any, list[Method]] = {}
        self.view: nn.Module | None = None
        self._lock = threading.Lock()

    def run(
        self, entry: Entry, make: Callable[[str | None], Method], run: Callable[[Method], Any]
    ) -> Any:
        """What the method of this entry returns, made now if none decides like this.

        Args:
            entry: What is called.
            make: Makes it; takes why it stays Python, or None.
            run: Calls it.
        """
        number = 0
        while True:
            with self._lock:
                known = self.made.setdefault(entry.key, [])
                is_new = number == len(known)
                if is_new:
                    known.append(make(_MANY_WAYS if number >= _MOST_WAYS else None))
                method = known[number]
            try:
                return run(method)
            except GuardError:
                if is_new:
                    raise
            number += 1

    def has(self, path: str, method: str) -> bool:
        """Whether a method of a part was made."""
        return any(key[:2] == (path, method) for key in [*self.made])

    def __deepcopy__(self, memo: dict[int, Any]) -> Methods:
        del memo
        return Methods()

    def __reduce__(self) -> tuple[Any, ...]:
        return Methods, ()
