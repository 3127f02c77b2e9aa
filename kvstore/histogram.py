"""Histograms as plain numbers: one bisection and two additions each time, read when scraped."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate


class Histogram:
    """Counts observations by upper bounds, which are inclusive as in Prometheus."""

    __slots__ = ("_bounds", "_counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        assert list(bounds) == sorted(set(bounds)), "bounds grow"
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self.sum = 0.0

    def observe(self, amount: float) -> None:
        """Count one observation."""
        self._counts[bisect_left(self._bounds, amount)] += 1
        self.sum += amount

    @property
    def count(self) -> int:
        """Observations so far."""
        return sum(self._counts)

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound as text, observations not above it), the last being ``+Inf``."""
        names = [*map(_spell, self._bounds), "+Inf"]
        return list(zip(names, map(float, accumulate(self._counts)), strict=True))


def _spell(bound: float) -> str:
    return f"{bound:g}"


def doubling(first: float, count: int) -> tuple[float, ...]:
    """``count`` bounds from ``first``, each twice the one before."""
    return tuple(first * 2**n for n in range(count))
