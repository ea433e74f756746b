"""What a training step, and every node in it, costs."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class NodeCost:
    """What one node of a graph, or one module of a network that is no graph, costs.

    Attributes:
        name: The name of the node, behind the path of its graph if that is not the whole network;
            or the path of the module. Empty for what belongs to none, such as the loss.
        saved_bytes: The bytes kept for the backward pass.
        flops_forward: FLOPs of matrix products and convolutions, two a multiply-accumulate.
        flops_backward: These FLOPs in the backward pass, with what is recomputed there.
    """

    name: str
    saved_bytes: int = 0
    flops_forward: int = 0
    flops_backward: int = 0


@dataclasses.dataclass(frozen=True)
class StepPrediction:
    """What one training step will cost.

    Attributes:
        saved_activation_bytes: The bytes kept for the backward pass, right after the forward pass.
        peak_bytes: The largest total alive at one time, above the resting model.
        peak_node: The `NodeCost.name` of what runs at the peak.
        peak_phase: ``"forward"``, ``"backward"`` or ``"optimizer"``.
        flops_forward: FLOPs of matrix products and convolutions, two a multiply-accumulate.
        flops_backward: These FLOPs in the backward pass, with what is recomputed there.
        nodes: What every node costs, in the order in which they first ran.
        timeline: Bytes alive above the resting model after every operation.
        forward_end: The index in `timeline` of the first operation after the forward pass.
        backward_end: The index in `timeline` of the first operation after the backward pass.
        names: The `NodeCost.name` of every operation in `timeline`.
    """

    saved_activation_bytes: int
    peak_bytes: int
    peak_node: str
    peak_phase: str
    flops_forward: int
    flops_backward: int
    nodes: tuple[NodeCost, ...]
    timeline: tuple[int, ...] = dataclasses.field(repr=False)
    forward_end: int
    backward_end: int
    names: tuple[str, ...] = dataclasses.field(repr=False, compare=False)

    def phase_at(self, index: int) -> str:
        """The phase of an index in `timeline`."""
        if index < self.forward_end:
            return "forward"
        return "backward" if index < self.backward_end else "optimizer"
