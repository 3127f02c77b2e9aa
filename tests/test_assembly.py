"""Loading a store, before anyone is served."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from backends.memory import MemoryBackend, MemoryDisk
from kvstore.assembly import Assembly, LoadStoppedError
from kvstore.backend import Batch, CommitResult, Outcome
from kvstore.clock import ManualClock
from kvstore.config import CommitConfig
from kvstore.errors import BackendError, TimedOutError
from kvstore.shard_config import RouteSpec, ShardConfig, ShardSpec, one_shard
from kvstore.txn import Put
from tests.house import QUICK, assembled

ORPHANS = 10
TWO = ShardConfig(
    [ShardSpec("core", "memory:"), ShardSpec("events", "memory:")],
    [RouteSpec(b"/events/", "events")],
)


class Slow(MemoryBackend):
    """Its commits end as ``outcomes`` say, one after the other, then well."""

    outcomes: list[Outcome]

    def commit(self, batch: Batch, done: Callable[[CommitResult], None]) -> None:
        """Commit, or not."""
        if self.outcomes:
            result = CommitResult(self.outcomes.pop(0), "as told")
            self._later(lambda: done(result))
        else:
            super().commit(batch, done)


def slow(disk: MemoryDisk, *outcomes: Outcome) -> Slow:
    """A backend over ``disk``."""
    backend = Slow(disk, later=asyncio.get_running_loop().call_soon)
    backend.outcomes = list(outcomes)
    return backend


def orphaned(*outcomes: Outcome) -> Slow:
    """A store whose keys all have leases that are not there."""
    disk = MemoryDisk(tip=1 + ORPHANS)
    for n in range(2, 2 + ORPHANS):
        disk.rows[n, 0] = (n, 0, b"%d" % n, n, 1, n, b"v")
    return slow(disk, *outcomes)


async def load(
    *backends: Slow,
    shards: ShardConfig | None = None,
    stopped: Callable[[], bool] = lambda: False,
    clock: ManualClock | None = None,
) -> Assembly:
    """Load it, with queues that take three rows at a time."""
    commit = CommitConfig(queue_rows_max=3, retry_interval=0.0)
    config = shards or one_shard("memory:")
    quick = replace(QUICK, commit=commit)
    return await assembled(backends, config, quick, clock=clock, stopped=stopped)


async def test_all_keys_without_a_lease_die_before_serving() -> None:
    """However many they are for the queues, and although a commit must be tried again."""
    store = await load(orphaned(Outcome.NOT_COMMITTED))
    assert store.store.index.live == 0
    assert store.store.revision == 1 + 2 * ORPHANS


async def test_storage_that_breaks_meanwhile() -> None:
    """The server cannot start, and says why."""
    with pytest.raises(BackendError, match="broken: as told"):
        await load(orphaned(Outcome.BROKEN))


async def test_stopped_meanwhile() -> None:
    """A server that is told to stop does not wait for storage."""
    backend = orphaned(*[Outcome.NOT_COMMITTED] * 1_000)
    with pytest.raises(LoadStoppedError):
        await load(backend, stopped=lambda: len(backend.outcomes) < 1_000)


async def test_storage_that_is_known_to_break_meanwhile() -> None:
    """What a backend tells while the store is loaded is heard."""

    class Breaking(Slow):
        """Breaks when it is asked to commit, and tells so instead of answering."""

        def commit(self, batch: Batch, done: Callable[[CommitResult], None]) -> None:
            self._later(lambda: self.on_broken("the disk is gone"))

    backend = Breaking(orphaned().disk, later=asyncio.get_running_loop().call_soon)
    with pytest.raises(BackendError, match="broken: the disk is gone"):
        await load(backend)


async def test_several_shards() -> None:
    """Each row is loaded from its shard, the order goes on above all, reservation and records are
    those of home.
    """
    home = MemoryDisk(shard="core", tip=3, reserved=4)
    events = MemoryDisk(shard="events", tip=4, epoch=1)
    home.shard_map = TWO.document()
    home.rows[3, 0] = (3, 0, b"/a", 3, 1, 0, b"v")
    events.rows[2, 0] = (2, 0, b"/events/a", 2, 1, 0, b"v")
    events.rows[4, 0] = (4, 0, b"/events/a", 2, 2, 0, b"w")
    store = await load(slow(home), slow(events), shards=TWO)
    assert (store.store.revision, store.store.index.live) == (4, 2)
    assert [len(history) for history in store.store.histories] == [1, 2]
    assert store.commits.reserved == home.reserved > 4
    assert [queue.name for queue in store.commits.queues] == ["core", "events"]
    assert [queue.state for queue in store.commits.queues] == ["serving", "serving"]
    assert store.returning == []


async def test_one_shard_is_missing() -> None:
    """The store is loaded without it, and it is known what is to come back."""
    home, events = MemoryDisk(shard="core"), MemoryDisk(shard="events", reachable=False)
    home.shard_map = TWO.document()
    store = await load(slow(home), slow(events), shards=TWO)
    (returning,) = store.returning
    assert (returning.name, returning.over) == ("events", False)
    assert returning.trouble == "the memory of shard events cannot be reached"
    assert [queue.state for queue in store.commits.queues] == ["serving", "missing"]


async def test_a_shard_that_hangs_before_its_keys_without_a_lease_are_gone() -> None:
    """It is left alone after ``shard_timeout``, and the others are served; when it answers, these
    keys die before anyone sees it.
    """
    home = MemoryDisk(shard="core", reserved=1 + ORPHANS)
    events = MemoryDisk(shard="events", tip=1 + ORPHANS, epoch=1)
    home.shard_map = TWO.document()
    for n in range(2, 2 + ORPHANS):
        key = b"/events/%d" % n
        events.rows[n, 0] = (n, 0, key, n, 1, n, b"v")
    events.rows[2, 0] = (2, 0, b"/events/kept", 2, 1, 0, b"v")
    hanging, clock = slow(events), ManualClock()
    began = clock.now
    hung: list[tuple[Batch, Callable[[CommitResult], None]]] = []
    answers = hanging.commit
    hanging.commit = lambda *asked: hung.append(asked)  # type: ignore[method-assign]

    def stopped() -> bool:
        clock.advance(1.0)
        return clock.now > began + 100

    store = await load(slow(home), hanging, shards=TWO, stopped=stopped, clock=clock)
    (returning,) = store.returning
    assert (returning.name, returning.trouble) == ("events", "storage does not answer")
    assert [queue.state for queue in store.commits.queues] == ["serving", "missing"]
    store.store.put(Put(b"/a", b"v"))
    with pytest.raises(TimedOutError):
        store.store.put(Put(b"/events/new", b"v"))
    hanging.commit = answers  # type: ignore[method-assign]
    answers(*hung.pop())
    await returning.attempt()
    assert returning.over
    assert store.commits.frontier((1,)) > store.commits.durable
    live = [row[2] for row in events.rows.values() if store.store.get(row[2], events.tip)]
    assert live == [b"/events/kept"]


async def test_one_shard_reserves_nothing() -> None:
    """Its own tip says it all."""
    store = await load(orphaned())
    assert store.reservation is None
