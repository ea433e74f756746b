"""The score of the Visual Decathlon: many domains in one number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_da3.errors import ConfigError
from lightning_da3.formatting import shown
from lightning_da3.metrics.counts import checked_domains, count_right, place_in
from lightning_da3.metrics.functional import PERFECT, decathlon_points, decathlon_score
from lightning_da3.plotting.accuracies import draw_points
from lightning_da3.plotting.figure import axes_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VISUAL_DECATHLON = {
    "imagenet12": 0.5987,
    "aircraft": 0.6034,
    "cifar100": 0.8212,
    "daimlerpedcls": 0.9282,
    "dtd": 0.5553,
    "gtsrb": 0.9753,
    "vgg-flowers": 0.8141,
    "omniglot": 0.8769,
    "svhn": 0.9655,
    "ucf101": 0.5120,
}
"""Accuracies of a ResNet-26 fine-tuned on each domain alone, at 64 px (Rebuffi et al. 2018)."""


class DecathlonScore(Metric):
    """The decathlon score: points for few errors, compared with fine-tuning's, summed over domains.

    A domain has 250 points for as many errors as fine-tuning makes, 1000 for none, 0 for twice as
    many; ten domains as good as fine-tuning have 2500. The formula is that of
    `lightning_da3.metrics.decathlon_points`. A domain that was not evaluated has no points.

    Args:
        fine_tuned: Accuracies by domain, fractions below 1, of the whole network fine-tuned on each
            alone, such as `VISUAL_DECATHLON`.
        kwargs: What every metric of torchmetrics takes.

    Raises:
        DomainError: There is no domain.
        ConfigError: An accuracy is no such fraction.

    Example:
        >>> score = DecathlonScore({"flowers": 0.75, "birds": 0.5})
        >>> score.update("flowers", torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 0]))
        >>> score.update("birds", torch.tensor([0, 1]), torch.tensor([0, 1]))
        >>> score.compute()
        tensor(1250.)
        >>> score.by_domain()
        {'flowers': tensor(250.), 'birds': tensor(1000.)}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0

    correct: Tensor  # (D,) counts
    total: Tensor  # (D,) counts
    fine_tuned: Tensor  # (D,)

    def __init__(self, fine_tuned: Mapping[str, float], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(fine_tuned, Mapping):
            raise ConfigError(
                f"`fine_tuned` must be a dict of accuracies by domain, got {shown(fine_tuned)}."
            )
        self.domains = checked_domains([*fine_tuned])
        values = torch.tensor([float(value) for value in fine_tuned.values()])
        decathlon_points(torch.zeros_like(values), values)  # refuses what is no fraction
        self.register_buffer("fine_tuned", values, persistent=False)
        zeros = torch.zeros(len(self.domains), dtype=torch.long)
        self.add_state("correct", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("total", zeros.clone(), dist_reduce_fx="sum")

    def update(self, domain: str, preds: Tensor, target: Tensor) -> None:
        """Adds a batch of one domain.

        Args:
            domain: Its name.
            preds: Scores (N, C, ...), of which the highest counts, or labels (N, ...).
            target: Labels (N, ...).

        Raises:
            DomainError: If the name is unknown.
            ConfigError: If the shapes do not fit.
        """
        place = place_in(self.domains, "domain", domain)
        right, count = count_right(preds, target)
        self.correct[place] += right
        self.total[place] += count

    def compute(self) -> Tensor:
        """The score ()."""
        return decathlon_score(self.correct / self.total, self.fine_tuned)

    def by_domain(self) -> dict[str, Tensor]:
        """Points by domain name, NaN where not evaluated; of all processes, as `compute`."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            points = decathlon_points(self.correct / self.total, self.fine_tuned)
        return dict(zip(self.domains, points, strict=True))

    @override
    def plot(
        self, val: Mapping[str, Tensor] | None = None, ax: Axes | None = None
    ) -> tuple[Figure, Axes]:
        """Draw the points of every domain.

        Args:
            val: What `by_domain` gave; None: what it gives now.
            ax: Where to draw; None: in a new figure.

        Raises:
            DA3Error: Matplotlib is not installed.
        """
        figure, axes = axes_of(ax, 7.0, 1.6 + 0.32 * len(self.domains))
        points = {name: float(v) for name, v in (val or self.by_domain()).items()}
        draw_points(axes, points, as_fine_tuning=PERFECT / 4, most=PERFECT)
        return figure, axes
