"""What repetitions say about targets: medians, and ratios of medians with their uncertainty.

A mean follows its worst outlier and machines have bad minutes, so a target is its median run.
How far a ratio of two medians can be trusted is asked of the runs themselves: both sides are drawn
again with replacement, many times, and the middle 95 % of the ratios is the interval (percentile
bootstrap). Every ratio is drawn from the same seed, so it depends on no other that is made.
A handful of runs cannot support an interval: below ``REPETITIONS_MIN`` there is none.

Something against nothing (errors against none) is infinitely more, and nothing against nothing is
as much. A drawn ratio may be so too, so an interval ends at ratios that were drawn, not between.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

REPETITIONS_MIN = 5
"""Of each target, for a verdict."""
DRAWS = 10_000
INTERVAL_PERCENT = 95.0


class Ratio(NamedTuple):
    """How many times one target's median is that of another."""

    ratio: float
    """Infinite where the other has none."""
    low: float | None
    """Ends of the interval; None: too few runs for one."""
    high: float | None
    runs: int
    """Of the side that has fewer."""

    @property
    def too_few(self) -> bool:
        """May it not be called a result?"""
        return self.low is None

    @property
    def settled(self) -> bool:
        """Is one side different from the other for certain: the interval leaves 1 out?"""
        return self.low is not None and self.high is not None and not self.low <= 1 <= self.high


def median(values: Sequence[float]) -> float:
    """The middle one, or halfway between the two; there must be one at least."""
    assert values
    return float(np.median(np.asarray(values, dtype=np.float64)))


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many per cent do not exceed; there must be one at least."""
    assert values
    return float(np.percentile(np.asarray(values, np.float64), percent, method="inverted_cdf"))


def ratio(values: Sequence[float], against: Sequence[float], *, seed: int) -> Ratio | None:
    """Median over median with its interval; None of nothing to nothing."""
    if not values or not against:
        return None
    above, below = median(values), median(against)
    if not above and not below:
        return None
    point = above / below if below else np.inf
    runs = min(len(values), len(against))
    if runs < REPETITIONS_MIN:
        return Ratio(point, None, None, runs)
    draw = np.random.default_rng(abs(seed))
    drawn, other = _medians(values, draw), _medians(against, draw)
    nothing = np.where(drawn != 0, np.inf, 1.0)
    ratios = np.divide(drawn, other, out=nothing, where=other != 0)
    rest = (100 - INTERVAL_PERCENT) / 2
    low, high = np.percentile(ratios, [rest, 100 - rest], method="inverted_cdf")
    return Ratio(point, float(low), float(high), runs)


def _medians(values: Sequence[float], draw: np.random.Generator) -> np.ndarray:
    """Medians of samples drawn with replacement."""
    drawn = draw.choice(np.asarray(values, dtype=np.float64), size=(DRAWS, len(values)))
    medians: np.ndarray = np.median(drawn, axis=1)
    return medians
