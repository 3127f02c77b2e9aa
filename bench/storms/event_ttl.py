"""S5 ``event-ttl``: an audit trail that comes in bursts and must vanish on time.

Theory: Events are what Kubernetes writes most and keeps shortest. Each is put with a lease that an
apiserver shares among those of a few seconds, so a burst of events becomes, one TTL later, a mass
deletion that no client asked for, in the same store and at a time when the cluster does something
else. Stores have stalled all writers over it (etcd #9360, #15993), and those that delete rows by a
clock of their own lose or repeat the deletions.
The hour of a real TTL is compressed to seconds; everything else is as it is: a quarter of the
writes are count-bumps, updates that move the event to a new lease; one in two hundred has 10 to
76 KB; apiservers have no cache of events, so clients list and watch namespaces in the store itself.
``bystander_per_second`` updates of pods go on beside it, to see who else pays.

Writes: one per event, and a bump for a third of them; 4 events are what one pod makes.

Asked of the store beyond the common judges (which know the window in which a key must vanish): all
clients of one namespace hear of the same expiries, each once; bumps are counted in what is left.
That nobody else's writes become slower is a figure, ``bystander_expiry_ratio``: a gate bounds it.
"""

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench import values
from bench.clock import MICROSECONDS
from bench.plan import WRITES, Actor, Edit, Object, Plan, Start, Step, Verb, Watcher
from bench.records import EVENTS, FINAL, OPS, WATCHES, EventType, Frame, Outcome, Records
from bench.storms import objects, timing
from bench.verdicts import Verdict, rule_of, verdict

NAME = "event-ttl"
SUMMARY = "bursts of events with leases, which expire in bursts, watched by namespace"
RATE = "events_per_second"

BUMP = b"event.bump"
BYSTANDER = b"bystander.update"
BYSTANDERS = 50
BIG_SHARE = 0.005
BIG_BYTES = (10_000, 76_000)


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers that a user may change."""

    events_per_second: float = 100.0
    """Writes of events outside of bursts, bumps included."""
    burst_factor: float = 8.0
    """Times as many events within a burst."""
    burst_s: float = 2.0
    """How long a burst lasts."""
    burst_every_s: float = 12.0
    """From one burst to the next."""
    ttl_s: int = 10
    """After which an event vanishes."""
    bump_share: float = 0.25
    """Of all writes of events."""
    namespaces: int = 10
    """Namespaces that events are spread over."""
    clients_per_namespace: int = 2
    """Clients that list and watch the events of each."""
    bystander_per_second: float = 50.0
    """Updates of pods beside the events, to see who else pays."""
    apiservers: int = 2
    """Each has a connection, a cache and a watch for every resource."""


PRESETS: Mapping[str, Parameters] = {
    "xs": Parameters(),
    "s": Parameters(
        events_per_second=400, burst_factor=5, burst_s=10, burst_every_s=60,
        ttl_s=30,
    ),
    "m": Parameters(
        events_per_second=2_000, burst_factor=10, burst_s=10, burst_every_s=120,
        ttl_s=60, namespaces=20, clients_per_namespace=5, apiservers=3,
    ),
    "l": Parameters(
        events_per_second=5_000, burst_factor=20, burst_s=10, burst_every_s=120,
        ttl_s=60, namespaces=100, clients_per_namespace=5, apiservers=3,
    ),
}  # fmt: skip


def schedule(parameters: Parameters, duration_us: int, draw: random.Random) -> Plan:
    """Events in their bursts, who watches them, and who is not to notice."""
    return Plan(
        duration_us=duration_us,
        warm_up_us=duration_us // timing.WARM_UP_PARTS,
        apiservers=parameters.apiservers,
        resources=(objects.PODS,),
        preload=tuple(
            Object(_bystander(number), "pod", objects.POD_READY_BYTES)
            for number in range(BYSTANDERS)
        ),
        actors=(
            *_events(parameters, duration_us, draw),
            *_bystanders(parameters, duration_us, draw),
        ),
        watchers=tuple(_clients(parameters)),
    )


def _bursts(parameters: Parameters, duration_us: int) -> list[tuple[int, int]]:
    """When bursts begin and end: the first a quarter of their distance after the start."""
    every_us = int(parameters.burst_every_s * MICROSECONDS)
    lasts_us = int(parameters.burst_s * MICROSECONDS)
    if every_us <= 0 or lasts_us <= 0:
        return []
    starts = range(every_us // 4, duration_us, every_us)
    return [(start, min(start + lasts_us, duration_us)) for start in starts]


def _events(parameters: Parameters, duration_us: int, draw: random.Random) -> Iterator[Actor]:
    """One actor for each event; bursts are arrivals on top of the steady ones."""
    creates = parameters.events_per_second * (1 - parameters.bump_share)
    times = list(timing.arrivals(creates, 0, duration_us, draw))
    extra = creates * (parameters.burst_factor - 1)
    for start_us, end_us in _bursts(parameters, duration_us):
        times += timing.arrivals(extra, start_us, end_us, draw)
    bumped = parameters.bump_share / (1 - parameters.bump_share)
    ttl_us = parameters.ttl_s * MICROSECONDS
    for number, due_us in enumerate(sorted(times)):
        namespace = objects.tenant(draw.randrange(parameters.namespaces))
        key = objects.key(objects.EVENTS, namespace, f"pod-{number // 4:06}.{number:016x}")
        size = objects.EVENT_BYTES
        if draw.random() < BIG_SHARE:
            size = draw.randint(*BIG_BYTES)
        create = Step(
            Verb.CREATE, key, "event.create", due_us,
            shape="event", size=size, lease_ttl=parameters.ttl_s,
        )  # fmt: skip
        again_us = due_us + int(ttl_us * draw.uniform(0.1, 0.3))
        steps: tuple[Step, ...] = (create,)
        if draw.random() < bumped and again_us < duration_us:
            bump = create._replace(
                verb=Verb.UPDATE, role=BUMP.decode(), due_us=again_us, edit=Edit.INCREMENT
            )
            steps = (create, bump)
        yield Actor(f"event-{number}", draw.randrange(parameters.apiservers), steps)


def _bystander(number: int) -> bytes:
    return objects.key(objects.PODS, objects.tenant(number), f"bystander-{number:03}")


def _bystanders(parameters: Parameters, duration_us: int, draw: random.Random) -> Iterator[Actor]:
    """Pods of which one or other reports its status, at Poisson times."""
    due: list[list[int]] = [[] for _ in range(BYSTANDERS)]
    for due_us in timing.arrivals(parameters.bystander_per_second, 0, duration_us, draw):
        draw.choice(due).append(due_us)
    for number, times in enumerate(due):
        step = objects.update(
            _bystander(number), BYSTANDER.decode(), "pod", objects.POD_READY_BYTES
        )
        steps = tuple(step._replace(due_us=due_us) for due_us in times)
        yield Actor(f"bystander-{number}", number % parameters.apiservers, steps)


def _clients(parameters: Parameters) -> Iterator[Watcher]:
    """Those who list and watch the events of one namespace."""
    for number in range(parameters.namespaces):
        prefix = b"%b%b/" % (objects.EVENTS, objects.tenant(number).encode())
        for client in range(parameters.clients_per_namespace):
            yield Watcher(f"events-{number:03}-{client}", prefix, Start.LIST)


# Checks.


def checks(records: Records, parameters: Parameters) -> list[Verdict]:
    """Clients agree on what expired, bumps are counted."""
    return [_agreement(records), _counts(records)]


def _agreement(records: Records) -> Verdict:
    """All clients of a namespace hear of the same deletions, each once.

    Keys go on expiring while a run ends, so only what the slowest client has passed is compared.
    """
    watches = records.frame(WATCHES)
    clients = watches.where(watches["apiserver"] < 0)
    events = records.frame(EVENTS)
    heard = events.where(np.isin(events["watch"], clients["watch"]))
    order = np.argsort(clients["watch"])
    of_row = order[np.searchsorted(clients["watch"][order], heard["watch"])]
    evidence: list[str] = []
    checked = 0
    for code in np.unique(clients["key"][timing.begins(clients, "key", objects.EVENTS)]):
        names = np.unique(clients["name"][clients["key"] == code])
        inside = clients["key"][of_row] == code
        rows, of = heard.where(inside), clients["name"][of_row][inside]
        passed = min(int(rows["mod"][of == name].max(initial=0)) for name in names)
        chosen = (rows["type"] == EventType.DELETE) & (rows["mod"] <= passed)
        rows, of = rows.where(chosen), of[chosen]
        checked += len(rows)
        for name in names:
            client = clients.text("name")[int(name)].decode()
            evidence += (f"{client} {wrong}" for wrong in _differences(rows, of == name))
    rule, lacking = rule_of(_agreement), "no client heard of an expiry"
    return verdict(
        f"{NAME}: clients agree on expiries", checked, evidence, rule=rule, lacking=lacking
    )


def _differences(rows: Frame, own: timing.Mask) -> Iterator[str]:
    """What one client's deletions have less, or more than once, than those of all together."""
    pairs = rows["mod"] * (int(rows["key"].max(initial=0)) + 1) + rows["key"]
    _, first, of_row = np.unique(pairs, return_index=True, return_inverse=True)
    times = np.bincount(of_row.reshape(-1)[own], minlength=len(first))
    for i in np.flatnonzero(times != 1):
        row = int(first[i])
        key = rows.text("key")[int(rows["key"][row])].decode()
        yield f"heard {times[i]} times that {key} was deleted at {int(rows['mod'][row])}"


def _deletions(records: Records) -> Frame:
    """All that was heard of deleted events."""
    events = records.frame(EVENTS)
    events = events.where(events["type"] == EventType.DELETE)
    return events.where(timing.begins(events, "key", objects.EVENTS))


def _counts(records: Records) -> Verdict:
    """What is left of the events shows each bump that was acknowledged."""
    final = records.frame(FINAL)
    final = final.where(timing.begins(final, "key", objects.EVENTS))
    ops = records.frame(OPS)
    bumps = ops.where(timing.begins(ops, "role", BUMP) & (ops["verb"] == Verb.UPDATE))
    sure = Counter(bumps["key"][bumps["outcome"] == Outcome.OK].tolist())
    maybe = Counter(bumps["key"][bumps["outcome"] == Outcome.UNKNOWN].tolist())
    keys, texts = final.text("key"), final.text("value")
    evidence = []
    for key, value in zip(final["key"].tolist(), final["value"].tolist(), strict=True):
        count = values.count_of(texts[value])
        if not sure[key] <= count <= sure[key] + maybe[key]:
            evidence.append(f"{keys[key].decode()} counts {count} of {sure[key]} bumps")
    rule, lacking = rule_of(_counts), "no event was left in the end"
    return verdict(f"{NAME}: bumps are counted", len(final), evidence, rule=rule, lacking=lacking)


# Measures.


def measures(records: Records, parameters: Parameters) -> dict[str, float]:
    """How late expiries are, and what they cost those who have nothing to do with them."""
    ops = timing.warm(records, timing.planned(records))
    events = ops.where(timing.begins(ops, "role", b"event.") & timing.is_verb(ops, WRITES))
    pods = ops.where(timing.begins(ops, "role", BYSTANDER))
    told = _deletions(records)
    received = timing.received_us(records, told)
    spans = _mass_expiries(received)
    bursts = np.array(_bursts(parameters, records.facts["duration_us"]), np.int64).reshape(-1, 2)
    during = timing.within(pods["due"], spans, spans + MICROSECONDS)
    quiet = ~during & ~timing.within(pods["due"], bursts[:, 0], bursts[:, 1])
    took = timing.latencies_us(records, pods)
    return (
        timing.spread("event_write", timing.latencies_us(records, events))
        | timing.spread("bystander", took)
        | timing.spread("bystander_expiry", took[during])
        | timing.ratio("bystander_expiry_ratio", took[during], took[quiet])
        | timing.spread("expiry_late", _late_us(records, told, received))
    )


def _mass_expiries(received: NDArray[np.int64]) -> NDArray[np.int64]:
    """Starts of those seconds in which at least half as many keys vanish as in the worst one."""
    seconds, count = np.unique(received // MICROSECONDS, return_counts=True)
    starts: NDArray[np.int64] = seconds[count * 2 >= count.max(initial=0)] * MICROSECONDS
    return starts


def _late_us(records: Records, told: Frame, received: NDArray[np.int64]) -> NDArray[np.int64]:
    """How long after the end of its lease each deletion was heard of.

    The lease is that of the put which the deletion says came before it; counted from the answer to
    the grant, after which no store can have begun to count.
    """
    events, ops = records.frame(EVENTS), records.frame(OPS)
    puts = events.where((events["type"] == EventType.PUT) & (events["lease"] > 0))
    mods, first = np.unique(puts["mod"], return_index=True)
    leases = puts["lease"][first]
    grants = ops.where((ops["verb"] == Verb.GRANT) & (ops["outcome"] == Outcome.OK))
    ids, first = np.unique(grants["lease"], return_index=True)
    ends = (grants["done"] + grants["ttl"] * MICROSECONDS)[first]
    if not len(mods) or not len(ids):
        return np.empty(0, np.int64)
    at = np.minimum(np.searchsorted(mods, told["prev_mod"]), len(mods) - 1)
    lease = np.where(mods[at] == told["prev_mod"], leases[at], -1)
    grant = np.minimum(np.searchsorted(ids, lease), len(ids) - 1)
    known = ids[grant] == lease
    late: NDArray[np.int64] = (received - ends[grant])[known]
    return late
