"""The figures of one run, made from its raw records and nothing else.

What is counted, and what for:

- An *operation* is one step of an actor, with all the calls that it took: what was read first, and
  every attempt after a lost comparison. A *call* is one of them, or one that an apiserver makes on
  its own account. Headlines are of operations, because a store whose watches are late makes many
  quick calls where another needs one.
- The *latency* of an operation counts from when it was due to the answer that completed it; that of
  a call from when it was due, its *service* time from when it was sent, which shows what of it was
  the server's.
- What failed or was never answered took as long as its timeout, at least, and stands in the error
  budget. So does a step that was due and never sent, as long as it waited until the load ended:
  else a server would look better for every step that it kept from being sent. None is dropped.
- A lost comparison (CONFLICT) is an answer, and so are a refusal that the plan asks for and one of
  history that was compacted. Calls and operations that end so are counted apart from what wrote or
  read: they cost less.
- What was due during the warm-up is left out.
- The *watch lag* of an event counts from when its write was sent, over watches that were open by
  then; a watch that catches up shows history. As a second, it counts from the write's answer, and
  is zero where the event was there first. Watchers that read slowly on purpose are left out.
- The outage of a kill is from the signal until the server, started again, has answered a call.
- The server's CPU is divided by the operations it completed (a lost one costs, and is none), by the
  calls it answered, and by events delivered.

A run whose generator cannot be believed (see ``punctuality``) is INVALID.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from hdrh.histogram import HdrHistogram
from numpy.typing import NDArray

from bench.clock import MICROSECONDS
from bench.plan import WRITES, Trouble, Verb
from bench.punctuality import objections, punctuality
from bench.records import (
    EVENTS,
    INCIDENTS,
    MESSAGES,
    NEVER_US,
    OPS,
    SAMPLES,
    WATCHES,
    Frame,
    Outcome,
    Records,
)
from bench.storms import attempts, timing

LATENCY_US_MAX = 3600 * MICROSECONDS
"""What takes longer counts as an hour."""
DIGITS = 3
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p999": 99.9}
SHORT_LOAD_US = 120 * MICROSECONDS
"""Loads shorter than this have windows of one second, others of ten."""
COLUMNS = ("verb", "due", "sent", "done", "outcome", "code", "refusal", "role")
"""Of OPS, in which figures are."""
COMPACTED = 11
"""gRPC code of a revision that is compacted: OUT_OF_RANGE."""
ALL = "all"

Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]


class Class(TypedDict):
    """Operations or calls of one kind; percentiles only where there are some beyond them."""

    count: int
    latency_us: dict[str, int]
    service_us: dict[str, int]
    """Of calls."""


class Windows(TypedDict):
    """The course of the load, one entry a window; None where nothing happened."""

    width_us: int
    rate_per_second: list[float | None]
    """Operations that succeeded, by when they did."""
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
    """Of operations ``all`` and ``role claim.assign``; of calls ``verb CREATE``, ``conflict``,
    ``refusal``."""
    errors: dict[str, int]
    """The error budget: calls by outcome and gRPC code, and steps that were never sent."""
    windows: Windows
    latency: HdrHistogram
    """Of all operations but conflicts and refusals, to be added to that of other runs."""
    invalid: list[str]
    """Why the run says nothing about the server; empty if it does."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """Operations, or calls, after the warm-up, with what is known of each."""

    rows: Frame
    roles: Sequence[bytes]
    """By the codes in ``rows``."""
    unsent: Mask
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
    operations, calls = _operations(records), _calls(records)
    lags = _lags(records)
    latency = _histogram(operations.latency[operations.plain])
    values = {
        **_counts(records, operations, calls),
        **_percentiles("latency", latency),
        **_percentiles("call_latency", _histogram(calls.latency[calls.plain])),
        **_percentiles("service", _histogram(calls.service[calls.plain])),
        **_percentiles("watch_lag", _histogram(lags.from_sent[lags.cached])),
        **_percentiles("watch_lag_after_answer", _histogram(lags.from_done[lags.cached])),
        **_percentiles("watcher_lag", _histogram(lags.from_sent[~lags.cached])),
        **punctuality(records, _end_us(records)),
        **_resources(records, operations, calls),
        **_outages(records),
    }
    nothing = [] if values["operations"] else ["no operation was due after the warm-up"]
    return Figures(
        values=values,
        classes=_classes(operations, calls),
        errors=_errors(operations, calls),
        windows=_windows(records, operations, lags),
        latency=latency,
        invalid=[*nothing, *objections(values)],
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


def _calls(records: Records) -> _Asked:
    """What was sent, whoever did it."""
    rows = records.frame(OPS)
    sent = (rows["sent"] >= 0) | (rows["due"] < 0)
    return _asked(records, _columns(rows, sent, *COLUMNS, texts=("role",)))


def _operations(records: Records) -> _Asked:
    """Steps of actors, from when each was due to the answer that was its last."""
    rows = records.frame(OPS)
    names = ("actor", "step", "op", *COLUMNS)
    texts = ("role", "key", "message")
    return _asked(records, attempts.steps(_columns(rows, rows["actor"] >= 0, *names, texts=texts)))


def _asked(records: Records, rows: Frame) -> _Asked:
    facts, end_us = records.facts, _end_us(records)
    rows = rows.where((rows["due"] >= facts["warm_up_us"]) & (rows["due"] <= end_us))
    due, outcome, done = rows["due"], rows["outcome"], rows["done"]
    unanswered = done < 0
    conflict = (outcome == Outcome.CONFLICT) & ~unanswered
    unsent = (rows["sent"] < 0) & ~conflict  # an ADOPT that others were faster at is a conflict
    refused = (outcome == Outcome.REFUSED) & ~unanswered
    refusal = refused & (rows["refusal"] > 0) & (rows["code"] == rows["refusal"])
    refusal |= refused & (rows["verb"] == Verb.READ_AT) & (rows["code"] == COMPACTED)
    failed = unanswered | (outcome == Outcome.UNKNOWN) | (refused & ~refusal)
    at_least = np.where(failed, facts["timeout_us"], 0)
    given_up = np.where(unsent, end_us, rows["sent"] + facts["timeout_us"])
    ended = np.where(unanswered, given_up, done)
    return _Asked(
        rows=rows,
        roles=rows.text("role"),
        unsent=unsent,
        failed=failed,
        conflict=conflict,
        refusal=refusal,
        latency=np.maximum(ended - due, at_least),
        service=np.maximum(ended - rows["sent"], at_least),
    )


def _counts(records: Records, operations: _Asked, calls: _Asked) -> dict[str, float]:
    succeeded = int(operations.succeeded.sum())
    counts = {
        "operations": len(operations.rows),
        "calls": len(calls.rows),
        "errors": int(calls.failed.sum() + operations.unsent.sum()),
        "conflicts": int(calls.conflict.sum()),
        "operations_lost": int(operations.conflict.sum()),
        "refusals": int(calls.refusal.sum()),
        "rate_per_second": succeeded / _seconds(records),
    }
    if succeeded:
        counts["conflicts_per_success"] = counts["conflicts"] / succeeded
        counts["calls_per_success"] = counts["calls"] / succeeded
    return counts


def _classes(operations: _Asked, calls: _Asked) -> dict[str, Class]:
    """Every class that there is, by name."""
    found = {ALL: _class(operations, calls, operations.plain, calls.plain)}
    for code in np.unique(operations.rows["role"]).tolist():
        if role := operations.roles[code].decode():
            masks = (one.plain & (one.rows["role"] == code) for one in (operations, calls))
            found[f"role {role}"] = _class(operations, calls, *masks)
    of_calls = {f"verb {v.name}": calls.plain & (calls.rows["verb"] == v) for v in Verb}
    of_calls |= {"conflict": calls.conflict, "refusal": calls.refusal}
    found |= {name: _class(calls, calls, mask, mask) for name, mask in of_calls.items()}
    return {name: one for name, one in found.items() if one["count"]}


def _class(asked: _Asked, calls: _Asked, mask: Mask, of_calls: Mask) -> Class:
    return Class(
        count=int(mask.sum()),
        latency_us=_known(_histogram(asked.latency[mask])),
        service_us=_known(_histogram(calls.service[of_calls])),
    )


def _errors(operations: _Asked, calls: _Asked) -> dict[str, int]:
    """Failures by outcome and code, ``UNKNOWN 14``; apart what has neither."""
    failed = calls.rows.where(calls.failed)
    unanswered = failed["done"] < 0
    without = {"never sent": operations.unsent, "unanswered": unanswered}
    budget = {name: int(mask.sum()) for name, mask in without.items() if mask.any()}
    answered = np.stack((failed["outcome"], failed["code"]), axis=1)[~unanswered]
    kinds, counts = np.unique(answered, axis=0, return_counts=True)
    for (outcome, code), count in zip(kinds.tolist(), counts.tolist(), strict=True):
        budget[f"{Outcome(outcome).name} {code}"] = count
    return budget


def _columns(rows: Frame, chosen: Integers | Mask, *names: str, texts: Sequence[str] = ()) -> Frame:
    """Some columns of some rows: a copy of millions of rows in all their columns is a gigabyte."""
    columns = {name: rows[name][chosen] for name in names}
    return Frame(columns, {name: rows.text(name) for name in texts})


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
    wrote = timing.is_verb(rows, WRITES) & (rows["outcome"] == Outcome.OK)
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


def _resources(records: Records, operations: _Asked, calls: _Asked) -> dict[str, float]:
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

    used = spent("generator_cpu_max") / MICROSECONDS / _seconds(records)
    values: dict[str, float] = {"generator_cores_max": used}
    if samples["server_rss"].max() <= 0:
        return values
    values["server_rss_max_bytes"] = int(samples["server_rss"].max())
    values["server_rss_end_bytes"] = int(samples["server_rss"][-1])
    values["disk_end_bytes"] = int(samples["disk"][-1])
    cpu = spent("server_cpu")
    values["server_cores"] = cpu / MICROSECONDS / _seconds(records)
    divisors = {
        "operation": int((operations.succeeded | operations.refusal).sum()),
        "call": int((~calls.failed).sum()),
        "event": _events_received(records, facts["warm_up_us"], end),
    }
    for name, count in divisors.items():
        if count:
            values[f"server_cpu_per_{name}_us"] = cpu / count
    wrote = int((operations.succeeded & timing.is_verb(operations.rows, WRITES)).sum())
    if wrote:
        values["written_per_write_bytes"] = spent("server_written") / wrote
    return values


def _outages(records: Records) -> dict[str, float]:
    """How long a server that was killed was not there; nothing if it never was."""
    incidents = records.frame(INCIDENTS)
    kills = incidents.where(
        (incidents["trouble"] == Trouble.KILL) & (incidents["until"] < NEVER_US)
    )
    return {"kill_outage_max_us": int((kills["until"] - kills["at"]).max())} if len(kills) else {}


def _events_received(records: Records, start: int, end: int) -> int:
    messages = records.frame(MESSAGES)
    during = (messages["received"] >= start) & (messages["received"] <= end)
    return int(messages["events"][during].clip(min=0).sum())


def _windows(records: Records, operations: _Asked, lags: _Lags) -> Windows:
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
