"""What metrics of domains share: names, and samples that are counted right."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_da3.errors import ConfigError, DomainError
from lightning_da3.formatting import shown


def checked_domains(domains: Sequence[str]) -> tuple[str, ...]:
    """The names, in their order.

    Raises:
        DomainError: There is none, or one comes twice.
    """
    names = tuple(domains)
    repeated = sorted({name for name in names if names.count(name) > 1})
    if isinstance(domains, str) or not names or repeated:
        raise DomainError(
            "`domains` must be a sequence of one or more different names, "
            f"got {shown(domains)}" + (f" with {repeated} more than once." if repeated else ".")
        )
    return names


def place_in(domains: Sequence[str], argument: str, name: str) -> int:
    """Where a name is among the domains.

    Raises:
        DomainError: It is not.
    """
    if name not in domains:
        raise DomainError(
            f"`{argument}` names the unknown domain {name!r}. Known: {', '.join(domains)}."
        )
    return domains.index(name)


def count_right(preds: Tensor, target: Tensor) -> tuple[Tensor, int]:
    """How many labels are right, (), and of how many.

    Args:
        preds: Scores (N, C, ...), of which the highest counts, or labels (N, ...).
        target: Labels (N, ...).

    Raises:
        ConfigError: The shapes do not fit.
    """
    labels = preds.argmax(dim=1) if preds.ndim == target.ndim + 1 else preds
    if labels.shape != target.shape:
        raise ConfigError(
            f"`preds` of shape {tuple(preds.shape)} do not fit `target` of shape "
            f"{tuple(target.shape)}. Give scores (N, C, ...) or labels (N, ...) for (N, ...)."
        )
    return (labels == target).sum(), target.numel()
