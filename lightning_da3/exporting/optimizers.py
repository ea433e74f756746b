"""Optimizers as functions of named tensors, for programs of one training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_da3.exporting.manifest import NEW
from lightning_da3.exporting.program import Port

Named = Mapping[str, Tensor]

BETA_1, BETA_2, EPS = 0.9, 0.999, 1e-8
MOMENTS = ("moment1", "moment2")


class Optimizer(NamedTuple):
    """One kind of optimizer.

    Attributes:
        kept: What it keeps of every parameter, zeros before the first step.
        said: Numbers that it is told beside the learning rate, with examples.
        settings: Its numbers, for the manifest.
        update: Takes parameters, gradients and inputs by name; gives outputs by name.
    """

    kept: tuple[str, ...]
    said: dict[str, float]
    settings: dict[str, Any]
    update: Callable[[Named, Named, Named], dict[str, Tensor]]

    def ports(self, trained: Named) -> list[Port]:
        """What goes in beside the parameters."""
        numbers = {"learning_rate": 0.1, **self.said}
        return [
            *(Port(name, torch.tensor(number)) for name, number in numbers.items()),
            *(Port(f"{k}.{n}", torch.zeros_like(p)) for k in self.kept for n, p in trained.items()),
        ]


def _sgd(trained: Named, grads: Named, given: Named) -> dict[str, Tensor]:
    """``p - lr g``."""
    rate = given["learning_rate"]
    return {f"{NEW}{n}": p - rate.to(p.dtype) * grads[n] for n, p in trained.items()}


def _adam(trained: Named, grads: Named, given: Named) -> dict[str, Tensor]:
    """`torch.optim.Adam`; what it divides by is close to 0 at first, so it is in float64."""
    rate, step = given["learning_rate"], given["step"].double()
    first_share = (1.0 - torch.pow(torch.full_like(step, BETA_1), step)).float()
    second_share = (1.0 - torch.pow(torch.full_like(step, BETA_2), step)).sqrt().float()
    found, moments = {}, {}
    for n, p in trained.items():
        first = BETA_1 * given[f"moment1.{n}"] + (1.0 - BETA_1) * grads[n]
        second = BETA_2 * given[f"moment2.{n}"] + (1.0 - BETA_2) * grads[n].square()
        spread = second.sqrt() / second_share.to(p.dtype) + EPS
        found[f"{NEW}{n}"] = p - (rate / first_share).to(p.dtype) * first / spread
        moments[f"{NEW}moment1.{n}"], moments[f"{NEW}moment2.{n}"] = first, second
    return found | moments


def accumulating(optimizer: Optimizer) -> Optimizer:
    """The same optimizer, for gradients that add up over several calls.

    Every call adds `weight` times its gradients to those of before, and the one that is told to
    `apply` them makes the step and begins anew.
    """

    def update(trained: Named, grads: Named, given: Named) -> dict[str, Tensor]:
        weight, applies = given["weight"], given["apply"] > 0
        sums = {n: given[f"gradient.{n}"] + weight.to(g.dtype) * g for n, g in grads.items()}
        found = {
            name: torch.where(applies, tensor, given[name.removeprefix(NEW)])
            for name, tensor in optimizer.update(trained, sums, given).items()
        }
        rest = {n: torch.where(applies, torch.zeros_like(g), g) for n, g in sums.items()}
        return found | {f"{NEW}gradient.{n}": g for n, g in rest.items()}

    return optimizer._replace(
        kept=(*optimizer.kept, "gradient"),
        said={**optimizer.said, "weight": 1.0, "apply": 1.0},
        update=update,
    )


OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": Optimizer((), {}, {}, _sgd),
    "adam": Optimizer(MOMENTS, {"step": 1.0}, {"betas": [BETA_1, BETA_2], "eps": EPS}, _adam),
}
"""By the names that `export_training` takes."""
