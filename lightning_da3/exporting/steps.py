"""The training step of a domain as a function of named tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_da3.errors import ConversionError
from lightning_da3.exporting.optimizers import Optimizer
from lightning_da3.exporting.program import Held, tensors_in
from lightning_da3.nn.call import Executed, Noise
from lightning_da3.nn.gate import executed_fraction

Loss = Callable[[Any, Tensor], Tensor]
Named = Mapping[str, Tensor]
Places = dict[str, tuple[int, int, int]]
Run = Callable[..., tuple[Any, list[tuple[str, Executed]]]]


class GivenNoise(Noise):
    """Noise that is given: columns for the cells of every host, in the order of the hosts.

    Args:
        places: First column, columns and cells of every host, by its name; hosts that are not
            there get zeros, and a place behind the others.
        values: (N, columns), or None: all zeros.
        samples: N, where values are None.
    """

    def __init__(self, places: Places, values: Tensor | None, samples: int = 0) -> None:
        super().__init__(samples)
        self.places, self.values = places, values

    @property
    def columns(self) -> int:
        """How many columns there are."""
        return sum(columns for _, columns, _ in self.places.values())

    def draw(self, host: str, p: Tensor) -> Tensor:
        """The noise of one host: (N, G, 1) for p (N, C, *grid) of G cells."""
        rows, cells = p.shape[0], p.shape[2:].numel()
        if host not in self.places:
            if rows % self.total:
                raise ConversionError(
                    f"{host!r} works on {rows} at once for {self.total} samples, so that its gates "
                    "have no noise for every sample. Say GateConfig(by='cell', noise=False)."
                )
            self.places[host] = (self.columns, rows // self.total * cells, cells)
        first, columns, cells = self.places[host]
        if self.values is None:
            return p.new_zeros((rows, cells, 1))
        return self.values.narrow(1, first, columns).to(p.dtype).reshape(-1, cells, 1)


class Step(NamedTuple):
    """One training step of a domain.

    Attributes:
        parts: The backbone and the domain, by these names.
        run: Takes noise and the network's inputs, and gives the output and how much of every host
            was executed, with its name.
        trained: Names of the domain's tensors that learn.
        inputs: Names of what the network takes.
        loss: Of the output and the targets, a scalar.
        gate_weight: Of the gates' loss; None: there are no gates.
        noise: Places of the hosts' noise; None: the gates have none.
        optimizer: What updates the tensors.
    """

    parts: Mapping[str, nn.Module]
    run: Run
    trained: Sequence[str]
    inputs: Sequence[str]
    loss: Loss
    gate_weight: float | None
    noise: Places | None
    optimizer: Optimizer

    @property
    def frozen(self) -> dict[str, Tensor]:
        """All tensors of backbone and domain but those that learn."""
        held, learned = Held(self.parts, self.run), {f"domain.{name}" for name in self.trained}
        everything = {**dict(held.named_parameters()), **dict(held.named_buffers())}
        return {n: t.detach() for n, t in everything.items() if n not in learned}

    def outputs(self, frozen: Named, given: Named) -> dict[str, Tensor]:
        """Outputs by name.

        Args:
            frozen: `frozen`.
            given: What the program takes.
        """
        trained = {n: given[n].detach().requires_grad_() for n in self.trained}
        tensors = {**frozen, **{f"domain.{name}": tensor for name, tensor in trained.items()}}
        # the backward, too: regions are computed again with what the modules hold
        held = Held(self.parts, self._differentiated)
        value, grads = functional_call(held, tensors, (trained, given))
        with torch.no_grad():
            own = {n: p.detach() for n, p in trained.items()}
            return {"loss": value, **self.optimizer.update(own, grads, given)}

    @torch.enable_grad()
    def _differentiated(self, trained: Named, given: Named) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and the gradients of the loss and that of the gates."""
        noise = None if self.noise is None else GivenNoise(self.noise, given["noise"])
        output, ledger = self.run(noise, *[given[name] for name in self.inputs])
        value = whole = self._loss_of(output, given["targets"])
        if self.gate_weight is not None:
            executed = [entry for _, entry in ledger]
            whole = (
                value
                + self.gate_weight * (executed_fraction(executed) - given["gate_target"]).square()
            )
        leaves = list(trained.values())
        found = torch.autograd.grad(whole, leaves, allow_unused=True)
        grads = [
            torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True)
        ]
        return value.detach(), dict(zip(trained, grads, strict=True))

    def _loss_of(self, output: Any, targets: Tensor) -> Tensor:
        value: Any = self.loss(the_tensor_of(output), targets)
        if not (isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad):
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value)
            raise ConversionError(
                "`loss` must give a tensor of one number that depends on the output, with a "
                f"gradient, got {got}. Average over the samples, with operations of torch."
            )
        return value.reshape(())


def the_tensor_of(output: Any) -> Tensor:
    """The only tensor of an output.

    Raises:
        ConversionError: There are others.
    """
    tensors = tensors_in(output)
    if len(tensors) != 1:
        raise ConversionError(
            f"The network gives {len(tensors)} tensors, and a training step needs one to compute "
            "its loss from. Export a network that gives one."
        )
    return tensors[0]
