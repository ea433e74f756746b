"""Everything that is read of Lightning, or of torch's profiler, without being public.

Each function says what it reads and what happens where that is missing. Classes are known by name,
because the `lightning` and `pytorch_lightning` packages each have their own.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.strategies import DDPStrategy
from typing_extensions import override

from lightning_da3.errors import ConfigError

try:
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher as Launcher
except ImportError:  # then processes are started without a conversion before, which is refused
    Launcher = object  # type: ignore[assignment, misc]

PACKAGES = ("lightning", "pytorch_lightning")


def is_from_lightning(kind: type) -> bool:
    """Whether one of Lightning's packages defines a class. Reads the class's ``__module__``."""
    return kind.__module__.partition(".")[0] in PACKAGES


def is_of_lightning(thing: Any, kind: str) -> bool:
    """Whether `thing` is an instance of Lightning's class of that name, or of one derived.

    Reads the names of its classes. A class that Lightning renamed is not recognised.
    """
    return any(cls.__name__ == kind and is_from_lightning(cls) for cls in type(thing).__mro__)


def overrides(pl_module: Any, hook: str) -> bool:
    """Whether the class of a LightningModule defines a hook itself.

    Reads the module in which the method is defined. Without a ``__module__`` the answer is yes,
    which is right for any class.
    """
    defined_in = getattr(getattr(type(pl_module), hook), "__module__", "")
    return not defined_in.endswith((".core.hooks", ".core.module"))


def starts_processes(strategy: Any) -> bool:
    """Whether a strategy trains in processes that get the LightningModule as a copy: spawn, fork.

    Reads the name of the launcher's class. A strategy without a launcher starts none.
    """
    return is_of_lightning(getattr(strategy, "launcher", None), "_MultiProcessingLauncher")


def is_compiled(pl_module: Any) -> bool:
    """Whether `torch.compile` compiled a LightningModule.

    Reads ``_compiler_ctx``, which Lightning sets on such modules. Where it is missing: no.
    """
    return getattr(pl_module, "_compiler_ctx", None) is not None


def count_logged_(trainer: Any, samples: int | None) -> None:
    """Let what a step logs count by so many samples; None: as Lightning counts them itself.

    Sets ``trainer._results.batch_size``. Where that is missing every part of a batch counts alike,
    which differs from the mean over samples by as much as the sizes of the parts differ.
    """
    results: Any = getattr(trainer, "_results", None)
    if hasattr(results, "batch_size"):
        results.batch_size = samples


def training_batches(trainer: Any, asked: str, instead: str) -> Generator[Any]:
    """The batches of an epoch, each as a training step gets it, before training begins.

    Reads ``fit_loop._data_fetcher`` and the module's ``_on_before_batch_transfer``. The fetcher
    begins anew afterwards, as it does in every epoch.

    Args:
        trainer: About to train.
        asked: What needs them, for the error.
        instead: What to call instead.

    Raises:
        ConfigError: This version of Lightning has either no longer, or `training_step` takes an
            iterator of batches.
    """
    fetcher = getattr(trainer.fit_loop, "_data_fetcher", None)
    module, strategy = trainer.lightning_module, trainer.strategy
    prepare = getattr(module, "_on_before_batch_transfer", None)
    if fetcher is None or prepare is None or is_of_lightning(fetcher, "_DataLoaderIterDataFetcher"):
        raise ConfigError(
            f"{asked} cannot see the batches before training starts: `training_step` takes an "
            f"iterator of them, or this version of Lightning hides them. Call `{instead}` yourself."
        )
    try:
        for batch, *_ in fetcher:
            batch = prepare(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
            yield strategy.batch_to_device(batch, dataloader_idx=0)
    finally:
        iter(fetcher)


def find_unused_parameters_(strategy: Any) -> None:
    """Let DistributedDataParallel expect parameters that get no gradient in a step.

    Sets an entry of the ``_ddp_kwargs`` of a DDPStrategy; other strategies need nothing.

    Raises:
        ConfigError: A DDPStrategy has no such attribute, and was not told by its user.
    """
    if not is_of_lightning(strategy, "DDPStrategy"):
        return
    arguments = getattr(strategy, "_ddp_kwargs", None)
    if arguments is None:
        raise ConfigError(
            f"This version of Lightning does not say how {type(strategy).__name__} wraps the "
            "module, so that several domains cannot be learned in one run on several devices. "
            "Learn them one after the other, or use another version of Lightning."
        )
    arguments["find_unused_parameters"] = True


def averaged_model(callback: Any) -> Any:
    """The copy of the LightningModule in which a callback averages weights, or None.

    Reads ``_average_model`` of WeightAveraging and StochasticWeightAveraging.

    Raises:
        ConfigError: The callback has no such attribute.
    """
    if not hasattr(callback, "_average_model"):
        raise ConfigError(
            f"{type(callback).__name__} of this version of Lightning does not show the weights "
            "that it averages, so that it cannot be kept from changing the frozen ones. Leave it "
            "out, or use another version of Lightning."
        )
    return callback._average_model


def profiler_runs() -> bool:
    """Whether a torch profiler runs already; there can be only one at a time.

    Reads ``torch._C._autograd._profiler_enabled``. Where it is missing: yes, and no peak is
    measured.
    """
    try:
        from torch._C._autograd import _profiler_enabled
    except ImportError:
        return True
    return bool(_profiler_enabled())


def forks(strategy: Any) -> bool:
    """Whether a strategy's processes are forked from the main one.

    Reads ``_start_method``. Where it is missing: no.
    """
    return getattr(strategy, "_start_method", None) == "fork"


class PreparingStrategy(DDPStrategy):
    """Calls `before_launch` in the main process, before it starts others by spawn or fork.

    Overrides ``_configure_launcher`` and replaces ``_launcher``. Where Lightning has either no
    longer, nothing is called before the launch.
    """

    def before_launch(self, trainer: L.Trainer) -> None:
        """What is to be done first.

        Args:
            trainer: The one that starts the processes.
        """

    @override
    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        if starts_processes(self):
            self._launcher = PreparingLauncher(self, self._start_method, self.before_launch)


class PreparingLauncher(Launcher):
    """Starts processes by spawn or fork, and prepares the main one before.

    Args:
        strategy: The strategy that owns the launcher.
        start_method: ``"spawn"``, ``"fork"`` or ``"forkserver"``.
        prepare: Called with the Trainer.
    """

    def __init__(
        self, strategy: Any, start_method: Any, prepare: Callable[[L.Trainer], None]
    ) -> None:
        super().__init__(strategy, start_method)
        self._prepare = prepare

    @override
    def launch(
        self, function: Any, *args: Any, trainer: L.Trainer | None = None, **kwargs: Any
    ) -> Any:
        if trainer is not None:
            self._prepare(trainer)
        return super().launch(function, *args, trainer=trainer, **kwargs)


def lend_summary_(trainer: Any, make: Callable[[Any, int], Any]) -> None:
    """Let the Trainer's summaries of the model be made by `make(pl_module, max_depth)`.

    Puts ``_summary`` on the callback that prints one, beside that of its class, and reads its
    ``_max_depth``. Where either is missing, the summary shows what it would without.
    """
    for callback in trainer.callbacks:
        depth = getattr(callback, "_max_depth", None)
        if isinstance(callback, L.pytorch.callbacks.ModelSummary) and isinstance(depth, int):
            vars(callback)["_summary"] = partial(_summary, make, depth)


def _summary(make: Callable[[Any, int], Any], depth: int, trainer: Any, pl_module: Any) -> Any:
    """Stands for a callback's method, and can be pickled."""
    del trainer
    return make(pl_module, depth)


def prefixed(logger: Any, name: str) -> str:
    """The name that a W&B logger gives a metric in its run.

    Reads ``_prefix`` of WandbLogger. Where it is missing: the name itself.
    """
    prefix = getattr(logger, "_prefix", "")
    return f"{prefix}{getattr(logger, 'LOGGER_JOIN_CHAR', '-')}{name}" if prefix else name


def name_run_(logger: Any, **names: str) -> bool:
    """Name a W&B run's group and job type, unless its user did or it runs already.

    Sets entries of ``_wandb_init`` of WandbLogger, which `wandb.init` is called with, while its
    ``_experiment`` is None. Where either is missing the run has neither.

    Returns:
        Whether the run is still to begin.
    """
    arguments = getattr(logger, "_wandb_init", None)
    if not isinstance(arguments, dict) or getattr(logger, "_experiment", logger) is not None:
        return False
    arguments |= {name: value for name, value in names.items() if arguments.get(name) is None}
    return True
