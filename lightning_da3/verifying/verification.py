"""The check that a conversion ends with: what differs stays Python, and is named."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

from torch import nn

from lightning_da3.errors import ConfigError, ConversionError, ConversionWarning, DA3Error
from lightning_da3.model.model import DA3Model
from lightning_da3.verifying.batches import Known
from lightning_da3.verifying.comparing import Comparison
from lightning_da3.verifying.expected import Expected, expected_of
from lightning_da3.verifying.narrowing import holders, modules, narrowed

Build = Callable[[Mapping[str, str]], DA3Model]


def verified(
    network: nn.Module, model: DA3Model, build: Build, known: Known, *, thorough: bool | None
) -> DA3Model:
    """The network's conversion, which computes what the network does.

    Args:
        network: The user's; left unchanged.
        model: Its conversion.
        build: Converts it again; takes the modules that must stay Python, and why, by their paths.
        known: Of the network's arguments.
        thorough: None: as far as that is quick, and if anything is known.

    Raises:
        ConversionError: Whatever stays Python, it computes something else; or the network does not
            take the examples.
        ConfigError: It should be verified, and nobody knows what it takes.
    """
    expected = _expected(network, known, thorough)
    wrong = None if expected is None else _first_wrong(expected, model)
    if wrong is None:
        return model
    if expected is not None and expected.dtype is None and not thorough:  # rounding may be to blame
        expected = _expected(network, known, thorough=True)
        wrong = None if expected is None else _first_wrong(expected, model)
    if expected is None or wrong is None:
        return model
    return _narrowed(network, build, expected, wrong)


def comparisons(network: nn.Module, model: DA3Model, known: Known) -> list[Comparison]:
    """Everything that is compared, whether it differs or not.

    Raises:
        ConversionError: The network does not take the examples.
        ConfigError: Nobody knows what it takes.
    """
    expected = _expected(network, known, thorough=True)
    assert expected is not None  # whatever it takes
    return list(expected.compare(model))


def _expected(network: nn.Module, known: Known, thorough: bool | None) -> Expected | None:
    found = expected_of(network, known, thorough=thorough)
    if not isinstance(found, Exception):
        return found
    if known.examples is not None:
        raise ConversionError(f"The example inputs do not fit the network: {found}") from found
    if thorough:
        raise ConfigError(
            f"What {type(network).__name__} takes is not known, so it cannot be verified "
            f"({found}). Give `example_inputs`: a tensor or a tuple of its arguments."
        ) from found
    return None


def _first_wrong(expected: Expected, model: DA3Model) -> Comparison | None:
    return next((c for c in expected.compare(model) if not c.ok), None)


def _narrowed(network: nn.Module, build: Build, expected: Expected, wrong: Comparison) -> DA3Model:
    """The conversion in which the modules that are to blame stay Python."""
    reason = f"converted, it computed something else: {wrong}"
    built: dict[frozenset[str], DA3Model] = {}

    def right(python: frozenset[str]) -> bool:
        try:
            model = build(dict.fromkeys(sorted(python), reason))
        except DA3Error:  # too little is left to adapt; but that is what the network was
            return True
        found = _first_wrong(expected, model) is None
        if found:
            built[python] = model
        return found

    for candidates in (holders(network), modules(network)):
        blamed = narrowed([*candidates], right)
        if blamed is not None and frozenset(blamed) in built:
            names = ", ".join(path or "the network itself" for path in blamed)
            warnings.warn(
                f"{type(network).__name__}: {names} stays Python, and so takes more memory. Turned "
                f"into a graph, it computed something else ({wrong}). `print(model.plan)` says "
                "more; `lightning-da3 verify` compares.",
                ConversionWarning,
                stacklevel=4,
            )
            return built[frozenset(blamed)]
    raise ConversionError(
        f"The converted network does not reproduce the backbone {type(network).__name__}, "
        f"whatever of it stays Python: {wrong}. Does it compute the same each time, if generators "
        "are seeded? (`convert(..., verify=False)` does not compare.)"
    )
