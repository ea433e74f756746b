"""``lightning-da3 verify``: every comparison, for people and, by its exit code, for programs."""

import textwrap

import pytest

from lightning_da3.cli import main
from lightning_da3.nn.convolution import FrozenConv


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = """
    from torch import nn

    def net():
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
        )

    def bilinear():
        return nn.Bilinear(3, 3, 2)
    """
    (tmp_path / "verified_by_users.py").write_text(textwrap.dedent(source))
    return "verified_by_users"


@pytest.mark.parametrize("options", [(), ("--size", "20", "16", "--exact")], ids=" ".join)
def test_a_network_that_is_the_same(mine, capsys, options):
    assert main(["verify", f"{mine}:net", *options]) == 0
    said = capsys.readouterr().out
    assert said.count("  ok  ") == 7
    assert "outputs, eval, another batch" in said
    assert "differs" not in said


def test_a_network_that_differs(mine, capsys, monkeypatch):
    own = FrozenConv.forward
    monkeypatch.setattr(FrozenConv, "forward", lambda self, x: own(self, x) * 1.01)
    assert main(["verify", f"{mine}:net"]) == 1
    assert capsys.readouterr().out.count("differs") >= 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("net", "--size", "0"), "must be one positive number"), (("bilinear",), "nothing to adapt")],
)
def test_what_is_wrong_ends_with_a_line(mine, capsys, arguments, message):
    name, *others = arguments
    with pytest.raises(SystemExit) as ended:
        main(["verify", f"{mine}:{name}", *others])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
