"""The generator against a server that commits one fault: it must be seen over the socket too."""

import asyncio
import pickle
import sys
from pathlib import Path

import pytest

from bench.clock import MICROSECONDS
from bench.judges import judge
from bench.plan import Actor, Disturbance, Object, Plan, Step, Trouble, Verb, Watcher
from bench.records import Facts, Records
from bench.run.repetition import Order, Repetition
from bench.targets import Running, Target
from bench.verdicts import Verdict
from tests.bench.fake_etcd import Fault

ROOT = Path(__file__).parents[3]
PODS, EVENTS, COMPACTOR = b"/registry/pods/", b"/registry/events/", b"compact_rev_key"
TTL = 2
APISERVERS = 2
STEP_US = 40_000

CAUGHT_BY: dict[Fault, tuple[str, int]] = {
    Fault.LOST_EVENT: ("Reliable", 30),
    Fault.DUPLICATED_EVENT: ("Unique", 30),
    Fault.REORDERED_EVENTS: ("Ordered", 30),
    Fault.SPLIT_REVISION: ("Atomic", 1),
    Fault.LOST_WRITE: ("Acknowledged writes durable", 60),
    Fault.FORGOTTEN_WRITE: ("Acknowledged writes durable", 60),
    Fault.WRONG_PREV_KV: ("PrevKV", 30),
    Fault.MISSING_PREV_KV: ("PrevKV", 30),
    Fault.WRONG_CREATE: ("IsCreate", 30),
    Fault.WRONG_VERSION: ("Version arithmetic", 30),
    Fault.RESURRECTED_KEY: ("Final state", 5),
    Fault.EARLY_PROGRESS: ("Bookmarkable", 30),
    Fault.STRAY_EVENT: ("Filter", 30),
    Fault.IGNORED_FILTER: ("Filter", 3),
    Fault.STALE_READ: ("Snapshot", 3),
    Fault.TORN_PAGE: ("Snapshot", 2),
    Fault.LEASE_EARLY: ("TTL window", 2),
    Fault.LEASE_NEVER: ("TTL overdue", 1),
    Fault.LEASE_TWICE: ("TTL window", 1),
    Fault.SILENT_COMPACTED: ("Resumable", 1),
    Fault.REVISION_BACK: ("Revision", 20),
    Fault.NO_WATCH: ("Everyone is watching", 1),
    Fault.FALSE_COMPACTION: ("Resumable", 1),
    Fault.EMPTY_PAGE: ("Snapshot", 10),
    Fault.MORE_DENIED: ("Snapshot", 5),
    Fault.MORE_PROMISED: ("Snapshot", 5),
    Fault.WRONG_COUNT: ("Snapshot", 5),
    Fault.EMPTY_STORE: ("Final state", 1),
    Fault.UNKNOWN_TWICE: ("Errors attributable", 30),
}
"""The judge that must catch each fault, and the occasion on which it is committed."""


def plan_of(seconds: float) -> Plan:
    """A little of everything that judges look at."""
    duration_us = int(seconds * MICROSECONDS)
    actors = [Actor(f"pod {n}", n % APISERVERS, _pod(n)) for n in range(20)]
    actors += [Actor(f"reader {n}", n, _reads(duration_us)) for n in range(APISERVERS)]
    actors += [Actor(f"events {n}", n, _events(n, duration_us)) for n in range(APISERVERS)]
    compact = (Step(Verb.COMPACT, COMPACTOR, "compact", at) for at in (300_000, 700_000, 1_100_000))
    actors.append(Actor("compactor", 0, tuple(compact)))
    return Plan(
        duration_us=duration_us,
        apiservers=APISERVERS,
        resources=(PODS, EVENTS),
        preload=tuple(Object(PODS + b"old-%02d" % n, "pod", 500) for n in range(12)),
        actors=tuple(actors),
        watchers=(Watcher("no deletes", b"/registry/", no_delete=True),),
        disturbances=(Disturbance(1_500_000, Trouble.DROP, resume=0, stale=100),),
        progress_requests_us=150_000,
    )


def _pod(n: int) -> tuple[Step, ...]:
    """One object's life; every other one is left at the end."""
    key, begin_us = PODS + b"pod-%02d" % n, n * 50_000
    updates = [
        Step(Verb.UPDATE, key, "pod.update", think_us=STEP_US, shape="pod", size=500)
        for _ in range(8)
    ]
    end = [Step(Verb.DELETE, key, "pod.delete", think_us=STEP_US)] if n % 2 else []
    return (Step(Verb.CREATE, key, "pod.create", begin_us, shape="pod", size=500), *updates, *end)


def _reads(duration_us: int) -> tuple[Step, ...]:
    steps: list[Step] = []
    for n, due_us in enumerate(range(100_000, duration_us, 100_000)):
        steps += [
            Step(Verb.LIST, PODS, "list", due_us, limit=5),
            Step(Verb.COUNT, PODS, "count", due_us),
            Step(Verb.GET, PODS + b"pod-%02d" % (n % 20), "get", due_us),
            Step(Verb.READ_AT, PODS + b"pod-%02d" % (n % 20), "past", due_us, think_us=300_000),
        ]
    return tuple(steps)


def _events(n: int, duration_us: int) -> tuple[Step, ...]:
    return tuple(
        Step(
            *(Verb.CREATE, EVENTS + b"event-%d-%03d" % (n, k), "event", due_us),
            shape="event",
            size=300,
            lease_ttl=TTL,
        )
        for k, due_us in enumerate(range(50_000, duration_us, 30_000))
    )


async def run(fault: Fault, after: int, folder: Path, seconds: float) -> list[Verdict]:
    """One repetition against the fake, judged."""
    plan = plan_of(seconds)
    plan_file = folder / "plan.pickle"
    plan_file.write_bytes(pickle.dumps(plan))
    facts = Facts(
        run="fake", storm="fake", preset="xs", parameters={}, seed=1,
        duration_us=plan.duration_us, warm_up_us=0, fingerprint="", apiservers=APISERVERS,
        resources=[PODS.decode(), EVENTS.decode()], target="fake", command="fake", version="",
        durability="none", repetition=0, fsync_us=0, loopback_us=0, prefix="", zero_us=0,
        load_end_us=0, finished_us=0,
        state="INCOMPLETE", processes=1, client="lean", timeout_us=2 * MICROSECONDS,
        connections_failed=0, steps=plan.steps, final_revision=-1, reason="",
    )  # fmt: skip
    program = f"{sys.executable} -m tests.bench.fake_etcd {{port}} {fault} {after}"
    command = f"env PYTHONPATH={ROOT} {program}"
    records = folder / "records"
    records.mkdir()
    order = Order(
        folder=records,
        plan=plan,
        plan_file=plan_file,
        facts=facts,
        seed=1,
        range_stream=False,
        stop=asyncio.Event(),
        show=lambda _: None,
    )
    with Running(Target(name="fake", command=command)) as server:
        await Repetition(order, server.host, server.port, server).run()
    return judge(Records(records))


@pytest.mark.slow
def test_right_server_passes(tmp_path: Path) -> None:
    """Of a server without a fault every judge has seen something, and nothing wrong."""
    verdicts = asyncio.run(run(Fault.NONE, 1, tmp_path, 3))
    assert [] == [(v.judge, v.evidence) for v in verdicts if not v.passed]
    assert [] == [v.judge for v in verdicts if not v.checked]


@pytest.mark.slow
@pytest.mark.parametrize("fault", CAUGHT_BY)
def test_fault_is_caught(fault: Fault, tmp_path: Path) -> None:
    """A fault that a server commits once is caught by its judge."""
    name, after = CAUGHT_BY[fault]
    verdicts = asyncio.run(run(fault, after, tmp_path, 8.5 if fault is Fault.LEASE_NEVER else 3))
    failed = {v.judge: v.evidence for v in verdicts if not v.passed}
    assert name in failed, failed


def test_every_fault_has_its_judge() -> None:
    """No fault of the fake is left out."""
    assert set(CAUGHT_BY) == set(Fault) - {Fault.NONE}
