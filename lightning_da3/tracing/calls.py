"""How the modules of a network are called, seen while it runs on two inputs without values.

So a module inside of one that stays Python is traced as well as a whole network is.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_da3.memory.fake import left_by_forward, quiet, tensors_of
from lightning_da3.memory.names import mutable
from lightning_da3.torch_private.trees import tree_leaves
from lightning_da3.tracing.hooks import Hooks, next_number
from lightning_da3.tracing.probes import UNKNOWN, Probes
from lightning_da3.tracing.watching import unchanged

_PLAIN = (type(None), bool, str, float)


@dataclass(frozen=True)
class ModuleCall:
    """How a module is called, by probe.

    Attributes:
        inputs: By probe, the values of all parameters of its forward that have a name.
        fixed: Those that are the same in every call and no tensors; ``"**kwargs"`` are the rest.
    """

    inputs: tuple[list[Any], ...]
    fixed: Mapping[str, Any]


def calls_of(network: nn.Module, probes: Probes) -> tuple[dict[str, ModuleCall], dict[str, str]]:
    """The calls of the modules in a network, by their paths, and which of them hooks into which.

    One that is called in several ways, or with more than tensors and plain values, is left out.

    Args:
        network: Left unchanged: copies run, as a forward may change what nobody sees.
        probes: Its inputs.
    """
    hooked: dict[str, str] = {}
    seen = [_run(_twin(network), inputs, probes.mode, hooked) for inputs in probes.inputs]
    found = {}
    for path, module in network.named_modules():
        each = [calls.get(path, []) for calls in seen]
        if path and all(each):
            call = _call(module, each)
            if call is not None:
                found[path] = call
    return found, hooked


_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _twin(network: nn.Module) -> nn.Module:
    """A copy that shares the tensors, with or without values."""
    own = {id(t): t for t in tensors_of(network)}
    return copy.deepcopy(network, left_by_forward(network) | own)


def takes(network: nn.Module, inputs: Sequence[Any], mode: AbstractContextManager[Any]) -> bool:
    """Whether a network takes inputs, as far as that can be told without values.

    Args:
        network: Left unchanged: a copy runs.
        inputs: Without values.
        mode: Of fake tensors.
    """
    twin = _twin(network)
    try:
        with quiet(), torch.no_grad(), mode:
            twin(*mutable(inputs))  # some write into lists that they get
    except UNKNOWN:
        return True
    except Exception:  # noqa: BLE001  # the user's own forward: anything can come
        return False
    return True


def _run(
    network: nn.Module,
    inputs: Sequence[Any],
    mode: AbstractContextManager[Any],
    hooked: dict[str, str],
) -> dict[str, list[_Arguments]]:
    calls: dict[str, list[_Arguments]] = {}
    running: list[tuple[str, int]] = []
    spans: list[tuple[str, int, int]] = []  # inner ones first
    with contextlib.ExitStack() as stack:
        stack.enter_context(unchanged(network))
        for path, module in network.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            note = calls.setdefault(path, [])

            def noted(_: Any, args: Any, kwargs: Any, note: Any = note, path: str = path) -> None:
                note.append((args, kwargs))
                running.append((path, next_number()))

            def ended(*_: Any, path: str = path) -> None:
                if running and running[-1][0] == path:  # no hook before raised an error
                    spans.append((*running.pop(), next_number()))

            module.register_forward_pre_hook(noted, with_kwargs=True)
            module.register_forward_hook(ended, always_call=True)
        before = Hooks(network.modules())
        # what ran before an error is known, and the error comes again where it matters
        with contextlib.suppress(Exception), quiet(), torch.no_grad(), mode:
            network(*mutable(inputs))
        for path, module in network.named_modules():
            for number in (n for hooks in before.hung(module).values() for n in hooks):
                by = (p for p, start, end in spans if start <= number < end)
                hooked.setdefault(path, next(by, ""))
    return calls


def _call(module: nn.Module, each: Sequence[Sequence[_Arguments]]) -> ModuleCall | None:
    signature = inspect.signature(module.forward)
    parameters = signature.parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY) for p in parameters):
        return None
    bound = []
    for calls in each:
        for args, kwargs in calls:
            found = signature.bind(*args, **kwargs)
            found.apply_defaults()
            bound.append(found.arguments)
    fixed: dict[str, Any] = {}
    for parameter in parameters:
        values = [arguments[parameter.name] for arguments in bound]
        star = parameter.kind is parameter.VAR_KEYWORD
        if star or isinstance(values[0], _PLAIN):
            if any(isinstance(leaf, Tensor) for leaf in tree_leaves(values)):
                return None
            if any(type(v) is not type(values[0]) or v != values[0] for v in values):
                return None
            fixed[("**" if star else "") + parameter.name] = values[0]
        elif not all(type(v) is type(values[0]) for v in values):
            return None
    names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    starts = (0, len(each[0]))
    inputs = tuple([bound[start][name] for name in names] for start in starts)
    return ModuleCall(inputs, fixed)
