"""Medians, ratios and their intervals."""

import random
from math import inf

import pytest

from bench.statistics import REPETITIONS_MIN, median, percentile, ratio


def test_median_and_percentile_of_known_values() -> None:
    """Halfway between the middle two; the smallest value that enough do not exceed."""
    assert 2.5 == median([4, 1, 2, 3])
    assert (2, 4) == (percentile([4, 1, 2, 3], 50), percentile([4, 1, 2, 3], 99))


def test_too_few_runs_have_no_interval() -> None:
    """One run less than a verdict needs, on either side, gives the ratio alone."""
    enough, few = [1.0] * REPETITIONS_MIN, [2.0] * (REPETITIONS_MIN - 1)
    for sides in ((enough, few), (few, enough)):
        found = ratio(*sides, seed=1)
        assert found is not None
        assert found.too_few
        assert not found.settled
        assert REPETITIONS_MIN - 1 == found.runs


def test_a_clear_difference_is_settled_and_noise_is_not() -> None:
    """Runs that do not overlap settle it; runs drawn from one distribution do not."""
    clear = ratio([1.0, 1.1, 1.2, 1.0, 1.1], [2.0, 2.1, 1.9, 2.2, 2.0], seed=1)
    noise = ratio([1.0, 1.4, 0.8, 1.1, 0.9], [1.1, 0.8, 1.3, 1.0, 0.9], seed=1)
    assert clear is not None
    assert noise is not None
    assert clear.settled
    assert clear.ratio == pytest.approx(1.1 / 2.0)
    assert not noise.settled


def test_one_seed_gives_one_interval() -> None:
    """The interval is a function of runs and seed, whatever was drawn before."""
    draw = random.Random(2)
    sides = [[draw.random() + 1 for _ in range(20)] for _ in range(2)]
    assert ratio(*sides, seed=3) == ratio(*sides, seed=3)
    assert ratio(*sides, seed=3) != ratio(*sides, seed=4)


def test_something_against_nothing_is_infinitely_more() -> None:
    """Fifty errors against none are a difference, and settled if they always were."""
    found = ratio([50.0, 49, 51, 50, 52], [0.0] * 5, seed=1)
    assert found is not None
    assert (inf, inf, inf) == (found.ratio, found.low, found.high)
    assert found.settled
    few = ratio([50.0], [0.0], seed=1)
    assert few is not None
    assert (inf, True) == (few.ratio, few.too_few)


def test_errors_now_and_then_settle_nothing() -> None:
    """Where runs without errors are as likely on both sides the interval reaches down to 1."""
    found = ratio([50.0, 0, 51, 0, 52], [0.0, 0, 0, 0, 1], seed=1)
    assert found is not None
    assert inf == found.high
    assert not found.settled


def test_nothing_against_nothing_has_no_ratio() -> None:
    """Nor has what was not measured."""
    assert ratio([0.0], [0.0], seed=1) is None
    assert ratio([], [1.0], seed=1) is None
    assert ratio([1.0], [], seed=1) is None


def test_a_seed_may_be_negative() -> None:
    """Whatever seed a session was made with, its ratios can be drawn."""
    assert ratio([1.0] * 5, [2.0] * 5, seed=-1) is not None


@pytest.mark.slow
def test_intervals_hold_the_true_ratio() -> None:
    """Of nine runs each side the true ratio is in most intervals; five would hold it less."""
    draw = random.Random(5)
    held = 0
    for seed in range(100):
        above, below = ([draw.gauss(mean, 1.0) for _ in range(9)] for mean in (20, 40))
        found = ratio(above, below, seed=seed)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0.5 <= found.high
    assert held >= 85
