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
say how a stall is survived and recovered from; targets that have shards will have theirs stopped
one at a time. Only a server that the benchmark started can be stopped: 0 seconds for the others.
A slow network to one shard needs a shard to be slow to, and is left out likewise.

A run of work is a pod's: created, its status updated twice, an event, deleted. Writes: 5 per run.
One watcher of everything sees one order over all tenants, which the common judges hold it to.

Asked of the store beyond the common judges: no call of a neighbour fails because of the noise, or
later than ``GRACE_US`` after the outage; every tenant is served again by then; and the outage was
one: a server that answers while it should be stopped (its wrapper was, not itself) makes the
figures of the phase meaningless.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from bench.clock import MICROSECONDS
from bench.plan import Actor, Disturbance, Plan, Start, Step, Trouble, Watcher
from bench.records import INCIDENTS, Frame, Outcome, Records
from bench.storms import objects, timing
from bench.verdicts import Verdict, verdict

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


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers that a user may change."""

    runs_per_second: float = 50.0
    """Of all tenants together, without the noise; 5 writes each."""
    tenants: int = 20
    noise_factor: float = 50.0
    noise_bytes: int = 8_000
    outage_s: float = 2.0
    apiservers: int = 2


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


def checks(records: Records, parameters: Parameters) -> list[Verdict]:
    """Neighbours are served throughout, all again after the outage, which was one."""
    ops = timing.planned(records)
    outages = _outages(records)
    neighbours = ops.where(timing.begins(ops, "role", NEIGHBOUR.encode()))
    return [_served(neighbours, outages), _recovered(records, ops), _still(ops, outages)]


def _outages(records: Records) -> list[tuple[int, int]]:
    """When the server stood still, or was gone."""
    incidents = records.frame(INCIDENTS)
    chosen = incidents.where(incidents["trouble"] != Trouble.DROP)
    return list(zip(chosen["at"].tolist(), chosen["until"].tolist(), strict=True))


def _served(ops: Frame, outages: list[tuple[int, int]]) -> Verdict:
    """No call of a neighbour fails but for an outage."""
    failed = (ops["outcome"] == Outcome.UNKNOWN) | (ops["outcome"] == Outcome.REFUSED)
    failed |= ops["done"] < 0
    excused = np.zeros(len(ops), np.bool_)
    for at, until in outages:
        ended = (ops["done"] >= 0) & (ops["done"] < at)
        excused |= (ops["sent"] < until + GRACE_US) & ~ended
    wrong = np.flatnonzero(failed & ~excused)
    evidence = [
        f"{_call(ops, row)}, sent at {ops['sent'][row]} us, failed with code {ops['code'][row]}"
        for row in wrong
    ]
    return verdict(f"{NAME}: neighbours are served", len(ops), evidence, timed=True)


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
    for _, until in _outages(records):
        asked = (ops["sent"] >= until) & (ops["sent"] < until + GRACE_US) & (tenants >= 0)
        good = asked & (ops["outcome"] == Outcome.OK) & (ops["done"] < until + 2 * GRACE_US)
        waiting = np.unique(tenants[asked])
        checked += len(waiting)
        evidence += [
            f"{objects.tenant(int(tenant))} was not served after the outage until {until} us"
            for tenant in np.setdiff1d(waiting, tenants[good])
        ]
    return verdict(f"{NAME}: all are served again", checked, evidence, timed=True)


def _still(ops: Frame, outages: list[tuple[int, int]]) -> Verdict:
    """Nothing is answered while the server is stopped."""
    checked, evidence = 0, []
    for at, until in outages:
        done = ops["done"]
        begun = (ops["sent"] >= at) & (ops["sent"] < until)
        inside = (done >= at + SETTLE_US) & (done < until - SETTLE_US)
        answered = np.flatnonzero(inside & (ops["outcome"] != Outcome.UNKNOWN))
        checked += int(begun.sum())
        evidence += [
            f"{_call(ops, row)} was answered at {done[row]} us, while the server was stopped"
            for row in answered
        ]
    return verdict(f"{NAME}: the outage was one", checked, evidence, timed=True)


# Measures.


def measures(records: Records, parameters: Parameters) -> dict[str, float]:
    """What the neighbours feel in each phase."""
    ops = timing.planned(records)
    ops = ops.where(timing.begins(ops, "role", NEIGHBOUR.encode()))
    duration_us = records.facts["duration_us"]
    took, due = timing.latencies_us(records, ops), ops["due"]
    noise_us, quiet_us = (int(duration_us * part) for part in NOISE_SPAN)
    before = took[(due >= records.facts["warm_up_us"]) & (due < noise_us)]
    noise = took[(due >= noise_us) & (due < quiet_us)]
    found = timing.spread("neighbours_before", before) | timing.spread("neighbours_noise", noise)
    found |= timing.ratio("neighbours_noise_ratio", noise, before)
    for at, until in _outages(records)[:1]:
        stopped = (due >= at) & (due < until)
        after = took[due >= until + MICROSECONDS]
        found |= timing.spread("neighbours_outage", took[stopped])
        found |= timing.spread("neighbours_after", after)
        found |= timing.ratio("neighbours_after_ratio", after, before)
        if stopped.any():
            found["outage_backlog_ms"] = float((due + took)[stopped].max() - until) / 1000
    return found
