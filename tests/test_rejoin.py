"""A shard that was missing at the start comes back while the others are served."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from backends.memory import MemoryBackend, MemoryDisk
from kvstore.backend import Batch, CommitResult, IndexRow, LeaseRow, Outcome, Row, ShardRecord
from kvstore.errors import BackendError, TimedOutError, UnreachableError
from kvstore.kv import value_of
from kvstore.range import RangeQuery
from kvstore.shard_config import RouteSpec, ShardConfig, ShardSpec
from kvstore.txn import GREATER, TARGET_VERSION, Compare, DeleteRange, Put, Txn
from tests.engine import Waiter
from tests.house import QUICK, assembled
from tests.transport.running import eventually

if TYPE_CHECKING:
    from kvstore.assembly import Assembly

NAMES = ("core", "events", "agents")
CONFIG = ShardConfig(
    [ShardSpec(name, "memory:") for name in NAMES],
    [RouteSpec(b"/events/", "events"), RouteSpec(b"/agents/", "agents")],
)
AWAY = 1
"""The shard that is missing at the start."""


class Fragile(MemoryBackend):
    """Loads a few rows at a time, and breaks off after some of them if told to; its commits end as
    ``outcomes`` say.
    """

    loads: int | None = None
    outcomes: tuple[Outcome, ...] = ()

    async def load_index(self, sink: Callable[[list[IndexRow]], None]) -> None:
        """Two rows at a time."""
        rows = [row[:6] for row in self.disk.rows.values()]
        for start in range(0, len(rows), 2):
            if self.loads == 0:
                self.loads = None
                raise UnreachableError("the connection was lost")
            if self.loads is not None:
                self.loads -= 1
            sink(rows[start : start + 2])
            await asyncio.sleep(0)

    def commit(self, batch: Batch, done: Callable[[CommitResult], None]) -> None:
        """Commit, or not."""
        if self.outcomes:
            outcome, *left = self.outcomes
            self.outcomes = tuple(left)
            self._later(lambda: done(CommitResult(outcome, "as told")))
        else:
            super().commit(batch, done)


def row(revision: int, sub: int, key: bytes, *, lease: int = 0) -> Row:
    """A new key."""
    return (revision, sub, key, revision, 1, lease, b"v")


def store_rows(disk: MemoryDisk, *rows: Row) -> None:
    """As if a process had committed them."""
    for each in rows:
        disk.rows[each[:2]] = each
        disk.tip = max(disk.tip, each[0])


class Degraded:
    """A store of three shards one of which was missing at the start."""

    def __init__(self) -> None:
        self.disks = [MemoryDisk(shard=name, epoch=1) for name in NAMES]
        home = self.disks[0]
        home.shard_map = CONFIG.document()
        home.reserved = 50
        store_rows(home, row(3, 0, b"/a"))
        store_rows(self.disks[AWAY], row(2, 0, b"/events/a"), row(4, 0, b"/events/b"))
        self.remember()
        self.store: Assembly

    @property
    def away(self) -> MemoryDisk:
        """The missing shard's database."""
        return self.disks[AWAY]

    def remember(self) -> None:
        """Home knows how far the others are."""
        for disk in self.disks[1:]:
            self.disks[0].records[disk.shard] = ShardRecord(disk.shard, disk.tip, disk.origin)

    async def start(self) -> "Degraded":
        """Open and load what there is; the missing one is reachable from now on."""
        later = asyncio.get_running_loop().call_soon
        self.backends = [Fragile(disk, later=later) for disk in self.disks]
        self.away.reachable = False
        patient = replace(QUICK.commit, shard_timeout=60.0, retry_interval=0.0)
        self.store = await assembled(self.backends, CONFIG, replace(QUICK, commit=patient))
        self.away.reachable = True
        return self

    async def attempt(self) -> None:
        """One attempt of the missing shard to join, with the ticks that go on meanwhile."""

        async def tick() -> None:
            while True:
                self.store.commits.tick()
                await asyncio.sleep(0.005)

        (returning,) = self.store.returning
        ticking = asyncio.create_task(tick())
        try:
            await returning.attempt()
        finally:
            ticking.cancel()

    def read(self, key: bytes, end: bytes | None = None, revision: int = 0) -> list[bytes]:
        """Keys of a range, as a client sees them now."""
        store = self.store.store
        query = RangeQuery(key, end, revision=revision)
        at = store.pin(query, store.shards_of(key, end))
        assert store.commits.frontier(store.shards_of(key, end)) >= at
        read = store.read(query, at)
        while not read.done:
            read.step()
        return list(read.keys)

    async def write(self, key: bytes) -> int:
        """Put ``key``, durably."""
        store, waiter = self.store.store, Waiter()
        revision = store.put(Put(key, b"w", 0)).revision
        self.store.commits.release(store.shards_of(key, None), waiter, b"")
        await eventually(lambda: not waiter.waits)
        assert waiter.body == b""
        return revision


@pytest.fixture
async def degraded() -> Degraded:
    """Started."""
    return await Degraded().start()


async def test_the_others_are_served_meanwhile(degraded: Degraded) -> None:
    """Reads and writes of the missing shard are refused, and of ranges that touch it."""
    assert degraded.read(b"/a") == [b"/a"]
    assert await degraded.write(b"/agents/a") == 51
    for key, end in ((b"/events/a", None), (b"/", b"0"), (b"/events/", b"/events0")):
        for revision in (0, 51):
            with pytest.raises(TimedOutError):
                degraded.read(key, end, revision)
    with pytest.raises(TimedOutError):
        await degraded.write(b"/events/c")
    with pytest.raises(TimedOutError):
        degraded.store.store.delete_range(DeleteRange(b"/", b"0", False))
    assert degraded.read(b"/agents/", b"/agents0") == [b"/agents/a"]


@pytest.mark.parametrize("where", ["compare", "success", "failure", "range"])
async def test_a_txn_that_only_reads(degraded: Degraded, where: str) -> None:
    """It is refused if it touches the missing shard in whatever branch, taken or not: as absent its
    keys would decide, or be shown.
    """
    here, there = RangeQuery(b"/a", None), RangeQuery(b"/events/a", None)
    store = degraded.store.store
    result, revision = store.txn(Txn([], [here], [here]))
    assert (result.succeeded, revision) == (True, 50)
    compared = b"/events/a" if where == "compare" else b"/a"
    txn = Txn(
        [Compare(GREATER, TARGET_VERSION, compared, None, 0)],
        [there if where == "success" else here],
        [there if where == "failure" else here],
    )
    if where == "range":
        txn = Txn([], [RangeQuery(b"/", b"0")], [])
    with pytest.raises(TimedOutError):
        store.txn(txn)
    await degraded.attempt()
    result, revision = store.txn(txn)
    assert (result.succeeded, revision) == (True, 50)


async def test_a_shard_joins(degraded: Degraded) -> None:
    """With all that it had, behind what the others have committed meanwhile."""
    await degraded.write(b"/agents/a")
    await degraded.attempt()
    assert degraded.read(b"/", b"0") == [b"/a", b"/agents/a", b"/events/a", b"/events/b"]
    assert degraded.read(b"/", b"0", revision=3) == [b"/a", b"/events/a"]
    assert await degraded.write(b"/events/c") == 52
    assert degraded.away.tip == 52
    (returning,) = degraded.store.returning
    assert returning.over
    assert degraded.store.commits.queues[AWAY].state == "serving"
    assert degraded.store.commits.queues[AWAY].stored == 3


async def test_a_shard_that_is_not_there_yet(degraded: Degraded) -> None:
    """Is asked again; what is told is why the last attempt failed."""
    (returning,) = degraded.store.returning
    degraded.away.reachable = False
    with pytest.raises(UnreachableError):
        await degraded.attempt()
    degraded.away.reachable = True
    other = MemoryBackend(degraded.away, later=asyncio.get_running_loop().call_soon)
    await other.open()
    with pytest.raises(BackendError, match="in use"):
        await degraded.attempt()
    assert "in use" in returning.trouble
    await other.close()
    await degraded.attempt()
    assert (returning.over, returning.trouble) == (True, "")


@pytest.mark.parametrize("chunks", [0, 1, 2])
async def test_a_load_that_breaks_off_goes_on(chunks: int) -> None:
    """Nothing is loaded twice, nothing is left out, and nothing is shown before all is there."""
    degraded = Degraded()
    for revision in range(5, 9):
        store_rows(degraded.away, row(revision, 0, b"/events/%d" % revision, lease=7))
    degraded.disks[0].leases[7] = LeaseRow(7, 60, 0)
    await degraded.start()
    degraded.backends[AWAY].loads = chunks
    with pytest.raises(UnreachableError):
        await degraded.attempt()
    with pytest.raises(TimedOutError):
        degraded.read(b"/events/a")
    assert degraded.away.holder is None
    await degraded.attempt()
    keys = [b"/events/%d" % n for n in range(5, 9)]
    assert degraded.read(b"/events/", b"/events0") == [*keys, b"/events/a", b"/events/b"]
    found = degraded.store.lessor.time_to_live(7, keys=True)
    assert found is not None
    assert found.keys == keys


# -- what has changed meanwhile --------------------------------------------------------------------


async def test_keys_whose_lease_has_gone_die_before_anyone_sees_them() -> None:
    """A revision per lease, however often a commit must be tried; others stay."""
    degraded = Degraded()
    home = degraded.disks[0]
    home.leases[7], home.leases[8] = LeaseRow(7, 60, 0), LeaseRow(8, 60, 0)
    kept = row(7, 0, b"/events/kept", lease=8)
    store_rows(degraded.away, row(5, 0, b"/events/x", lease=7), row(6, 0, b"/events/y", lease=7))
    store_rows(degraded.away, kept, row(8, 0, b"/events/z", lease=99))
    await degraded.start()
    lessor = degraded.store.lessor
    lessor.revoke(7)
    waiter = Waiter()
    lessor.after_revoke(7, waiter, b"")
    await eventually(lambda: not waiter.waits)
    seen: list[list[bytes]] = []

    def look() -> None:
        try:
            seen.append(degraded.read(b"/events/", b"/events0"))
        except TimedOutError:
            seen.append([])

    degraded.store.commits.on_durable = look
    degraded.backends[AWAY].outcomes = (Outcome.NOT_COMMITTED,)
    await degraded.attempt()
    left = [b"/events/a", b"/events/b", b"/events/kept"]
    assert degraded.read(b"/events/", b"/events0") == left
    assert all(keys in ([], left) for keys in seen)
    deaths = [row[:3] for row in degraded.away.rows.values() if row[4] == 0]
    assert sorted(deaths) == [
        (51, 0, b"/events/x"),
        (51, 1, b"/events/y"),
        (52, 0, b"/events/z"),
    ]


async def test_a_lease_granted_again_does_not_take_over_old_keys() -> None:
    """The one before it with the same id has ended, and so must the keys that nobody knew of; what
    is attached afterwards stays.
    """
    degraded = Degraded()
    degraded.disks[0].leases[7] = LeaseRow(7, 60, 0)
    store_rows(degraded.away, row(5, 0, b"/events/x", lease=7))
    degraded.remember()
    await degraded.start()
    lessor, waiter = degraded.store.lessor, Waiter()
    lessor.revoke(7)
    lessor.after_revoke(7, waiter, b"")
    await eventually(lambda: not waiter.waits)
    lessor.grant(7, 60)
    await eventually(lambda: lessor.exists(7))
    degraded.store.store.put(Put(b"/agents/new", b"w", 7))
    await degraded.attempt()
    assert degraded.read(b"/events/x") == []
    found = lessor.time_to_live(7, keys=True)
    assert found is not None
    assert found.keys == [b"/agents/new"]


async def test_a_lease_that_is_ending_takes_no_more_keys() -> None:
    """Its keys elsewhere are on their way out when the shard comes: those that come with it are
    deleted, too.
    """
    degraded = Degraded()
    degraded.disks[0].leases[7] = LeaseRow(7, 60, 0)
    store_rows(degraded.disks[2], row(6, 0, b"/agents/x", lease=7))
    store_rows(degraded.away, row(5, 0, b"/events/x", lease=7))
    degraded.remember()
    await degraded.start()
    agents, waiter = degraded.backends[2], Waiter()
    agents.outcomes = (Outcome.NOT_COMMITTED,) * 1_000
    degraded.store.lessor.revoke(7)
    degraded.store.lessor.after_revoke(7, waiter, b"")
    await degraded.attempt()
    assert waiter.waits
    assert degraded.read(b"/events/x") == []
    agents.outcomes = ()

    def ended() -> bool:
        degraded.store.commits.tick()
        return not waiter.waits

    await eventually(ended)
    assert waiter.body == b""
    assert degraded.read(b"/", b"0") == [b"/a", b"/events/a", b"/events/b"]


async def test_parts_of_records_are_applied_before_it_is_loaded() -> None:
    """What home has committed for it; then the record is dropped."""
    degraded = Degraded()
    home = degraded.disks[0]
    home.redo = [("events", row(9, 0, b"/events/r")), ("agents", row(9, 1, b"/agents/r"))]
    home.tip = 9
    await degraded.start()
    assert degraded.read(b"/agents/r") == [b"/agents/r"]
    assert len(home.redo) == 2
    await degraded.attempt()
    assert degraded.read(b"/events/r") == [b"/events/r"]
    await eventually(lambda: not home.redo)
    assert degraded.away.tip == 9


async def test_parts_that_it_has_already() -> None:
    """They are not applied again, and the record is dropped as well."""
    degraded = Degraded()
    home = degraded.disks[0]
    home.redo = [("events", row(4, 0, b"/events/b"))]
    await degraded.start()
    await degraded.attempt()
    await eventually(lambda: not home.redo)
    assert len(degraded.away.rows) == 2


@pytest.mark.parametrize("outcome", [Outcome.NOT_COMMITTED, Outcome.UNKNOWN])
async def test_parts_that_it_does_not_take(outcome: Outcome) -> None:
    """It is let go and asked again."""
    degraded = Degraded()
    degraded.disks[0].redo = [("events", row(9, 0, b"/events/r"))]
    degraded.disks[0].tip = 9
    await degraded.start()
    degraded.backends[AWAY].outcomes = (outcome,)
    with pytest.raises(UnreachableError, match="does not commit"):
        await degraded.attempt()
    assert degraded.away.holder is None
    await degraded.attempt()
    assert degraded.read(b"/events/r") == [b"/events/r"]


async def test_a_compaction_meanwhile(degraded: Degraded) -> None:
    """Takes effect at once; on the shard when it is back, and what it supersedes is dropped."""
    store_rows(degraded.away, (5, 0, b"/events/a", 2, 2, 0, b"w"))
    degraded.remember()
    waiter = Waiter()
    degraded.store.compactor.compact(50, physical=False, answer=waiter, body=b"")
    await eventually(lambda: not waiter.waits)
    assert (2, 0) in degraded.away.rows
    await degraded.attempt()
    assert degraded.read(b"/events/", b"/events0") == [b"/events/a", b"/events/b"]

    def dropped() -> bool:
        degraded.store.compactor.tick()
        return (2, 0) not in degraded.away.rows

    await eventually(dropped)
    assert sorted(degraded.away.rows) == [(4, 0), (5, 0)]


async def test_rows_that_a_compaction_had_left_behind() -> None:
    """They are dropped once the shard is there."""
    degraded = Degraded()
    degraded.disks[0].compact_revision = 5
    store_rows(degraded.away, (5, 0, b"/events/a", 2, 2, 0, b"w"))
    degraded.remember()
    await degraded.start()
    await degraded.attempt()
    await eventually(lambda: (2, 0) not in degraded.away.rows)
    assert sorted(degraded.away.rows) == [(4, 0), (5, 0)]


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cluster_id": 5}, "belongs to cluster 5"),
        ({"shard": "other"}, "is that of shard other"),
        ({"tip": 3}, "events has lost data: it is at revision 3 and was at 4"),
        ({"origin": "b"}, "events is another one than it was: b instead of unnamed"),
        ({"shard_map": CONFIG.document()}, "events is the home of another store"),
        ({"tip": 51}, "at revision 51, and the order is at 50: the home shard has lost data"),
    ],
)
async def test_a_wrong_shard_is_refused(change: dict[str, object], reason: str) -> None:
    """It is let go, the others are served on, and the right one is taken when it is there."""
    degraded = await Degraded().start()
    right = {name: getattr(degraded.away, name) for name in change}
    for name, value in change.items():
        setattr(degraded.away, name, value)
    with pytest.raises(BackendError, match=reason) as caught:
        await degraded.attempt()
    assert not isinstance(caught.value, UnreachableError)
    assert degraded.away.holder is None
    with pytest.raises(TimedOutError):
        degraded.read(b"/events/a")
    assert degraded.read(b"/a") == [b"/a"]
    for name, value in right.items():
        setattr(degraded.away, name, value)
    await degraded.attempt()
    assert degraded.read(b"/events/a") == [b"/events/a"]


async def test_an_older_copy_after_a_load_that_broke_off() -> None:
    """What was loaded is not forgotten: another database may not go on in its place."""
    degraded = Degraded()
    del degraded.disks[0].records["events"]
    await degraded.start()
    degraded.backends[AWAY].loads = 1
    store_rows(degraded.away, row(6, 0, b"/events/c"))
    with pytest.raises(UnreachableError):
        await degraded.attempt()
    degraded.away.tip = 4
    with pytest.raises(BackendError, match="lost data"):
        await degraded.attempt()


async def test_a_shard_that_breaks_on_the_way() -> None:
    """It is lost for good, and nobody tries any longer."""
    degraded = Degraded()
    store_rows(degraded.away, row(5, 0, b"/events/x", lease=7))
    await degraded.start()
    degraded.backends[AWAY].outcomes = (Outcome.BROKEN,)
    with pytest.raises(BackendError, match="broken: as told"):
        await degraded.attempt()
    (returning,) = degraded.store.returning
    assert returning.over
    assert degraded.read(b"/a") == [b"/a"]


async def test_values_are_read_from_it(degraded: Degraded) -> None:
    """They were never in memory."""
    await degraded.attempt()
    store = degraded.store.store
    item = store.get(b"/events/a", store.commits.durable)
    assert item is not None
    found: list[bytes] = []
    store.fetch(
        [(item.key, item.entry)],
        lambda values: found.extend(v for v in values if v) if isinstance(values, list) else None,
    )
    await eventually(lambda: bool(found))
    assert value_of(found[0]) == b"v"
