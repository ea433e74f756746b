"""Which part of the user's network a module of the converted one stands for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    pass


_CONVERTED = re.compile(
    r"(?P<outside>(?:.*\.)?)(?:"
    r"bank\.[^.]+\.(?:adapters\.(?P<adapter>[^.]+)(?:\..*)?|(?P<head>head)(?:\..*)?)"
    r"|backbone\.(?:host_inputs|host_outputs)\.(?P<host>[^.]+)"
    r"|backbone\.(?P<layer>.+))"
)


class Place(NamedTuple):
    """Which part of the user's network a module of the converted one stands for.

    Attributes:
        kind: ``"layer"``, ``"host"`` (its adapter and gate), ``"head"``, or ``""``: none.
        name: That part's name, as `flat` writes it.
        outside: Name of the module that holds the converted network, with a dot behind, or empty.
    """

    kind: str
    name: str
    outside: str = ""


def place_of(name: str) -> Place:
    """Where in the user's network the module `name` of a converted network is.

    ``backbone.layer1.0.relu`` is the layer ``layer1_0_relu``, and
    ``bank.digits.adapters.layer1__0__conv1.norm`` the host ``layer1_0_conv1``.
    """
    found = _CONVERTED.fullmatch(name)
    if found is None:
        return Place("", flat(name))
    outside = found["outside"]
    if found["head"]:
        return Place("head", "head", outside)
    host = found["adapter"] or found["host"]
    if host:
        return Place("host", flat(host), outside)
    return Place("layer", flat(found["layer"]), outside)


def flat(name: str) -> str:
    """A name with underscores for all else: dotted names, fx nodes and host keys become alike."""
    return re.sub(r"[\W_]+", "_", name)
