"""What a run gives its loggers beside metrics, by itself: settings, pictures, tables, domains.

Nothing of it is in a step: pictures are drawn when an epoch ends, of a few images that were kept
from a step that nobody measures. Rank zero alone logs, and what a logger refuses ends no run.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L

from lightning_da3.files.folder import SUFFIX
from lightning_da3.metrics import average_accuracy, forgetting
from lightning_da3.model.model import DA3Model
from lightning_da3.model.status import Status
from lightning_da3.plotting.accuracies import plot_accuracy_matrix
from lightning_da3.plotting.figure import has_matplotlib
from lightning_da3.plotting.gates import executed_shares, plot_executed_shares, plot_gate_maps
from lightning_da3.plotting.memory import plot_memory
from lightning_da3.trainer.accuracies import Accuracies
from lightning_da3.trainer.curves import Curves
from lightning_da3.trainer.domain_files import DomainFiles
from lightning_da3.trainer.figures import finite
from lightning_da3.trainer.first_steps import FirstSteps
from lightning_da3.trainer.lightning_private import is_compiled
from lightning_da3.trainer.loggers import (
    Forgiving,
    is_wandb,
    log_domain,
    log_figure,
    log_first_steps,
    log_histogram,
    log_plan_table,
    log_summary,
    log_table,
    takes_pictures,
)
from lightning_da3.trainer.samples import Looked, Samples
from lightning_da3.trainer.session import TrainingSession
from lightning_da3.trainer.watching import watch_again, watching_runs

EVERY = 5  # epochs between two pictures of gates
MEASURED_STEPS = 2  # in which nothing is kept


class Tracking:
    """Logs what one callback's runs have to show.

    Args:
        session: What the run learns.
        files: The files that it writes.

    Attributes:
        curves: Of every domain, for W&B.
        logs_domains: Whether domains become artifacts at the end of a fit.
    """

    def __init__(self, session: TrainingSession, files: DomainFiles) -> None:
        self._session, self._files = session, files
        self.logs_domains = True
        self.curves = Curves(session)
        self._samples = Samples()
        self._loggers: list[Any] = []  # of this run, on rank zero
        self._logs = False
        self._told: set[str] = set()
        self._batches, self._wants_samples, self._shown = 0, False, False
        self._status: Status | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without loggers."""
        return {**vars(self), "_loggers": []}

    # --- a run ------------------------------------------------------------------------------------

    def begin(self, trainer: L.Trainer) -> None:
        """A run begins, of any kind."""
        trying = trainer.fast_dev_run  # type: ignore[attr-defined]
        self._logs = bool(trainer.is_global_zero and not trying)
        self._loggers = list(trainer.loggers) if self._logs else []
        monitor, mode = self._files.monitor, self._files.mode
        if monitor is not None:
            names = (monitor, *(f"{monitor}/{domain}" for domain in self._session.domains))
            self.curves.best = dict.fromkeys(names, mode)
        with self._forgiving("curves by domain"):
            self.curves.lend(filter(is_wandb, self._loggers))

    def close(self) -> None:
        """The run is over, however it ended."""
        self._samples.abort()
        self._samples = Samples()  # images take memory
        self.curves.give_back()
        self._loggers = []

    def evaluated(self, trainer: L.Trainer) -> None:
        """An evaluation that is no part of a training is over."""
        if trainer.state.fn != "fit":
            self._log_accuracies(trainer.callback_metrics)

    # --- a training -------------------------------------------------------------------------------

    def start(self, pl_module: L.LightningModule) -> None:
        """A training begins."""
        self._batches, self._shown, self._status = 0, False, None
        self._samples = Samples()
        gated = self._session.network.config.cell_gates is not None
        self._wants_samples = gated and not is_compiled(pl_module) and self._draws
        runs = watching_runs(filter(is_wandb, self._loggers)) if self._logs else []
        for run in runs:
            self._session.open_domains()  # what does not require a gradient is not watched
            with self._forgiving("gradients"):
                watch_again(run, pl_module, self._session.network)
            self._session.close_domains()

    def step_begins(self) -> None:
        """A training step begins."""
        if self._wants_samples and self._batches >= MEASURED_STEPS:
            self._samples.step_begins(self._session.network)

    def step_ends(self, batch: Any, status: Status | None) -> None:
        """A training step is over.

        Args:
            batch: Its batch.
            status: What the fit learns, once it is known.
        """
        self._batches += 1
        self.curves.step_ends(self._session.network.active_domain)
        self._samples.step_ends(self._session.network, batch)
        if status is not None and status is not self._status:
            self._status = status
            settings = {"da3": {**_plain(status), **_settings(self._session.network)}}
            self._each("settings", lambda logger: logger.log_hyperparams(settings))

    def epoch_ends(self, trainer: L.Trainer, steps: FirstSteps | None) -> None:
        """An epoch of a training is over."""
        if not self._shown:
            self._shown = True
            self._log_memory(steps)
        if (trainer.current_epoch + 1) % EVERY == 0:
            self._log_gates(trainer.global_step)

    def end(self, trainer: L.Trainer, steps: FirstSteps | None) -> None:
        """A training is over; its last epoch may have been stopped."""
        if not self._shown:
            self._log_memory(steps)
        if trainer.current_epoch % EVERY:  # which counts the last epoch
            self._log_gates(trainer.global_step)
        Accuracies.of(self._session.network).learned(self._session.domains)
        self._log_accuracies(trainer.callback_metrics)
        if steps is not None and steps.saved_activation_bytes is not None:
            figures = _headline(steps)
            self._each("the summary", lambda logger: log_summary(logger, figures), is_wandb)

    def finished(self, trainer: L.Trainer) -> None:
        """A fit has come to its end, and its files are final: log the domains."""
        trackers = filter(is_wandb, self._loggers if self.logs_domains else ())
        runs = {id(logger.experiment): logger for logger in trackers}
        for logger in runs.values():
            with self._forgiving("domains"), tempfile.TemporaryDirectory() as folder:
                for domain in self._session.domains:
                    self._log_domain(logger, domain, Path(folder), trainer.callback_metrics)

    # --- what is logged ---------------------------------------------------------------------------

    def _log_domain(
        self, logger: Any, domain: str, folder: Path, metrics: Mapping[str, Any]
    ) -> None:
        kept, own = self._files.path(domain), self._files.wrote(domain)
        path = folder / f"{domain}{SUFFIX}"
        if kept is not None and own:
            path = kept
        else:
            self._session.network.save_domain(domain, path, metrics=finite(metrics))
        log_domain(logger, path, domain, best=own or kept is None)

    def _log_memory(self, steps: FirstSteps | None) -> None:
        if steps is None or not steps.saved_by_module:
            return
        plan, kept = self._session.network.plan, steps.saved_by_module
        self._each(
            "memory by layer",
            lambda logger: log_plan_table(logger, plan, kept, "da3/memory_by_layer"),
            takes_pictures,
        )
        if not self._draws:
            return
        self._each(
            "memory of a step",
            lambda logger: log_first_steps(logger, steps, "da3/memory_of_a_step"),
            takes_pictures,
        )
        name = "" if self._status is None else self._status.name
        place = f"{name}." if name else ""  # in the LightningModule
        before = {f"{place}{layer}": count for layer, count in steps.finetune_by_module.items()}
        if any(before.values()):
            self._draw("da3/memory", lambda: plot_memory(before, kept, head=plan.head))

    def _log_gates(self, step: int) -> None:
        active = self._session.network.active_domain
        for domain in self._samples.domains:
            with self._forgiving("gates"):
                try:
                    self._session.activate(domain)
                    seen = self._samples.look(self._session.network, domain)
                finally:
                    self._session.activate(active)
                self._draw_gates(domain, seen, step)

    def _draw_gates(self, domain: str, seen: Looked, step: int) -> None:
        maps = seen.maps
        self._draw(
            f"da3/gates/{domain}",
            lambda: plot_gate_maps(seen.images, maps, captions=seen.captions),
            step,
        )
        shares, figure = executed_shares(maps), plot_executed_shares(maps)
        self._each(
            "executed shares",
            lambda log: log_histogram(log, f"da3/executed_shares/{domain}", shares, figure, step),
            takes_pictures,
        )

    def _log_accuracies(self, metrics: Mapping[str, Any]) -> None:
        known = Accuracies.of(self._session.network)
        if not known.order or not known.see(metrics) or len(known.order) < 2:
            return
        matrix, names = known.matrix, list(known.order)
        rows = [
            [name, *(None if math.isnan(value) else value for value in row)]
            for name, row in zip(names, matrix.tolist(), strict=True)
        ]
        self._each(
            "accuracies",
            lambda logger: log_table(logger, "da3/accuracies", ["after", *names], rows),
            takes_pictures,
        )
        lost = {f"da3/forgetting/{n}": v for n, v in zip(names, forgetting(matrix), strict=True)}
        values = finite({"da3/average_accuracy": average_accuracy(matrix), **lost})
        self._each("the summary", lambda logger: log_summary(logger, values), is_wandb)
        if self._draws:
            self._draw("da3/accuracy_matrix", lambda: plot_accuracy_matrix(matrix, names))

    # --- loggers ----------------------------------------------------------------------------------

    @property
    def _draws(self) -> bool:
        """Whether a logger takes pictures; only then matplotlib is imported, if it is there."""
        return any(map(takes_pictures, self._loggers)) and has_matplotlib()

    def _draw(self, name: str, draw: Callable[[], Any], step: int | None = None) -> None:
        """Give all loggers that take pictures one."""
        with self._forgiving(name):
            figure = draw()
            self._each(name, lambda log: log_figure(log, name, figure, step), takes_pictures)

    def _each(
        self,
        what: str,
        log: Callable[[Any], Any],
        which: Callable[[Any], bool] = lambda _: True,
    ) -> None:
        for logger in filter(which, self._loggers):
            with self._forgiving(f"{what} with {type(logger).__name__}"):
                log(logger)

    def _forgiving(self, what: str) -> Forgiving:
        return Forgiving(what, self._told)


def _plain(status: Status) -> dict[str, Any]:
    """What loggers take: no nested lists, nothing empty."""
    values = status.to_dict()
    values["others"] = ", ".join(values["others"])
    values["step"] = values["step"] or {}
    return {key: value for key, value in values.items() if value not in ({}, "", None)}


def _settings(model: DA3Model) -> dict[str, Any]:
    """Which network it is, and by which choices it was converted."""
    domains: Iterable[str] = model.domains
    names = {d: ", ".join(model.domain(d).class_names or ()) for d in domains}
    return {
        "config": model.config.to_dict(),
        "fingerprint": model.fingerprint,
        "architecture": model.architecture,
        "class_names": {domain: said for domain, said in names.items() if said},
    }


def _headline(steps: FirstSteps) -> dict[str, float]:
    """Bytes of a step, measured and predicted, and how many times less than fine-tuning that is."""
    predicted, kept, tuned = steps.predicted, steps.kept_bytes, steps.finetune_kept_bytes
    values: dict[str, float | None] = {
        "da3/kept_bytes": steps.saved_activation_bytes,
        "da3/peak_bytes": steps.peak_bytes,
        "da3/predicted_kept_bytes": None if predicted is None else predicted.saved_activation_bytes,
        "da3/predicted_peak_bytes": None if predicted is None else predicted.peak_bytes,
        "da3/finetune_kept_bytes": tuned,
        "da3/kept_times_less": tuned / kept if kept and tuned else None,
    }
    return {name: float(value) for name, value in values.items() if value is not None}
