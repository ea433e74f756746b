"""Which batch norms go into the convolution before them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import fx

from lightning_da3.layers import CONVS
from lightning_da3.planning.layers import has_statistics
from lightning_da3.tracing.graphs import module_of


def _calls(gm: fx.GraphModule) -> Counter[int]:
    return Counter(id(m) for n in gm.graph.nodes if (m := module_of(gm, n)) is not None)


def find_folds(gm: fx.GraphModule, head: str | None) -> Iterator[tuple[str, str]]:
    """(batch norm node, convolution node): ``bn(conv(x))`` where nobody else reads conv(x)."""
    calls = _calls(gm)
    for node in gm.graph.nodes:
        norm = module_of(gm, node)
        if not has_statistics(norm):
            continue
        before = node.args[0]
        conv = module_of(gm, before) if isinstance(before, fx.Node) else None
        if (
            type(conv) in CONVS
            and len(before.users) == 1
            and calls[id(conv)] == 1
            and calls[id(norm)] == 1
            and str(before.target) != head
        ):
            yield node.name, before.name
