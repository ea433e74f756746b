"""The check that a conversion ends with: what differs stays Python, and is named."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from lightning_da3.errors import ConfigError, ConversionError, ConversionWarning, DA3Error
from lightning_da3.model.model import DA3Model
from lightning_da3.verifying.batches import Known
from lightning_da3.verifying.comparing import Comparison
from lightning_da3.verifying.expected import Expected, expected_of
from lightning_da3.verifying.narrowing import MOST_TRIES, holders, modules, narrowed
from lightning_da3.verifying.room import NoRoom, lack_of_room

Build = Callable[[Mapping[str, str]], DA3Model]
_ROUNDING = 0.02  # what differs by less may differ by rounding alone
_LONG = 10.0  # seconds, from which a search is no longer silent


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
    expected = wrong = None
    for expected in _closer(network, known, thorough):
        wrong = _first_wrong(expected, model)
        if wrong is None:
            return model
    if expected is None or wrong is None:
        return model
    lacks = lack_of_room(network, torch.double)
    if lacks and expected.dtype is None and not thorough and wrong.difference < _ROUNDING:
        _warn(
            f"{type(network).__name__}: converted, it computed something else ({wrong}). That may "
            f"be rounding. A comparison in float64 would tell, but {lacks}."
        )
        return model
    found = _narrowed(network, build, expected, wrong)
    return _refusing(network, model, expected, wrong) if found is None else found


def _closer(network: nn.Module, known: Known, thorough: bool | None) -> Iterator[Expected]:
    """What is compared; each where something differed in the one before."""
    expected = _expected(network, known, thorough)
    if expected is None:
        return
    yield expected
    yield expected.with_decisions()
    if expected.dtype is None and not (thorough or lack_of_room(network, torch.double)):
        yield from _closer(network, known, thorough=True)  # rounding may be to blame


def _refusing(
    network: nn.Module, model: DA3Model, expected: Expected, wrong: Comparison
) -> DA3Model:
    """The conversion, if all that is wrong is that it does not take some inputs, and says so.

    Raises:
        ConversionError: It computes something else.
    """
    others = [c for c in expected.compare(model) if not (c.ok or c.refused)]
    if not others:
        _warn(f"{type(network).__name__} does not take every input that the network takes: {wrong}")
        return model
    codes = others[0].name.startswith("gradients") and not model.config.memory.exact
    exact = "`MemoryConfig(exact=True)` computes gradients without codes. " if codes else ""
    raise ConversionError(
        f"The converted network does not reproduce the backbone {type(network).__name__}, "
        f"whatever of it stays Python: {others[0]}. {exact}Does it compute the same each time, if "
        "generators are seeded? (`convert(..., verify=False)` does not compare.)"
    )


def comparisons(network: nn.Module, model: DA3Model, known: Known) -> list[Comparison]:
    """Everything that is compared, whether it differs or not.

    Raises:
        ConversionError: The network does not take the examples.
        ConfigError: Nobody knows what it takes.
    """
    expected = _expected(network, known, thorough=True)
    assert expected is not None  # whatever it takes
    found = list(expected.compare(model))
    return found if all(c.ok for c in found) else list(expected.with_decisions().compare(model))


def _expected(network: nn.Module, known: Known, thorough: bool | None) -> Expected | None:
    found = expected_of(network, known, thorough=thorough)
    name = type(network).__name__
    if isinstance(found, NoRoom):
        if thorough:
            raise ConfigError(f"{name} cannot be compared with its conversion: {found}.") from found
        _warn(
            f"{name} is not compared with its conversion: {found}. `convert(..., verify=True)` or "
            "`lightning-da3 verify` compares it on a machine that has more; `verify=False` says "
            "that this is meant."
        )
        return None
    if not isinstance(found, Exception):
        lacks = lack_of_room(network, torch.double) if thorough else ""
        if lacks and found is not None and found.dtype is None:
            _warn(f"{name} is compared in its own types, not in float64: {lacks}.")
        return found
    if known.examples is not None:
        raise ConversionError(f"The example inputs do not fit the network: {found}") from found
    if thorough:
        raise ConfigError(
            f"What {name} takes is not known, so it cannot be verified "
            f"({found}). Give `example_inputs`: a tensor or a tuple of its arguments."
        ) from found
    return None


def _first_wrong(expected: Expected, model: DA3Model) -> Comparison | None:
    return next((c for c in expected.compare(model) if not c.ok), None)


def _narrowed(
    network: nn.Module, build: Build, expected: Expected, wrong: Comparison
) -> DA3Model | None:
    """The conversion in which the modules that are to blame stay Python."""
    if lack_of_room(network, own=True):  # it is converted anew, again and again
        return None
    build = _announced(network, build, wrong)
    for passes in (expected.until(wrong), expected):  # at first no more than shows the difference
        for candidates in (holders(network), modules(network)):
            found = _blamed(build, passes, [*candidates], wrong)
            if found is not None and _first_wrong(expected, found[1]) is None:
                names = ", ".join(path or "the network itself" for path in found[0])
                _warn(
                    f"{type(network).__name__}: {names} stays Python, and so takes more memory. "
                    f"Turned into a graph, it computed something else ({wrong}). "
                    "`print(model.plan)` says more; `lightning-da3 verify` compares."
                )
                return found[1]
    return None


def _announced(network: nn.Module, build: Build, wrong: Comparison) -> Build:
    """The same, which says what takes so long, once it does."""
    begun, said = time.monotonic(), False

    def building(python: Mapping[str, str]) -> DA3Model:
        nonlocal said
        if not said and time.monotonic() - begun > _LONG:
            said = True
            _warn(
                f"{type(network).__name__}: converted, it computed something else ({wrong}). The "
                f"modules to blame are looked for by converting it again, at most {MOST_TRIES} "
                "times for each kind of them. `convert(..., verify=False)` leaves that out."
            )
        return build(python)

    return building


def _blamed(
    build: Build, expected: Expected, candidates: list[str], wrong: Comparison
) -> tuple[tuple[str, ...], DA3Model] | None:
    """The few candidates that must stay Python, and the network in which they do."""
    reason = f"converted, it computed something else: {wrong}"
    last: dict[frozenset[str], DA3Model] = {}

    def right(python: frozenset[str]) -> bool:
        try:
            model = build(dict.fromkeys(sorted(python), reason))
        except DA3Error:  # too little is left to adapt; but that is what the network was
            return True
        found = _first_wrong(expected, model) is None
        if found:
            last.clear()
            last[python] = model
        return found

    paths = narrowed(candidates, right)
    model = None if paths is None else last.get(frozenset(paths))
    return None if paths is None or model is None else (paths, model)


def _warn(message: str) -> None:
    warnings.warn(message, ConversionWarning, stacklevel=5)  # whoever called `convert`
