"""S3 ``heartbeat-flood``: every agent has a Lease, and renews it whether it works or not.

Theory: what Kubernetes calls a Lease is an ordinary key, written by a Txn. N agents renew theirs at
absolute times of a phase of their own: residents every 10 s, as nodes do, and those that elect a
leader every 2 s. It is the flood of small writes to many keys under which operators lose their
leadership: KEDA's dies when a renewal takes longer than two thirds of the lease.
Two agents in a hundred stop without a word. Two in a hundred give their Lease up, as a leader that
is told to end does; two standbys see it free and race for it, and the winner renews from then on.

Writes: one per renewal, N/10 to N/2 a second; two more per change of hands.

Asked of the store beyond the common judges: a Lease changes its writer only by being given up and
taken, once; what a holder writes later has the higher revision; and as nobody else writes, no
renewal may lose its comparison or miss its object, unless an answer was lost before.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from bench.clock import MICROSECONDS
from bench.plan import BOUND, Actor, Object, Plan, Step, Verb
from bench.records import Frame, Outcome, Records
from bench.storms import attempts, objects, timing
from bench.verdicts import Verdict, rule_of, verdict

NAME = "heartbeat-flood"
SUMMARY = "every agent renews a lease of its own; some change hands"
RATE = "agents"

AGENT, LEADER = "agent.renew", "leader.renew"
RELEASE, TAKE = "lease.release", "lease.take"
PERIOD_US = {AGENT: 10 * MICROSECONDS, LEADER: 2 * MICROSECONDS}
DEADLINE_US = {AGENT: 40 * MICROSECONDS * 2 // 3, LEADER: 15 * MICROSECONDS * 2 // 3}
"""Two thirds of what a Lease lasts: 40 s for those of nodes, 15 s for those of leaders."""
STANDBY_US = 100_000
"""When standbys look, after a Lease should have been given up; who sees no free one goes away."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers that a user may change."""

    agents: int = 2_000
    """Each has a Lease, and renews it every 10 s unless it is a leader."""
    leaders: float = 0.25
    """Part of the agents that renew every 2 s."""
    stopping: float = 0.02
    """Part of the agents that stop without a word."""
    changing: float = 0.02
    """Part of the agents whose Lease is given up and taken by another."""
    tenants: int = 20
    """Namespaces that agents are spread over."""
    apiservers: int = 2
    """Each has a connection, a cache and a watch for every resource."""


PRESETS: Mapping[str, Parameters] = {
    "xs": Parameters(),
    "s": Parameters(agents=20_000, leaders=0.05, tenants=100),
    "m": Parameters(agents=50_000, leaders=0.1, tenants=250, apiservers=3),
    "l": Parameters(agents=150_000, leaders=0.1, tenants=500, apiservers=3),
}


def schedule(parameters: Parameters, duration_us: int, draw: random.Random) -> Plan:
    """All agents; each has a Lease from the start."""
    preload, actors = [], []
    for number in range(parameters.agents):
        namespace = objects.tenant(number % parameters.tenants)
        name = f"agent-{number:06}"
        lease = objects.key(objects.LEASES, namespace, name)
        preload.append(Object(lease, "lease", objects.LEASE_BYTES, owner=name))
        role = LEADER if draw.random() < parameters.leaders else AGENT
        fate, until_us = draw.random(), duration_us
        if fate < parameters.stopping + parameters.changing:
            until_us = draw.randrange(duration_us // 4, duration_us * 3 // 4)
        steps = [_put(lease, role, at, name) for at in _beats(role, until_us, draw)]
        changes = fate < parameters.changing
        if changes:
            steps.append(_put(lease, RELEASE, until_us, ""))
        if steps:
            actors.append(Actor(name, draw.randrange(parameters.apiservers), tuple(steps)))
        if changes:
            actors += _standbys(lease, role, until_us, duration_us, parameters, draw)
    return Plan(
        duration_us=duration_us,
        warm_up_us=duration_us // 10,
        apiservers=parameters.apiservers,
        resources=(objects.LEASES,),
        preload=tuple(preload),
        actors=tuple(actors),
    )


def _beats(role: str, until_us: int, draw: random.Random) -> range:
    """Times of renewals, from a phase on."""
    return range(draw.randrange(PERIOD_US[role]), until_us, PERIOD_US[role])


def _put(lease: bytes, role: str, due_us: int, owner: str) -> Step:
    step = objects.update(lease, role, "lease", objects.LEASE_BYTES, owner=owner)
    return step._replace(due_us=due_us)


def _standbys(
    lease: bytes,
    role: str,
    free_us: int,
    duration_us: int,
    parameters: Parameters,
    draw: random.Random,
) -> Iterator[Actor]:
    """Two that race for a Lease, through different apiservers if there are; one will renew it.

    Renewals are of the Lease that was got: they are left out by the one that got none.
    """
    folder, _, lease_name = lease.rpartition(b"/")
    first = draw.randrange(parameters.apiservers)
    take_us = free_us + STANDBY_US
    for number in range(2):
        name = f"{lease_name.decode()}-standby-{number}"
        take = _put(lease, TAKE, min(take_us + draw.randrange(2_000), duration_us - 1), name)
        take = take._replace(verb=Verb.ADOPT, candidates=(lease,))
        times = range(take_us + PERIOD_US[role], duration_us, PERIOD_US[role])
        renewals = (_put(folder + b"/" + BOUND, role, at, name) for at in times)
        apiserver = (first + number) % parameters.apiservers
        yield Actor(name, apiserver, (take, *renewals))


# Checks.


def checks(records: Records, parameters: Parameters) -> list[Verdict]:
    """Who held which Lease, by the order of revisions."""
    ops = timing.planned(records)
    mine = ops.where(timing.begins(ops, "role", *_ROLES))
    return [_one_holder(mine), _monotonic(mine), _unmissed(mine)]


_ROLES = tuple(role.encode() for role in (AGENT, LEADER, RELEASE, TAKE))


def _in_order(ops: Frame) -> Frame:
    """Acknowledged writes, by key and revision."""
    ops = ops.where(attempts.written(ops))
    return ops.where(np.lexsort((ops["revision"], ops["key"])))


def _neighbours(ops: Frame, chosen: timing.Mask) -> Iterator[tuple[str, str, str]]:
    """Key, and what stands before and after, of chosen pairs of neighbours."""
    keys, roles = ops.text("key"), ops.text("role")
    for at in np.flatnonzero(chosen).tolist():
        before, after = (
            f"{roles[int(ops['role'][n])].decode()} of actor {int(ops['actor'][n])}, "
            f"step {int(ops['step'][n])} (revision {int(ops['revision'][n])})"
            for n in (at, at + 1)
        )
        yield keys[int(ops["key"][at])].decode(), before, after


def _one_holder(ops: Frame) -> Verdict:
    """The writer of a Lease changes only when one gave it up and one took it."""
    done = _in_order(ops)
    took = timing.begins(done, "role", TAKE.encode())
    gave = timing.begins(done, "role", RELEASE.encode())
    changes = (np.diff(done["actor"]) != 0) & (np.diff(done["key"]) == 0)
    # A release whose answer was lost may have been made.
    doubtful = ops.where(attempts.unsure(ops) & timing.begins(ops, "role", RELEASE.encode()))
    given = gave[:-1] | np.isin(done["actor"][:-1], doubtful["actor"])
    wrong = changes & ~(given & took[1:])
    evidence = [
        f"{key} went from {before} to {after}" for key, before, after in _neighbours(done, wrong)
    ]
    rule, lacking = rule_of(_one_holder), "no renewal was acknowledged"
    return verdict(
        f"{NAME}: one holder", len(np.unique(done["key"])), evidence, rule=rule, lacking=lacking
    )


def _monotonic(ops: Frame) -> Verdict:
    """A holder's later renewal has the higher revision."""
    done = _in_order(ops)
    same = (np.diff(done["actor"]) == 0) & (np.diff(done["key"]) == 0)
    wrong = same & (np.diff(done["step"]) <= 0)
    evidence = [
        f"{key} has {before} before {after}" for key, before, after in _neighbours(done, wrong)
    ]
    rule, lacking = rule_of(_monotonic), "nobody renewed twice"
    return verdict(
        f"{NAME}: renewals in order", int(same.sum()), evidence, rule=rule, lacking=lacking
    )


def _unmissed(ops: Frame) -> Verdict:
    """Renewals of holders to whom nothing happened are made at the first attempt."""
    renewals = ops.where(timing.begins(ops, "role", AGENT.encode(), LEADER.encode()))
    renewals = renewals.where(~np.isin(renewals["actor"], attempts.troubled_actors(ops)))
    missing = (renewals["verb"] == Verb.GET) & (renewals["found"] == 0)
    wrong = renewals.where(missing | (renewals["outcome"] == Outcome.CONFLICT))
    keys = wrong.text("key")
    columns = (wrong[name].tolist() for name in ("key", "actor", "step", "expected", "found"))
    evidence = [
        f"{keys[key].decode()}: renewal {step} of actor {actor} expected revision {expected} "
        f"and found {found}"
        for key, actor, step, expected, found in zip(*columns, strict=True)
    ]
    rule, lacking = rule_of(_unmissed), "nobody renewed without an error"
    return verdict(
        f"{NAME}: no renewal missed", len(renewals), evidence, rule=rule, lacking=lacking
    )


# Measures.


def measures(records: Records, parameters: Parameters) -> dict[str, float]:
    """How late renewals are, and who would have lost his Lease by that."""
    all_steps = attempts.steps(timing.planned(records))
    steps = timing.warm(records, all_steps)
    figures: dict[str, float] = {}
    renewals = steps.where(timing.begins(steps, "role", AGENT.encode(), LEADER.encode()))
    took = timing.latencies_us(records, renewals)
    if len(took):
        figures |= timing.spread("renew", took)
        figures["renew_p999_ms"] = timing.percentile_ms(took, 99.9)
    figures["deadline_misses"] = float(
        sum(_misses(all_steps, role, records.facts["load_end_us"]) for role in (AGENT, LEADER))
    )
    takes = steps.where(timing.begins(steps, "role", TAKE.encode()) & attempts.written(steps))
    given = steps.where(timing.begins(steps, "role", RELEASE.encode()) & attempts.written(steps))
    figures["leases_untaken"] = float(len(given) - len(takes))
    return figures | timing.spread("take", timing.latencies_us(records, takes))


def _misses(steps: Frame, role: str, end_us: int) -> int:
    """Times that a holder was longer without a renewal than it may be and keep its Lease.

    Counted between renewals that were made, from when the first was due, and until the load's end
    if the last was not made.
    """
    mine = steps.where(timing.begins(steps, "role", role.encode()))
    if not len(mine):
        return 0
    mine = mine.where(np.lexsort((mine["step"], mine["actor"])))
    made = attempts.written(mine)
    changes = np.diff(mine["actor"]) != 0
    first, last = np.append(True, changes), np.append(changes, True)
    stands = made | first | last
    times = np.where(made, mine["done"], np.where(last, end_us, mine["due"]))[stands]
    actors = mine["actor"][stands]
    gaps = np.diff(times)[np.diff(actors) == 0]
    return int((gaps > DEADLINE_US[role]).sum())
