"""Rates are tried beyond a grid while its end is best."""

import pytest

GRID = [3e-3, 1e-2, 3e-2]


@pytest.mark.parametrize(
    ("said", "most", "tried", "best"),
    [
        ({}, 6, GRID, 3e-3),
        ({3e-3: 0.5, 1e-2: 0.6}, 6, GRID, 1e-2),  # not all of the grid yet
        ({3e-3: 0.5, 1e-2: 0.7, 3e-2: 0.6}, 6, GRID, 1e-2),
        ({3e-3: 0.5, 1e-2: 0.6, 3e-2: 0.7}, 6, [*GRID, 1e-1], 3e-2),
        ({3e-3: 0.5, 1e-2: 0.6, 3e-2: 0.7, 1e-1: 0.8}, 6, [*GRID, 1e-1, 3e-1], 1e-1),
        ({3e-3: 0.5, 1e-2: 0.6, 3e-2: 0.7, 1e-1: 0.8, 3e-1: 0.7}, 6, [*GRID, 1e-1, 3e-1], 1e-1),
        ({3e-3: 0.5, 1e-2: 0.6, 3e-2: 0.7, 1e-1: 0.8}, 4, [*GRID, 1e-1], 1e-1),
        ({3e-3: 0.5, 1e-2: 0.4, 3e-2: 0.3}, 6, [1e-3, *GRID], 3e-3),
        ({3e-3: 0.5, 1e-2: 0.4, 3e-2: 0.3}, 3, GRID, 3e-3),
    ],
)
def test_rates_are_tried_beyond_a_grid_while_its_end_is_best(said, most, tried, best):
    from comparison.rates import best_rate, rates_to_try

    def found(rate):
        return {"accuracy": said[rate], "loss": 1.0} if rate in said else None

    assert rates_to_try(GRID, most, found) == tried
    assert best_rate(tried, found) == best


def test_one_rate_is_taken_as_it_is():
    from comparison.rates import rates_to_try

    assert rates_to_try([1e-2], 9, lambda rate: {"accuracy": rate, "loss": 1.0}) == [1e-2]


def test_the_ladder_ends():
    from comparison.rates import LADDER, rates_to_try

    def higher_is_better(rate):
        return {"accuracy": rate, "loss": 1.0}

    assert rates_to_try(LADDER[-3:-1], 9, higher_is_better) == list(LADDER[-3:])
