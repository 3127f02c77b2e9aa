"""A plan played on a perfect store: records in which no check may find fault.

Calls are applied one at a time in the order in which they are sent, each takes ``CALL_US``, and
every watch hears at once. What a test then changes in ``rows`` is the one fault of its run.

Left out, because no check of a storm looks at it: values that are read, previous versions in events
beyond their revision, kills and pauses of the server.
"""

import heapq
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from bench import values
from bench.plan import BOUND, Actor, Edit, Plan, Step, Trouble, Verb
from bench.records import TABLES, EventType, MessageKind, Outcome, Recorder, Records

Row = dict[str, int | bytes]
CALL_US = 300
OUT_OF_RANGE = 11
_ABSENT_BY_DEFAULT = {
    *("actor", "apiserver", "closed", "code", "count", "digest", "expected", "found", "step"),
    *("prev_mod", "prev_create", "prev_version", "prev_digest"),
}
"""Integer columns that are -1 unless told."""
WRITING = (Verb.CREATE, Verb.UPDATE, Verb.DELETE, Verb.ADOPT)


class Kept(NamedTuple):
    """An object in the store."""

    value: bytes
    create: int
    mod: int
    version: int
    lease: int


@dataclass
class Played:
    """Rows of all tables, to be changed by a test, and facts."""

    plan: Plan
    facts: dict[str, object]
    rows: dict[str, list[Row]] = field(default_factory=lambda: defaultdict(list))

    def find(self, table: str, **columns: int | bytes) -> Iterator[Row]:
        """Rows of a table that have these values."""
        for row in self.rows[table]:
            if all(row[name] == value for name, value in columns.items()):
                yield row

    def records(self, folder: Path) -> Records:
        """Written and read back."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(json.dumps(self.facts))
        for table in TABLES:
            recorder = Recorder(table)
            for row in self.rows[table.name]:
                recorder.add(*(row[column] for column in table.columns))
            recorder.write(folder, 0)
        return Records(folder)

    def add(self, table: str, **columns: int | bytes) -> Row:
        """One more row; what is not told is absent."""
        (shape,) = (each for each in TABLES if each.name == table)
        row: Row = {name: -1 if name in _ABSENT_BY_DEFAULT else 0 for name in shape.integers}
        row |= dict.fromkeys(shape.binaries, b"")
        assert columns.keys() <= row.keys()
        row |= columns
        self.rows[table].append(row)
        return row


def play(plan: Plan, **facts: object) -> Played:
    """The records of a plan that met no trouble of the server's."""
    known: dict[str, object] = {
        "run": "r",
        "duration_us": plan.duration_us,
        "warm_up_us": plan.warm_up_us,
        "apiservers": plan.apiservers,
        "resources": [each.decode() for each in plan.resources],
        "timeout_us": 5_000_000,
        "zero_us": 0,
        "state": "COMPLETE",
    }
    played = Played(plan, known | facts)
    _Store(played).run()
    return played


class _Store:
    def __init__(self, played: Played) -> None:
        self.played = played
        self.plan = played.plan
        self.revision = 1
        self.objects: dict[bytes, Kept] = {}
        self.past: dict[bytes, list[tuple[int, Kept | None]]] = defaultdict(list)
        self.seen: list[tuple[int, int]] = []  # time and revision
        self.compacted = 0
        self.compactors: dict[int, tuple[int, int]] = {}  # actor: version known, revision seen
        self.leases: dict[tuple[int, int], tuple[int, int]] = {}  # apiserver, ttl: lease, until
        self.attached: dict[int, set[bytes]] = defaultdict(set)
        self.due: list[tuple[int, int, str, object]] = []
        self.numbers = iter(range(1, 1_000_000_000))
        self.watching: list[tuple[int, bytes]] = []

    def at(self, time_us: int, kind: str, what: object) -> None:
        heapq.heappush(self.due, (time_us, next(self.numbers), kind, what))

    def run(self) -> None:
        plan, add = self.plan, self.played.add
        for each in plan.preload:
            text = values.value(
                run="r", actor=-1, seq=0, shape=each.shape, size=each.size, owner=each.owner
            )
            self.put(-1, each.key, text, 0)
            add("preloaded", key=each.key, mod=self.revision, digest=values.digest(text))
        self.watch_all(-1)
        for index, actor in enumerate(plan.actors):
            self.at(max(actor.steps[0].due_us, 0), "step", (index, 0, actor, b""))
        for trouble in plan.disturbances:
            self.at(trouble.at_us, "trouble", trouble)
        loaded = now = 0
        while self.due:
            now, _, kind, what = heapq.heappop(self.due)
            if kind == "step":
                self.step(now, *what)  # type: ignore[misc]
                loaded = max(loaded, now + CALL_US)
            elif kind == "expire":
                if now <= max(loaded, plan.duration_us) + 1_000_000:
                    self.expire(now, what)  # type: ignore[arg-type]
            elif kind == "watch":
                self.watch_all(now, what)  # type: ignore[arg-type]
            elif what.trouble == Trouble.DROP:  # type: ignore[attr-defined]
                self.drop(now, what.stale)  # type: ignore[attr-defined]
        self.played.facts |= {"load_end_us": loaded, "finished_us": loaded + 1_000_000}
        for key, kept in sorted(self.objects.items()):
            add("final", key=key, revision=self.revision, **kept._asdict())

    # Watches.

    def watch_all(self, now: int, stale: int = 0) -> None:
        """Of the caches ``stale`` per cent begin at the beginning of history, the first first."""
        caches = [
            (prefix, number)
            for number in range(self.plan.apiservers)
            for prefix in self.plan.resources
        ]
        for count, (prefix, number) in enumerate(caches):
            start = 1 if count * 100 < stale * len(caches) else self.revision + 1
            self.watch(now, prefix, number, f"apiserver {number} {prefix!r}".encode(), 0, start)
        for each in self.plan.watchers:
            name, slow = each.name.encode(), each.events_per_second
            self.watch(now, each.prefix, -1, name, slow, self.revision + 1)

    def watch(
        self, now: int, prefix: bytes, apiserver: int, name: bytes, slow: int, start: int
    ) -> None:
        number = next(self.numbers)
        add = self.played.add
        add(
            "watches",
            watch=number,
            apiserver=apiserver,
            start=start,
            slow=slow,
            prev_kv=1,
            opened=now,
            name=name,
            key=prefix,
            range_end=prefix[:-1] + b"0",
        )
        add("messages", watch=number, received=now + CALL_US, kind=MessageKind.CREATED)
        if start > self.compacted:
            self.watching.append((number, prefix))
            return
        add(
            "messages",
            watch=number,
            message=1,
            received=now + CALL_US,
            kind=MessageKind.CANCELED,
            revision=self.revision,
            compact_revision=self.compacted,
        )
        self.watch(now + 3 * CALL_US, prefix, apiserver, name, slow, self.revision + 1)

    def drop(self, now: int, stale: int) -> None:
        for late in (0, 500):  # two processes of the generator
            self.played.add("incidents", at=now + late, until=now + late, trouble=Trouble.DROP)
        self.watching.clear()
        for row in self.played.rows["watches"]:
            if row["closed"] == -1:
                row["closed"] = now
        self.at(now + 1000, "watch", stale)

    def tell(
        self, now: int, kind: EventType, mod: int, kept: Kept | None, was: Kept | None, key: bytes
    ) -> None:
        for number, prefix in self.watching:
            if key.startswith(prefix):
                message = next(self.numbers)
                self.played.add(
                    "messages",
                    watch=number,
                    message=message,
                    received=now + CALL_US,
                    kind=MessageKind.EVENTS,
                    events=1,
                    revision=mod,
                )
                self.played.add(
                    "events",
                    watch=number,
                    message=message,
                    type=kind,
                    mod=mod,
                    key=key,
                    create=kept.create if kept else 0,
                    version=kept.version if kept else 0,
                    lease=kept.lease if kept else 0,
                    digest=values.digest(kept.value) if kept else -1,
                    prev_mod=was.mod if was else -1,
                )

    # Changes.

    def put(self, now: int, key: bytes, text: bytes, lease: int) -> None:
        self.revision += 1
        was = self.objects.get(key)
        create = was.create if was else self.revision
        kept = Kept(text, create, self.revision, was.version + 1 if was else 1, lease)
        if was:
            self.attached[was.lease].discard(key)
        self.objects[key] = kept
        self.past[key].append((self.revision, kept))
        if lease:
            self.attached[lease].add(key)
        self.tell(now, EventType.PUT, self.revision, kept, was, key)
        self.seen.append((now, self.revision))

    def delete(self, now: int, *keys: bytes) -> None:
        self.revision += 1
        for key in keys:
            was = self.objects.pop(key)
            self.attached[was.lease].discard(key)
            self.past[key].append((self.revision, None))
            self.tell(now, EventType.DELETE, self.revision, None, was, key)
        self.seen.append((now, self.revision))

    def expire(self, now: int, lease: int) -> None:
        keys = sorted(self.attached.pop(lease, ()))
        if keys:
            self.delete(now, *keys)

    def lease(self, now: int, apiserver: int, ttl: int) -> int:
        if not ttl:
            return 0
        found, until = self.leases.get((apiserver, ttl), (0, -1))
        if now <= until:
            return found
        lease = next(self.numbers)
        self.leases[apiserver, ttl] = (lease, now + ttl * 50_000)
        self.played.add(
            "ops",
            op=next(self.numbers),
            verb=Verb.GRANT,
            due=now,
            sent=now,
            done=now + CALL_US,
            code=0,
            revision=self.revision,
            lease=lease,
            ttl=ttl,
        )
        self.at(now + ttl * 1_000_000 + CALL_US, "expire", lease)
        return lease

    # Steps.

    def step(self, now: int, index: int, number: int, actor: Actor, bound: bytes) -> None:
        step = actor.steps[number]
        row = self.played.add(
            "ops",
            op=next(self.numbers),
            connection=actor.apiserver,
            actor=index,
            step=number,
            verb=step.verb,
            due=now if step.due_us < 0 else step.due_us,
            sent=now,
            done=now + CALL_US,
            code=0,
            key=step.key.replace(BOUND, bound),
            role=step.role.encode(),
            refusal=step.refusal,
        )
        if step.verb == Verb.ADOPT:
            row["key"] = bound = next(k for k in step.candidates if self.is_free(k))
            bound = bound.rsplit(b"/", 1)[1]
        if step.refusal:
            row |= {"outcome": Outcome.REFUSED, "code": step.refusal}
        elif step.verb in WRITING:
            self.write(now, row, step, actor)
        else:
            self.read(now, row, step)
        row["revision"] = -1 if row["outcome"] == Outcome.REFUSED else self.revision
        if number + 1 < len(actor.steps):
            after = actor.steps[number + 1]
            free = now + CALL_US
            start = max(free, after.due_us) if after.due_us >= 0 else free + after.think_us
            self.at(start, "step", (index, number + 1, actor, bound))

    def is_free(self, key: bytes) -> bool:
        return key in self.objects and not values.is_owned(self.objects[key].value)

    def write(self, now: int, row: Row, step: Step, actor: Actor) -> None:
        key = row["key"]
        assert isinstance(key, bytes)
        was = self.objects.get(key)
        assert (was is None) == (step.verb == Verb.CREATE), (step, actor.name)
        row["expected"] = was.mod if was else 0
        if step.verb == Verb.DELETE:
            self.delete(now, key)
            return
        lease = self.lease(now, actor.apiserver, step.lease_ttl)
        who, seq = int(row["actor"]), int(row["step"])
        if step.edit == Edit.REPLACE or was is None:
            text = values.value(
                run="r", actor=who, seq=seq, shape=step.shape, size=step.size, owner=step.owner
            )
        elif step.edit == Edit.INCREMENT:
            text = values.increment(was.value, run="r", actor=who, seq=seq)
        else:
            text = values.append(was.value, f"{who}.{seq}", step.size)
        row |= {"lease": lease, "digest": values.digest(text)}
        self.put(now, key, text, lease)

    def read(self, now: int, row: Row, step: Step) -> None:
        if step.verb == Verb.GET:
            kept = self.objects.get(step.key)
            row["found"] = kept.mod if kept else 0
        elif step.verb == Verb.COUNT:
            row["count"] = sum(key.startswith(step.key) for key in self.objects)
        elif step.verb == Verb.LIST:
            self.list(now, row, step)
        elif step.verb == Verb.READ_AT:
            self.read_at(now, row, step)
        elif step.verb == Verb.COMPACT:
            self.compact(now, row)

    def compact(self, now: int, row: Row) -> None:
        """A Txn on the version that this actor knows; the winner compacts to what it saw before."""
        key, actor = bytes(row["key"]), int(row["actor"])
        known, seen = self.compactors.get(actor, (0, 0))
        was = self.objects.get(key)
        version = was.version if was else 0
        if known != version:
            row["outcome"] = Outcome.CONFLICT
            self.compactors[actor] = (version, self.revision)
            return
        self.put(now, key, b"%d" % self.revision, 0)
        self.compactors[actor] = (version + 1, self.revision)
        if seen:
            self.compacted = max(self.compacted, seen)
            call = self.played.add("ops", **row)
            call |= {"op": next(self.numbers), "at": seen, "revision": self.revision}

    def list(self, now: int, row: Row, step: Step) -> None:
        found = sorted(key for key in self.objects if key.startswith(step.key))
        at = 0
        for page, first in enumerate(range(0, max(len(found), 1), step.limit)):
            if page:
                row = self.played.add("ops", **row)
                row |= {"op": next(self.numbers), "attempt": page, "at": self.revision}
            row |= {"count": len(found) - first, "at": at, "revision": self.revision}
            at = self.revision
            for key in found[first : first + step.limit]:
                kept = self.objects[key]
                self.played.add("items", op=row["op"], key=key, mod=kept.mod, create=kept.create)

    def read_at(self, now: int, row: Row, step: Step) -> None:
        earlier = [revision for time, revision in self.seen if time <= now - step.think_us]
        row["at"] = at = max(earlier, default=self.seen[0][1])
        if at < self.compacted:
            row |= {"outcome": Outcome.REFUSED, "code": OUT_OF_RANGE}
            return
        kept = [kept for mod, kept in self.past[step.key] if mod <= at][-1]
        row["found"] = kept.mod if kept else 0
