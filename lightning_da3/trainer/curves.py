"""Curves of every domain in a W&B run, each over steps of its own.

One run may have several Trainers, one after the other, whose steps all begin at 0: what they log by
the same name would be drawn over each other. So what is logged while one domain trains has its name
as well (``val/acc/flowers`` beside ``val/acc``), as what several domains log in turn has anyway;
and whatever has a domain's name is drawn over ``da3/step/<domain>``, its training batches so far.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from numbers import Real
from typing import Any

from lightning_da3.trainer.lightning_private import prefixed
from lightning_da3.trainer.session import TrainingSession

STEP = "da3/step"
KIND = re.compile(r"(?P<name>.+?)(?P<kind>_step|_epoch)?")  # as Lightning forks what it logs
ACCURACY = re.compile(r"acc|accuracy", re.IGNORECASE)
MORE_IS_BETTER = re.compile(
    r"acc|accuracy|f1|f1score|auroc|auc|iou|dice|precision|recall|map|score", re.IGNORECASE
)
LESS_IS_BETTER = re.compile(r"loss|error|err|mse|mae|rmse|perplexity", re.IGNORECASE)
BYTES = re.compile(r"bytes")


class Curves:
    """Lends W&B loggers a way to log that knows domains; every other logger is left alone.

    Args:
        session: Knows the domains that train, and those that the network has beside them.

    Attributes:
        steps: Training batches so far, by domain.
        best: ``"max"`` or ``"min"`` by the name of a metric, where that is not to be guessed.
    """

    def __init__(self, session: TrainingSession) -> None:
        self._session, self.domains = session, list(session.domains)
        self.steps: dict[str, int] = {}
        self.best: dict[str, str] = {}
        self._defined: set[tuple[str, str]] = set()  # of a run, by its id
        self._lent: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        """Without loggers."""
        return {**vars(self), "_lent": []}

    def lend(self, loggers: Iterable[Any]) -> None:
        """A run begins.

        Args:
            loggers: Those that are W&B's.
        """
        for logger in loggers:
            if not any(logger is other for other in self._lent):
                for domain in self.domains:  # of an earlier Trainer of this run
                    before = logger.experiment.summary.get(prefixed(logger, f"{STEP}/{domain}"), 0)
                    count = before if isinstance(before, int) else 0
                    self.steps[domain] = max(count, self.steps.get(domain, 0))
                logger.log_metrics = partial(self._log, logger)  # of the instance
                self._lent.append(logger)

    def give_back(self) -> None:
        """The run is over: what the loggers' class says is back."""
        while self._lent:
            vars(self._lent.pop()).pop("log_metrics", None)

    def step_ends(self, domain: str | None) -> None:
        """A training batch of a domain is over."""
        if domain is not None:
            self.steps[domain] = self.steps.get(domain, 0) + 1

    def _log(self, logger: Any, metrics: Mapping[str, Any], step: int | None = None) -> None:
        given = self.with_domains(metrics)
        for name in given:
            self._define(logger, name)
        type(logger).log_metrics(logger, given, step)

    def with_domains(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Metrics, with the name of the domain, and its steps.

        Args:
            metrics: By the names that they are logged by.
        """
        given = dict(metrics)
        numbers = [name for name, value in metrics.items() if isinstance(value, Real)]
        if len(self.domains) == 1:
            (domain,), model = self.domains, self._session.model
            known = self.domains if model is None else [*self.domains, *model.domains]
            for name in numbers:
                if name != "epoch" and domain_in(name, known) is None:
                    given[named_by(name, domain)] = metrics[name]
        seen = {domain_in(name, self.domains) for name in given} - {None}
        return {**given, **{f"{STEP}/{d}": self.steps.get(d, 0) for d in self.domains if d in seen}}

    def _define(self, logger: Any, name: str) -> None:
        domain, run = domain_in(name, self.domains), logger.experiment
        if domain is None or (run.id, name) in self._defined:
            return
        self._defined.add((run.id, name))
        full, step = prefixed(logger, name), prefixed(logger, f"{STEP}/{domain}")
        if full == step:
            run.define_metric(step, hidden=True)
            return
        best = self.best.get(name) or better(name)
        run.define_metric(full, step_metric=step, summary=f"{best},last" if best else None)


def named_by(name: str, domain: str) -> str:
    """The name by which a domain logs: ``loss/flowers_step`` of ``loss_step``."""
    found = KIND.fullmatch(name)
    assert found is not None
    return f"{found['name']}/{domain}{found['kind'] or ''}"


def domain_in(name: str, domains: Iterable[str]) -> str | None:
    """The domain whose name a metric has; None: it has none."""
    return next((d for d in domains if re.search(rf"/{re.escape(d)}(_step|_epoch)?$", name)), None)


def better(name: str) -> str | None:
    """Whether more of a metric is better (``"max"``) or less (``"min"``); None: not known.

    Of bytes the most is what counts.
    """
    words = re.split(r"[^A-Za-z0-9]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name))
    for kinds, best in ((BYTES, "max"), (MORE_IS_BETTER, "max"), (LESS_IS_BETTER, "min")):
        if any(kinds.fullmatch(word) for word in words):
            return best
    return None


def is_accuracy(name: str) -> bool:
    """Whether a metric is an accuracy, and not one of training."""
    words = re.split(r"[^A-Za-z0-9]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name))
    accuracy = any(ACCURACY.fullmatch(word) for word in words)
    return accuracy and not any(word.lower() in ("train", "training") for word in words)
