"""What a run of a Trainer learns, and what its strategy does for that.

One implementation behind two doors: `DA3Callback` binds it to whatever strategy the Trainer has,
the strategies "da3" and "da3_ddp" bind it to themselves, earlier. Nothing here imports Lightning,
so that it serves the `lightning` and `pytorch_lightning` packages alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_da3.budget.accumulation import accumulated
from lightning_da3.budget.microbatches import samples_in
from lightning_da3.config import DA3Config
from lightning_da3.errors import CheckpointError, ConfigError, DA3Error
from lightning_da3.model.model import DA3Model
from lightning_da3.model.state import domain_state, without_backbones
from lightning_da3.trainer.attaching import attach_, domains_in, load_state_
from lightning_da3.trainer.refusals import (
    BACKBONE_OUT_OF_REACH,
    check_plugins,
    check_strategy,
    is_of_lightning,
)

BOUND = (
    "load_model_state_dict lightning_module_state_dict save_checkpoint setup setup_optimizers "
    "training_step validation_step test_step predict_step"
).split()
STATES = ("state_dict", "current_model_state")  # the second is of Lightning's WeightAveraging

AVERAGING_CALLBACKS = ("WeightAveraging", "StochasticWeightAveraging")


class TrainingSession:
    """The domains that a Trainer learns, and their network.

    A method named like one of a strategy's stands in for it: `strategy` is the strategy, `proceed`
    what its class does.

    Args:
        domains: Number of classes by name, at least one. With several, batches say which domain
            they are of: ``{name: batch}``.
        config: For the conversion.
        backbone: Dotted name of the network inside the LightningModule, or None to look for it.
    """

    def __init__(
        self, domains: Mapping[str, int | None], config: DA3Config, backbone: str | None
    ) -> None:
        self.domains, self.config, self.backbone = dict(domains), config, backbone
        self.model: DA3Model | None = None
        self._frozen: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the network: it belongs to the LightningModule."""
        return {**vars(self), "model": None}

    def bind(self, trainer: Any) -> None:
        """Let the strategy of `trainer` do what this run needs. Any number of times.

        Raises:
            ConfigError: It is of a kind that shards or replaces the network, or another part of
                `trainer` would touch the backbone.
        """
        check_strategy(trainer.strategy)
        check_plugins(trainer)
        strategy = trainer.strategy
        for name in BOUND:
            proceed = getattr(type(strategy), name).__get__(strategy)
            setattr(strategy, name, partial(getattr(self, name), strategy, proceed))

    def attach(self, pl_module: Any, trainer: Any = None) -> None:
        """Convert the network, unless it is, and activate a domain. Any number of times.

        Args:
            pl_module: The LightningModule.
            trainer: Whose callbacks may have copied the module, and copy it again; or None.
        """
        before = [name for name, _ in pl_module.named_parameters()]
        self.model = attach_(pl_module, self.backbone, self.config, self.domains)
        if trainer is not None and [name for name, _ in pl_module.named_parameters()] != before:
            _copy_again(trainer, pl_module)

    # --- states -----------------------------------------------------------------------------------

    def load_model_state_dict(
        self,
        strategy: Any,
        _: Callable[..., None],
        checkpoint: dict[str, Any],
        strict: bool = True,
    ) -> None:
        """Convert, if nothing did before, then load: strictly where it matters.

        Of a checkpoint from before the conversion, training takes the weights and starts anew.
        """
        module = strategy.lightning_module
        self.attach(module, module.trainer)
        fitting = module.trainer.state.fn == "fit"
        self._check_domains(checkpoint, fitting)
        if fitting and not domains_in(checkpoint["state_dict"]):
            _forget_training_(checkpoint)
        load_state_(module, checkpoint["state_dict"], strict, type(module).load_state_dict)

    def _check_domains(self, checkpoint: Mapping[str, Any], fitting: bool) -> None:
        for extra in domains_in(checkpoint["state_dict"]).values():
            lacking = [domain for domain in self.domains if domain not in extra["num_classes"]]
            if lacking:
                raise CheckpointError(
                    f"The checkpoint holds the domains {list(extra['num_classes'])} and not "
                    f"{lacking}. Give the callback a domain that it holds; to learn a new one "
                    "beside them, `load_from_checkpoint` first and `fit` without `ckpt_path`."
                )
        theirs = [key for key in checkpoint.get("callbacks", ()) if key.startswith("DA3Callback[")]
        if fitting and theirs and state_key(self.domains) not in theirs:
            raise CheckpointError(
                f"The checkpoint was written while {theirs} trained, and this run trains "
                f"{state_key(self.domains)}: its optimizer states are of other parameters. Resume "
                "with the domains that it trained, or `load_from_checkpoint` and `fit` without "
                "`ckpt_path`."
            )

    def lightning_module_state_dict(self, strategy: Any, _: Callable[[], Any]) -> dict[str, Any]:
        """The domains alone, and what of the LightningModule lies outside the network."""
        return domain_state(strategy.lightning_module)

    def save_checkpoint(
        self,
        strategy: Any,
        proceed: Callable[..., None],
        checkpoint: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Take out backbones that callbacks put in."""
        for key in STATES:
            if key in checkpoint:
                checkpoint[key] = without_backbones(checkpoint[key], strategy.lightning_module)
        proceed(checkpoint, *args, **kwargs)

    # --- the start --------------------------------------------------------------------------------

    def setup(self, strategy: Any, proceed: Callable[[Any], None], trainer: Any) -> None:
        """Convert at the latest now: next come the wrapping by DDP and the optimizers."""
        self.attach(strategy.lightning_module, trainer)
        assert self.model is not None
        if trainer.state.fn != "fit":
            proceed(trainer)
            return
        _average_exactly(trainer)
        if len(self.domains) > 1 and hasattr(strategy, "_ddp_kwargs"):
            strategy._ddp_kwargs["find_unused_parameters"] = True  # those of the inactive domains
        for name in self.domains:  # DDP and optimizers take what requires a gradient
            self.model.domain(name).requires_grad_(True)
        proceed(trainer)
        for name in self.domains:
            self.model.domain(name).requires_grad_(name == self.model.active_domain)
        self._frozen = dict(self._frozen_sums())

    def setup_optimizers(self, strategy: Any, proceed: Callable[[Any], None], trainer: Any) -> None:
        """Make the optimizers, then take the frozen parameters out of them."""
        assert self.model is not None
        proceed(trainer)
        drop_frozen_(strategy.optimizers)
        learned = {id(p) for name in self.domains for p in self.model.domain(name).parameters()}
        groups = [group for optimizer in strategy.optimizers for group in optimizer.param_groups]
        if groups and not any(id(p) in learned for group in groups for p in group["params"]):
            raise ConfigError(
                f"No optimizer holds a parameter of {list(self.domains)}, so nothing would be "
                "learned. Give it `self.parameters()` in configure_optimizers: what is frozen is "
                "taken out."
            )

    # --- the steps --------------------------------------------------------------------------------

    def training_step(
        self, strategy: Any, proceed: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """The step of the domain that the batch is of, in parts where the budget asks for it."""
        if len(self.domains) > 1 and not self._names(batch):
            raise ConfigError(
                f"This run learns {list(self.domains)}, so a training batch must say of which one "
                f"domain it is: {{name: batch}}. Got {_described(batch)}. "
                "trainer.fit(module, DomainLoader({name: loader, ...})) of a `lightning` Trainer "
                "gives such batches."
            )
        return self._step(partial(self._in_parts, strategy, proceed), batch, *args, **kwargs)

    def _in_parts(
        self, strategy: Any, proceed: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        assert self.model is not None
        module = strategy.lightning_module
        if not self.model.budget_policy.accumulates:
            return proceed(batch, *args, **kwargs)
        if not module.automatic_optimization:
            raise ConfigError(
                "MemoryConfig(split='accumulate') cannot split the training step of a module with "
                "automatic_optimization=False: call `lightning_da3.accumulated` in it yourself, or "
                "use split='pieces'."
            )
        results = module.trainer._results

        def step(part: Any) -> Any:
            results.batch_size = samples_in(part)  # what is logged counts by samples
            return proceed(part, *args, **kwargs)

        try:
            return accumulated(
                self.model,
                step,
                batch,
                parameters=module.parameters(),
                scale=loss_scale(module.trainer),
                unsynced=getattr(strategy, "block_backward_sync", nullcontext),
            )
        finally:
            results.batch_size = None

    def _step(self, proceed: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        if self._names(batch):
            assert self.model is not None
            ((name, batch),) = batch.items()
            self.model.set_domain(name)
        return proceed(batch, *args, **kwargs)

    def validation_step(
        self, _: Any, proceed: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Likewise."""
        return self._step(proceed, *args, **kwargs)

    def test_step(self, _: Any, proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Likewise."""
        return self._step(proceed, *args, **kwargs)

    def predict_step(self, _: Any, proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Likewise."""
        return self._step(proceed, *args, **kwargs)

    def _names(self, batch: Any) -> bool:
        """Whether `batch` says of which domain it is."""
        return (
            len(self.domains) > 1
            and isinstance(batch, dict)
            and len(batch) == 1
            and {*batch} <= {*self.domains}
        )

    # --- the end ----------------------------------------------------------------------------------

    def check_frozen(self) -> None:
        """Refuse that anything but the domains of this run changed since `setup`.

        Raises:
            DA3Error: Something did, which only code beside this package can have done.
        """
        now = dict(self._frozen_sums())
        changed = sorted(name for name, value in self._frozen.items() if now.get(name) != value)
        if changed:
            raise DA3Error(
                f"{len(changed)} frozen tensors changed while {list(self.domains)} trained, such "
                f"as {changed[:3]}: {BACKBONE_OUT_OF_REACH}. Look for a callback, a hook or an "
                "optimizer step of your own that edits parameters which require no gradient."
            )

    def _frozen_sums(self) -> Iterator[tuple[str, int]]:
        assert self.model is not None
        learned = tuple(f"bank.{name}." for name in self.domains)
        for tensors in (self.model.named_parameters(), self.model.named_buffers()):
            for name, value in tensors:
                if not name.startswith(learned):
                    yield name, _sum_of_bits(value)


def state_key(domains: Iterable[str]) -> str:
    """Tells the callbacks of one checkpoint apart."""
    return f"DA3Callback[{', '.join(domains)}]"


def loss_scale(trainer: Any) -> float:
    """By which float16 training multiplies the loss, so that small gradients do not vanish."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def drop_frozen_(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Take parameters that require no gradient out of the groups and out of the state.

    Groups that become empty stay: schedulers hold one learning rate a group.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            trained = [parameter.requires_grad for parameter in group["params"]]
            for key in ("params", "param_names"):
                if key in group:  # in place: an optimizer may hold the list itself
                    group[key][:] = [x for x, keep in zip(group[key], trained, strict=True) if keep]
        state: dict[Any, Any] = optimizer.state
        for frozen in [k for k in state if isinstance(k, Tensor) and not k.requires_grad]:
            del state[frozen]


def _forget_training_(checkpoint: dict[str, Any]) -> None:
    """Leave a Trainer nothing to restore but the weights."""
    for key in ("loops", "callbacks"):
        checkpoint.pop(key, None)
    checkpoint.update(optimizer_states=[], lr_schedulers=[])


def _copy_again(trainer: Any, pl_module: Any) -> None:
    """Let callbacks that keep a copy of the module take it anew, after the conversion."""
    for callback in trainer.callbacks:
        if any(is_of_lightning(callback, kind) for kind in AVERAGING_CALLBACKS):
            callback.setup(trainer, pl_module, trainer.state.fn)


def _average_exactly(trainer: Any) -> None:
    """Averaging must leave frozen weights as they are, to the last bit."""
    for callback in trainer.callbacks:
        average: Any = getattr(callback, "_average_model", None)
        mean = getattr(average, "avg_fn", None)
        if mean is not None and not isinstance(mean, _Mean):
            average.avg_fn = _Mean(mean)


class _Mean:
    """A mean of two numbers, which is that number exactly where they are equal: frozen weights."""

    def __init__(self, mean: Callable[..., Tensor]) -> None:
        self.mean = mean

    def __call__(self, average: Tensor, current: Tensor, *args: Any) -> Tensor:
        return torch.where(average == current, average, self.mean(average, current, *args))


def _sum_of_bits(value: Tensor) -> int:
    """Changes with any bit of a tensor, but for rare chance; takes no memory worth counting."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.itemsize]
    return int(value.detach().contiguous().view(-1).view(whole).sum())


def _described(batch: Any) -> str:
    if isinstance(batch, dict):
        return f"a dict of {list(batch)}"
    return f"a {type(batch).__name__}"
