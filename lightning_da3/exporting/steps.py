"""What is exported of a model: the inference of a domain, or its training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lightning_da3.exporting.program import Port
from lightning_da3.nn.call import Executed, Noise
from lightning_da3.nn.gate import budget_loss, executed_fraction
from lightning_da3.planning.plan import Plan
from lightning_da3.torch_private.fake import new_fake_mode
from lightning_da3.torch_private.trees import tree_leaves

Loss = Callable[[Any, Tensor], Tensor]
Named = Mapping[str, Tensor]
Run = Callable[..., tuple[Any, list[tuple[str, Executed]]]]


class Model(Protocol):
    """What is used here of a DA3Model."""

    plan: Plan

    def run_domain(self, name: str | None, noise: Noise | None, *args: Any) -> tuple[Any, Any]:
        """One pass for a domain, and how much of every host was executed."""


class _Pass(nn.Module):
    """One pass through a model, for whichever tensors it has while it runs."""

    def __init__(self, model: nn.Module, domain: str | None) -> None:
        super().__init__()
        self.model, self.domain = model, domain

    def forward(self, noise: Noise | None, *args: Tensor) -> tuple[Any, list[Executed]]:
        output, ledger = self.model.run_domain(self.domain, noise, *args)
        return output, [executed for _, executed in ledger]


class GivenNoise(Noise):
    """Noise that is given: a column for every cell of every host, in the order of the hosts.

    Args:
        values: (N, cells), or None to find out how many there are.
    """

    def __init__(self, values: Tensor | None = None) -> None:
        super().__init__(0)
        self.values, self.cells = values, 0
        self.places: dict[str, tuple[int, int]] = {}

    def draw(self, host: str, p: Tensor) -> Tensor:
        """The noise of one host: (N, G, 1) for p (N, C, *grid) of G cells."""
        count = p.shape[2:].numel()
        if host not in self.places:
            self.places[host] = (self.cells, count)
            self.cells += count
        if self.values is None:
            return p.new_zeros((p.shape[0], count, 1))
        return self.values.narrow(1, *self.places[host]).to(p.dtype).unsqueeze(2)


class Step:
    """A domain's computation as functions of named tensors.

    Args:
        model: A `DA3Model`.
        domain: The domain's name; None: the backbone alone.
        trained: The domain's tensors that are inputs, by their names in its file.
        inputs: Examples of what the network takes.
        dynamic_batch: Their first axis may be of any size.
    """

    def __init__(
        self,
        model: Any,
        domain: str | None,
        trained: Named,
        inputs: Sequence[Tensor],
        dynamic_batch: bool = True,
    ) -> None:
        self.run = _Pass(model, domain)
        self.domain, self.trained, self.inputs = domain, trained, list(inputs)
        own = f"bank.{domain}."
        given = {f"{own}{name}" for name in trained}
        everything = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.frozen = {
            name: tensor.detach().cpu()
            for name, tensor in everything.items()
            if name.startswith(("backbone.", own)) and name not in given
        }
        names = ["input"] if len(inputs) == 1 else [f"input_{i}" for i in range(len(inputs))]
        self.ports = [
            Port(n, x.cpu(), dynamic_batch) for n, x in zip(names, self.inputs, strict=True)
        ]

    @property
    def domain_ports(self) -> list[Port]:
        """The domain's tensors."""
        return [Port(name, tensor.detach().cpu()) for name, tensor in self.trained.items()]

    def forward(self, frozen: Named, trained: Named, given: Named, noise: Noise | None) -> Any:
        """The output, and how much of every host was executed."""
        tensors = {f"model.{name}": tensor for name, tensor in frozen.items()}
        tensors |= {f"model.bank.{self.domain}.{n}": t for n, t in trained.items()}
        args = [given[port.name] for port in self.ports]
        return functional_call(self.run, tensors, (noise, *args))

    @torch.no_grad()
    def shapes(self) -> tuple[list[Tensor], int]:
        """The outputs, without values, and the number of cells with gates."""
        noise, mode = GivenNoise(), new_fake_mode(allow_non_fake_inputs=True)
        with mode:
            inputs = [mode.from_tensor(x) for x in self.inputs]
            output, _ = self.run(noise, *inputs)
        return tensors_in(output), noise.cells


def inference(step: Step) -> Callable[[Named, Named], dict[str, Tensor]]:
    """The function of an inference program."""

    def infer(frozen: Named, given: Named) -> dict[str, Tensor]:
        trained = {name: given[name] for name in step.trained}
        with torch.no_grad():
            output, _ = step.forward(frozen, trained, given, None)
        found = tensors_in(output)
        names = ["output"] if len(found) == 1 else [f"output_{i}" for i in range(len(found))]
        return dict(zip(names, found, strict=True))

    return infer


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors of an output, in order."""
    return [y for y in tree_leaves(output) if isinstance(y, Tensor)]


def training(
    step: Step, loss: Loss, gate_weight: float | None, update: Callable[..., dict[str, Tensor]]
) -> Callable[[Named, Named], dict[str, Tensor]]:
    """The function of a program that does one training step.

    Args:
        step: The domain's computation.
        loss: Of the output and the targets.
        gate_weight: Of the gates' loss; None: there are no gates.
        update: Takes parameters, gradients and inputs by name; gives outputs by name.
    """

    def train(frozen: Named, given: Named) -> dict[str, Tensor]:
        trained = {n: given[n].detach().requires_grad_() for n in step.trained}
        noise = None if gate_weight is None else GivenNoise(given["noise"])
        output, executed = step.forward(frozen, trained, given, noise)
        value = whole = loss(output, given["targets"])
        found = {"loss": value.detach()}
        if executed and gate_weight is not None:
            whole = value + gate_weight * budget_loss(executed, given["gate_target"])
            found["executed"] = executed_fraction(executed).detach()
        grads = torch.autograd.grad(whole, list(trained.values()), allow_unused=True)
        named = {
            n: torch.zeros_like(p) if g is None else g
            for (n, p), g in zip(trained.items(), grads, strict=True)
        }
        with torch.no_grad():
            return found | update({n: p.detach() for n, p in trained.items()}, named, given)

    return train


def cross_entropy(output: Any, targets: Tensor) -> Tensor:
    """`torch.nn.functional.cross_entropy` of the first tensor of the output."""
    return F.cross_entropy(tensors_in(output)[0], targets)


# --- optimizers

_BETA_1, _BETA_2, _EPS = 0.9, 0.999, 1e-8


def sgd(trained: Named, grads: Named, given: Named) -> dict[str, Tensor]:
    """``p - lr g``."""
    rate = given["learning_rate"]
    return {f"new.{n}": p - rate * grads[n] for n, p in trained.items()}


def adam(trained: Named, grads: Named, given: Named) -> dict[str, Tensor]:
    """`torch.optim.Adam` with its default betas and epsilon."""
    rate, step = given["learning_rate"], given["step"]
    first_share = 1.0 - torch.pow(torch.full_like(step, _BETA_1), step)
    second_share = 1.0 - torch.pow(torch.full_like(step, _BETA_2), step)
    found = {}
    for n, p in trained.items():
        first = _BETA_1 * given[f"moment1.{n}"] + (1.0 - _BETA_1) * grads[n]
        second = _BETA_2 * given[f"moment2.{n}"] + (1.0 - _BETA_2) * grads[n].square()
        spread = (second / second_share).sqrt() + _EPS
        found[f"new.{n}"] = p - rate * (first / first_share) / spread
        found[f"new.moment1.{n}"], found[f"new.moment2.{n}"] = first, second
    return found


def summed(trained: Named, grads: Named, given: Named) -> dict[str, Tensor]:
    """Gradients added to those that come in."""
    del trained
    return {f"new.gradient.{n}": given[f"gradient.{n}"] + g for n, g in grads.items()}
