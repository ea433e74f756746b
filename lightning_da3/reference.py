"""The converted network in plain autograd, to compare with.

The network runs as it was traced: every operation has PyTorch's own backward, and adapters and
gates are written out in PyTorch's functions. Slow, and keeps everything: for tests and benchmarks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from lightning_da3.errors import ConfigError
from lightning_da3.memory.names import mutable
from lightning_da3.model.model import DA3Model
from lightning_da3.nn.call import Executed
from lightning_da3.nn.gate import budget_loss
from lightning_da3.ops.adapter_cells import VALUE_SCALE
from lightning_da3.ops.host import coarse_grid, pool, upsample
from lightning_da3.ops.tokens import TokenGrid
from lightning_da3.planning.plan import HostPlan, PartPlan
from lightning_da3.schedule import annealed_target
from lightning_da3.tracing.graphs import Part
from lightning_da3.tracing.islands import trace

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class _Views(TorchFunctionMode):
    """Folded weights make maps channels_last, and not every view of such a map exists."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        reshapes = func is Tensor.view and not isinstance(args[1], torch.dtype)
        return (Tensor.reshape if reshapes else func)(*args, **(kwargs or {}))


class PlainPyTorch:
    """A backbone with the active domain of its converted model, in plain autograd.

    The model estimates a gate's gradient from cell means. Here a term of value zero has the same
    gradient.

    Args:
        backbone: The network that `model` was converted from.
        model: A converted network with an active domain.
        folded: Fold batch norms into the convolutions before them, with the weights of `model`,
            and give every convolution the value that it has in `model`. Rounding then decides no
            ReLU, gate or matched box differently.
        example_inputs: The arguments that `model` was converted with, if any.

    Raises:
        ConfigError: The domain skips branches.
    """

    def __init__(
        self,
        backbone: nn.Module,
        model: DA3Model,
        *,
        folded: bool = False,
        example_inputs: Sequence[Any] | None = None,
    ) -> None:
        self.model, self.domain = model, model.domain(str(model.active_domain))
        if self.domain.skipped:
            raise ConfigError(
                f"{model.active_domain!r} skips {list(self.domain.skipped)}, which a comparison "
                "does not know. Compare a domain that skips nothing."
            )
        self.executed: list[Executed] = []
        traced, python = trace(backbone, example_inputs), dict(model.plan.python)
        if dict(traced.python) != python:  # the comparison of a conversion left more in Python
            traced = trace(backbone, example_inputs, python)
        self.root = traced.root
        if model.plan.head is not None and self.domain.head is not None:
            self.root.set_submodule(model.plan.head, self.domain.head)
        for path in traced.python:  # follows the mode, layers do not
            self.root.get_submodule(path).training = model.training
        for part, planned in zip(traced.parts, model.plan.parts, strict=True):
            if folded:
                _fold_(part, planned, model.backbone)
            # a graph may be called more than once: every call is a run of its own
            part.gm.forward = functools.partial(_run, part.gm, planned, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network.

        Returns:
            What the model returns.
        """
        self.executed.clear()
        with _Views():
            return self.root(*args, **kwargs)

    def loss(self) -> Tensor | float:
        """The budget loss of the gates in the last call, 0 without gates.

        Added to a loss, it has the gradients of a model whose `gate_loss_scale` is 1.
        """
        gate = self.model.config.cell_gates
        if gate is None or not self.executed:
            return 0.0
        target = annealed_target(gate.target, self.model.progress)
        return budget_loss(self.executed, target) * gate.weight

    def _place(self, host: HostPlan, x: Tensor) -> TokenGrid | None:
        if host.stride is not None:
            return None
        return TokenGrid.of(x.shape[1:-1], host.prefix_tokens, self.model.config.adapter.max_cells)

    def _adapt(self, host: HostPlan, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.transpose(0, host.samples) if host.samples else x
        x = x.unsqueeze(1) if host.stride is None and x.dim() == 2 else x  # one token a sample
        adapter: Any = self.domain.adapters[host.name.replace(".", "__").replace(":", "__call")]
        place = self._place(host, x)
        if place is None:
            size = [-(-n // s) for n, s in zip(x.shape[2:], host.stride or (), strict=True)]
            grid = coarse_grid(size, self.model.config.adapter.max_cells)
            pooled = pool(x, grid)
        else:
            pooled = place.in_row(x, pool(place.maps(x), place.grid))
        norm, weight = adapter.norm, adapter.squeeze.weight
        hidden = _CONV[host.axes](pooled, weight, padding=weight.shape[-1] // 2)
        hidden = F.group_norm(hidden, 1, norm.weight, norm.bias, norm.eps)
        cells = hidden.flatten(2).transpose(1, 2).contiguous().relu()
        logits = F.linear(cells, adapter.attend.weight, adapter.attend.bias)
        soft = torch.sigmoid(logits)
        addend = VALUE_SCALE * F.linear(soft * cells, adapter.value.weight, adapter.value.bias)
        gate = (logits > 0).to(soft) + soft - soft.detach()
        grid = hidden.shape[2:]
        maps = (addend.transpose(1, 2), gate.transpose(1, 2))
        return tuple(m.reshape(*m.shape[:2], *grid) for m in maps)  # type: ignore[return-value]

    def _write(self, host: HostPlan, f: Tensor, adapted: tuple[Tensor, Tensor]) -> Tensor:
        addend, gate = adapted
        if host.samples:
            first = dataclasses.replace(host, samples=0)
            return self._write(first, f.transpose(0, 1), adapted).transpose(0, 1)
        if host.stride is None and f.dim() == 2:
            return self._write(host, f.unsqueeze(1), adapted).squeeze(1)
        place = self._place(host, f)
        size = f.shape[2:] if place is None else f.shape[1:-1]
        if self.model.config.cell_gates is None:
            return f + _spread(addend, f, place)
        self.executed.append(Executed(gate, host.macs_per_output * size.numel()))
        if place is None:
            means = pool(f, gate.shape[2:])
        else:
            means = place.in_row(f, pool(place.maps(f), place.grid))
        estimate = _spread((gate - gate.detach()) * means.detach(), f, place)
        return _spread(gate.detach(), f, place) * f + _spread(addend, f, place) + estimate


def _run(
    gm: fx.GraphModule, planned: PartPlan, plain: PlainPyTorch, *args: Any, **kwargs: Any
) -> Any:
    return _Interpreter(gm, planned, plain).with_arguments(args, kwargs)


class _Interpreter(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, planned: PartPlan, plain: PlainPyTorch) -> None:
        super().__init__(gm)
        self.plain = plain
        self.first = {host.readers[0]: host for host in planned.hosts}
        self.last = {host.last: host for host in planned.hosts}
        self.adapted: dict[str, tuple[Tensor, Tensor]] = {}

    def with_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        graph = cast("fx.Graph", self.module.graph)
        names = [n for n in graph.nodes if n.op == "placeholder"]
        values = dict(zip([n.target for n in names], args, strict=False)) | kwargs
        defaults = {n.target: n.args[0] for n in names if n.args}
        return self.run(*[values.get(n.target, defaults.get(n.target)) for n in names])

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return mutable(args), mutable(kwargs)

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self.first:
            host = self.first[n.name]
            x = next(self.env[i] for i in n.all_input_nodes if i.name == host.source)
            self.adapted[host.name] = self.plain._adapt(host, x)
        result = super().run_node(n)
        if n.name not in self.last:
            return result
        host = self.last[n.name]
        return self.plain._write(host, result, self.adapted[host.name])


def _spread(cells: Tensor, f: Tensor, place: TokenGrid | None) -> Tensor:
    """Every position's value of its cell."""
    if place is None:
        return upsample(cells, f.shape[2:])
    maps = upsample(place.on_grid(cells), place.size)
    if f.dim() != 3:
        return maps.movedim(1, -1)
    rows = torch.cat([cells[:, :, : place.own], maps.flatten(2)], dim=2)
    return rows.transpose(1, 2)


class _SameValue(nn.Module):
    """A layer with PyTorch's gradient, and the value of its twin to the last bit."""

    def __init__(self, layer: nn.Module, twin: nn.Module) -> None:
        super().__init__()
        self.layer, self.twin = layer, twin

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        with torch.no_grad():
            difference = self.twin(x) - y  # exact, as both are close; so is the sum
        return y + difference


class _Affine(nn.Module):
    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.scale, self.shift = scale, shift

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.dim() - 2))
        return torch.addcmul(self.shift.view(shape), x, self.scale.view(shape))


def _fold_(part: Part, planned: PartPlan, backbone: nn.Module) -> None:
    """Give a traced network the folded weights of its converted twin."""
    frozen: Any = backbone.get_submodule(part.path)
    nodes = {node.name: node for node in part.gm.graph.nodes}
    for step in planned.nodes:
        target = str(nodes[step.name].target)
        if step.action == "freeze":
            conv, twin = part.gm.get_submodule(target), frozen.get_submodule(target)
            if not isinstance(conv, _SameValue):  # else an earlier call did it
                conv.weight, conv.bias = twin.weight, twin.bias
                part.gm.set_submodule(target, _SameValue(conv, twin))
        elif step.action == "fold":
            part.gm.set_submodule(target, nn.Identity())
        elif step.action == "affine":
            twin = frozen.get_submodule(step.place)
            place = f"affine_{step.name}"
            part.gm.add_submodule(place, _Affine(twin.scale, twin.shift))
            nodes[step.name].target = place
