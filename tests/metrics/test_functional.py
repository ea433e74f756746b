"""Transfer and the decathlon, against cases worked by hand."""

import doctest
import importlib
import itertools

import pytest
import torch
from torch import nan

from lightning_da3.errors import ConfigError, DomainError
from lightning_da3.metrics import (
    VISUAL_DECATHLON,
    AccuracyMatrix,
    DecathlonScore,
    backward_transfer,
    decathlon_points,
    decathlon_score,
    forward_transfer,
)

MATRIX = torch.tensor([[0.8, 0.3, 0.1], [0.9, 0.5, 0.2], [0.6, 0.7, 0.4]])


@pytest.mark.parametrize("name", ["functional", "matrix", "decathlon"])
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"lightning_da3.metrics.{name}")
    failed, tried = doctest.testmod(module, extraglobs={"torch": torch})
    assert tried > 3
    assert not failed


def test_backward_transfer_is_the_last_row_minus_the_diagonal():
    assert backward_transfer(MATRIX) == pytest.approx(((0.6 - 0.8) + (0.7 - 0.5)) / 2, abs=1e-6)
    half = MATRIX.clone()
    half[2] = nan  # the third is still to come
    assert backward_transfer(half) == pytest.approx(0.1)
    assert backward_transfer(torch.tensor(0.5)).isnan()
    assert backward_transfer(torch.full((2, 2), nan)).isnan()


def test_forward_transfer_is_the_upper_diagonal_minus_chance():
    chance = torch.tensor([0.5, 0.25, 0.1])
    assert forward_transfer(MATRIX, chance) == pytest.approx((0.05 + 0.1) / 2, abs=1e-6)
    half = MATRIX.clone()
    half[1:] = nan
    assert forward_transfer(half, chance).isnan()  # one domain was learnt
    assert forward_transfer(torch.tensor(0.5), torch.tensor([0.1])).isnan()
    with pytest.raises(ConfigError, match=r"`untrained` must be \(3,\)"):
        forward_transfer(MATRIX, chance[:2])


def test_the_matrix_reads_the_same_from_itself():
    matrix = AccuracyMatrix(["a", "b"])
    for after, on, right in (("a", "a", 8), ("a", "b", 3), ("b", "a", 6), ("b", "b", 9)):
        target = torch.zeros(10, dtype=torch.long)
        matrix.update(after, on, (torch.arange(10) >= right).long(), target)
    assert matrix.average_accuracy() == pytest.approx(0.75)
    assert matrix.backward_transfer() == pytest.approx(-0.2)
    assert matrix.forward_transfer(torch.tensor([0.1, 0.1])) == pytest.approx(0.2)


def test_ten_domains_as_good_as_fine_tuning_have_2500_points():
    tuned = torch.tensor([*VISUAL_DECATHLON.values()])
    assert len(tuned) == 10
    assert decathlon_score(tuned, tuned) == pytest.approx(2500, abs=0.01)
    assert decathlon_score(torch.ones(10), tuned) == pytest.approx(10_000)
    assert decathlon_score(torch.zeros(10), tuned) == 0


def test_points_are_those_of_the_formula_as_published():
    accuracy, tuned = torch.rand(7, dtype=torch.float64), torch.full((7,), 0.6).double()
    most = 2 * (1 - tuned)
    expected = 1000 / most**2 * (most - (1 - accuracy)).clamp(min=0) ** 2
    torch.testing.assert_close(decathlon_points(accuracy, tuned), expected)


def test_what_was_not_evaluated_has_no_points():
    score = DecathlonScore({"a": 0.5, "b": 0.5})
    score.update("a", torch.tensor([[0.1, 0.9]]), torch.tensor([1]))
    assert score.compute() == 1000
    assert score.by_domain()["b"].isnan()


@pytest.mark.parametrize("wrong", [{"a": 1.0}, {"a": -0.1}, {"a": nan}, 3])
def test_accuracies_that_are_none(wrong):
    with pytest.raises(ConfigError):
        DecathlonScore(wrong)
    with pytest.raises(ConfigError, match="fractions"):
        decathlon_score(torch.tensor([80.0]), torch.tensor([0.5]))


def test_names_and_shapes_of_the_decathlon():
    with pytest.raises(DomainError, match="one or more"):
        DecathlonScore({})
    score = DecathlonScore({"a": 0.5})
    with pytest.raises(DomainError, match="`domain` names the unknown domain 'b'"):
        score.update("b", torch.tensor([1]), torch.tensor([1]))
    with pytest.raises(ConfigError, match="do not fit"):
        score.update("a", torch.tensor([1, 2]), torch.tensor([1]))
    with pytest.raises(ConfigError, match=r"\(D,\)"):
        decathlon_score(torch.ones(2), torch.tensor([0.5]))


@pytest.mark.parametrize("metric", [AccuracyMatrix(["a", "b"]), DecathlonScore({"a": 0.5})])
def test_plots_are_drawn_where_the_caller_wants(metric):
    from lightning_da3.plotting.figure import new_figure

    labels = torch.tensor([1, 0])
    given = ("a", "a") if isinstance(metric, AccuracyMatrix) else ("a",)
    metric.update(*given, labels, labels)
    mine = new_figure(4, 3)
    own = mine.add_subplot()
    assert metric.plot(ax=own) == (mine, own)
    figure, axes = metric.plot()
    assert axes in figure.axes
    assert axes.get_title()
    figure.draw_without_rendering()


def two_ranks(other):
    """Settings of a process in a world of two, whose other one has the state of `other`."""
    names = itertools.cycle(["correct", "total"])  # in the order in which they were added

    def gather(tensor, group=None):
        return [tensor, getattr(other, next(names))]

    return {"dist_sync_fn": gather, "distributed_available_fn": lambda: True}


def test_processes_add_up():
    other = DecathlonScore({"a": 0.5, "b": 0.5})
    other.update("b", torch.tensor([1, 1, 1]), torch.tensor([1, 0, 0]))
    score = DecathlonScore({"a": 0.5, "b": 0.5}, **two_ranks(other))
    score.update("b", torch.tensor([1]), torch.tensor([1]))
    assert score.compute() == 250  # two of four, as in fine-tuning
    assert score.by_domain()["b"] == 250
    assert score.total.sum() == 1  # its own again

    other = AccuracyMatrix(["a", "b"])
    other.update("a", "a", torch.tensor([1, 1, 1]), torch.tensor([1, 0, 0]))
    matrix = AccuracyMatrix(["a", "b"], **two_ranks(other))
    matrix.update("a", "a", torch.tensor([1, 1]), torch.tensor([1, 1]))
    assert matrix.compute()[0, 0] == 0.6
    assert matrix.average_accuracy() == pytest.approx(0.6)
