"""S0 ``idle-background``: what a cluster writes when nobody uses it; it runs under other storms.

Theory: N agents live on N/30 nodes, and a node renews its Lease (an ordinary key) every 10 s. Six
controllers renew their leader election every 2 s. Every apiserver keeps a masterlease, one of the
few keys with an etcd lease (15 s, put every 10 s), asks for its health once a second and for its
status every 30 s, counts each resource once a minute, and tries to be the one that compacts:
a Txn on the version of ``compact_rev_key``, whose winner compacts to where the store was one
interval earlier.

Writes: N/300 + 3 + A/10 a second, and one of each interval's compaction.

Asked of the store beyond the common judges: the compactors' Txn compares a version where all others
compare a revision, so that key's last version is the number of Txns that were told they had won:
were it less, two apiservers would have compacted in one interval.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from bench.clock import MICROSECONDS
from bench.plan import Actor, Object, Plan, Start, Step, Verb, Watcher
from bench.records import Outcome, Records
from bench.storms import attempts, objects, timing
from bench.verdicts import Verdict, rule_of, verdict

NAME = "idle-background"
SUMMARY = "a cluster at rest: node leases, elections, masterleases, compaction, probes"
RATE = "agents"

AGENTS_PER_NODE = 30
NODE_PERIOD_US = 10 * MICROSECONDS
NODE_JITTER = 0.04
"""Of the period, as kubelet has it."""
ELECTION_PERIOD_US = 2 * MICROSECONDS
MASTER_PERIOD_US, MASTER_TTL = 10 * MICROSECONDS, 15
STATUS_PERIOD_US = 30 * MICROSECONDS
HEALTH_PERIOD_US = MICROSECONDS
COUNT_PERIOD_US = 60 * MICROSECONDS
PROGRESS_PERIOD_US = MICROSECONDS
CONTROLLERS = (
    "kube-controller-manager",
    "kube-scheduler",
    "cloud-controller-manager",
    "agent-sandbox-controller",
    "cluster-autoscaler",
    "keda-operator",
)
COUNTED = (
    objects.PODS,
    objects.EVENTS,
    objects.NODES,
    objects.LEASES,
    objects.CONFIG_MAPS,
    objects.SANDBOXES,
    objects.CLAIMS,
    objects.POOLS,
    objects.RUNS,
)


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers that a user may change."""

    agents: int = 1_000
    """A node and its Lease for each 30."""
    apiservers: int = 2
    """Each has a connection, a cache and a watch for every resource."""
    compaction_s: float = 10.0
    """Between compactions, and how much history they leave; 0: there are none."""


PRESETS: Mapping[str, Parameters] = {
    "xs": Parameters(),
    "s": Parameters(agents=10_000, compaction_s=60.0),
    "m": Parameters(agents=30_000, apiservers=3, compaction_s=300.0),
    "l": Parameters(agents=150_000, apiservers=3, compaction_s=300.0),
}


def under(plan: Plan, parameters: Parameters, draw: random.Random) -> Plan:
    """A storm's plan with this beside it, on the storm's apiservers.

    A plan that compacts by itself is not compacted by anybody else.
    """
    compacts = any(step.verb == Verb.COMPACT for actor in plan.actors for step in actor.steps)
    fitting = replace(
        parameters,
        apiservers=plan.apiservers,
        compaction_s=0.0 if compacts else parameters.compaction_s,
    )
    return plan.beside(schedule(fitting, plan.duration_us, draw))


def schedule(parameters: Parameters, duration_us: int, draw: random.Random) -> Plan:
    """Everything that beats, each from a phase of its own."""
    nodes = -(-parameters.agents // AGENTS_PER_NODE)
    node_leases = [_lease("kube-node-lease", f"node-{n:05}") for n in range(nodes)]
    elections = [_lease("kube-system", name) for name in CONTROLLERS]
    apiservers = range(parameters.apiservers)
    actors = [
        *_renewing("node.renew", node_leases, NODE_PERIOD_US, parameters, duration_us, draw),
        *_renewing("election.renew", elections, ELECTION_PERIOD_US, parameters, duration_us, draw),
    ]
    for apiserver in apiservers:
        actors += _of_apiserver(apiserver, parameters, duration_us, draw)
    return Plan(
        duration_us=duration_us,
        apiservers=parameters.apiservers,
        resources=(objects.LEASES,),
        preload=(*node_leases, *elections),
        actors=tuple(actor for actor in actors if actor.steps),
        watchers=tuple(
            Watcher(f"compaction {n}", objects.COMPACT_REV_KEY, Start.NOW) for n in apiservers
        ),
        progress_requests_us=PROGRESS_PERIOD_US,
    )


def _lease(namespace: str, name: str) -> Object:
    key = objects.key(objects.LEASES, namespace, name)
    return Object(key, "lease", objects.LEASE_BYTES, owner=name)


def _beats(period_us: int, duration_us: int, draw: random.Random) -> range:
    """When something happens that does so every ``period_us``."""
    return range(draw.randrange(period_us), duration_us, period_us)


def _renewing(
    role: str,
    leases: list[Object],
    period_us: int,
    parameters: Parameters,
    duration_us: int,
    draw: random.Random,
) -> Iterator[Actor]:
    """The holder of each lease, renewing it."""
    jitter_us = int(period_us * NODE_JITTER)
    for lease in leases:
        steps = tuple(
            Step(
                Verb.UPDATE,
                lease.key,
                role,
                min(at_us + draw.randrange(jitter_us), duration_us - 1),
                shape=lease.shape,
                size=lease.size,
                owner=lease.owner,
            )
            for at_us in _beats(period_us, duration_us, draw)
        )
        yield Actor(lease.owner, draw.randrange(parameters.apiservers), steps)


def _of_apiserver(
    number: int, parameters: Parameters, duration_us: int, draw: random.Random
) -> Iterator[Actor]:
    """What one apiserver does on its own account."""
    address = f"10.0.0.{number + 1}"
    master = Step(
        Verb.CREATE,
        objects.MASTER_LEASES + address.encode(),
        "masterlease.put",
        shape="endpoints",
        size=objects.LEASE_BYTES,
        lease_ttl=MASTER_TTL,
        owner=address,
    )
    beats = _beats(MASTER_PERIOD_US, duration_us, draw)
    verbs = [Verb.CREATE] + [Verb.UPDATE] * len(beats)
    steps = [master._replace(verb=verb, due_us=at) for verb, at in zip(verbs, beats, strict=False)]
    yield Actor(f"masterlease {number}", number, tuple(steps))
    calls = (
        ("health", Step(Verb.GET, objects.HEALTH, "apiserver.health"), HEALTH_PERIOD_US),
        ("status", Step(Verb.STATUS, b"", "apiserver.status"), STATUS_PERIOD_US),
        *(
            (
                f"count {prefix.decode()}",
                Step(Verb.COUNT, prefix, "apiserver.count"),
                COUNT_PERIOD_US,
            )
            for prefix in COUNTED
        ),
    )
    for name, step, period_us in calls:
        steps = [step._replace(due_us=at) for at in _beats(period_us, duration_us, draw)]
        yield Actor(f"{name} {number}", number, tuple(steps))
    interval_us = int(parameters.compaction_s * MICROSECONDS)
    if interval_us:
        compaction = Step(Verb.COMPACT, objects.COMPACT_REV_KEY, "apiserver.compact")
        times = range(min(interval_us, MICROSECONDS), duration_us, interval_us)
        steps = [compaction._replace(due_us=at + draw.randrange(100_000)) for at in times]
        yield Actor(f"compactor {number}", number, tuple(steps))


def checks(records: Records, parameters: Parameters) -> list[Verdict]:
    """Of several apiservers that want to compact, one does."""
    ops = timing.planned(records)
    txns = ops.where((ops["verb"] == Verb.COMPACT) & (ops["at"] == 0))
    won = int((txns["outcome"] == Outcome.OK).sum())
    may_have = won + int((txns["outcome"] == Outcome.UNKNOWN).sum())
    evidence = []
    if len(txns) and records.facts["state"] == "COMPLETE":
        version, _ = attempts.final_values(records).get(objects.COMPACT_REV_KEY, (0, b""))
        if not won <= version <= may_have:
            evidence.append(
                f"{objects.COMPACT_REV_KEY.decode()} has version {version} in the end, but "
                f"{won} Txns were told that they had won, and {may_have - won} may have"
            )
    rule, lacking = rule_of(checks), "no apiserver wanted to compact"
    return [verdict(f"{NAME}: one compactor", len(txns), evidence, rule=rule, lacking=lacking)]


def measures(records: Records, parameters: Parameters) -> dict[str, float]:
    """How late the beats are: these callers lose what they hold when they are."""
    ops = timing.warm(records, timing.planned(records))
    figures: dict[str, float] = {}
    for name in ("node.renew", "election.renew", "masterlease.put", "apiserver.health"):
        mine = attempts.steps(ops.where(timing.begins(ops, "role", name.encode())))
        figures |= timing.spread(name.replace(".", "_"), timing.latencies_us(records, mine))
    return figures
