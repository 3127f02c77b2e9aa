"""S1 ``swarm-burst``: a planner spawns the swarm, all of it at once.

Theory: agent-sandbox keeps pools of warm Sandboxes. A burst of claims comes within 50 ms, and each
becomes the owner of one Sandbox of its tenant's pool; which one it tries first is the same as
another claim's every now and then, so that two controllers race and the store decides. In the
background the pool is refilled, at most 80 Sandboxes a second, which is what one scheduler does.
All claims of a tenant report to one pool object: a hot key, counted up by whoever comes.

The chain of agent-sandbox's controllers, one write after the other:

- a claim, 10 writes: create, observe, assign, *adopt a Sandbox*, event, ready, first-ready mark,
  Pod labels, Sandbox status, pool status. It is Ready with the sixth, which is the latency that
  users see;
- its refill, 14 writes: Sandbox, Pod, Pod name, status, bind, three of the kubelet's, four events,
  Sandbox ready, pool status;
- its teardown after a dwell, 6 writes: claim, Sandbox, three of the Pod's end, event. One claim in
  ten is a resident agent and stays.

Writes per claim: 29.4, and failed comparisons beside them.

Asked of the store beyond the common judges: no Sandbox is owned by two claims, in what was
acknowledged, in what watches heard and in what is there in the end; an adoption is followed by
exactly one Ready; pools hold what was made less what was adopted; and the store's revision rises by
the number of successful writes, no more and no less.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.clock import MICROSECONDS
from bench.plan import BOUND, WRITES, Actor, Edit, Object, Plan, Step, Verb, Watcher
from bench.records import EVENTS, FINAL, OPS, PRELOADED, EventType, Frame, Outcome, Records
from bench.storms import adoptions, attempts, objects, timing
from bench.verdicts import Verdict, rule_of, verdict

NAME = "swarm-burst"
SUMMARY = "bursts of claims race for warm sandboxes; pools are refilled behind them"
RATE = "claims"

BURST_US = 50_000
REFILL_PER_SECOND = 80
THINK_US = (2_000, 20_000)
CANDIDATES = 32
"""Sandboxes that a claim tries, from its first one on."""
STAYING = 0.1
"""Part of the claims that are resident agents."""
POOL = "python-pool"
CHAIN = (b"claim.", b"sandbox.", b"pod.", b"pool.", b"refill.", b"event.")
"""Beginnings of this storm's roles."""
_OWNER = re.compile(rb'"owner":"([^"]*)"')


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers that a user may change."""

    claims: int = 50
    """In one burst, over all tenants."""
    burst_every_s: float = 4.0
    """From one burst to the next."""
    tenants: int = 4
    """Each has one pool."""
    replicas: int = 50
    """Warm Sandboxes of each pool, before the first burst."""
    racing: float = 0.3
    """Part of the claims that try first what the claim before them tries."""
    dwell_s: float = 1.0
    """From Ready to the end of a claim."""
    apiservers: int = 2
    """Each has a connection, a cache and a watch for every resource."""


PRESETS: Mapping[str, Parameters] = {
    "xs": Parameters(),
    "s": Parameters(claims=300, burst_every_s=30.0, replicas=150, dwell_s=5.0),
    "m": Parameters(claims=1_000, burst_every_s=30.0, tenants=10, replicas=300, dwell_s=5.0),
    "l": Parameters(
        claims=3_000, burst_every_s=30.0, tenants=20, replicas=500, dwell_s=5.0, apiservers=3
    ),
}


def schedule(parameters: Parameters, duration_us: int, draw: random.Random) -> Plan:
    """A train of bursts, from the end of the warm-up until what the last one begins can end."""
    warm_up_us = duration_us // 15
    every_us = int(parameters.burst_every_s * MICROSECONDS)
    bursts = range(warm_up_us, max(duration_us - every_us // 2, warm_up_us + 1), every_us)
    of_pool = [len(range(t, parameters.claims, parameters.tenants)) for t in _tenants(parameters)]
    sandboxes = [
        [_sandbox(n, draw) for n in range(parameters.replicas + claims * len(bursts))]
        for claims in of_pool
    ]
    actors: list[Actor] = []
    for number, at_us in enumerate(bursts):
        for claim in range(parameters.claims):
            turn, tenant = divmod(claim, parameters.tenants)
            index = number * of_pool[tenant] + turn
            names = sandboxes[tenant]
            first = index - (turn > 0 and draw.random() < parameters.racing)
            due_us = min(at_us + draw.randrange(BURST_US), duration_us - 1)
            actors.append(
                _claim(
                    f"agent-{number:03}-{claim:05}-{objects.suffix(draw)}",
                    tenant,
                    names[first : first + CANDIDATES],
                    due_us,
                    parameters,
                    draw,
                )
            )
            pace_us = turn * MICROSECONDS // REFILL_PER_SECOND
            due_us = min(at_us + BURST_US + pace_us, duration_us - 1)
            name = names[parameters.replicas + index]
            actors.append(_refill(name, tenant, due_us, parameters, draw))
    return Plan(
        duration_us=duration_us,
        warm_up_us=warm_up_us,
        apiservers=parameters.apiservers,
        resources=(objects.CLAIMS, objects.SANDBOXES, objects.PODS, objects.POOLS),
        preload=tuple(_warm(parameters, sandboxes)),
        actors=tuple(actors),
        watchers=(Watcher("events", objects.EVENTS),),
    )


def _tenants(parameters: Parameters) -> range:
    return range(parameters.tenants)


def _sandbox(number: int, draw: random.Random) -> str:
    return f"{POOL}-{number:05}-{objects.suffix(draw)}"


def _warm(parameters: Parameters, sandboxes: list[list[str]]) -> Iterator[Object]:
    """Every pool, and its Sandboxes with their Pods."""
    for tenant in _tenants(parameters):
        namespace = objects.tenant(tenant)
        yield Object(objects.key(objects.POOLS, namespace, POOL), "pool", objects.POOL_BYTES)
        for name in sandboxes[tenant][: parameters.replicas]:
            sandbox = objects.key(objects.SANDBOXES, namespace, name)
            yield Object(sandbox, "sandbox", objects.SANDBOX_READY_BYTES)
            pod = objects.key(objects.PODS, namespace, name)
            yield Object(pod, "pod", objects.POD_READY_BYTES)


def _pool_status(namespace: str) -> Step:
    """One more of something in the pool's status, by whoever comes."""
    step = objects.update(
        objects.key(objects.POOLS, namespace, POOL), "pool.status", "pool", objects.POOL_BYTES
    )
    return step._replace(edit=Edit.INCREMENT)


def _claim(
    name: str,
    tenant: int,
    candidates: list[str],
    due_us: int,
    parameters: Parameters,
    draw: random.Random,
) -> Actor:
    """Rows 1 to 10 of the chain and, unless it stays, the teardown."""
    namespace, bound = objects.tenant(tenant), BOUND.decode()
    claim = objects.key(objects.CLAIMS, namespace, name)
    sandbox = objects.key(objects.SANDBOXES, namespace, bound)
    pod = objects.key(objects.PODS, namespace, bound)
    ready, large = objects.CLAIM_READY_BYTES, objects.SANDBOX_READY_BYTES
    adopt = Step(
        Verb.ADOPT,
        sandbox,
        "claim.adopt",
        shape="sandbox",
        size=large,
        owner=name,
        candidates=tuple(objects.key(objects.SANDBOXES, namespace, each) for each in candidates),
    )
    steps = [
        objects.create(claim, "claim.create", "claim", objects.CLAIM_NEW_BYTES),
        objects.update(claim, "claim.observe", "claim", objects.CLAIM_NEW_BYTES + 200),
        objects.update(claim, "claim.assign", "claim", objects.CLAIM_NEW_BYTES + 300),
        adopt,
        objects.event(namespace, name, "SandboxAdopted"),
        objects.update(claim, "claim.ready", "claim", ready),
        objects.update(claim, "claim.mark", "claim", ready + 100),
        objects.update(pod, "pod.label", "pod", objects.POD_READY_BYTES),
        objects.update(sandbox, "sandbox.status", "sandbox", large, owner=name),
        _pool_status(namespace),
    ]
    if draw.random() >= STAYING:
        steps += _teardown(claim, sandbox, pod, namespace, int(parameters.dwell_s * MICROSECONDS))
    steps = [steps[0]._replace(due_us=due_us), *(_reconciled(step, draw) for step in steps[1:])]
    return Actor(name, draw.randrange(parameters.apiservers), tuple(steps))


def _reconciled(step: Step, draw: random.Random) -> Step:
    """A controller comes to it a moment later: a warm claim's five writes take 92 ms (p50)."""
    return step._replace(think_us=step.think_us + draw.randrange(*THINK_US))


def _teardown(
    claim: bytes, sandbox: bytes, pod: bytes, namespace: str, dwell_us: int
) -> Iterator[Step]:
    """The claim goes, and what it owned after it; a Pod is told to end before it does."""
    yield objects.delete(claim, "claim.delete", think_us=dwell_us)
    yield objects.delete(sandbox, "sandbox.delete")
    yield objects.update(pod, "pod.terminate", "pod", objects.POD_READY_BYTES)
    yield objects.event(namespace, BOUND.decode(), "Killing")
    yield objects.update(pod, "pod.status", "pod", objects.POD_READY_BYTES)
    yield objects.delete(pod, "pod.delete")


def _refill(
    name: str, tenant: int, due_us: int, parameters: Parameters, draw: random.Random
) -> Actor:
    """Rows 11 to 24: a Sandbox that belongs to its pool until it is warm, then to nobody."""
    namespace = objects.tenant(tenant)
    sandbox = objects.key(objects.SANDBOXES, namespace, name)
    pod = objects.key(objects.PODS, namespace, name)
    new, kubelet_us = objects.SANDBOX_NEW_BYTES, 50_000

    def written(role: str, size: int, owner: str = POOL) -> Step:
        return objects.update(sandbox, role, "sandbox", size, owner=owner)

    def reported(role: str, think_us: int = 0) -> Step:
        return objects.update(pod, role, "pod", objects.POD_READY_BYTES, think_us=think_us)

    steps = [
        objects.create(sandbox, "refill.create", "sandbox", new)._replace(owner=POOL),
        objects.create(pod, "refill.pod", "pod", objects.POD_NEW_BYTES),
        written("refill.name", new + 100),
        written("refill.pending", new + 300),
        reported("pod.bind"),
        objects.event(namespace, name, "Scheduled"),
        reported("pod.status"),
        objects.event(namespace, name, "Pulled", think_us=kubelet_us),
        objects.event(namespace, name, "Created"),
        reported("pod.status"),
        objects.event(namespace, name, "Started"),
        reported("pod.status", kubelet_us),
        written("refill.ready", objects.SANDBOX_READY_BYTES, owner=""),
        _pool_status(namespace),
    ]
    steps = [steps[0]._replace(due_us=due_us), *(_reconciled(step, draw) for step in steps[1:])]
    return Actor(f"refill {name} {namespace}", draw.randrange(parameters.apiservers), tuple(steps))


# Checks.


def checks(records: Records, parameters: Parameters) -> list[Verdict]:
    """Who owns what, and whether the store counts as its writers do."""
    ops = timing.planned(records)
    return [
        _one_owner(records, ops),
        adoptions.adopted_is_ready(f"{NAME}: claims = adoptions = Ready", records, ops, CANDIDATES),
        _populations(records, ops),
        _revisions(records),
    ]


def _pairs(frame: Frame, digests: NDArray[np.int64]) -> NDArray[np.int64]:
    """Key and digest as one number; -1 where the digest is none of ``digests``, ascending."""
    if not len(digests):
        return np.full(len(frame), -1)
    at = np.searchsorted(digests, frame["digest"]).clip(max=len(digests) - 1)
    pair = frame["key"] * len(digests) + at
    return np.where(digests[at] == frame["digest"], pair, -1)


def _one_owner(records: Records, ops: Frame) -> Verdict:
    """No Sandbox is adopted twice, by what was acknowledged, heard, or is there in the end."""
    adopts = ops.where(ops["verb"] == Verb.ADOPT)
    digests = np.unique(adopts["digest"])
    tried = _pairs(adopts, digests)
    acknowledged = tried[adopts["outcome"] == Outcome.OK]
    events = records.frame(EVENTS)
    heard = _pairs(events, digests)[events["type"] == EventType.PUT]
    heard = heard[np.isin(heard, tried)]
    each = np.unique(np.concatenate((acknowledged, heard)))
    keys, owners = np.unique(each // max(len(digests), 1), return_counts=True)
    texts, names = adopts.text("key"), adoptions.claims(ops)
    evidence = []
    for key in keys[owners > 1].tolist():
        mine = adopts.where((adopts["key"] == key) & np.isin(tried, each))
        claims = (
            f"{names.get(actor, b'?').decode()} (revision {revision}, {Outcome(outcome).name})"
            for actor, revision, outcome in zip(
                *(mine[column].tolist() for column in ("actor", "revision", "outcome")),
                strict=True,
            )
        )
        evidence.append(f"{texts[key].decode()} was adopted by {' and '.join(claims)}")
    there = _owners_in_the_end(records, adopts, names)
    evidence += filter(None, there)
    count, rule, lacking = len(keys) + len(there), rule_of(_one_owner), "no Sandbox was adopted"
    return verdict(f"{NAME}: one owner", count, evidence, rule=rule, lacking=lacking)


def _owners_in_the_end(records: Records, adopts: Frame, names: dict[int, bytes]) -> list[str]:
    """For every Sandbox that is there: what is wrong with its owner, or nothing."""
    known: dict[bytes, set[bytes]] = {}
    doubtful: dict[bytes, set[bytes]] = {}
    keys = adopts.text("key")
    columns = (adopts[column].tolist() for column in ("key", "actor", "outcome"))
    for key, actor, outcome in zip(*columns, strict=True):
        if outcome in (Outcome.OK, Outcome.UNKNOWN):
            kind = known if outcome == Outcome.OK else doubtful
            kind.setdefault(keys[key], set()).add(names.get(actor, b"?"))
    told = []
    for key, (_, value) in attempts.final_values(records).items():
        if not key.startswith(objects.SANDBOXES):
            continue
        owner = _owner(value)
        may_be = known.get(key) or {b"", POOL.encode(), *doubtful.get(key, ())}
        is_right = owner in may_be
        wrong = f"{key.decode()} belongs to {_named(owner)} in the end, not to "
        told.append("" if is_right else wrong + _named(*sorted(may_be)))
    return told


def _named(*owners: bytes) -> str:
    return " or ".join(owner.decode() or "nobody" for owner in owners)


def _owner(value: bytes) -> bytes:
    found = _OWNER.search(value[:256])
    return found[1] if found else b""


def _populations(records: Records, ops: Frame) -> Verdict:
    """Warm Sandboxes in the end are those of before and refilled ones less adopted ones."""
    preloaded = records.frame(PRELOADED)
    least = _by_tenant(preloaded)
    done, unsure = ops.where(attempts.written(ops)), ops.where(attempts.unsure(ops))
    least.update(_by_tenant(done.where(timing.begins(done, "role", b"refill.ready"))))
    least.subtract(_by_tenant(done.where(done["verb"] == Verb.ADOPT)))
    most = Counter(least)
    least.subtract(_by_tenant(unsure.where(unsure["verb"] == Verb.ADOPT)))
    most.update(_by_tenant(unsure.where(timing.begins(unsure, "role", b"refill.ready"))))
    found: Counter[bytes] = Counter()
    for key, (_, value) in attempts.final_values(records).items():
        if key.startswith(objects.SANDBOXES) and not _owner(value):
            found[_tenant_of(key)] += 1
    judge, rule = f"{NAME}: pool population", rule_of(_populations)
    if records.facts["state"] != "COMPLETE":
        return verdict(judge, 0, [], rule=rule, lacking="the run was cut short")
    evidence = [
        f"{tenant.decode()} has {found[tenant]} warm Sandboxes in the end; made and not adopted "
        f"were {least[tenant]} to {most[tenant]}"
        for tenant in sorted(most)
        if not least[tenant] <= found[tenant] <= most[tenant]
    ]
    return verdict(judge, len(most), evidence, rule=rule, lacking="there was no Sandbox")


def _tenant_of(key: bytes) -> bytes:
    return key.rsplit(b"/", 2)[1]


def _by_tenant(frame: Frame) -> "Counter[bytes]":
    """How many rows about Sandboxes there are for each tenant."""
    found: Counter[bytes] = Counter()
    for key, count in attempts.tally(frame, "key").items():
        if key.startswith(objects.SANDBOXES):
            found[_tenant_of(key)] += count
    return found


def _revisions(records: Records) -> Verdict:
    """The store's revision rose by the successful writes; of a run that had it for itself.

    A lease that expires with keys raises it too; at most once each, and only where the key's last
    put carried it and the key is gone.
    """
    judge = f"{NAME}: revision = writes"
    final, before = records.frame(FINAL), records.frame(PRELOADED)["mod"]
    rule, why = rule_of(_revisions), attempts.disturbance(records)
    if not (len(final) and len(before)):
        why = why or "there was nothing before the load or in the end"
    if why := why or ("" if records.facts["command"] else "the server was not started here"):
        return verdict(judge, 0, [], rule=rule, lacking=why)
    ops = records.frame(OPS)
    ops = ops.where(timing.is_verb(ops, WRITES) | _compactions(ops))
    done = ops.where(ops["outcome"] == Outcome.OK)
    unsure = int(((ops["outcome"] == Outcome.UNKNOWN) | (ops["done"] < 0)).sum())
    rose = int(final["revision"][0] - before.max())
    expired = _expired(done, final)
    wrong = (
        f"the revision rose from {before.max()} to {final['revision'][0]}, by {rose}; "
        f"{len(done)} writes were acknowledged, {unsure} are unknown, and {expired} leases "
        "may have expired with keys"
    )
    is_right = len(done) <= rose <= len(done) + unsure + expired
    lacking = "no write was acknowledged"
    return verdict(judge, len(done), [] if is_right else [wrong], rule=rule, lacking=lacking)


def _compactions(ops: Frame) -> timing.Mask:
    """Txns by which an apiserver becomes the one that compacts."""
    mask: timing.Mask = (ops["verb"] == Verb.COMPACT) & (ops["at"] == 0)
    return mask


def _expired(done: Frame, final: Frame) -> int:
    """Leases that the last put of a key carried which is gone, without having been deleted."""
    done = done.where(np.argsort(done["revision"]))
    _, back = np.unique(done["key"][::-1], return_index=True)
    last = done.where(len(done) - 1 - back)
    gone = ~np.isin(last["key"], final["key"]) & (last["lease"] > 0)
    return len(np.unique(last["lease"][gone & (last["verb"] != Verb.DELETE)]))


# Measures.


def measures(records: Records, parameters: Parameters) -> dict[str, float]:
    """What users of a swarm wait for, and what it costs in lost comparisons."""
    steps = attempts.steps(timing.planned(records))
    creates = steps.where(timing.begins(steps, "role", b"claim.create"))
    if not len(creates):
        return {}
    took = _ready_us(records, steps, creates)
    every_us = int(parameters.burst_every_s * MICROSECONDS)
    start_us = records.facts["warm_up_us"]
    burst = (creates["due"] - start_us) // every_us
    begun = start_us + burst * every_us
    all_ready = [int((creates["due"] + took - begun)[burst == n].max()) for n in np.unique(burst)]
    refills = steps.where(timing.begins(steps, "role", b"refill.ready"))
    ended = np.searchsorted(np.unique(begun), refills["due"], "right") - 1
    drained = [
        int(refills["done"][ended == n].max() - at)
        for n, at in enumerate(np.unique(begun))
        if (ended == n).any()
    ]
    chain = steps.where(timing.begins(steps, "role", *CHAIN))
    adopted = chain.where(attempts.written(chain) & (chain["verb"] == Verb.ADOPT))
    return {
        **{f"ready_p{p}_ms": timing.percentile_ms(took, p) for p in (50, 90, 99)},
        "all_ready_ms": float(np.median(all_ready)) / 1000,
        "all_ready_max_ms": max(all_ready) / 1000,
        **({"drained_ms": float(np.median(drained)) / 1000} if drained else {}),
        "conflicts_per_claim": int(chain["conflicts"].sum()) / len(creates),
        "claims_unserved": float(len(creates) - len(adopted)),
    }


def _ready_us(records: Records, steps: Frame, creates: Frame) -> NDArray[np.int64]:
    """From when each claim was due until it was Ready; the timeout for one that never was."""
    ready = steps.where(timing.begins(steps, "role", b"claim.ready") & attempts.written(steps))
    done = np.full(int(steps["actor"].max()) + 1, -1)
    done[ready["actor"]] = ready["done"]
    took = done[creates["actor"]] - creates["due"]
    timeout_us = records.facts["timeout_us"]
    return np.where(done[creates["actor"]] < 0, np.maximum(took, timeout_us), took)
