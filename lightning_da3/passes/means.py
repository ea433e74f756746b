"""``y, e = host_output(conv(x), a)``: the output learns of ``conv``, where that is all of the host.

The gradient of a gate needs the host's output in every cell. Where cells are single pixels it
follows from the input that the adapter keeps, by the convolution, so that it need not be kept.
"""

from __future__ import annotations

from torch import fx

from lightning_da3.config import DA3Config
from lightning_da3.nn.adapter import HostOutput
from lightning_da3.nn.frozen import FrozenConv
from lightning_da3.passes.hosts import INPUTS, OUTPUTS, host_key
from lightning_da3.planning.plan import PartPlan
from lightning_da3.tracing.graphs import Part, module_of

# Multiply-accumulates for one byte that is not kept. Pointwise and grouped convolutions stay below,
# a dense 3x3 of 128 channels and more does not: the backward would take half as long again.
MOST_MACS = 1024


def compute_means_again_(part: Part, plan: PartPlan, config: DA3Config) -> None:
    """Let the outputs of hosts that are one cheap convolution compute it again."""
    del config
    gm = part.gm
    calls = {str(node.target): node for node in gm.graph.nodes if node.op == "call_module"}
    for host in plan.hosts:
        key = host_key(host.name)
        exit_, door = calls[f"{OUTPUTS}.{key}"], calls[f"{INPUTS}.{key}"]
        output, conv = module_of(gm, exit_), _alone(gm, exit_.args[0], door)
        if isinstance(output, HostOutput) and conv is not None and _macs(conv) <= MOST_MACS:
            output.set_conv(conv)


def _alone(gm: fx.GraphModule, last: object, door: fx.Node) -> FrozenConv | None:
    """The convolution that `last` calls, if nothing lies between it and the host's input."""
    conv = module_of(gm, last) if isinstance(last, fx.Node) else None
    if not (isinstance(last, fx.Node) and isinstance(conv, FrozenConv) and conv.slopes is None):
        return None
    through = last.args[0]
    return conv if isinstance(through, fx.Node) and through.args == (door, 0) else None


def _macs(conv: FrozenConv) -> int:
    """Multiply-accumulates for one element of the output."""
    return conv.weight[0].numel()
