"""S6 ``apiserver-restart``: all clients lose their connections and come back at once.

Theory: when apiservers restart, each lists everything that it caches and watches on from there.
A store that serves a few writes a second without effort must then read all of its data several
times within a second, while writes go on; if it starves them, leases are lost and more restarts
follow. ``objects`` exist from the start, half Pods and half Sandboxes; claims keep coming as in
``swarm-burst``, in small bursts of ``claims`` a second.

``drops`` times, at equal distances, every connection ends, half of them by RST. Then 20 % of the
watches resume after the revision that they saw last, 5 % (15 % at xs, where there are few) start at
the beginning of history, which has been compacted, and the rest list again, in pages at one
revision. ``kills`` more times the server itself is killed and started again on its data (only one
that the benchmark started).
Writes: those of the claims, 29.4 each; restarts only read, ``objects`` for each apiserver.

Asked of the store beyond the common judges (which know that lists are snapshots, and that list and
watch leave no gap): every watch is there again after the last blow; and who starts at a revision
that is compacted is told so, with the revision of the compaction, instead of being left to wait
(kubernetes #123072, etcd #17529) or shown half of history.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.clock import MICROSECONDS
from bench.plan import WRITES, Actor, Disturbance, Object, Plan, Step, Trouble, Verb
from bench.records import (
    INCIDENTS,
    MESSAGES,
    OPS,
    SAMPLES,
    WATCHES,
    Frame,
    MessageKind,
    Outcome,
    Records,
)
from bench.storms import objects, swarm_burst, timing
from bench.verdicts import Verdict, rule_of, verdict

NAME = "apiserver-restart"
SUMMARY = "all apiservers reconnect, list and watch at once, three times, under load"
RATE = "claims"

TOLD_US = MICROSECONDS
"""A watch that was open for so long has been answered."""
RECONNECTED_US = MICROSECONDS
"""After a blow, calls may find no connection for so long."""
UNAVAILABLE = 14
MEBIBYTE = 1 << 20


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers that a user may change."""

    objects: int = 20_000
    """Objects that are there from the start, half Pods and half Sandboxes."""
    claims: int = 12
    """In a second, all at once."""
    drops: int = 3
    """How often all connections end, at equal distances."""
    kills: int = 0
    """How often the server itself is killed and started again."""
    resume: int = 20
    """Per cent of the watches that go on where they were."""
    stale: int = 5
    """Per cent of them that start at the beginning of history."""
    compaction_s: float = 3.0
    """Between compactions; 0: there are none."""
    apiservers: int = 2
    """Each has a connection, a cache and a watch for every resource."""


PRESETS: Mapping[str, Parameters] = {
    "xs": Parameters(stale=15),
    "s": Parameters(objects=150_000, claims=30, kills=1, compaction_s=10.0),
    "m": Parameters(objects=300_000, claims=100, kills=1, compaction_s=60.0, apiservers=3),
    "l": Parameters(objects=1_000_000, claims=300, kills=2, compaction_s=300.0, apiservers=3),
}


def schedule(parameters: Parameters, duration_us: int, draw: random.Random) -> Plan:
    """Claims, compactions, and blows at equal distances."""
    load = swarm_burst.Parameters(
        claims=parameters.claims,
        burst_every_s=1.0,
        replicas=2 * parameters.claims + 20,
        apiservers=parameters.apiservers,
    )
    restarts = Plan(
        duration_us=duration_us,
        warm_up_us=duration_us // timing.WARM_UP_PARTS,
        apiservers=parameters.apiservers,
        resources=(objects.PODS, objects.SANDBOXES),
        preload=tuple(_residents(parameters)),
        actors=tuple(_compactors(parameters, duration_us)),
        disturbances=tuple(_blows(parameters, duration_us)),
    )
    return restarts.beside(swarm_burst.schedule(load, duration_us, draw))


def _residents(parameters: Parameters) -> Iterator[Object]:
    """Agents that just are there."""
    for number in range(parameters.objects // 2):
        namespace, name = objects.tenant(number % 100), f"resident-{number:06}"
        pod = objects.key(objects.PODS, namespace, name)
        yield Object(pod, "pod", objects.POD_READY_BYTES, owner=name)
        sandbox = objects.key(objects.SANDBOXES, namespace, name)
        yield Object(sandbox, "sandbox", objects.SANDBOX_READY_BYTES, owner=name)


def _compactors(parameters: Parameters, duration_us: int) -> Iterator[Actor]:
    """One in each apiserver; ``compaction_s`` 0: none."""
    interval_us = int(parameters.compaction_s * MICROSECONDS)
    if not interval_us:
        return
    for number in range(parameters.apiservers):
        times = range(MICROSECONDS // 2, duration_us, interval_us)
        steps = tuple(
            Step(Verb.COMPACT, objects.COMPACT_REV_KEY, "apiserver.compact", due_us)
            for due_us in times
        )
        yield Actor(f"compactor-{number}", number, steps)


def _blows(parameters: Parameters, duration_us: int) -> Iterator[Disturbance]:
    """Drops, then kills, with equal times before, between and after them."""
    blows = parameters.drops + parameters.kills
    for number in range(blows):
        at_us = duration_us * (number + 1) // (blows + 1)
        kind = Trouble.DROP if number < parameters.drops else Trouble.KILL
        yield Disturbance(at_us, kind, resume=parameters.resume, stale=parameters.stale)


# Checks.


def checks(records: Records, parameters: Parameters) -> list[Verdict]:
    """Everyone comes back, and is told if there is nothing to come back to."""
    watches = _Watches(records)
    return [_returned(records, watches), _refused(records, watches)]


def _blows_of(incidents: Frame) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """When each blow began and ended; generator processes tell of the same one separately."""
    order = np.argsort(incidents["at"])
    at, until = incidents["at"][order], incidents["until"][order]
    first = np.flatnonzero(np.diff(at, prepend=-TOLD_US) >= TOLD_US)
    return at[first], np.maximum.reduceat(until, first) if len(first) else until


class _Watches:
    """The watches of a run, with the time at which each was made or refused by the store."""

    def __init__(self, records: Records) -> None:
        self.frame = records.frame(WATCHES)
        finished = records.facts["finished_us"]
        self.closed = np.where(self.frame["closed"] < 0, finished, self.frame["closed"])
        self.created = self._first(records, MessageKind.CREATED, "received")
        self.canceled = self._first(records, MessageKind.CANCELED, "received")
        self.compacted = self._first(records, MessageKind.CANCELED, "compact_revision")
        self.told = self._first(records, MessageKind.EVENTS, "received")
        self.blows, self.back = _blows_of(records.frame(INCIDENTS))
        self.ends = np.append(self.blows[1:], finished)[: len(self.blows)]

    def _first(self, records: Records, kind: MessageKind, column: str) -> NDArray[np.int64]:
        """Of each watch's first message of one kind; -1: it got none."""
        messages = records.frame(MESSAGES)
        messages = messages.where(messages["kind"] == kind)
        found, first = np.unique(messages["watch"], return_index=True)
        values = np.append(messages[column][first], -1)
        at = np.searchsorted(found, self.frame["watch"])
        same = np.append(found, -1)[at] == self.frame["watch"]
        return np.where(same, values[at], -1)

    def name(self, code: int) -> str:
        """Of a client: an apiserver's cache, or a watcher."""
        return self.frame.text("name")[code].decode()

    def returns(self) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
        """Blow, client, and when this one's watches were made between that blow and the next.

        Those that were canceled do not count, nor clients that had none before.
        """
        frame, lasting = self.frame, (self.created >= 0) & (self.canceled < 0)
        for blow, (at, end) in enumerate(zip(self.blows, self.ends, strict=True)):
            inside = lasting & (frame["opened"] >= at) & (frame["opened"] < end)
            for client in np.unique(frame["name"][frame["opened"] < at]):
                yield blow, int(client), self.created[inside & (frame["name"] == client)]


def _returned(records: Records, watches: _Watches) -> Verdict:
    """After the last blow each client gets a watch that lasts.

    One that still lists when the next blow falls is slow, which is a figure.
    """
    judge, rule = f"{NAME}: everyone came back", rule_of(_returned)
    if records.facts["state"] != "COMPLETE":
        return verdict(judge, 0, [], rule=rule, lacking="the run was cut short", timed=True)
    checked, evidence = 0, []
    for blow, client, made in watches.returns():
        if blow == len(watches.blows) - 1:
            checked += 1
            if not len(made):
                at = int(watches.blows[blow])
                evidence.append(f"{watches.name(client)} has no watch since the blow at {at} us")
    return verdict(judge, checked, evidence, rule=rule, lacking="there was no blow", timed=True)


def _refused(records: Records, watches: _Watches) -> Verdict:
    """A start below what had been compacted before is refused, and nothing else is told."""
    ops = timing.planned(records)
    done = ops.where(
        (ops["verb"] == Verb.COMPACT) & (ops["at"] > 0) & (ops["outcome"] == Outcome.OK)
    )
    done = done.where(np.argsort(done["done"]))
    reached = np.append(0, np.maximum.accumulate(done["at"]))
    frame = watches.frame
    limit = reached[np.searchsorted(done["done"], frame["opened"])]
    lasted = watches.closed - frame["opened"] >= TOLD_US
    chosen = (frame["start"] > 0) & (frame["start"] < limit) & (lasted | (watches.canceled >= 0))
    evidence = []
    for row in np.flatnonzero(chosen):
        said = int(watches.compacted[row])
        if watches.told[row] < 0 and said >= limit[row]:
            continue
        what = "events" if watches.told[row] >= 0 else "nothing"
        if watches.canceled[row] >= 0:
            what = f"compact revision {said}"
        evidence.append(
            f"{watches.name(int(frame['name'][row]))} began at {frame['start'][row]}, "
            f"{limit[row]} was compacted, it was told {what}"
        )
    rule, lacking = rule_of(_refused), "no watch began below a compaction"
    return verdict(
        f"{NAME}: compacted starts are refused",
        int(chosen.sum()),
        evidence,
        rule=rule,
        lacking=lacking,
    )


# Measures.


def measures(records: Records, parameters: Parameters) -> dict[str, float]:
    """How long until all are back, and what writers feel meanwhile."""
    watches = _Watches(records)
    blows = watches.blows
    synced = watches.back.copy()
    for blow, _, made in watches.returns():
        synced[blow] = max(synced[blow], made.min() if len(made) else watches.ends[blow])
    ops = timing.planned(records)
    writes = timing.warm(records, ops.where(timing.is_verb(ops, WRITES)))
    writes = writes.where(~_cut(writes, watches))
    during = timing.within(writes["due"], blows, synced)
    took = timing.latencies_us(records, writes)
    found = timing.spread("write_quiet", took[~during]) | timing.spread("write_storm", took[during])
    found |= timing.ratio("write_storm_ratio", took[during], took[~during])
    if len(blows):
        found["synced_max_s"] = float((synced - blows).max()) / MICROSECONDS
    return found | _listing(records) | _memory(records.frame(SAMPLES))


def _cut(ops: Frame, watches: _Watches) -> timing.Mask:
    """Calls that failed because we ended their connection: no measure of the store."""
    lost = (ops["outcome"] == Outcome.UNKNOWN) & (ops["code"] == UNAVAILABLE)
    cut = np.zeros(len(ops), np.bool_)
    for at, back in zip(watches.blows, watches.back, strict=True):
        cut |= (ops["done"] >= at) & (ops["sent"] < back + RECONNECTED_US)
    mask: timing.Mask = lost & cut
    return mask


def _listing(records: Records) -> dict[str, float]:
    """Of one page of an apiserver's list."""
    ops = records.frame(OPS)
    pages = ops.where((ops["verb"] == Verb.LIST) & (ops["actor"] < 0) & (ops["due"] >= 0))
    return timing.spread("relist_page", timing.latencies_us(records, pages))


def _memory(samples: Frame) -> dict[str, float]:
    """The server's highest, when it is known."""
    peak = int(samples["server_rss"].max(initial=0))
    return {"server_rss_peak_mib": peak / MEBIBYTE} if peak else {}
