"""Other methods of the user's network than `forward`, and its parts by themselves, rewritten.

They are traced, planned and rewritten like `forward` when they are first called, from the copy of
the network without values; what they compute with are the tensors of the rewritten network itself.
"""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, fx, nn

from lightning_da3.config import DA3Config
from lightning_da3.errors import ConversionWarning, DA3Error
from lightning_da3.memory import fake_mode_of
from lightning_da3.model.binding import Bound, without_values_of
from lightning_da3.model.entries import Entry
from lightning_da3.model.original import Original
from lightning_da3.model.smaller import Smaller
from lightning_da3.nn.call import Call, Calls
from lightning_da3.passes.branches import without_branches
from lightning_da3.passes.rewriting import rewrite
from lightning_da3.planning.plan import PartPlan, Plan
from lightning_da3.planning.planner import make_plan
from lightning_da3.tracing.guards import GuardError
from lightning_da3.tracing.islands import trace
from lightning_da3.tracing.tracer import Tracer

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
        whole: So does every module that holds others; else graphs of them are called.

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
        whole: bool = False,
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
            stays |= dict.fromkeys(_holders(network) if whole else [""], python)
        with warnings.catch_warnings(), fake_mode_of(network) or nullcontext():
            warnings.simplefilter("ignore")  # of PyTorch, about copies of what has no values
            given = [without_values_of(x, network, backbone) for x in tensors]
            traced = trace(_entering(network, entry), given, stays)
            hosts: Any = plan
            if entry.skipped:
                traced, hosts = without_branches(traced, plan, entry.skipped)
            head = plan.head if _has(traced.root, plan.head) else None
            known = dataclasses.replace(config, head=head)
            self.plan = make_plan(traced, known, None, hosts_of=hosts)
            self.root = rewrite(traced, self.plan, known)
        if not isinstance(self.root, fx.GraphModule):
            self.root.__class__ = type(network)  # it stays Python: called as it is
        self.apart = dict(_apart(plan, self.plan, network))
        self._bound = Bound(self.root, self.plan, backbone, original, calls, entry.name)

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
        self._bound.follow(backbone)
        if isinstance(self.root, fx.GraphModule):
            return self.root(*tensors)
        return self.entry.call(self.root, tensors)


def _holders(network: nn.Module) -> Iterator[str]:
    """The paths of modules that hold others, but of layers."""
    layers = Tracer()
    for path, module in network.named_modules():
        if any(True for _ in module.children()) and not layers.is_leaf_module(module, path):
            yield path


def _has(root: nn.Module, path: str | None) -> bool:
    try:
        return path is not None and root.get_submodule(path) is not None
    except AttributeError:
        return False


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
    computed = {place for part in plan.parts for place in _places(part, network)}
    for part in whole.parts:
        order, places = {node.name: i for i, node in enumerate(part.nodes)}, _places(part, network)
        for host in part.hosts:
            if host.name not in there:
                for place in places[order[host.readers[0]] : order[host.last] + 1]:
                    if place in computed and _has_weights(network, place):
                        yield place, host.name


def _places(part: PartPlan, network: nn.Module) -> list[str]:
    """Where the nodes are in the user's network; a graph of one layer calls it by another name."""
    found = [f"{part.path}.{node.place}".lstrip(".") for node in part.nodes]
    return [p if _has(network, p) else p.removesuffix(".layer") for p in found]


def _has_weights(network: nn.Module, path: str) -> bool:
    return _has(network, path) and any(True for _ in network.get_submodule(path).parameters())


_MOST_WAYS = 8  # in which one method decides; what decides in more stays Python
_AS_ELSEWHERE = "it decides on something else than can be seen before it runs"
_MANY_WAYS = f"it decides on its inputs in more than {_MOST_WAYS} ways"


class Methods:
    """The rewritten methods of one model, made when they are first called. Copies have none.

    Attributes:
        made: The methods by the key of their entry: one for every way in which it decides on its
            inputs, as far as they came.
        smaller: Forms of the whole network without some branches, by their names.
        view: The view of the whole network, once it was asked for.
    """

    def __init__(self) -> None:
        self.made: dict[Any, list[Method]] = {}
        self.smaller: dict[frozenset[str], Smaller] = {}
        self.view: nn.Module | None = None
        self._lock = threading.Lock()

    def run(
        self,
        entry: Entry,
        make: Callable[[str | None, bool], Method],
        run: Callable[[Method], Any],
    ) -> Any:
        """What the method of this entry returns, made now if none decides like this.

        Args:
            entry: What is called.
            make: Makes it; takes why it stays Python, or None, and whether all that it calls does.
            run: Calls it.
        """
        number = 0
        while True:
            with self._lock:
                known = self.made.setdefault(entry.key, [])
                is_new = number == len(known)
                if is_new:
                    known.append(make(_MANY_WAYS if number >= _MOST_WAYS else None, False))
                method = known[number]
            try:
                return run(method)
            except GuardError as error:
                if is_new:  # what it decides on is not as its tracing saw it
                    return self._run_python(entry, method, make, run, error)
            number += 1

    def _run_python(
        self,
        entry: Entry,
        method: Method,
        make: Callable[[str | None, bool], Method],
        run: Callable[[Method], Any],
        error: GuardError,
    ) -> Any:
        """The same as Python, in the place of one that refuses what it was made for."""
        warnings.warn(
            f"`{entry.name}` stays Python for inputs like this one, and so takes more memory. "
            f"{error.fact}",
            ConversionWarning,
            stacklevel=2,
        )
        found = self._replaced(entry, method, make(_AS_ELSEWHERE, False))
        try:
            return run(found)
        except GuardError:  # what it calls decides
            return run(self._replaced(entry, found, make(_AS_ELSEWHERE, True)))

    def _replaced(self, entry: Entry, method: Method, other: Method) -> Method:
        with self._lock:
            known = self.made[entry.key]
            if method in known:
                known[known.index(method)] = other
        return other

    def smaller_of(self, skipped: frozenset[str], make: Callable[[], Smaller]) -> Smaller:
        """The network without some branches, made now if it is not there."""
        with self._lock:
            if skipped not in self.smaller:
                self.smaller[skipped] = make()
            return self.smaller[skipped]

    def keep_only(self, used: Collection[frozenset[str]]) -> None:
        """Forget what skips other branches than one of these sets, and any at all."""
        with self._lock:
            self.smaller = {key: form for key, form in self.smaller.items() if key in used}
            gone = {key for key in self.made if key[-1] and key[-1] not in used}
            self.made = {key: found for key, found in self.made.items() if key not in gone}

    def has(self, path: str, method: str) -> bool:
        """Whether a method of a part was made."""
        return any(key[:2] == (path, method) for key in [*self.made])

    def __deepcopy__(self, memo: dict[int, Any]) -> Methods:
        del memo
        return Methods()

    def __reduce__(self) -> tuple[Any, ...]:
        return Methods, ()
