"""When work arrives, and how long it took: what several storms draw and measure alike.

Arrivals are Poisson, so that they bunch as those of independent users do. A latency counts from the
time at which a call was due, and one that failed counts as the timeout: a server does not get
faster by refusing work.
"""

import random
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from bench.clock import MICROSECONDS
from bench.plan import Verb
from bench.records import MESSAGES, OPS, Frame, Outcome, Records

Mask = NDArray[np.bool_]
WARM_UP_PARTS = 15
"""A warm-up is the first of so many equal parts of a load."""


def arrivals(per_second: float, from_us: int, until_us: int, draw: random.Random) -> Iterator[int]:
    """Times of a Poisson process, ascending; none at a rate of 0."""
    if per_second <= 0:
        return
    at = float(from_us)
    while (at := at + draw.expovariate(per_second) * MICROSECONDS) < until_us:
        yield int(at)


def begins(frame: Frame, column: str, *starts: bytes) -> Mask:
    """Rows whose byte string in ``column`` begins with one of ``starts``."""
    texts = frame.text(column)
    chosen = np.fromiter((text.startswith(starts) for text in texts), np.bool_, len(texts))
    return chosen[frame[column]] if len(chosen) else np.zeros(len(frame), np.bool_)


def planned(records: Records) -> Frame:
    """Calls that actors made, not what apiservers and watchers do on their own account."""
    ops = records.frame(OPS)
    return ops.where(ops["actor"] >= 0)


def warm(records: Records, ops: Frame) -> Frame:
    """Those due after the warm-up."""
    return ops.where(ops["due"] >= records.facts["warm_up_us"])


def is_verb(ops: Frame, verbs: Sequence[Verb]) -> Mask:
    """Rows with one of these verbs."""
    return np.isin(ops["verb"], [int(verb) for verb in verbs])


def latencies_us(records: Records, ops: Frame) -> NDArray[np.int64]:
    """From when each was due to its answer; the timeout for those that failed."""
    timeout_us = records.facts["timeout_us"]
    refused = (ops["outcome"] == Outcome.REFUSED) & (ops["refusal"] == 0)
    failed = refused | (ops["outcome"] == Outcome.UNKNOWN) | (ops["done"] < 0)
    took = ops["done"] - ops["due"]
    return np.where(failed, np.maximum(took, timeout_us), took)


def percentile_ms(latencies: NDArray[np.int64], per_cent: float) -> float:
    """In milliseconds; of a sample that is there, not between two."""
    return float(np.percentile(latencies, per_cent, method="higher")) / 1000


def spread(name: str, latencies: NDArray[np.int64]) -> dict[str, float]:
    """Median and 99th percentile by name; nothing of nothing."""
    if not len(latencies):
        return {}
    return {f"{name}_p{p}_ms": percentile_ms(latencies, p) for p in (50, 99)}


def ratio(
    name: str, inside: NDArray[np.int64], outside: NDArray[np.int64], per_cent: float = 99
) -> dict[str, float]:
    """How many times slower the one than the other; nothing if either is empty."""
    if not len(inside) or not len(outside):
        return {}
    base = percentile_ms(outside, per_cent)
    return {name: percentile_ms(inside, per_cent) / base} if base > 0 else {}


def within(times: NDArray[np.int64], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Mask:
    """Times that lie in one of the spans ``[start, end)``; spans may overlap."""
    edges = np.concatenate((starts, ends))
    steps = np.concatenate((np.ones(len(starts), np.int64), -np.ones(len(ends), np.int64)))
    order = np.argsort(edges, kind="stable")
    depth = np.concatenate(([0], np.cumsum(steps[order])))
    inside: Mask = depth[np.searchsorted(edges[order], times, side="right")] > 0
    return inside


def received_us(records: Records, events: Frame) -> NDArray[np.int64]:
    """When the message came that told each of these watch events.

    Watches are renumbered first: their numbers carry that of their process in the high bits.
    """
    messages = records.frame(MESSAGES)
    order = np.lexsort((messages["message"], messages["watch"]))
    most = int(messages["message"].max(initial=0)) + 1
    watches, of_event = np.unique(messages["watch"], return_inverse=True)
    numbers = (of_event.reshape(-1) * most + messages["message"])[order]
    wanted = np.searchsorted(watches, events["watch"]) * most + events["message"]
    place = np.searchsorted(numbers, wanted)
    assert place.max(initial=-1) < len(numbers)
    assert (numbers[place] == wanted).all()
    times: NDArray[np.int64] = messages["received"][order][place]
    return times
