"""A small store that is always right, its clients, and the records of what they saw.

``World`` plays a seeded run in which everything happens that judges must tell apart: conflicts,
calls of unknown outcome that took effect or did not, leases that end with several keys, objects
that get another lease, pages while writes go on, compaction, watches of all kinds that are lost,
resume, list again or start from what is compacted, a kill. A test then changes ``rows``: its fault.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from copy import copy
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from bench import judges
from bench.plan import Trouble, Verb
from bench.records import TABLES, EventType, MessageKind, Outcome, Recorder, Records
from bench.values import digest
from bench.verdicts import Verdict

Row = dict[str, int | bytes]
PODS, EVENTS = b"/registry/pods/", b"/registry/events/"
COMPACTOR = b"compact_rev_key"
TICK_US = 10_000
TTL = 2
PAGE = 4
APISERVERS = 2
ABSENT = {
    *("actor", "apiserver", "code", "count", "digest", "expected", "found", "step"),
    *("prev_mod", "prev_create", "prev_version", "prev_digest", "revision"),
}
WHOLE = {"revision", "code"}
"""Of these, 0 is the normal value in other tables than OPS and WATCHES."""


def facts_of(
    load_end_us: int = 0, finished_us: int = 0, final_revision: int = -1
) -> dict[str, Any]:
    """What judges read of a run beside its tables; without resources."""
    facts = {"load_end_us": load_end_us, "finished_us": finished_us, "state": "COMPLETE"}
    more = {"final_revision": final_revision, "resources": [], "apiservers": 0, "command": "serve"}
    return facts | more


class Kept(NamedTuple):
    """An object."""

    value: bytes
    create: int
    mod: int
    version: int
    lease: int


class Watch:
    """A watch, and what it has not been told yet."""

    def __init__(self, row: Row, key: bytes, end: bytes) -> None:
        self.row, self.key, self.end = row, key, end
        self.pending: list[Row] = []
        self.messages = 0
        self.seen = 0
        self.open = True

    def wants(self, event: Row) -> bool:
        """Its range and kinds."""
        key = event["key"]
        assert isinstance(key, bytes)
        inside = key == self.key if not self.end else self.key <= key
        inside = inside and (self.end in {b"", b"\0"} or key < self.end)
        return inside and not self.row["no_delete" if event["type"] else "no_put"]


class World:
    """See the module's text."""

    def __init__(self, seed: int, ticks: int = 450) -> None:
        self.draw = Random(seed)
        self.rows: dict[str, list[Row]] = defaultdict(list)
        self.now = -1_000_000
        self.revision = 1
        self.objects: dict[bytes, Kept] = {}
        self.past: list[tuple[int, dict[bytes, Kept]]] = [(1, {})]
        self.log: list[tuple[Row, Kept | None]] = []
        self.grants: dict[int, int] = {}
        self.compacted = 0
        self.compact_seen = 0
        self.watches: list[Watch] = []
        self.seq = 0
        self._play(ticks)

    # Records.

    def add(self, table: str, **columns: int | bytes) -> Row:
        """One more row; what is not told is absent, or 0."""
        (shape,) = (each for each in TABLES if each.name == table)
        row: Row = {
            name: -1 if name in ABSENT and (table == "ops" or name not in WHOLE) else 0
            for name in shape.integers
        }
        row |= dict.fromkeys(shape.binaries, b"")
        assert columns.keys() <= row.keys()
        row |= columns
        self.rows[table].append(row)
        return row

    def records(self, folder: Path) -> Records:
        """Written and read back."""
        (folder / "run.json").write_text(json.dumps(self.facts))
        for table in TABLES:
            recorder = Recorder(table)
            for row in self.rows[table.name]:
                recorder.add(*(row[column] for column in table.columns))
            recorder.write(folder, 0)
        return Records(folder)

    def find(self, table: str, **columns: int | bytes) -> Iterator[Row]:
        """Rows of a table that have these values."""
        for row in self.rows[table]:
            if all(row[name] == value for name, value in columns.items()):
                yield row

    # The run.

    def _play(self, ticks: int) -> None:
        for n in range(10):
            raw = self.value()
            self.put(PODS + b"old-%d" % n, raw)
            self.add("preloaded", key=PODS + b"old-%d" % n, mod=self.revision, digest=digest(raw))
        self.now = 0
        for n in range(APISERVERS):
            self.watch(PODS, PODS[:-1] + b"0", name=b"pods of %d" % n, apiserver=n, progress=1)
            self.watch(EVENTS, EVENTS[:-1] + b"0", name=b"events of %d" % n, apiserver=n)
        self.watch(b"", b"\0", name=b"no puts", no_put=1)
        self.watch(b"", b"\0", name=b"no deletes", no_delete=1)
        self.watch(PODS + b"old-3", b"", name=b"one key", prev_kv=0)
        self.watch(b"", b"\0", name=b"slow", slow=10)
        for tick in range(ticks):
            self.tick()
            if tick in (ticks // 3, ticks // 2):
                self.drop(Trouble.KILL if tick == ticks // 2 else Trouble.DROP)
        self.load_end = self.now
        for _ in range(int(7e6 / TICK_US)):
            self.tick(idle=True)
        for watch in self.watches:
            if watch.open:
                self.flush(watch)
                if not watch.row["slow"]:
                    self.message(watch, MessageKind.PROGRESS)
        self.facts = facts_of(self.load_end, self.now, final_revision=self.revision)
        self.facts |= {"resources": [PODS.decode(), EVENTS.decode()], "apiservers": APISERVERS}
        for key, kept in sorted(self.objects.items()):
            self.add("final", key=key, **kept._asdict() | {"revision": self.revision})

    def tick(self, *, idle: bool = False) -> None:
        """A call, what leases do meanwhile, and what watches are told."""
        self.now += TICK_US
        for lease, ends in list(self.grants.items()):
            if self.now >= ends:
                del self.grants[lease]
                keys = [key for key, kept in self.objects.items() if kept.lease == lease]
                if keys:
                    self.delete(*keys)
        if not idle:
            chances = (self.create, self.change, self.change, self.erase, self.fail, self.read)
            self.draw.choice((*chances, self.lease, self.lease, self.list, self.compact))()
        for watch in self.watches:
            if watch.open and (self.draw.random() < 0.6 or idle):
                self.flush(watch)
                if watch.row["progress"] and self.draw.random() < 0.2:
                    self.message(watch, MessageKind.PROGRESS)

    def value(self) -> bytes:
        """Another value."""
        self.seq += 1
        return b'{"seq":%d}' % self.seq

    def op(self, verb: Verb, key: bytes, **columns: int | bytes) -> Row:
        """A call that was answered at once."""
        number = len(self.rows["ops"])
        times = {"due": self.now, "sent": self.now, "done": self.now + 500}
        known: Row = {"op": number, "verb": verb, "key": key, "revision": self.revision, "code": 0}
        return self.add("ops", **known | times | columns)

    def pick(self, prefix: bytes = b"") -> bytes:
        """A key that exists."""
        keys = [key for key in self.objects if key.startswith(prefix) and key != COMPACTOR]
        return self.draw.choice(sorted(keys)) if keys else b""

    def create(self, lease: int = 0) -> None:
        """Txn of a new key, or of one that may have existed."""
        prefix = EVENTS if lease else PODS
        key = prefix + b"%s-%d" % (b"e" if lease else b"p", self.draw.randrange(60))
        raw = self.value()
        outcome = Outcome.CONFLICT if key in self.objects else Outcome.OK
        if outcome == Outcome.OK:
            self.put(key, raw, lease)
        mark = digest(raw)
        self.op(Verb.CREATE, key, expected=0, outcome=outcome, digest=mark, lease=lease)

    def lease(self) -> None:
        """A grant, or a put with a lease of before; sometimes of an object that has one."""
        if not self.grants or self.draw.random() < 0.1:
            number = 100 + len(self.rows["ops"])
            self.grants[number] = self.now + 250 + TTL * 1_000_000
            self.op(Verb.GRANT, b"", lease=number, ttl=TTL)
            return
        lease = self.draw.choice(sorted(self.grants))
        key = self.pick(EVENTS)
        if key and self.draw.random() < 0.4:
            self.change(key, lease)
        else:
            self.create(lease)

    def change(self, key: bytes = b"", lease: int = 0) -> None:
        """Txn with the right revision."""
        key = key or self.pick(PODS)
        if key:
            raw, expected = self.value(), self.objects[key].mod
            self.put(key, raw, lease)
            mark = digest(raw)
            self.op(Verb.UPDATE, key, expected=expected, digest=mark, lease=lease)

    def erase(self) -> None:
        """Likewise, a delete."""
        key = self.pick(PODS)
        if key and self.draw.random() < 0.5:
            expected = self.objects[key].mod
            self.delete(key)
            self.op(Verb.DELETE, key, expected=expected)

    def fail(self) -> None:
        """A conflict, a refusal, or an outcome that is unknown: it took effect, or did not."""
        key = self.pick(PODS)
        if not key:
            return
        raw, mod = self.value(), self.objects[key].mod
        kind = self.draw.randrange(4)
        mark = digest(raw)
        if kind == 0:
            lost = {"outcome": Outcome.CONFLICT, "found": mod, "digest": mark}
            self.op(Verb.UPDATE, key, expected=mod - 1, **lost)
        elif kind == 1:
            refused = {"outcome": Outcome.REFUSED, "code": 3, "refusal": 3, "revision": -1}
            self.op(Verb.UPDATE, key, expected=mod, digest=mark, **refused)
        else:
            if kind == 2:
                self.put(key, raw)
            unknown = {"outcome": Outcome.UNKNOWN, "code": 14, "revision": -1, "digest": mark}
            self.op(Verb.UPDATE, key, expected=mod, **unknown)

    def items(self, op: Row, there: dict[bytes, Kept]) -> None:
        """What a read showed."""
        for key, kept in sorted(there.items()):
            row: Row = {name: value for name, value in kept._asdict().items() if name != "value"}
            number, mark = op["op"], digest(kept.value)
            self.add("items", op=number, key=key, digest=mark, **row)

    def read(self) -> None:
        """One key, now or in the past; a count; a status."""
        kind = self.draw.randrange(4)
        key = self.pick() if self.draw.random() < 0.8 else PODS + b"p-%d" % self.draw.randrange(60)
        if kind == 0:
            self.op(Verb.STATUS, b"")
        elif kind == 1:
            count = sum(key.startswith(PODS) for key in self.objects)
            self.op(Verb.COUNT, PODS, count=count, at=0)
        elif key:
            at = 0
            if kind == 2:
                at = self.draw.choice([revision for revision, _ in self.past])
            there = self.at(at) if at else self.objects
            kept = there.get(key)
            verb = Verb.READ_AT if at else Verb.GET
            shown = {"found": kept.mod, "digest": digest(kept.value)} if kept else {"found": 0}
            op = self.op(verb, key, at=at, count=int(kept is not None), **shown)
            self.items(op, {key: kept} if kept else {})

    def at(self, at: int) -> dict[bytes, Kept]:
        """The store as it was."""
        return next(there for revision, there in reversed(self.past) if revision <= at)

    def list(self) -> None:
        """Pages of one revision, with writes in between."""
        prefix, step = self.draw.choice((PODS, EVENTS)), self.seq
        there, at, page = self.objects.copy(), self.revision, 0
        keys = sorted(key for key in there if key.startswith(prefix))
        while True:
            some = {key: there[key] for key in keys[:PAGE]}
            asked = at if page else 0
            more = {"found": int(len(keys) > PAGE), "count": len(keys)}
            op = self.op(Verb.LIST, prefix, at=asked, attempt=page, step=step, **more)
            self.items(op, some)
            keys, page = keys[PAGE:], page + 1
            if not keys:
                return
            self.now += 1000
            self.change()
            self.now += 1000

    def compact(self) -> None:
        """As kube-apiserver does it."""
        if self.draw.random() < 0.3:
            raw = b"%d" % self.revision
            before, self.compact_seen = self.compact_seen, self.revision
            self.put(COMPACTOR, raw)
            self.op(Verb.COMPACT, COMPACTOR, digest=digest(raw))
            if before:
                self.now += 1000
                self.compacted = before
                self.past = [part for part in self.past if part[0] >= before]
                self.op(Verb.COMPACT, COMPACTOR, at=before)

    # The store.

    def put(self, key: bytes, raw: bytes, lease: int = 0) -> None:
        """One more revision."""
        self.revision += 1
        was = self.objects.get(key)
        create, version = (was.create, was.version + 1) if was else (self.revision, 1)
        self.objects[key] = Kept(raw, create, self.revision, version, lease)
        event: Row = {"type": EventType.PUT, "create": create, "version": version, "lease": lease}
        self.tell(event | {"mod": self.revision, "digest": digest(raw), "key": key}, was)
        self.past.append((self.revision, self.objects.copy()))

    def delete(self, *keys: bytes) -> None:
        """One more revision, of several keys if a lease ends."""
        self.revision += 1
        for key in keys:
            was = self.objects.pop(key)
            event: Row = {"type": EventType.DELETE, "create": 0, "version": 0, "lease": 0}
            self.tell(event | {"mod": self.revision, "digest": -1, "key": key}, was)
        self.past.append((self.revision, self.objects.copy()))

    # Watches.

    def watch(self, key: bytes, end: bytes, *, start: int = 0, **columns: int | bytes) -> None:
        """Open one, and give it what it has missed."""
        number = len(self.rows["watches"])
        known: Row = {"watch": number, "prev_kv": 1, "code": -1, "opened": self.now}
        row = self.add("watches", **known | columns | {"start": start, "key": key})
        row["range_end"] = end
        watch = Watch(row, key, end)
        self.message(watch, MessageKind.CREATED)
        self.watches.append(watch)
        if 0 < start < self.compacted:
            self.message(watch, MessageKind.CANCELED, compact_revision=self.compacted)
            watch.open = False
            row["closed"] = self.now
            self.watch(key, end, start=self.revision + 1, **columns)
        elif start:
            for event, was in self.log:
                if int(event["mod"]) >= start:
                    self.offer(watch, event, was)
            watch.seen = start - 1

    def tell(self, event: Row, was: Kept | None) -> None:
        """Something has changed."""
        self.log.append((event, was))
        for watch in self.watches:
            if watch.open:
                self.offer(watch, event, was)

    def offer(self, watch: Watch, event: Row, was: Kept | None) -> None:
        """To one watch, if it wants it."""
        if watch.wants(event):
            if watch.row["prev_kv"] and was is not None and int(event["mod"]) > self.compacted:
                before = ("mod", "create", "version")
                event = event | {f"prev_{name}": getattr(was, name) for name in before}
                event["prev_digest"] = digest(was.value)
            watch.pending.append(event)

    def flush(self, watch: Watch) -> None:
        """Everything that it has not been told."""
        if watch.pending:
            watch.seen = self.revision
            number = watch.messages
            self.message(watch, MessageKind.EVENTS, events=len(watch.pending))
            for event in watch.pending:
                self.add("events", **event | {"watch": watch.row["watch"], "message": number})
            watch.pending = []

    def message(self, watch: Watch, kind: MessageKind, **columns: int | bytes) -> None:
        """One more; progress comes when everything has been told."""
        if kind == MessageKind.PROGRESS:
            self.flush(watch)
            watch.seen = self.revision
        known: Row = {"watch": watch.row["watch"], "message": watch.messages, "kind": kind}
        known |= {"received": self.now + 300, "revision": self.revision}
        self.add("messages", **known | columns)
        watch.messages += 1

    def drop(self, trouble: Trouble) -> None:
        """All watches end and come back: resumed, listed again, or from too long ago."""
        self.add("incidents", at=self.now, until=self.now + TICK_US, trouble=trouble)
        lost = [watch for watch in self.watches if watch.open]
        for watch in lost:
            watch.open = False
            watch.row |= {"code": 14, "closed": self.now}
        self.tick()
        for watch in lost:
            columns = ("name", "apiserver", "progress", "prev_kv", "no_put", "no_delete", "slow")
            start = (watch.seen or self.revision) + 1
            if self.draw.random() < 0.2:
                start = self.draw.choice((1, self.revision + 1))
            if watch.row["name"] == b"events of 1" and trouble == Trouble.KILL:
                start = 1
            kept = {name: watch.row[name] for name in columns}
            self.watch(watch.key, watch.end, start=start, **kept)


@cache
def _pristine() -> World:
    return World(0)


def fresh() -> World:
    """A run of which nobody has changed anything yet."""
    world = copy(_pristine())
    rows = {name: [dict(row) for row in table] for name, table in world.rows.items()}
    world.rows = defaultdict(list, rows)
    world.facts = dict(world.facts)
    return world


def number(row: Row, column: str) -> int:
    """An integer of a row."""
    found = row[column]
    assert isinstance(found, int)
    return found


def text(row: Row, column: str) -> bytes:
    """A byte string of a row."""
    found = row[column]
    assert isinstance(found, bytes)
    return found


def verdict_of(world: World, judge: str, folder: Path) -> Verdict:
    """What one judge says."""
    (found,) = (each for each in judges.judge(world.records(folder)) if each.judge == judge)
    return found
