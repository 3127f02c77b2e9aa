"""Stored runs and sessions that never happened: records written with known figures."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.capsule import Capsule
from bench.plan import Trouble, Verb
from bench.records import (
    EVENTS,
    INCIDENTS,
    MESSAGES,
    OPS,
    SAMPLES,
    WATCHES,
    EventType,
    Facts,
    MessageKind,
    Outcome,
    Recorder,
    row_counts,
)
from bench.report.session import Session, run_folder, write_session, write_verdicts
from bench.verdicts import Verdict

SECOND = 1_000_000
CAPSULE = Capsule(
    cpu="A CPU",
    cores=2,
    memory_bytes=8 << 30,
    kernel="Linux 6.1",
    file_system="ext4",
    python="CPython 3.11",
    versions={"kvstore": "0.1.0", "etcd": "etcd Version: 3.6.14"},
    commit="0123456",
    fsync_p50_us=110.0,
    fsync_p99_us=300.0,
    loopback_p50_us=14.0,
)
GOOD = (
    Verdict("Ordered", checked=400),
    Verdict("Reliable", checked=400),
    Verdict("Resumable", checked=0),
    Verdict("swarm-burst: one owner", checked=50),
)


class Run:
    """Records of one run, written row by row."""

    def __init__(
        self, folder: Path, *, duration_us: int = 10 * SECOND, warm_up_us: int = 0
    ) -> None:
        self.folder = folder
        self.facts = Facts(
            run="r1",
            storm="swarm-burst",
            preset="xs",
            parameters={"burst": 50},
            seed=7,
            duration_us=duration_us,
            warm_up_us=warm_up_us,
            fingerprint="f" * 64,
            apiservers=1,
            resources=["/registry/pods/"],
            target="ours",
            command="kvstore serve",
            version="3.6.0",
            durability="fsync per commit",
            repetition=0,
            fsync_us=250.0,
            loopback_us=20.0,
            prefix="",
            zero_us=1,
            load_end_us=duration_us,
            finished_us=duration_us + SECOND,
            state="COMPLETE",
            processes=1,
            client="lean",
            timeout_us=5 * SECOND,
            connections_failed=0,
            steps=0,
            final_revision=-1,
            reason="",
        )
        tables = (OPS, WATCHES, MESSAGES, EVENTS, SAMPLES, INCIDENTS)
        self._recorders = {table.name: Recorder(table) for table in tables}
        self._revision = 1
        self._watch_start(watch=0, apiserver=0)

    def op(
        self,
        due: int,
        *,
        latency: int = 1000,
        lag: int = 0,
        actor: int = 0,
        verb: Verb = Verb.UPDATE,
        outcome: Outcome = Outcome.OK,
        answered: bool = True,
        code: int = 0,
        refusal: int = 0,
        lease: int = 0,
        role: str = "claim.assign",
        step: int | None = None,
        sent: bool = True,
    ) -> int:
        """One call, sent ``lag`` after it was due; the revision of a successful write.

        It is a step of its own, unless ``step`` says of which; without ``sent`` it never was, and
        is answered only if it was lost to others without it.
        """
        ops = self._recorders["ops"]
        self._revision += 1
        revision = self._revision if answered and outcome is Outcome.OK else -1
        done = due + latency if answered and (sent or outcome is Outcome.CONFLICT) else -1
        times = (due, due + lag if sent else -1, done, outcome, code)
        ids = (len(ops), 0, actor, len(ops) if step is None else step, 0, verb)
        rest = (0, revision, -1, 1, lease, 0, -1, 0, refusal)
        ops.add(*ids, *times, *rest, role.encode(), b"/registry/pods/a", b"")
        return revision

    def _watch_start(self, *, watch: int, apiserver: int, opened: int = -1, slow: int = 0) -> None:
        text = (b"watch", b"/registry/pods/", b"", b"")
        ids = (watch, watch, apiserver, 0, 1, 1, 0, 0, slow, 0)
        self._recorders["watches"].add(*ids, opened, -1, -1, *text)

    def forget_watches(self) -> None:
        """Nobody watches; but for the load this is a replay's run."""
        self.facts["resources"] = []
        self._recorders |= {table.name: Recorder(table) for table in (WATCHES, MESSAGES, EVENTS)}

    def watcher(self, watch: int, *, opened: int = -1, slow: int = 0, apiserver: int = -1) -> None:
        """A watch beside that of the cache, which is 0."""
        self._watch_start(watch=watch, apiserver=apiserver, opened=opened, slow=slow)

    def event(
        self, revision: int, received: int, *, watch: int = 0, message: int | None = None
    ) -> None:
        """An event of a write, in a message of its own, whose index may be given."""
        messages, events = self._recorders["messages"], self._recorders["events"]
        message = len(messages) if message is None else message
        kind = MessageKind.EVENTS
        messages.add(watch, message, received, kind, revision, 0, 1, 0, b"")
        numbers = (watch, message, EventType.PUT, revision, revision, 1, 0, 1, -1, -1, -1, -1)
        events.add(*numbers, b"/registry/pods/a")

    def sample(
        self,
        at: int,
        *,
        cpu: int,
        rss: int = 1 << 20,
        written: int = 0,
        disk: int = 0,
        own: int = 0,
        most: int | None = None,
    ) -> None:
        """What processes had used by then; ``own`` is the generators' CPU, ``most`` of one."""
        most = own if most is None else most
        self._recorders["samples"].add(at, cpu, rss, written, disk, own, most)

    def incident(self, at: int, until: int, trouble: Trouble = Trouble.DROP) -> None:
        """A disturbance."""
        self._recorders["incidents"].add(at, until, trouble)

    def write(self) -> Path:
        """Everything as the generator leaves it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for recorder in self._recorders.values():
            recorder.write(self.folder, 0)
        self.facts["rows"] = row_counts(self.folder)
        (self.folder / "run.json").write_text(json.dumps(self.facts))
        return self.folder


def load(run: Run, *, mean_us: float, draw: random.Random, per_second: int = 40) -> None:
    """An ordinary load: latencies around a mean, an event for every write."""
    seconds = run.facts["duration_us"] // SECOND
    for n in range(seconds * per_second):
        due = n * SECOND // per_second
        latency = 50 + int(draw.expovariate(1 / mean_us))
        role = draw.choice(("claim.create", "claim.assign", "sandbox.adopt"))
        conflict = draw.random() < 0.05
        outcome = Outcome.CONFLICT if conflict else Outcome.OK
        revision = run.op(due, latency=latency, lag=40, actor=n, outcome=outcome, role=role)
        if not conflict:
            run.event(revision, due + latency + draw.randrange(200))
    for at in range((seconds + 1) * 4):
        used = int(at * mean_us * 10)
        memory = (64 << 20) + at * 10_000 + int(mean_us) * 5000
        run.sample(at * SECOND // 4, cpu=used, rss=memory, written=at * 400_000, disk=1, own=at)


Change = Callable[[Run], None]


def session(
    folder: Path,
    *,
    means_us: Mapping[str, float],
    repetitions: int = 5,
    seconds: int = 10,
    verdicts: Mapping[str, Sequence[Verdict]] | None = None,
    changes: Mapping[str, Change] | None = None,
    after: Capsule = CAPSULE,
) -> Session:
    """A complete session; ``changes`` are made to each run of a target before it is written."""
    for repetition in range(repetitions):
        for target, mean_us in means_us.items():
            run = Run(run_folder(folder, target, repetition), duration_us=seconds * SECOND)
            run.facts["target"] = target
            run.facts["repetition"] = repetition
            load(run, mean_us=mean_us, draw=random.Random(f"{target} {repetition}"))
            (changes or {}).get(target, _nothing)(run)
            write_verdicts(run.write(), (verdicts or {}).get(target, GOOD))
    made = Session(
        command_line=["kvstore-bench", "run", "swarm-burst", "--start", "ours & <etcd>"],
        storm="swarm-burst",
        preset="xs",
        parameters={"burst": 50},
        seed=7,
        duration_us=seconds * SECOND,
        fingerprint="f" * 64,
        targets=list(means_us),
        repetitions=repetitions,
        started="2026-01-02T03:04:05Z",
        state="COMPLETE",
        before=CAPSULE,
        after=after,
        ceiling_per_second=20_000,
    )
    write_session(folder, made)
    return made


def _nothing(run: Run) -> None:
    """The run stays as it is."""
