"""A start that loses a database while it loads it."""

import asyncio
from collections.abc import Callable

import pytest

from backends.memory import MemoryBackend, MemoryDisk
from kvstore.assembly import Assembly
from kvstore.backend import IndexRow, LeaseRow, Row
from kvstore.errors import TimedOutError, UnreachableError
from kvstore.range import RangeQuery
from kvstore.shard_config import RouteSpec, ShardConfig, ShardSpec
from kvstore.txn import Put
from tests.house import assembled
from tests.transport.running import eventually

NAMES = ("core", "events", "agents")
THREE = ShardConfig(
    [ShardSpec(name, "memory:") for name in NAMES],
    [RouteSpec(b"/events/", "events"), RouteSpec(b"/agents/", "agents")],
)
KEYS = [b"/events/%d" % n for n in range(4)]


class Fragile(MemoryBackend):
    """Loads a row at a time, and breaks off after ``loads`` of them, once."""

    loads: int | None = None

    async def load_index(self, sink: Callable[[list[IndexRow]], None]) -> None:
        """As far as it gets."""
        for row in list(self.disk.rows.values()):
            if self.loads == 0:
                self.loads = None
                raise UnreachableError("the connection was lost")
            if self.loads is not None:
                self.loads -= 1
            sink([row[:6]])
            await asyncio.sleep(0)


def disks_of_three() -> list[MemoryDisk]:
    """Lease 7 has the first key under /events/, the second is of lease 9, which is not there; so is
    one under /agents/.
    """
    home, events, agents = disks = [MemoryDisk(shard=name, epoch=1) for name in NAMES]
    home.shard_map, home.reserved = THREE.document(), 50
    home.leases[7] = LeaseRow(7, 60, 0)
    rows = [(n, key, lease) for n, key, lease in zip(range(2, 6), KEYS, (7, 9, 0, 0), strict=True)]
    for disk, revision, key, lease in (
        (home, 10, b"/a", 0),
        *((events, *row) for row in rows),
        (agents, 7, b"/agents/orphan", 9),
        (agents, 8, b"/agents/a", 0),
    ):
        stored: Row = (revision, 0, key, revision, 1, lease, b"v")
        disk.rows[revision, 0] = stored
        disk.tip = revision
    return disks


async def start(disks: list[MemoryDisk], fragile: int, loads: int) -> Assembly:
    """A start over ``disks`` of which one breaks off after some rows."""
    later = asyncio.get_running_loop().call_soon
    backends = [Fragile(disk, later=later) for disk in disks]
    backends[fragile].loads = loads
    return await assembled(backends, THREE)


def read(store: Assembly, key: bytes, end: bytes) -> list[bytes]:
    """Keys of a range, as a client sees them now."""
    query = RangeQuery(key, end, revision=0)
    found = store.store.read(query, store.store.pin(query, store.store.shards_of(key, end)))
    while not found.done:
        found.step()
    return list(found.keys)


@pytest.mark.parametrize("loads", range(4))
async def test_a_shard_that_is_lost_while_it_is_loaded_is_missing(loads: int) -> None:
    """The others are served, with nothing of it; when it is there again the load goes on, and keys
    without a lease are gone before anyone sees it.
    """
    disks = disks_of_three()
    store = await start(disks, 1, loads)
    (returning,) = store.returning
    assert (returning.name, returning.over) == ("events", False)
    assert returning.trouble == "the connection was lost"
    assert [queue.state for queue in store.commits.queues] == ["serving", "missing", "serving"]
    assert disks[1].holder is None
    await eventually(store.commits.idle)
    assert read(store, b"/agents/", b"/agents0") == [b"/agents/a"]
    assert store.store.put(Put(b"/agents/b", b"v")).revision > 50
    with pytest.raises(TimedOutError):
        read(store, b"/events/", b"/events0")
    with pytest.raises(TimedOutError):
        store.store.put(Put(b"/events/x", b"v"))
    await returning.attempt()
    assert returning.over
    assert read(store, b"/events/", b"/events0") == [KEYS[0], *KEYS[2:]]
    assert store.commits.queues[1].stored == len(disks[1].rows)
    found = store.lessor.time_to_live(7, keys=True)
    assert found is not None
    assert found.keys == KEYS[:1]


async def test_home_lost_while_it_is_loaded_ends_the_start() -> None:
    """Nothing can be served without it."""
    with pytest.raises(UnreachableError):
        await start(disks_of_three(), 0, 0)
