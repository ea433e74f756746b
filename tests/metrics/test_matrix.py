"""The accuracy matrix and what is read from it, against small cases worked by hand."""

import pickle

import pytest
import torch
from torch import nan

from lightning_da3.errors import ConfigError, DomainError
from lightning_da3.metrics import AccuracyMatrix, average_accuracy, forgetting

DOMAINS = ("flowers", "birds", "cars")


def assert_same(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected), equal_nan=True)


def labels(*values):
    return torch.tensor(values)


def test_cells_are_fractions_and_nan_where_not_evaluated():
    matrix = AccuracyMatrix(["flowers", "birds"])
    matrix.update("flowers", "flowers", labels(1, 2, 3, 4), labels(1, 2, 3, 0))
    matrix.update("birds", "flowers", labels(1, 2), labels(0, 2))
    matrix.update("birds", "birds", labels(0), labels(0))
    assert_same(matrix.compute(), [[0.75, nan], [0.5, 1.0]])


def test_updates_of_a_cell_pool_their_samples():
    matrix = AccuracyMatrix(["flowers"])
    matrix.update("flowers", "flowers", labels(1, 1, 1), labels(1, 1, 1))
    matrix.update("flowers", "flowers", labels(1), labels(0))
    assert_same(matrix.compute(), 0.75)  # torchmetrics squeezes a single value
    assert_same(average_accuracy(matrix.compute()), 0.75)
    assert matrix.forgetting()["flowers"].isnan()


def test_scores_count_by_their_highest_over_any_further_axes():
    matrix = AccuracyMatrix(["flowers", "birds"])
    matrix.update("flowers", "flowers", torch.tensor([[0.1, 0.9], [2.0, 1.0]]), labels(1, 1))
    scores = torch.zeros(1, 3, 2, 2)  # (N, C, H, W)
    scores[0, 2, 0, 0] = 1.0
    matrix.update("birds", "birds", scores, torch.tensor([[[2, 0], [1, 1]]]))
    assert_same(matrix.compute(), [[0.5, nan], [nan, 0.5]])


def test_states_add_up_over_processes():
    first, second = AccuracyMatrix(DOMAINS), AccuracyMatrix(DOMAINS)
    first.update("flowers", "flowers", labels(1), labels(1))
    second.update("flowers", "flowers", labels(1, 1, 1), labels(0, 0, 0))
    assert {reduction.__name__ for reduction in first._reductions.values()} == {"dim_zero_sum"}
    first.merge_state(second)
    assert first.compute()[0, 0] == 0.25


def test_reset_and_pickle():
    matrix = AccuracyMatrix(DOMAINS)
    matrix.update("cars", "cars", labels(1), labels(1))
    again = pickle.loads(pickle.dumps(matrix))
    assert again.compute()[2, 2] == 1.0
    matrix.reset()
    matrix.update("flowers", "flowers", labels(1), labels(1))
    assert matrix.compute().isnan().sum() == 8


def test_unknown_names_are_errors_that_list_the_known():
    matrix = AccuracyMatrix(DOMAINS)
    message = "`after` names the unknown domain 'dogs'. Known: flowers, birds, cars."
    with pytest.raises(DomainError, match=message):
        matrix.update("dogs", "cars", labels(1), labels(1))
    with pytest.raises(DomainError, match="`on` names the unknown domain 'dogs'"):
        matrix.update("cars", "dogs", labels(1), labels(1))


@pytest.mark.parametrize("domains", [[], ["a", "b", "a"], "flowers"])
def test_bad_lists_of_domains_are_errors(domains):
    with pytest.raises(DomainError, match=r"`domains` must be a sequence of one or more different"):
        AccuracyMatrix(domains)


def test_shapes_that_do_not_fit_are_errors():
    matrix = AccuracyMatrix(["flowers"])
    with pytest.raises(ConfigError, match=r"`preds` of shape \(3,\) do not fit .* shape \(2,\)"):
        matrix.update("flowers", "flowers", labels(1, 2, 3), labels(1, 2))
    assert matrix.total.sum() == 0


def test_forgetting_is_the_best_earlier_minus_the_last():
    matrix = torch.tensor([[0.8, 0.9, nan], [0.9, 0.5, nan], [0.6, 0.7, 0.4]])
    # birds: 0.9 came before they were learnt and does not count, so they got better by 0.2
    assert_same(forgetting(matrix), [0.3, -0.2, nan])


def test_forgetting_while_domains_are_still_to_come():
    matrix = torch.full((3, 3), nan)
    assert forgetting(matrix).isnan().all()
    matrix[0, 0] = 0.8
    assert forgetting(matrix).isnan().all()
    matrix[1, :2] = torch.tensor([0.7, 0.5])
    assert_same(forgetting(matrix), [0.1, nan, nan])


def test_forgetting_by_name():
    matrix = AccuracyMatrix(["flowers", "birds"])
    matrix.update("flowers", "flowers", labels(1, 1), labels(1, 1))
    matrix.update("birds", "flowers", labels(1, 1), labels(1, 0))
    by_name = matrix.forgetting()
    assert list(by_name) == ["flowers", "birds"]
    assert by_name["flowers"] == 0.5
    assert by_name["birds"].isnan()


def test_average_is_over_the_domains_learnt():
    matrix = torch.tensor([[0.8, 0.1, nan], [0.9, 0.5, 0.2], [nan, nan, nan]])
    assert_same(average_accuracy(matrix), 0.7)
    assert average_accuracy(torch.full((2, 2), nan)).isnan()


def test_evaluations_that_were_left_out_do_not_matter():
    matrix = torch.tensor([[0.8, nan, nan], [nan, 0.5, nan], [0.6, nan, 0.4]])
    assert_same(forgetting(matrix), [0.2, nan, nan])
    assert_same(average_accuracy(matrix), 0.5)


@pytest.mark.parametrize("function", [forgetting, average_accuracy])
def test_only_square_matrices(function):
    with pytest.raises(ConfigError, match=r"`matrix` must be \(D, D\) with D > 0, got \(2, 3\)"):
        function(torch.zeros(2, 3))
