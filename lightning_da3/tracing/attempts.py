"""The graph of a module, in the first way that works."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

from torch import fx, nn

from lightning_da3.errors import ConversionError
from lightning_da3.memory import fake_mode_of
from lightning_da3.torch_private.fake import FakeTensorMode, new_fake_mode
from lightning_da3.tracing.calls import ModuleCall, calls_of, takes
from lightning_da3.tracing.first_calls import alike
from lightning_da3.tracing.guards import must_be_default
from lightning_da3.tracing.guessing import first_guesses
from lightning_da3.tracing.probes import ProbeFailed, Probes, SizeDecides, probe_inputs
from lightning_da3.tracing.refusals import NewLeaf
from lightning_da3.tracing.signatures import options_of, takes_one
from lightning_da3.tracing.tracer import Tracer

_MOST_LEAVES = 50  # functions that become nodes: a forward that has more of them stays Python


@dataclass
class Session:
    """What is known of a network, and found out while its modules are traced.

    Attributes:
        inputs: The network's arguments, if they are known.
        python: Why modules stay Python, by their paths.
        leaves: Why functions are one node, by their code.
        calls: How modules are called, by their paths.
        guessed: The network's arguments in those calls.
        hooked: By the paths of modules that the network hooks into as it runs, of the modules
            whose forwards do.
    """

    inputs: Sequence[Any] | None = None
    python: dict[str, str] = field(default_factory=dict)
    leaves: dict[CodeType, str] = field(default_factory=dict)
    calls: Mapping[str, ModuleCall] = field(default_factory=dict)
    guessed: Sequence[Any] = ()
    hooked: Mapping[str, str] = field(default_factory=dict)

    def stays_python(self, network: nn.Module, path: str) -> None:
        """Note that a module does, and so what its forward hooks into, maybe by its class."""
        for hooked in [hooked for hooked, by in self.hooked.items() if by == path]:
            kind = type(network.get_submodule(hooked)).__name__
            self.python.setdefault(hooked, f"{kind}: the network hooks into it as it runs")


@dataclass(frozen=True)
class Graph:
    """A graph, and what in it is no layer.

    Attributes:
        graph: The graph.
        opaque: Modules that are one node each, by their paths.
        python: Why some of them stay Python, by their paths.
        functions: Why functions are one node, by the names of the modules that call them.
    """

    graph: fx.Graph
    opaque: dict[str, nn.Module]
    python: dict[str, str]
    functions: dict[str, str]


def traced_graph(module: nn.Module, session: Session, path: str = "") -> Graph:
    """The graph of `module`, if need be with its optional arguments as they are by default.

    Args:
        module: A copy that nobody else uses.
        session: What is known of the network.
        path: Of the module in the network. Its Python parent may pass other arguments than the
            default.

    Raises:
        Exception: It cannot be traced. The user's forward is run, so this may be anything.
    """
    call = session.calls.get(path) if path else None
    if call is not None:
        found = _try(module, call.fixed, Probes(call.inputs, _mode(module)), session, path)
        if isinstance(found, Exception):
            raise found
        if isinstance(found, Graph):
            return found
    options = options_of(module, max(1, len((not path and session.inputs) or ())))
    absent = {name: default for name, default in options.items() if default in (None, {})}
    free = _attempt(module, {}, session, path)
    if isinstance(free, Exception) and (path or not options):
        raise free
    if not absent and not isinstance(free, Exception):
        return free
    fixed = _attempt(module, absent, session, path)
    if isinstance(fixed, Exception):
        fixed = _attempt(module, options, session, path)
    if isinstance(free, Exception):
        if isinstance(fixed, Exception):
            raise fixed
        return fixed
    # a proxy is never None: a forward that asks for None was not told the truth
    if isinstance(fixed, Exception) or _operations(fixed) == _operations(free):
        return free
    if path:
        raise ConversionError(f"it asks whether {sorted(absent)} are None")
    return fixed


def _operations(graph: Graph) -> int:
    return sum(node.target is not must_be_default for node in graph.graph.nodes)


def _attempt(
    module: nn.Module, defaults: Mapping[str, Any], session: Session, path: str
) -> Graph | Exception:
    """The graph with the first inputs that fit, or why there is none."""
    mode = _mode(module)
    for inputs in () if path else _inputs(module, session):
        for pair in probe_inputs(inputs):
            probes = Probes(pair, mode)
            found = _try(module, defaults, probes, session, path)
            if isinstance(found, SizeDecides):
                continue
            refused = isinstance(found, Exception) and not takes(module, probes.inputs[1], mode)
            if not (refused or isinstance(found, ProbeFailed)):
                return found
            if isinstance(found, ProbeFailed) and found.number == 0:
                break  # and not only the larger one
    found = _try(module, defaults, None, session, path)
    assert not isinstance(found, (ProbeFailed, SizeDecides))
    return found


def _try(
    module: nn.Module,
    defaults: Mapping[str, Any],
    probes: Probes | None,
    session: Session,
    path: str,
) -> Graph | Exception | ProbeFailed | SizeDecides:
    try:
        return _traced(module, defaults, probes, session, path)
    except (Exception, ProbeFailed, SizeDecides) as error:  # noqa: BLE001  # the user's own forward: anything can come
        return error


def _mode(module: nn.Module) -> FakeTensorMode:
    return fake_mode_of(module) or new_fake_mode(allow_non_fake_inputs=True)


def note_calls_(network: nn.Module, session: Session) -> None:
    """See how the modules of a network are called, if its inputs are known or can be guessed.

    Args:
        network: A copy that nobody else uses, before anything in it is converted.
        session: What is found out is noted in it.
    """
    for inputs in _inputs(network, session):
        for pair in probe_inputs(inputs):
            session.calls, hooked = calls_of(network, Probes(pair, _mode(network)))
            if session.calls:
                session.guessed, session.hooked = inputs, hooked
                return


def _inputs(module: nn.Module, session: Session) -> Iterator[Sequence[Any]]:
    if session.inputs is not None:
        yield session.inputs
        return
    if takes_one(module):
        yield from first_guesses(module)


def _traced(
    module: nn.Module,
    defaults: Mapping[str, Any],
    probes: Probes | None,
    session: Session,
    path: str,
) -> Graph:
    prefix = f"{path}." if path else ""

    def tracer(python: Mapping[str, str], **how: Any) -> Tracer:
        fresh = probes and probes.afresh()
        return Tracer(defaults, fresh, session.leaves, {**known, **python}, whole=not path, **how)

    while True:
        known = {p[len(prefix) :]: why for p, why in session.python.items() if p.startswith(prefix)}
        try:
            return _settled(module, tracer)
        except NewLeaf as leaf:
            if len(session.leaves) >= _MOST_LEAVES:
                raise ConversionError(leaf.reason) from leaf
            session.leaves[leaf.code] = leaf.reason


def _settled(module: nn.Module, tracer: Callable[..., Tracer]) -> Graph:
    """The graph of every call, the first one included.

    Args:
        module: What is traced.
        tracer: Makes one; takes why modules stay Python, by their paths.
    """
    python: dict[str, str] = {}
    while True:
        first = tracer(python, may_set_up=True)
        graph = _run(first, module)
        if not first.left:
            return _graph(first, graph)
        later = tracer(python, after=first)
        first.functions.forget()
        with suppress(Exception):  # the user's own forward: anything can come
            again = _run(later, module)
            if alike(graph, again, module):
                return _graph(later, again)
            later.functions.forget()
            if later.python.keys() > first.python.keys():
                python = later.python
                continue
        strict = tracer({})
        return _graph(strict, _run(strict, module))


def _run(tracer: Tracer, module: nn.Module) -> fx.Graph:
    try:
        return tracer.trace(module)
    except BaseException:
        tracer.functions.forget()
        raise


def _graph(tracer: Tracer, graph: fx.Graph) -> Graph:
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    opaque = {p: m for p, m in tracer.opaque.items() if p in called}
    return Graph(
        graph,
        opaque,
        {p: why for p, why in tracer.python.items() if p in opaque},
        {n: why for n, why in tracer.functions.reasons_by_name().items() if n in called},
    )
