"""S4 ``hot-status``: everybody patches the pool.

Theory: one status object is read, counted up and written back by W controllers that wake at the
same time, as controllers do that watch the same thing. In each round one wins and W - 1 lose their
comparison, read what won, and try again, at most five times: more than half of all Txns fail. That
is what burns sequence numbers in stores on SQL (kine #754, #759), and makes watches wait for
revisions that never come. Fifty other objects are counted up by single writers, by Zipf's law with
exponent 1.2. One large object of 1 MB is rewritten every second beside them: the slowest commit
that a client can ask for, so that small ones overtake it where a store lets them (kine #676 lost an
event behind a slow one; a client cannot hold a transaction open through the etcd API).

Writes: per round as many as succeed, up to min(W, 5); ``others_per_second``; and one large one a
second. With W writers a round is W + (W - 1) + ... Txns, of at most five terms: 10 at W = 4, 70 at
16, 310 at 64.

Asked of the store beyond the common judges: each counter is, in the end, the number of its
acknowledged updates, and the version one more; each acknowledged update is heard by every watch
that stayed open, within 2 s, and within 1 s after the writers have stopped.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from bench import values
from bench.clock import MICROSECONDS
from bench.plan import Actor, Edit, Object, Plan, Step, Verb
from bench.records import EVENTS, WATCHES, Frame, Records
from bench.storms import attempts, objects, timing
from bench.verdicts import Verdict, rule_of, verdict

NAME = "hot-status"
SUMMARY = "many writers count up one object, most of them in vain"
RATE = "rounds_per_second"

NAMESPACE = objects.tenant(0)
HOT, OTHER, LARGE = "hot.count", "other.count", "large.update"
OTHERS, EXPONENT = 50, 1.2
LARGE_BYTES = 1_000_000
LARGE_PERIOD_US = MICROSECONDS
JITTER_US = 1_000
"""How far apart the writers of one round wake."""
STALL_US, DRAIN_US = 2 * MICROSECONDS, MICROSECONDS


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers that a user may change."""

    writers: int = 4
    """Controllers that count the one status object up, all at the same moment."""
    rounds_per_second: float = 20.0
    """How often they do."""
    others_per_second: float = 150.0
    """Updates of fifty other objects, by single writers."""
    apiservers: int = 2
    """Each has a connection, a cache and a watch for every resource."""


PRESETS: Mapping[str, Parameters] = {
    "xs": Parameters(),
    "s": Parameters(writers=16, rounds_per_second=15.0, others_per_second=300.0),
    "m": Parameters(writers=64, rounds_per_second=6.0, others_per_second=1_000.0, apiservers=3),
    "l": Parameters(writers=64, rounds_per_second=20.0, others_per_second=5_000.0, apiservers=3),
}


def hot_key() -> bytes:
    """The object that everybody patches."""
    return objects.key(objects.POOLS, NAMESPACE, "hot-pool")


def _other_key(number: int) -> bytes:
    return objects.key(objects.POOLS, NAMESPACE, f"pool-{number:03}")


def schedule(parameters: Parameters, duration_us: int, draw: random.Random) -> Plan:
    """Rounds of all writers at Poisson times, single writers beside them, and the large one."""
    large = objects.key(objects.CONFIG_MAPS, NAMESPACE, "large")
    keys = [hot_key(), *map(_other_key, range(OTHERS))]
    return Plan(
        duration_us=duration_us,
        warm_up_us=duration_us // 10,
        apiservers=parameters.apiservers,
        resources=(objects.POOLS, objects.CONFIG_MAPS),
        preload=(
            *(Object(key, "pool", objects.POOL_BYTES) for key in keys),
            Object(large, "configmap", LARGE_BYTES),
        ),
        actors=(
            *_writers(parameters, duration_us, draw),
            *_singles(parameters, duration_us, draw),
            Actor("large", 0, tuple(_rewrites(large, duration_us))),
        ),
    )


def _count(key: bytes, role: str, due_us: int) -> Step:
    step = objects.update(key, role, "pool", objects.POOL_BYTES)
    return step._replace(edit=Edit.INCREMENT, due_us=due_us)


def _writers(parameters: Parameters, duration_us: int, draw: random.Random) -> Iterator[Actor]:
    """Controllers that wake together, each with its own delay, spread over the apiservers."""
    until_us = duration_us - JITTER_US
    rounds = list(timing.arrivals(parameters.rounds_per_second, 0, until_us, draw))
    for number in range(parameters.writers):
        # A delay may take a step past the next round's; an actor's own steps stay in order.
        dues = sorted(at_us + draw.randrange(JITTER_US) for at_us in rounds)
        steps = tuple(_count(hot_key(), HOT, due_us) for due_us in dues)
        if steps:
            yield Actor(f"writer-{number:02}", number % parameters.apiservers, steps)


def _singles(parameters: Parameters, duration_us: int, draw: random.Random) -> Iterator[Actor]:
    """Updates of the others, each by an actor of its own."""
    weights = list(accumulate((n + 1) ** -EXPONENT for n in range(OTHERS)))
    times = timing.arrivals(parameters.others_per_second, 0, duration_us, draw)
    for number, due_us in enumerate(times):
        (which,) = draw.choices(range(OTHERS), cum_weights=weights)
        step = _count(_other_key(which), OTHER, due_us)
        yield Actor(f"single-{number:06}", draw.randrange(parameters.apiservers), (step,))


def _rewrites(key: bytes, duration_us: int) -> Iterator[Step]:
    """A large object, again and again."""
    for due_us in range(0, duration_us, LARGE_PERIOD_US):
        step = objects.update(key, LARGE, "configmap", LARGE_BYTES)
        yield step._replace(due_us=due_us)


# Checks.


def checks(records: Records, parameters: Parameters) -> list[Verdict]:
    """Nothing that was counted is lost, and all of it is heard in time."""
    ops = timing.planned(records)
    counts = ops.where(timing.begins(ops, "role", HOT.encode(), OTHER.encode()))
    counts = counts.where(counts["verb"] == Verb.UPDATE)
    return [_counters(records, counts), _heard(records, counts)]


def _counters(records: Records, counts: Frame) -> Verdict:
    """The counter and the version of each object are those of its acknowledged updates."""
    judge = f"{NAME}: no update lost"
    done = attempts.tally(counts.where(attempts.written(counts)), "key")
    unsure = attempts.tally(counts.where(attempts.unsure(counts)), "key")
    final = attempts.final_values(records)
    evidence = []
    if records.facts["state"] != "COMPLETE":
        return verdict(judge, 0, [], rule=rule_of(_counters), lacking="the run was cut short")
    for key, least in done.items():
        version, value = final.get(key, (0, b""))
        count, most = values.count_of(value), least + unsure.get(key, 0)
        if not least <= count <= most or version != count + 1:
            evidence.append(
                f"{key.decode()} counts {count} and has version {version} in the end; {least} "
                f"updates were acknowledged, {most - least} are unknown"
            )
    rule, lacking = rule_of(_counters), "no update was acknowledged"
    return verdict(judge, len(done), evidence, rule=rule, lacking=lacking)


def _heard(records: Records, counts: Frame) -> Verdict:
    """Every acknowledged update reaches every watch that stayed open, in time.

    Of runs without trouble that was made on purpose, where a delay has no other cause.
    """
    judge = f"{NAME}: heard in time"
    done = counts.where(attempts.written(counts))
    watches = records.frame(WATCHES)
    stayed = (watches["closed"] >= records.facts["load_end_us"]) | (watches["closed"] < 0)
    stayed &= (watches["opened"] <= 0) & (watches["slow"] == 0)
    stayed &= timing.begins(watches, "key", objects.POOLS)
    rule = rule_of(_heard)
    if why := attempts.disturbance(records):
        return verdict(judge, 0, [], rule=rule, lacking=why, timed=True)
    evidence: list[str] = []
    checked = 0
    events = records.frame(EVENTS)
    received = timing.received_us(records, events)
    for watch in watches["watch"][stayed].tolist():
        mine = events["watch"] == watch
        heard = _times_heard(done, events["mod"][mine], received[mine])
        checked += len(done)
        evidence += _late(f"watch {watch}", done, heard)
    lacking = "no watch of pools stayed open, or no update was acknowledged"
    return verdict(judge, checked, evidence, rule=rule, lacking=lacking, timed=True)


def _times_heard(
    done: Frame, revisions: NDArray[np.int64], received: NDArray[np.int64]
) -> NDArray[np.int64]:
    """When each update was heard; -1: never."""
    if not len(revisions):
        return np.full(len(done), -1)
    order = np.argsort(revisions, kind="stable")
    at = np.searchsorted(revisions[order], done["revision"]).clip(max=len(order) - 1)
    is_there = revisions[order][at] == done["revision"]
    return np.where(is_there, received[order][at], -1)


def _late(watch: str, done: Frame, heard: NDArray[np.int64]) -> Iterator[str]:
    """What one watch did not hear, or heard too late."""
    stopped_us = int(done["done"].max()) if len(done) else 0
    late = heard - done["done"] > STALL_US
    undrained = heard > stopped_us + DRAIN_US
    keys = done.text("key")
    for at in np.flatnonzero((heard < 0) | late | undrained).tolist():
        what = f"{keys[int(done['key'][at])].decode()} at revision {int(done['revision'][at])}"
        after = (int(heard[at]) - int(done["done"][at])) / 1000
        how = "never heard of" if heard[at] < 0 else f"heard {after:.1f} ms after its answer of"
        yield f"{watch} {how} {what}"


# Measures.


def measures(records: Records, parameters: Parameters) -> dict[str, float]:
    """What a success on a contended object costs, and who gets it."""
    ops = timing.warm(records, timing.planned(records))
    steps = attempts.steps(ops.where(timing.begins(ops, "role", HOT.encode())))
    steps = steps.where(steps["verb"] == Verb.UPDATE)
    made = attempts.written(steps)
    won = int(made.sum())
    if not won:
        return {}
    span_us = records.facts["load_end_us"] - records.facts["warm_up_us"]
    wins = np.bincount(steps["actor"][made], minlength=int(steps["actor"].max()) + 1)
    wins = wins[np.unique(steps["actor"])]
    return {
        **timing.spread("hot", timing.latencies_us(records, steps)),
        "hot_ms_per_success": span_us / won / 1000,
        "attempts_per_success": (int(steps["conflicts"].sum()) + won) / won,
        "hot_given_up_per_cent": 100.0 * (len(steps) - won) / len(steps),
        "unfairness_ratio": float(wins.max() / max(wins.min(), 1)),
        **_lag(records, ops),
    }


def _lag(records: Records, ops: Frame) -> dict[str, float]:
    """How long after it was sent an update is heard, while others fail.

    By watches that were open by then and are read at full speed: another one reads history.
    """
    done = ops.where(timing.begins(ops, "role", HOT.encode()) & attempts.written(ops))
    done = done.where(np.argsort(done["revision"]))
    watches = records.frame(WATCHES)
    watches = watches.where(np.argsort(watches["watch"]))
    events = records.frame(EVENTS)
    events = events.where(timing.begins(events, "key", hot_key()))
    at = np.searchsorted(done["revision"], events["mod"]).clip(max=len(done) - 1)
    known = done["revision"][at] == events["mod"]
    sent = done["sent"][at]
    watch = np.searchsorted(watches["watch"], events["watch"])
    known &= (watches["opened"][watch] <= sent) & (watches["slow"][watch] == 0)
    return timing.spread("hot_watch_lag", (timing.received_us(records, events) - sent)[known])
