"""Keys that moved to another shard live there, whatever their old shard still has of them.

A compaction deletes superseded rows little by little; the routes may be changed, and the process
killed, before it has got to all of them.
"""

import asyncio
from dataclasses import dataclass

from backends.memory import MemoryBackend, MemoryDisk
from kvstore.assembly import Assembly
from kvstore.backend import Row, ShardRecord
from kvstore.shard_config import RouteSpec, ShardConfig, ShardSpec
from kvstore.txn import Put
from tests.house import assembled
from tests.transport.running import eventually

KEY = b"/e/k"
SHARDS = [ShardSpec(name, "memory:") for name in ("core", "events")]
ON_EVENTS = ShardConfig(SHARDS, [RouteSpec(b"/e/", "events")])
ON_HOME = ShardConfig(SHARDS, [])
LEFT: list[Row] = [(5, 0, KEY, 5, 1, 0, b"old"), (7, 0, KEY, 0, 0, 0, b"")]
"""Put and deleted below the compact revision, and not dropped yet."""


@dataclass
class Life:
    """One process over two shards."""

    backends: list[MemoryBackend]
    assembly: Assembly

    def crash(self) -> None:
        """All of it at once."""
        for backend in self.backends:
            backend.crash()


async def started(disks: list[MemoryDisk], config: ShardConfig) -> Life:
    """A process on them."""
    later = asyncio.get_running_loop().call_soon
    backends = [MemoryBackend(disk, later=later) for disk in disks]
    return Life(backends, await assembled(backends, config))


async def moved() -> tuple[list[MemoryDisk], int]:
    """Disks as a kill leaves them after the key's new shard has taken it; and its revision."""
    home, events = disks = [MemoryDisk(shard=spec.name, epoch=1) for spec in SHARDS]
    home.shard_map, home.tip, home.compact_revision, home.reserved = ON_EVENTS.document(), 8, 8, 50
    home.rows[8, 0] = (8, 0, b"note", 8, 1, 0, b"n")
    home.records["events"] = ShardRecord("events", 7, events.origin)
    events.rows |= {row[:2]: row for row in LEFT}
    events.tip = 7
    life = await started(disks, ON_HOME)
    revision = life.assembly.store.revision + 1
    life.assembly.store.put(Put(KEY, b"new"))
    await eventually(lambda: (revision, 0) in home.rows)
    life.crash()
    events.rows = {row[:2]: row for row in LEFT}
    return disks, revision


def head(life: Life) -> tuple[int, ...] | None:
    """The key's live version."""
    return life.assembly.store.index.head(KEY)


async def test_what_the_old_shard_has_left_hides_nothing() -> None:
    """Its tombstone, loaded after the key's new row, does not delete it; it is dropped at last."""
    disks, revision = await moved()
    life = await started(disks, ON_HOME)
    assert head(life) == (revision, 0, revision, 1, 0)
    assert life.assembly.store.index.live == 2
    assert not life.assembly.store.index.older(KEY)
    life.assembly.store.put(Put(b"more", b""))
    life.assembly.commits.poke_drops(1)
    await eventually(lambda: not disks[1].rows)


async def test_nor_does_an_old_shard_that_returns() -> None:
    """Loaded while the key is served, it does not take it away either."""
    disks, revision = await moved()
    disks[1].reachable = False
    life = await started(disks, ON_HOME)
    assert head(life) == (revision, 0, revision, 1, 0)
    disks[1].reachable = True
    (returning,) = life.assembly.returning
    await returning.attempt()
    assert head(life) == (revision, 0, revision, 1, 0)
