"""Whether the generator may be believed: how late it was, and how much of its CPU it used.

A generator that is late measures itself, and what was measured then says nothing about the server.

- The *send lag* is from when a call could have been sent to when it was. It could be sent when it
  was due and what it depends on was there: the answer to its actor's call before, the pause that an
  actor makes after a failure, and the lease that it carries. A slow server delays these and is not
  the generator's fault. Nor are servers and connections that a disturbance took away, and what
  follows a step that was given up without a call: when that was is not known.
- The CPU is that of one core for each process; the busiest process counts.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from bench.clock import MICROSECONDS
from bench.drive.actor import BACKOFF_US
from bench.plan import Verb
from bench.records import INCIDENTS, OPS, Frame, Outcome, Records

SEND_LAG_P99_US_MAX = 5_000
GENERATOR_CPU_MAX = 0.8
"""Of a core, for each generator process."""
RECOVERY_US = 2 * MICROSECONDS
"""For so long after a disturbance connections are made anew; what waits for one is not late."""

Integers = NDArray[np.int64]


def punctuality(records: Records, end_us: int) -> dict[str, float]:
    """How late it was until then; a 99th percentile even of few calls, as it is a gate."""
    lags = _send_lags(records, end_us)
    if not len(lags):
        return {}
    median, high = np.percentile(lags, [50, 99], method="inverted_cdf").tolist()
    return {"send_lag_p50_us": median, "send_lag_p99_us": high}


def objections(values: Mapping[str, float]) -> Iterator[str]:
    """Why the generator cannot be trusted in a run with these figures."""
    lag = values.get("send_lag_p99_us", 0)
    if lag > SEND_LAG_P99_US_MAX:
        yield f"send lag p99 {lag / 1000:.1f} ms, {SEND_LAG_P99_US_MAX / 1000:.0f} ms is allowed"
    used = values.get("generator_cores_max", 0)
    if used > GENERATOR_CPU_MAX:
        share = f"{used:.0%} of a core in one process"
        yield f"generator used {share}, {GENERATOR_CPU_MAX:.0%} is allowed"


def _send_lags(records: Records, end_us: int) -> Integers:
    """Microseconds from when each call could have been sent to when it was."""
    facts, ops = records.facts, records.frame(OPS)
    order = np.lexsort((ops["op"], ops["actor"]))
    names = ("actor", "step", "verb", "due", "sent", "done", "outcome", "lease")
    rows = Frame({name: ops[name][order] for name in names}, {})
    unsent = (rows["sent"] < 0) & (rows["due"] >= 0)
    ended = np.where(rows["done"] < 0, rows["sent"] + facts["timeout_us"], rows["done"])
    failed = (rows["done"] < 0) | np.isin(rows["outcome"], (Outcome.REFUSED, Outcome.UNKNOWN))
    follows = (rows["actor"][1:] == rows["actor"][:-1]) & (rows["actor"][1:] >= 0)
    pause = np.where(failed[:-1] & (rows["step"][1:] != rows["step"][:-1]), BACKOFF_US, 0)
    ready = rows["due"].copy()
    ready[1:] = np.where(follows, np.maximum(ready[1:], ended[:-1] + pause), ready[1:])
    ready = np.maximum(ready, _granted(rows))
    counted = (rows["due"] >= facts["warm_up_us"]) & (rows["due"] <= end_us)
    counted &= ~unsent & (rows["actor"] >= 0)
    counted[1:] &= ~(follows & unsent[:-1])
    incidents = records.frame(INCIDENTS)
    for at, until in zip(incidents["at"].tolist(), incidents["until"].tolist(), strict=True):
        counted &= (rows["sent"] < at) | (ready > max(at, until) + RECOVERY_US)
    lags: Integers = (rows["sent"] - ready)[counted]
    return np.maximum(lags, 0)


def _granted(rows: Frame) -> Integers:
    """When the lease that a call carries was there; the beginning of time without one."""
    never = np.iinfo(np.int64).min
    grants = rows.where((rows["verb"] == Verb.GRANT) & (rows["done"] >= 0) & (rows["lease"] > 0))
    if not len(grants):
        return np.full(len(rows), never)
    grants = grants.where(np.argsort(grants["lease"], kind="stable"))
    place = np.minimum(np.searchsorted(grants["lease"], rows["lease"]), len(grants) - 1)
    carries = (grants["lease"][place] == rows["lease"]) & (rows["verb"] != Verb.GRANT)
    return np.where(carries, grants["done"][place], never)
