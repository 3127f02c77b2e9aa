"""The figures of one run, made from its raw records and nothing else.

What is counted, and what for:

- The *latency* of an operation counts from when it was due, its *service* time from when it was
  sent. The first is what a caller waits, and is the headline; the second shows what of it was the
  server's.
- An operation that failed or was never answered took as long as its timeout, at least, in both, and
  stands in the error budget. None is dropped.
- A lost comparison (CONFLICT) is an answer, and so are a refusal that the plan asks for and one of
  history that was compacted. They are counted apart from what wrote or read: they cost less.
- Operations due during the warm-up are left out.
- The *send lag* is how late the generator was: from when an operation could have been sent to when
  it was. It could be sent when it was due and the answers it depends on were there: that of its
  actor's operation before, and that of the lease it carries. A slow server delays these and is not
  the generator's fault. Nor are servers and connections that a disturbance took away.
- The *watch lag* of an event counts from when its write was sent, over watches that were open by
  then; a watch that catches up shows history. As a second, it counts from the write's answer, and
  is zero where the event was there first. Watchers that read slowly on purpose are left out.
- The server's CPU is divided by the operations it answered, and once more by events delivered.

A run whose generator was late, or short of CPU, says nothing about the server: it is INVALID.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from hdrh.histogram import HdrHistogram
from numpy.typing import NDArray

from bench.clock import MICROSECONDS
from bench.plan import Verb
from bench.records import (
    EVENTS,
    INCIDENTS,
    MESSAGES,
    OPS,
    SAMPLES,
    WATCHES,
    Frame,
    Outcome,
    Records,
)
from bench.storms import timing

LATENCY_US_MAX = 3600 * MICROSECONDS
"""What takes longer counts as an hour."""
DIGITS = 3
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p999": 99.9}
SEND_LAG_P99_US_MAX = 5_000
GENERATOR_CPU_MAX = 0.8
"""Of a core, for each generator process."""
RECOVERY_US = 2 * MICROSECONDS
"""For so long after a disturbance connections are made anew; what waits for one is not late."""
SHORT_LOAD_US = 120 * MICROSECONDS
"""Loads shorter than this have windows of one second, others of ten."""
COMPACTED = 11
"""gRPC code of a revision that is compacted: OUT_OF_RANGE."""
ALL = "all"

Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]


class Class(TypedDict):
    """Operations of one kind; percentiles only where there are operations beyond them."""

    count: int
    latency_us: dict[str, int]
    service_us: dict[str, int]


class Windows(TypedDict):
    """The course of the load, one entry a window; None where nothing happened."""

    width_us: int
    rate_per_second: list[float | None]
    """Operations that succeeded, by when they were answered."""
    latency_p50_us: list[float | None]
    """By when they were due."""
    latency_p99_us: list[float | None]
    watch_lag_p99_us: list[float | None]
    """By when the write was sent."""
    server_cores: list[float | None]
    server_rss_bytes: list[float | None]


@dataclass(frozen=True, slots=True)
class Figures:
    """What one run measured."""

    values: dict[str, float]
    """By name with unit last; what could not be measured is absent."""
    classes: dict[str, Class]
    """``all``, ``verb CREATE``, ``role claim.assign``, ``conflict``, ``refusal``."""
    errors: dict[str, int]
    """The error budget: operations by outcome and gRPC code."""
    windows: Windows
    latency: HdrHistogram
    """Of all operations but conflicts and refusals, to be added to that of other runs."""
    invalid: list[str]
    """Why the run says nothing about the server; empty if it does."""


@dataclass(frozen=True, slots=True)
class _Operations:
    """Operations after the warm-up, with what is known of each."""

    rows: Frame
    roles: Sequence[bytes]
    """By the codes in ``rows``."""
    failed: Mask
    conflict: Mask
    refusal: Mask
    latency: Integers
    service: Integers

    @property
    def plain(self) -> Mask:
        """Neither conflicts nor refusals; failures included."""
        return ~(self.conflict | self.refusal)

    @property
    def succeeded(self) -> Mask:
        """Written or read as asked."""
        return self.plain & ~self.failed


@dataclass(frozen=True, slots=True)
class _Lags:
    """Events of writes after the warm-up, seen by watches that were open."""

    sent: Integers
    from_sent: Integers
    from_done: Integers
    cached: Mask
    """Of an apiserver's cache, not of a watcher of its own."""


def figures(records: Records) -> Figures:
    """All figures of one run."""
    operations = _operations(records)
    lags = _lags(records)
    latency = _histogram(operations.latency[operations.plain])
    values = {
        **_counts(records, operations),
        **_percentiles("latency", latency),
        **_percentiles("service", _histogram(operations.service[operations.plain])),
        **_percentiles("watch_lag", _histogram(lags.from_sent[lags.cached])),
        **_percentiles("watch_lag_after_answer", _histogram(lags.from_done[lags.cached])),
        **_percentiles("watcher_lag", _histogram(lags.from_sent[~lags.cached])),
        **_punctuality(records),
        **_resources(records, operations),
    }
    return Figures(
        values=values,
        classes=_classes(operations),
        errors=_errors(operations),
        windows=_windows(records, operations, lags),
        latency=latency,
        invalid=list(_objections(values)),
    )


def histogram() -> HdrHistogram:
    """An empty one, to add others to."""
    return HdrHistogram(1, LATENCY_US_MAX, DIGITS)


def _histogram(times_us: Integers) -> HdrHistogram:
    filled = histogram()
    times, counts = np.unique(np.clip(times_us, 0, LATENCY_US_MAX), return_counts=True)
    for time, count in zip(times.tolist(), counts.tolist(), strict=True):
        recorded = filled.record_value(time, count)
        assert recorded
    return filled


def _known(filled: HdrHistogram) -> dict[str, int]:
    """The median, and percentiles that a count of this size has: a value or more is beyond."""
    total = filled.get_total_count()
    asked = [p for p in PERCENTILES.values() if p <= 50 or total * (100 - p) >= 100 - 1e-6]
    found = filled.get_percentile_to_value_dict(asked) if total else {}
    return {name: int(found[p]) for name, p in PERCENTILES.items() if p in found}


def _percentiles(name: str, filled: HdrHistogram) -> dict[str, float]:
    return {f"{name}_{percent}_us": value for percent, value in _known(filled).items()}


def _seconds(records: Records) -> float:
    """Length of the load without its warm-up."""
    facts = records.facts
    return max(1, _end_us(records) - facts["warm_up_us"]) / MICROSECONDS


def _end_us(records: Records) -> int:
    """When the last step was answered; of a run that was stopped, when it would have ended."""
    end = records.facts["load_end_us"]
    return end if end > 0 else records.facts["duration_us"]


def _operations(records: Records) -> _Operations:
    facts, rows = records.facts, records.frame(OPS)
    counted = (rows["due"] >= facts["warm_up_us"]) & (rows["due"] <= _end_us(records))
    names = ("verb", "due", "sent", "done", "outcome", "code", "refusal", "role")
    roles, rows = rows.text("role"), _columns(rows, counted, *names)
    outcome, done = rows["outcome"], rows["done"]
    unanswered = done < 0
    conflict = (outcome == Outcome.CONFLICT) & ~unanswered
    refused = (outcome == Outcome.REFUSED) & ~unanswered
    refusal = refused & (rows["refusal"] > 0) & (rows["code"] == rows["refusal"])
    refusal |= refused & (rows["verb"] == Verb.READ_AT) & (rows["code"] == COMPACTED)
    failed = unanswered | (outcome == Outcome.UNKNOWN) | (refused & ~refusal)
    at_least = np.where(failed, facts["timeout_us"], 0)
    latency = np.where(unanswered, 0, done - rows["due"])
    service = np.where(unanswered, 0, done - rows["sent"])
    return _Operations(
        rows=rows,
        roles=roles,
        failed=failed,
        conflict=conflict,
        refusal=refusal,
        latency=np.maximum(latency, at_least),
        service=np.maximum(service, at_least),
    )


def _counts(records: Records, operations: _Operations) -> dict[str, float]:
    succeeded = int(operations.succeeded.sum())
    counts = {
        "operations": len(operations.rows),
        "sends": int((operations.rows["sent"] >= 0).sum()),
        "errors": int(operations.failed.sum()),
        "conflicts": int(operations.conflict.sum()),
        "refusals": int(operations.refusal.sum()),
        "rate_per_second": succeeded / _seconds(records),
    }
    if succeeded:
        counts["conflicts_per_success"] = counts["conflicts"] / succeeded
    return counts


def _classes(operations: _Operations) -> dict[str, Class]:
    """Every class that has an operation, by name."""
    rows = operations.rows
    masks = {ALL: operations.plain}
    for verb in Verb:
        masks[f"verb {verb.name}"] = operations.plain & (rows["verb"] == verb)
    for code in np.unique(rows["role"]).tolist():
        if role := operations.roles[code].decode():
            masks[f"role {role}"] = operations.plain & (rows["role"] == code)
    masks |= {"conflict": operations.conflict, "refusal": operations.refusal}
    return {name: _class(operations, mask) for name, mask in masks.items() if mask.any()}


def _class(operations: _Operations, mask: Mask) -> Class:
    return Class(
        count=int(mask.sum()),
        latency_us=_known(_histogram(operations.latency[mask])),
        service_us=_known(_histogram(operations.service[mask])),
    )


def _errors(operations: _Operations) -> dict[str, int]:
    """Failures by outcome and code, ``UNKNOWN 14``; ``unanswered`` for those without any."""
    failed = operations.rows.where(operations.failed)
    budget: dict[str, int] = {}
    unanswered = failed["done"] < 0
    if unanswered.any():
        budget["unanswered"] = int(unanswered.sum())
    answered = np.stack((failed["outcome"], failed["code"]), axis=1)[~unanswered]
    kinds, counts = np.unique(answered, axis=0, return_counts=True)
    for (outcome, code), count in zip(kinds.tolist(), counts.tolist(), strict=True):
        budget[f"{Outcome(outcome).name} {code}"] = count
    return budget


def _punctuality(records: Records) -> dict[str, float]:
    """How late the generator was; a 99th percentile even of few operations, as it is a gate."""
    lags = _send_lags(records)
    if not len(lags):
        return {}
    median, high = np.percentile(lags, [50, 99], method="inverted_cdf").tolist()
    return {"send_lag_p50_us": median, "send_lag_p99_us": high}


def _send_lags(records: Records) -> Integers:
    """Microseconds from when each operation could have been sent to when it was."""
    facts, rows = records.facts, records.frame(OPS)
    order = np.lexsort((rows["op"], rows["sent"], rows["actor"]))
    rows = _columns(rows, order, "actor", "verb", "due", "sent", "done", "lease")
    gave_up = rows["sent"] + facts["timeout_us"]
    ended = np.where(rows["done"] < 0, gave_up, rows["done"])
    ready = rows["due"].copy()
    follows = (rows["actor"][1:] == rows["actor"][:-1]) & (rows["actor"][1:] >= 0)
    ready[1:] = np.where(follows, np.maximum(ready[1:], ended[:-1]), ready[1:])
    ready = np.maximum(ready, _granted(rows))
    counted = (rows["due"] >= facts["warm_up_us"]) & (rows["due"] <= _end_us(records))
    counted &= (rows["sent"] >= 0) & (rows["actor"] >= 0)
    incidents = records.frame(INCIDENTS)
    for at, until in zip(incidents["at"].tolist(), incidents["until"].tolist(), strict=True):
        counted &= (rows["sent"] < at) | (ready > max(at, until) + RECOVERY_US)
    lags: Integers = (rows["sent"] - ready)[counted]
    return np.maximum(lags, 0)


def _columns(rows: Frame, chosen: Integers | Mask, *names: str) -> Frame:
    """Some columns of some rows: a copy of millions of rows in all their columns is a gigabyte."""
    return Frame({name: rows[name][chosen] for name in names}, {})


def _granted(rows: Frame) -> Integers:
    """When the lease that an operation carries was there; the beginning of time without one."""
    never = np.iinfo(np.int64).min
    grants = rows.where((rows["verb"] == Verb.GRANT) & (rows["done"] >= 0) & (rows["lease"] > 0))
    if not len(grants):
        return np.full(len(rows), never)
    grants = grants.where(np.argsort(grants["lease"], kind="stable"))
    place = np.minimum(np.searchsorted(grants["lease"], rows["lease"]), len(grants) - 1)
    carries = (grants["lease"][place] == rows["lease"]) & (rows["verb"] != Verb.GRANT)
    return np.where(carries, grants["done"][place], never)


def _lags(records: Records) -> _Lags:
    writes = _writes(records)
    events, watches = records.frame(EVENTS), records.frame(WATCHES)
    none = np.empty(0, dtype=np.int64)
    if not len(writes) or not len(events):
        return _Lags(none, none, none, none.astype(np.bool_))
    write = np.minimum(np.searchsorted(writes["revision"], events["mod"]), len(writes) - 1)
    known = writes["revision"][write] == events["mod"]
    write, events = write[known], _columns(events, known, "watch", "message")
    watch = _found(watches["watch"], events["watch"])
    sent, done = writes["sent"][write], writes["done"][write]
    received = timing.received_us(records, events)
    counted = (watches["opened"][watch] <= sent) & (watches["slow"][watch] == 0)
    return _Lags(
        sent=sent[counted],
        from_sent=(received - sent)[counted],
        from_done=(received - done)[counted],
        cached=(watches["apiserver"][watch] >= 0)[counted],
    )


def _writes(records: Records) -> Frame:
    """Successful writes after the warm-up, by revision."""
    rows = records.frame(OPS)
    wrote = timing.is_verb(rows, timing.WRITES) & (rows["outcome"] == Outcome.OK)
    wrote &= (rows["done"] >= 0) & (rows["revision"] > 0)
    wrote &= rows["due"] >= records.facts["warm_up_us"]
    rows = _columns(rows, wrote, "revision", "sent", "done")
    return rows.where(np.argsort(rows["revision"], kind="stable"))


def _found(keys: Integers, wanted: Integers) -> Integers:
    """Frame in which unique ``keys`` has what is ``wanted``; all of it must be there."""
    order = np.argsort(keys, kind="stable")
    place = np.searchsorted(keys[order], wanted)
    assert place.max(initial=-1) < len(keys)
    rows: Integers = order[place]
    assert (keys[rows] == wanted).all()
    return rows


def _resources(records: Records, operations: _Operations) -> dict[str, float]:
    """What the servers' processes and the generator's used; nothing where none was followed."""
    samples = records.frame(SAMPLES)
    samples = samples.where(np.argsort(samples["at"], kind="stable"))
    if len(samples) < 2:
        return {}
    facts, end = records.facts, _end_us(records)

    def spent(column: str) -> float:
        at = np.array([facts["warm_up_us"], end])
        start, finish = np.interp(at, samples["at"], samples[column]).tolist()
        return float(finish - start)

    used = spent("generator_cpu") / MICROSECONDS / _seconds(records)
    values: dict[str, float] = {"generator_cores_per_process": used / max(1, facts["processes"])}
    if samples["server_rss"].max() <= 0:
        return values
    values["server_rss_max_bytes"] = int(samples["server_rss"].max())
    values["server_rss_end_bytes"] = int(samples["server_rss"][-1])
    values["disk_end_bytes"] = int(samples["disk"][-1])
    cpu = spent("server_cpu")
    values["server_cores"] = cpu / MICROSECONDS / _seconds(records)
    divisors = {
        "operation": int((~operations.failed).sum()),
        "event": _events_received(records, facts["warm_up_us"], end),
    }
    for name, count in divisors.items():
        if count:
            values[f"server_cpu_per_{name}_us"] = cpu / count
    wrote = int((operations.succeeded & timing.is_verb(operations.rows, timing.WRITES)).sum())
    if wrote:
        values["written_per_write_bytes"] = spent("server_written") / wrote
    return values


def _events_received(records: Records, start: int, end: int) -> int:
    messages = records.frame(MESSAGES)
    during = (messages["received"] >= start) & (messages["received"] <= end)
    return int(messages["events"][during].clip(min=0).sum())


def _windows(records: Records, operations: _Operations, lags: _Lags) -> Windows:
    end = _end_us(records)
    width = MICROSECONDS if records.facts["duration_us"] < SHORT_LOAD_US else 10 * MICROSECONDS
    count = max(1, end // width)  # a last part of a window would look like a drop
    samples = records.frame(SAMPLES)
    samples = samples.where(np.argsort(samples["at"], kind="stable"))
    done = operations.rows["done"][operations.succeeded] // width
    answered = np.bincount(done[(done >= 0) & (done < count)], minlength=count)
    due = operations.rows["due"][operations.plain] // width
    latency = operations.latency[operations.plain]
    warm = -(-records.facts["warm_up_us"] // width)
    rates: list[float] = (answered * (MICROSECONDS / width)).tolist()
    cached = lags.cached
    return Windows(
        width_us=width,
        rate_per_second=[None if n < warm else rate for n, rate in enumerate(rates)],
        latency_p50_us=_by_window(due, latency, 50, count),
        latency_p99_us=_by_window(due, latency, 99, count),
        watch_lag_p99_us=_by_window(lags.sent[cached] // width, lags.from_sent[cached], 99, count),
        server_cores=_cores(samples, width, count),
        server_rss_bytes=_by_window(
            samples["at"] // width,
            np.where(samples["server_rss"] > 0, samples["server_rss"], -1),
            100,
            count,
        ),
    )


def _by_window(windows: Integers, values: Integers, percent: int, count: int) -> list[float | None]:
    """A percentile of the values of each window; negative values are none."""
    known = values >= 0
    windows, values = windows[known], values[known]
    order = np.lexsort((values, windows))
    windows, values = windows[order], values[order]
    starts = np.searchsorted(windows, np.arange(count), side="left").tolist()
    ends = np.searchsorted(windows, np.arange(count), side="right").tolist()
    return [
        float(values[start + max(0, -(-(end - start) * percent // 100) - 1)])
        if end > start
        else None
        for start, end in zip(starts, ends, strict=True)
    ]


def _cores(samples: Frame, width: int, count: int) -> list[float | None]:
    """Cores that the servers kept busy in each window."""
    if len(samples) < 2 or samples["server_rss"].max() <= 0:
        return [None] * count
    edges = np.arange(count + 1) * width
    cpu = np.interp(edges, samples["at"], samples["server_cpu"])
    busy: list[float | None] = (np.diff(cpu) / width).tolist()
    last = int(samples["at"].max())
    return [cores if start < last else None for start, cores in zip(edges, busy, strict=False)]


def _objections(values: dict[str, float]) -> Iterator[str]:
    """Why the generator cannot be trusted in this run."""
    if not values["operations"]:
        yield "no operation was due after the warm-up"
    lag = values.get("send_lag_p99_us", 0)
    if lag > SEND_LAG_P99_US_MAX:
        yield f"send lag p99 {lag / 1000:.1f} ms, {SEND_LAG_P99_US_MAX / 1000:.0f} ms is allowed"
    used = values.get("generator_cores_per_process", 0)
    if used > GENERATOR_CPU_MAX:
        yield f"generator used {used:.0%} of a core per process, {GENERATOR_CPU_MAX:.0%} is allowed"
