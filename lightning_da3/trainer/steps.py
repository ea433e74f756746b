"""A training step: of the domain that the batch names, in parts where the budget asks for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from lightning_da3.budget.accumulation import accumulated
from lightning_da3.budget.microbatches import samples_in
from lightning_da3.errors import ConfigError
from lightning_da3.model.model import DA3Model
from lightning_da3.trainer.lightning_private import count_logged_
from lightning_da3.trainer.session import TrainingSession


def changes_steps(session: TrainingSession) -> bool:
    """Whether a run's training steps differ from Lightning's own."""
    return len(session.domains) > 1 or session.network.budget_policy.by == "accumulate"


def training_step(
    session: TrainingSession,
    strategy: Any,
    proceed: Callable[..., Any],
    batch: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Take a training step.

    Args:
        session: What the run learns.
        strategy: The Trainer's.
        proceed: The strategy's own training step.
        batch: With several domains, ``{name: batch}``.
        args: As `proceed` takes them.
        kwargs: As `proceed` takes them.

    Raises:
        ConfigError: The batch does not name one domain, or the step cannot be split.
    """
    name, batch = domain_of(session, batch)
    if len(session.domains) > 1:
        session.turn_to(name)
    if not session.network.budget_policy.accumulates:
        return proceed(batch, *args, **kwargs)
    module = strategy.lightning_module
    if not module.automatic_optimization:
        raise ConfigError(
            "MemoryConfig(split='accumulate') cannot split the training step of a module with "
            "automatic_optimization=False: call `lightning_da3.accumulated` in it yourself, or "
            "use split='pieces'."
        )

    def step(part: Any) -> Any:
        count_logged_(module.trainer, samples_in(part))
        return proceed(part, *args, **kwargs)

    try:
        return accumulated(
            session.network,
            step,
            batch,
            parameters=module.parameters(),
            scale=loss_scale(module.trainer),
            unsynced=getattr(strategy, "block_backward_sync", nullcontext),
        )
    finally:
        count_logged_(module.trainer, None)


def loss_scale(trainer: Any) -> float:
    """The factor by which float16 training multiplies the loss, so that gradients do not vanish."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def explain_targets_(error: BaseException, model: DA3Model | None) -> None:
    """Add a sentence to PyTorch's error about targets that are no class of the active domain."""
    text, note = str(error), getattr(error, "add_note", None)  # since Python 3.11
    if note is None or model is None or model.active_domain is None:
        return
    classes = model.domain(model.active_domain).num_classes
    if classes is not None and ("out of bounds" in text or "device-side assert" in text):
        note(
            f"Domain {model.active_domain!r} has num_classes={classes}, so that its targets must "
            f"be 0 to {classes - 1}. Are there others in the data?"
        )


def domain_of(session: TrainingSession, batch: Any) -> tuple[str, Any]:
    """The domain that a batch is of, and the batch itself.

    Raises:
        ConfigError: There are several domains, and it does not name one.
    """
    if len(session.domains) == 1:
        return next(iter(session.domains)), batch
    if isinstance(batch, dict) and len(batch) == 1 and {*batch} <= {*session.domains}:
        ((name, inner),) = batch.items()
        return name, inner
    got = f"dict of {list(batch)}" if isinstance(batch, dict) else type(batch).__name__
    raise ConfigError(
        f"This run learns {list(session.domains)}, so a training batch must say of which one "
        f"domain it is: {{name: batch}}. Got a {got}. trainer.fit(module, DomainLoader({{name: "
        "loader, ...})) of a `lightning` Trainer gives such batches."
    )
