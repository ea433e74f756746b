"""What a strategy does differently while domains are learned: the part that hooks cannot do.

* ``load_checkpoint``: Lightning believes what a file holds, and waits for a pipe.
* ``load_model_state_dict``: no callback's hook comes before a checkpoint is loaded. Lightning would
  drop domains where ``strict_loading`` is False, and restore the optimizers of a checkpoint from
  before the conversion.
* ``lightning_module_state_dict``: with ``save_weights_only`` Lightning calls no callback's hook, so
  that the backbone would be in the checkpoint.
* ``training_step``: a batch of several domains is ``{name: batch}``, and a budget with
  ``split="accumulate"`` takes a step in parts. No hook can replace a batch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning.pytorch.strategies import Strategy
from typing_extensions import override

from lightning_da3.model.state import domain_state
from lightning_da3.trainer.loading import load_checkpoint_, read_checkpoint
from lightning_da3.trainer.session import TrainingSession
from lightning_da3.trainer.steps import changes_steps, training_step


class LearnsDomains(Strategy):
    """The methods as overrides, for strategies of our own.

    Attributes:
        session: What the run learns; None before the Trainer has set up its environment.
    """

    session: TrainingSession | None = None

    @override
    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        read = super().load_checkpoint
        checkpoint: dict[str, Any] = read_checkpoint(read, checkpoint_path, *args, **kwargs)
        return checkpoint

    @override
    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        assert self.session is not None
        load_checkpoint_(self.lightning_module, checkpoint, strict, self.session.domains)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return domain_state(self.lightning_module)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.session is not None
        return training_step(self.session, self, super().training_step, *args, **kwargs)


def lend_methods_(strategy: Any, session: TrainingSession) -> None:
    """Give Lightning's own strategies the same methods, each on the instance.

    They stay with the strategy, which belongs to the Trainer, so that a checkpoint saved after the
    fit holds the domains alone as well. Only where a step differs is ``training_step`` given.

    Args:
        strategy: The Trainer's, of either of Lightning's packages.
        session: What the run learns, its network converted.
    """
    if isinstance(strategy, LearnsDomains):
        return
    module = strategy.lightning_module
    vars(strategy).pop("load_checkpoint", None)  # of a run before
    strategy.load_checkpoint = partial(read_checkpoint, strategy.load_checkpoint)
    strategy.load_model_state_dict = partial(_load, session, module)
    strategy.lightning_module_state_dict = partial(domain_state, module)
    vars(strategy).pop("training_step", None)
    if changes_steps(session):
        own = strategy.training_step
        strategy.training_step = partial(training_step, session, strategy, own)


def _load(session: TrainingSession, module: Any, checkpoint: Any, strict: bool = True) -> None:
    load_checkpoint_(module, checkpoint, strict, session.domains)
