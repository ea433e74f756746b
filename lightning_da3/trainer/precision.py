"""Under what autocast a Trainer runs its steps: a network is converted as it will be trained."""

from __future__ import annotations

from typing import Any

from lightning_da3.tracing.autocast import Precision, precision_now


def precision_of(trainer: Any) -> Precision:
    """Where autocast is on in the steps of a Trainer, such as with ``precision="bf16-mixed"``.

    Args:
        trainer: Its precision plugin is asked; types of tensors beside autocast are left out.
    """
    with trainer.precision_plugin.forward_context():
        return precision_now()
