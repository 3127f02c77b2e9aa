"""Capacity: the highest rate that a target holds, not the highest that it ever reached.

A rate is held if for a minute every verdict passes, nothing fails, and latency and watch lag stay
below their gates at the 99th percentile. The load is open loop, so beyond its capacity a server
falls behind and misses them: that is the cliff which is looked for, by doubling and then halving
the distance until the step is a tenth, or one where a rate is a count.
A probe in which the generator was late is no proof against the server, but there is nothing to be
learnt above it: the search goes on below, and what it finds is a lower bound.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, NamedTuple

from bench.report.results import Results
from bench.storms import Storm

STEP = 1.1
SCALE_MAX = 256.0
SECONDS = 60.0


class Gates(NamedTuple):
    """What a rate must hold; milliseconds. The defaults are a store's share of a warm claim."""

    latency_p99_ms: float = 20.0
    watch_lag_p99_ms: float = 50.0


class Finding(Enum):
    """What one probe showed."""

    HOLDS = "holds"
    MISSES = "misses"
    UNKNOWN = "unknown"
    """The generator, not the server, was late; or there was nothing to judge by."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """The outcome of a search; both are rates that were probed."""

    holds: float
    """The largest that was held; 0: none was."""
    misses: float
    """The smallest that was not, or said nothing of the server; 0: none was found."""
    bounded: bool
    """``misses`` is the generator's, or ``SCALE_MAX`` was held: ``holds`` is a lower bound."""


def with_rate(storm: Storm[Any], parameters: Any, rate: float) -> Any:  # noqa: ANN401 - its own
    """The storm's parameters with another rate."""
    return replace(parameters, **{storm.RATE: rate})


def judge(results: Results, gates: Gates) -> tuple[Finding, str]:
    """What a session of one target and one run says, and why."""
    (target,) = results["targets"]
    if target["state"] != "PASS":
        said_nothing = target["state"] in {"INVALID", "NOT JUDGED"}
        finding = Finding.UNKNOWN if said_nothing else Finding.MISSES
        return finding, f"{target['state']}: {'; '.join(target['reasons'])}"
    figures = target["medians"]
    if figures.get("errors", 0.0):
        return Finding.MISSES, f"{figures['errors']:,.0f} errors, none is allowed"
    bounds = {
        "latency p99": (figures.get("latency_p99_us", 0.0) / 1000, gates.latency_p99_ms),
        "watch lag p99": (figures.get("watch_lag_p99_us", 0.0) / 1000, gates.watch_lag_p99_ms),
    }
    over = [
        f"{name} is {found:,.1f} ms, {bound:g} is allowed"
        for name, (found, bound) in bounds.items()
        if found > bound
    ]
    said = [f"{name} {found:.1f} ms" for name, (found, _) in bounds.items()]
    return (Finding.MISSES, "; ".join(over)) if over else (Finding.HOLDS, ", ".join(said))


def search(probe: Callable[[float], Finding], first: float) -> Capacity:
    """Find the cliff, from a first rate, with as few probes as doubling and bisection need.

    A rate that is a whole number stays one, and no rate is probed twice: neighbours are the end.
    """
    whole = isinstance(first, int)
    holds = misses = 0.0
    bounded = False
    rate = first
    while True:
        finding = probe(rate)
        if finding is Finding.HOLDS:
            holds = rate
        else:
            misses, bounded = rate, finding is Finding.UNKNOWN
        if not misses and holds >= first * SCALE_MAX:
            return Capacity(holds, misses, bounded=True)
        if not holds and misses <= first / SCALE_MAX:
            return Capacity(0.0, misses, bounded)
        if holds and misses and misses / holds <= STEP:
            return Capacity(holds, misses, bounded)
        rate = holds * 2 if not misses else misses / 2 if not holds else (holds * misses) ** 0.5
        rate = max(1, round(rate)) if whole else rate
        if rate in (holds, misses):
            return Capacity(holds, misses, bounded)
