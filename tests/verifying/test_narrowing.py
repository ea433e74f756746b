"""Which candidates are to blame, in how many tries."""

import pytest
from helpers.verified import CONFIG, Net

from lightning_da3 import ConversionWarning, convert
from lightning_da3.passes import rewriting
from lightning_da3.verifying.narrowing import MOST_TRIES, narrowed

CANDIDATES = [f"part {i}" for i in range(500)]


def found(*needed):
    """What is found, and in how many tries, where these are to blame."""
    asked = []

    def right(paths):
        asked.append(paths)
        return paths >= {f"part {i}" for i in needed}

    return narrowed(CANDIDATES, right), asked


@pytest.mark.parametrize("needed", [(), (0,), (499,), (250, 3)])
def test_a_few_are_found_exactly(needed):
    paths, asked = found(*needed)
    assert paths is not None
    assert set(paths) == {f"part {i}" for i in needed}
    assert len(asked) == len(set(asked)) <= MOST_TRIES


def test_none_where_all_do_not_help():
    assert found(1000)[0] is None


@pytest.mark.parametrize("needed", [range(0, 500, 7), range(20, 26), (499, 498, 100, 90, 80)])
def test_many_are_among_what_is_found_in_a_bounded_number_of_tries(needed):
    paths, asked = found(*needed)
    assert paths is not None
    assert set(paths) >= {f"part {i}" for i in needed}
    assert len(asked) == MOST_TRIES
    assert len(set(paths)) == len(paths) < 500
    last = [seen for seen in asked if seen >= {f"part {i}" for i in needed}][-1]
    assert frozenset(paths) == last  # whoever converts has this one at hand


def test_a_search_that_takes_long_says_so(monkeypatch):
    def drop_(part, plan, config):
        for node in [n for n in part.gm.graph.nodes if n.op == "call_module"]:
            if part.user_name(node.target).startswith("b.relu"):
                node.replace_all_uses_with(node.args[0])
                part.gm.graph.erase_node(node)

    last = rewriting.in_every_part(drop_)
    monkeypatch.setattr(rewriting, "ORDER", (*rewriting.ORDER, last))
    monkeypatch.setattr("lightning_da3.verifying.verification._LONG", -1.0)
    with pytest.warns(ConversionWarning) as said:
        convert(Net(), CONFIG)
    texts = [str(warning.message) for warning in said]
    assert len(texts) == 2
    assert f"at most {MOST_TRIES} times" in texts[0]
    assert "b stays Python" in texts[1]
