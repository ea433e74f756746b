"""``y, e = host_output(conv(x), a)``: the output learns of ``conv``, where the plan says so.

The gradient of a gate needs the host's output in every cell. Where cells are single pixels it
follows from the input that the adapter keeps, by the convolution, so that it need not be kept.
"""

from __future__ import annotations

from typing import cast

from lightning_da3.config import DA3Config
from lightning_da3.nn.adapter import HostOutput
from lightning_da3.nn.convolution import FrozenConv
from lightning_da3.passes.hosts import OUTPUTS, host_key
from lightning_da3.planning.plan import PartPlan
from lightning_da3.tracing.graphs import Part, module_of


def compute_means_again_(part: Part, plan: PartPlan, config: DA3Config) -> None:
    """Let the outputs of the planned hosts compute their convolution again."""
    del config
    nodes = {node.name: node for node in part.gm.graph.nodes}
    for host in plan.hosts:
        if host.means_from is not None:
            output = part.gm.get_submodule(f"{OUTPUTS}.{host_key(host.name)}")
            conv = module_of(part.gm, nodes[host.means_from])
            cast(HostOutput, output).set_conv(cast(FrozenConv, conv))
