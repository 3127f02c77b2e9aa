"""S8 ``noisy-shard``: one tenant storms, then a part of the store stands still, the others go on.

Theory: tenants share a store. What one of them does, or what happens to the place where its objects
are, is to be felt by it and not by its neighbours. So ``tenants`` do the same steady work, and in
four phases something happens to one of them:

    before  0 - 25 %     nothing: what is normal
    noise  25 - 50 %     ``tenant-007`` does ``noise_factor`` times as much, with values of
                         ``noise_bytes``
    outage 60 %          the server is stopped for ``outage_s`` (SIGSTOP) and goes on
    after                until the end: how fast is what was normal back

A store of one shard can only be stopped as a whole, so the outage is everybody's and its figures
say how a stall is survived and recovered from. Only a server that the benchmark started can be
stopped: 0 seconds for the others.
With ``--shard-stop CMD --shard-start CMD`` it is the shard of ``tenant-007`` that is away instead:
its map is to route ``/registry/pods/tenant-007/`` and ``/registry/events/tenant-007/`` to a
database that these commands stop and start.

A run of work is a pod's: created, its status updated twice, an event, deleted. Writes: 5 per run.
One watcher of everything sees one order over all tenants, which the common judges hold it to.

Asked of the store beyond the common judges: no call of a neighbour fails because of the noise, or
later than ``GRACE_US`` after the outage; every tenant is served again by then; and the outage was
one: a server that answers while it should be stopped (its wrapper was, not itself) makes the
figures of the phase meaningless. Of a shard that is away more is asked: no call of a neighbour
fails at all, and one of its own tenant is refused ``shard_timeout_s`` and a second after the
outage began at the latest, and at once from then on.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.clock import MICROSECONDS
from bench.plan import Actor, Disturbance, Plan, Start, Step, Trouble, Watcher
from bench.records import INCIDENTS, Frame, Outcome, Records
from bench.storms import objects, timing
from bench.verdicts import Verdict, rule_of, verdict

NAME = "noisy-shard"
SUMMARY = "one of twenty tenants goes wild, then the server stands still: who else notices"
RATE = "runs_per_second"

NOISY = 7
"""Number of the tenant that storms."""
NEIGHBOUR = "neighbour"
NOISE_SPAN = (0.25, 0.5)
OUTAGE_AT = 0.6
GRACE_US = 5 * MICROSECONDS
"""For a store that goes on after an outage, until everything is to work again."""
SETTLE_US = 100_000
"""Answers that a stopped server had sent already may still arrive for so long."""
AT_ONCE_US = MICROSECONDS
"""What is known to be away is refused within that."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers that a user may change."""

    runs_per_second: float = 50.0
    """Of all tenants together, without the noise; 5 writes each."""
    tenants: int = 20
    """Tenants that share the store; one of them makes the noise."""
    noise_factor: float = 50.0
    """Times as much work of that one in the second quarter."""
    noise_bytes: int = 8_000
    """Bytes of each of its values meanwhile."""
    outage_s: float = 2.0
    """How long the server is stopped; 0: it is not."""
    shard_timeout_s: float = 5.0
    """The server's ``--shard-timeout``, if one of its shards is stopped."""
    apiservers: int = 2
    """Each has a connection, a cache and a watch for every resource."""


PRESETS: Mapping[str, Parameters] = {
    "xs": Parameters(),
    "s": Parameters(runs_per_second=80, outage_s=10),
    "m": Parameters(runs_per_second=400, noise_bytes=20_000, outage_s=20, apiservers=3),
    "l": Parameters(
        runs_per_second=2_000, tenants=100, noise_bytes=20_000, outage_s=20, apiservers=3
    ),
}


def schedule(parameters: Parameters, duration_us: int, draw: random.Random) -> Plan:
    """The tenants' runs, one watcher of all, the outage."""
    outage_us = int(parameters.outage_s * MICROSECONDS)
    outage = Disturbance(int(duration_us * OUTAGE_AT), Trouble.PAUSE, outage_us)
    runs = (_runs(parameters, tenant, duration_us, draw) for tenant in range(parameters.tenants))
    return Plan(
        duration_us=duration_us,
        warm_up_us=duration_us // timing.WARM_UP_PARTS,
        apiservers=parameters.apiservers,
        resources=(objects.PODS,),
        actors=tuple(chain.from_iterable(runs)),
        watchers=(Watcher("everything", b"/registry/", Start.NOW),),
        disturbances=(outage,) if outage_us else (),
    )


def _runs(
    parameters: Parameters, tenant: int, duration_us: int, draw: random.Random
) -> Iterator[Actor]:
    """All of one tenant's, and the noise on top of them."""
    rate = parameters.runs_per_second / parameters.tenants
    steady = [(due_us, 0) for due_us in timing.arrivals(rate, 0, duration_us, draw)]
    noise: list[tuple[int, int]] = []
    if tenant == NOISY:
        from_us, until_us = (int(duration_us * part) for part in NOISE_SPAN)
        rate *= parameters.noise_factor - 1
        times = timing.arrivals(rate, from_us, until_us, draw)
        noise = [(due_us, parameters.noise_bytes) for due_us in times]
    for number, (due_us, size) in enumerate(sorted(steady + noise)):
        name = f"run-{tenant:03}-{number:06}"
        steps = tuple(_run(tenant, name, due_us, size, draw))
        yield Actor(name, draw.randrange(parameters.apiservers), steps)


def _run(tenant: int, name: str, due_us: int, size: int, draw: random.Random) -> Iterator[Step]:
    """A pod's life; ``size`` 0 is the usual one."""
    namespace, role = objects.tenant(tenant), "noisy" if tenant == NOISY else NEIGHBOUR
    key = objects.key(objects.PODS, namespace, name)
    new, ready = (size, size) if size else (objects.POD_NEW_BYTES, objects.POD_READY_BYTES)
    think = [draw.randrange(20_000, 200_000) for _ in range(4)]
    yield objects.create(key, f"{role}.create", "pod", new)._replace(due_us=due_us)
    yield objects.update(key, f"{role}.status", "pod", ready, think_us=think[0])
    yield objects.event(namespace, name, "Started")._replace(role=f"{role}.event")
    yield objects.update(key, f"{role}.status", "pod", ready, think_us=think[2])
    yield objects.delete(key, f"{role}.delete", think_us=think[3])


# Checks.


class _Outage(NamedTuple):
    """When a server stood still or was gone, or one of its shards."""

    at: int
    until: int
    shard: bool


def checks(records: Records, parameters: Parameters) -> list[Verdict]:
    """Neighbours are served throughout, all again after the outage, which was one."""
    ops = timing.planned(records)
    if records.facts["state"] != "COMPLETE":  # what was never sent is not the server's fault
        ops = ops.where(ops["sent"] >= 0)
    outages = _outages(records)
    neighbours = ops.where(timing.begins(ops, "role", NEIGHBOUR.encode()))
    return [
        _served(neighbours, outages),
        _recovered(records, ops),
        _still(ops, outages),
        _refused(ops, outages, parameters),
    ]


def _outages(records: Records) -> list[_Outage]:
    incidents = records.frame(INCIDENTS)
    chosen = incidents.where(incidents["trouble"] != Trouble.DROP)
    shard = chosen["trouble"] == Trouble.SHARD
    rows = zip(chosen["at"].tolist(), chosen["until"].tolist(), shard.tolist(), strict=True)
    return [_Outage(*row) for row in rows]


def _failed(ops: Frame) -> NDArray[np.bool_]:
    unanswered = (ops["outcome"] == Outcome.UNKNOWN) | (ops["done"] < 0)
    failed: NDArray[np.bool_] = unanswered | (ops["outcome"] == Outcome.REFUSED)
    return failed


def _served(ops: Frame, outages: list[_Outage]) -> Verdict:
    """No call of a neighbour fails but for an outage of the whole server."""
    excused = np.zeros(len(ops), np.bool_)
    for at, until, shard in outages:
        ended = (ops["done"] >= 0) & (ops["done"] < at)
        if not shard:
            excused |= (ops["sent"] < until + GRACE_US) & ~ended
    wrong = np.flatnonzero(_failed(ops) & ~excused)
    evidence = [
        f"{_call(ops, row)}, sent at {ops['sent'][row]} us, failed with code {ops['code'][row]}"
        for row in wrong
    ]
    rule, lacking = rule_of(_served), "no neighbour asked for anything"
    return verdict(
        f"{NAME}: neighbours are served", len(ops), evidence, rule=rule, lacking=lacking, timed=True
    )


def _call(ops: Frame, row: np.intp) -> str:
    key = ops.text("key")[int(ops["key"][row])].decode()
    return f"{ops.text('role')[int(ops['role'][row])].decode()} of {key}"


def _tenants(ops: Frame) -> NDArray[np.int64]:
    """The number of the tenant that each call's key names; -1: it names none."""
    marker = b"/tenant-"
    numbers = [
        int(rest[:3]) if rest[:3].isdigit() else -1
        for rest in (text.partition(marker)[2] for text in ops.text("key"))
    ]
    tenants: NDArray[np.int64] = np.array([*numbers, -1], np.int64)[ops["key"]]
    return tenants


def _recovered(records: Records, ops: Frame) -> Verdict:
    """Soon after an outage every tenant that asks for something gets it."""
    tenants = _tenants(ops)
    checked, evidence = 0, []
    for _, until, shard in _outages(records):
        if shard and until + GRACE_US > records.facts["duration_us"]:
            continue  # it may be refused for so long, and nobody asks afterwards
        asked = (ops["sent"] >= until) & (ops["sent"] < until + GRACE_US) & (tenants >= 0)
        good = asked & (ops["outcome"] == Outcome.OK) & (ops["done"] < until + 2 * GRACE_US)
        waiting = np.unique(tenants[asked])
        checked += len(waiting)
        evidence += [
            f"{objects.tenant(int(tenant))} was not served after the outage until {until} us"
            for tenant in np.setdiff1d(waiting, tenants[good])
        ]
    rule, lacking = rule_of(_recovered), "there was no outage"
    return verdict(
        f"{NAME}: all are served again", checked, evidence, rule=rule, lacking=lacking, timed=True
    )


def _still(ops: Frame, outages: list[_Outage]) -> Verdict:
    """Nothing is answered while the server is stopped, nothing of its tenant while a shard is."""
    checked, evidence = 0, []
    lost = _tenants(ops) == NOISY
    for at, until, shard in outages:
        done = ops["done"]
        begun = (ops["sent"] >= at) & (ops["sent"] < until)
        inside = (done >= at + SETTLE_US) & (done < until - SETTLE_US)
        concerned = lost if shard else np.ones(len(ops), np.bool_)
        answered = np.flatnonzero(inside & concerned & ~_failed(ops))
        stopped = "its shard" if shard else "the server"
        checked += int((begun & concerned).sum())
        evidence += [
            f"{_call(ops, row)} was answered at {done[row]} us, while {stopped} was stopped"
            for row in answered
        ]
    rule, lacking = rule_of(_still), "there was no outage"
    return verdict(
        f"{NAME}: the outage was one", checked, evidence, rule=rule, lacking=lacking, timed=True
    )


def _refused(ops: Frame, outages: list[_Outage], parameters: Parameters) -> Verdict:
    """Who needs a shard that is away learns it in time."""
    patience_us = int((parameters.shard_timeout_s + 1) * MICROSECONDS)
    checked, evidence = 0, []
    for at, until, shard in outages:
        asked = (_tenants(ops) == NOISY) & (ops["sent"] >= at) & (ops["sent"] < until) & shard
        latest = np.maximum(ops["sent"] + AT_ONCE_US, at + patience_us)
        answered = (ops["done"] >= 0) & (ops["done"] < until)
        asked &= answered | (latest < until)  # else it is back before it is late
        late = asked & ((ops["done"] < 0) | (ops["done"] > latest))
        checked += int(asked.sum())
        evidence += [
            f"{_call(ops, row)}, sent {ops['sent'][row] - at} us into the outage,"
            f" was answered at {ops['done'][row]} us, {latest[row]} us is the latest"
            for row in np.flatnonzero(late)
        ]
    rule, lacking = rule_of(_refused), "no shard was stopped"
    name = f"{NAME}: a lost shard is refused in time"
    return verdict(name, checked, evidence, rule=rule, lacking=lacking, timed=True)


# Measures.


def measures(records: Records, parameters: Parameters) -> dict[str, float]:
    """What the neighbours feel in each phase, and what who needs a lost shard is told."""
    all_ops = timing.planned(records)
    ops = all_ops.where(timing.begins(all_ops, "role", NEIGHBOUR.encode()))
    duration_us = records.facts["duration_us"]
    took, due = timing.latencies_us(records, ops), ops["due"]
    noise_us, quiet_us = (int(duration_us * part) for part in NOISE_SPAN)
    before = took[(due >= records.facts["warm_up_us"]) & (due < noise_us)]
    noise = took[(due >= noise_us) & (due < quiet_us)]
    found = timing.spread("neighbours_before", before) | timing.spread("neighbours_noise", noise)
    found |= timing.ratio("neighbours_noise_ratio", noise, before)
    for outage in _outages(records)[:1]:
        at, until, _ = outage
        stopped = (due >= at) & (due < until)
        after = took[due >= until + MICROSECONDS]
        found |= timing.spread("neighbours_outage", took[stopped])
        found |= timing.spread("neighbours_after", after)
        found |= timing.ratio("neighbours_after_ratio", after, before)
        if outage.shard:
            found |= timing.ratio("neighbours_outage_ratio", took[stopped], before)
            found |= _lost(all_ops, outage, parameters)
        elif stopped.any():
            found["outage_backlog_ms"] = float((due + took)[stopped].max() - until) / 1000
    return found


def _lost(ops: Frame, outage: _Outage, parameters: Parameters) -> dict[str, float]:
    """How long the tenant of a lost shard waited to be refused, and to be served again."""
    at, until, _ = outage
    ops = ops.where((_tenants(ops) == NOISY) & (ops["sent"] >= at) & (ops["done"] >= 0))
    failed, done = _failed(ops), ops["done"]
    refused = failed & (done < until)
    known = refused & (ops["sent"] >= at + int(parameters.shard_timeout_s * MICROSECONDS))
    back = done[~failed & (done >= until)]
    found = {}
    if refused.any():
        found["lost_refused_first_ms"] = float(done[refused].min() - at) / 1000
        found["lost_refused_longest_ms"] = float((done - ops["sent"])[refused].max()) / 1000
    if known.any():
        found["lost_refused_later_ms"] = float((done - ops["sent"])[known].max()) / 1000
    if len(back):
        found["lost_back_ms"] = float(back.min() - until) / 1000
    return found
