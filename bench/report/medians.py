"""Several runs of one target as one: median figures, one latency curve, one course of the load."""

from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
from hdrh.histogram import HdrHistogram

from bench.figures import Windows, histogram
from bench.statistics import median

CURVE_POINTS_PER_DECADE = 16


class Course(TypedDict):
    """One figure over the time of the load: the median run, the lowest and the highest."""

    middle: list[float | None]
    low: list[float | None]
    high: list[float | None]


def medians(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of figures that every run has."""
    if not values:
        return {}
    names = [name for name in values[0] if all(name in run for run in values)]
    return {name: median([run[name] for run in values]) for name in names}


def curve(histograms: Sequence[HdrHistogram]) -> list[list[float]]:
    """Latency at percentiles that come closer and closer to 100, the last of one operation."""
    together = histogram()
    for one in histograms:
        together.add(one)
    total = together.get_total_count()
    if not total:
        return []
    points = int(np.log10(total) * CURVE_POINTS_PER_DECADE) + 1
    nines = [n / CURVE_POINTS_PER_DECADE for n in range(points)]
    percents = [100 * (1 - 10**-n) for n in nines]
    found = together.get_percentile_to_value_dict(percents)
    return [[n, found[percent]] for n, percent in zip(nines, percents, strict=True)]


def course(windows: Sequence[Windows]) -> dict[str, Course]:
    """How each figure went over the time of the load."""
    names = [name for name in windows[0] if name != "width_us"] if windows else []
    return {name: _middle([dict(one)[name] for one in windows]) for name in names}


def _middle(series: Sequence[object]) -> Course:
    course = Course(middle=[], low=[], high=[])
    lists = [one for one in series if isinstance(one, list)]
    for n in range(max(map(len, lists), default=0)):
        known = [one[n] for one in lists if n < len(one) and one[n] is not None]
        course["middle"].append(median(known) if known else None)
        course["low"].append(min(known, default=None))
        course["high"].append(max(known, default=None))
    return course
