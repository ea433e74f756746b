"""The methods that are compared, by name. One is added by one more entry in `METHODS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import lightning as L
import torch
from torch import nn

from comparison.methods import da3, piggyback
from comparison.methods.checkpointing import checkpointing
from comparison.methods.lora import lora, merged
from comparison.methods.plain import biases_only, fine_tuning, linear_probe
from comparison.methods.residual_adapters import parallel_adapters, series_adapters
from comparison.methods.tinytl import tinytl
from lightning_da3 import DA3Config

MakesOptimizer = Callable[[nn.Module, float], torch.optim.Optimizer]


def adamw(network: nn.Module, rate: float) -> torch.optim.Optimizer:
    trained = [p for p in network.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=rate, weight_decay=1e-4)


def adam(network: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=rate)


def sgd(network: nn.Module, rate: float) -> torch.optim.Optimizer:
    trained = [p for p in network.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=rate, momentum=0.9)


@dataclass(frozen=True)
class Method:
    """One way to learn a domain.

    Args:
        build: Makes a network with the domain's head one that learns by this method.
        rates: Learning rates to choose from, ascending; more are tried while an end is best.
        optimizer: Of a network that `build` returned, at a learning rate.
        callbacks: For the Trainer.
        overwrites: Whether what the domains share is trained, so that one learned later changes
            those before.
        learns_as: The method that learns the same to the bit: only costs are measured anew.
        stored_as_bits: End of the names of what a domain stores as one bit a value.
        merge: What one does with a network that is used only, not trained.
        package: What must be installed for it.
    """

    build: Callable[[nn.Module], nn.Module]
    rates: Sequence[float]
    optimizer: MakesOptimizer = adamw
    callbacks: Callable[[], list[L.Callback]] = list
    overwrites: bool = False
    learns_as: str | None = None
    stored_as_bits: str | None = None
    merge: Callable[[nn.Module], nn.Module] = nn.Module.eval
    package: str | None = None

    def grid(self, most: int) -> Sequence[float]:
        """So many of the rates at most, from the middle of them."""
        spare = max(0, len(self.rates) - most)
        return self.rates[spare // 2 : len(self.rates) - (spare - spare // 2)]


TUNED, PROBE, BIASES, DA3 = "fine-tuning", "linear probe", "biases only", "DA3"
GATED, EXACT = "DA3 gates", "DA3 exact"
SHARES = 0.8, 0.65, 0.5  # of the network's FLOPs, left where domains skip branches
PRESETS = "small", "accurate"  # the default is DA3, "fast" leaves 65 % of the FLOPs
SMALL, MIDDLE, LARGE = (3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2)

METHODS: dict[str, Method] = {
    TUNED: Method(fine_tuning, SMALL, overwrites=True),
    "checkpointing": Method(checkpointing, SMALL, overwrites=True, learns_as=TUNED),
    PROBE: Method(linear_probe, LARGE),
    BIASES: Method(biases_only, MIDDLE),
    "series adapters": Method(series_adapters, (1e-2, 3e-2, 1e-1), sgd),
    "parallel adapters": Method(parallel_adapters, (1e-2, 3e-2, 1e-1), sgd),
    "Piggyback": Method(
        piggyback.piggyback,
        (1e-4, 3e-4, 1e-3),
        piggyback.optimizer,
        stored_as_bits=".mask",
        merge=piggyback.masked,
    ),
    "TinyTL": Method(tinytl, MIDDLE, adam),
    "LoRA": Method(lora, MIDDLE, merge=merged, package="peft"),
    **{
        name: Method(partial(da3.da3, config=c), SMALL, callbacks=partial(da3.callbacks, c))
        for name, c in (
            (DA3, da3.DEFAULT),
            (GATED, da3.GATED),
            (EXACT, da3.EXACT),
            *((f"{DA3} {preset}", DA3Config.preset(preset)) for preset in PRESETS),
            *((f"{DA3} {target:.0%} of FLOPs", da3.skipping(target)) for target in SHARES),
        )
    },
}
