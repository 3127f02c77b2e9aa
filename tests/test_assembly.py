"""Loading a store, before anyone is served."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest

from backends.memory import MemoryBackend, MemoryDisk
from kvstore.assembly import Assembly, LoadStoppedError, assemble, open_shards
from kvstore.backend import Batch, CommitResult, Outcome
from kvstore.clock import ManualClock
from kvstore.config import CommitConfig
from kvstore.errors import BackendError
from tests.house import QUICK

ORPHANS = 10


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


def orphaned(*outcomes: Outcome) -> Slow:
    """A store whose keys all have leases that are not there."""
    disk = MemoryDisk(tip=1 + ORPHANS)
    for n in range(2, 2 + ORPHANS):
        disk.rows[n, 0] = (n, 0, b"%d" % n, n, 1, n, b"v")
    backend = Slow(disk, later=asyncio.get_running_loop().call_soon)
    backend.outcomes = list(outcomes)
    return backend


async def load(backend: Slow, *, stopped: Callable[[], bool] = lambda: False) -> Assembly:
    """Load it, with queues that take three rows at a time."""
    commit = CommitConfig(queue_rows_max=3, retry_interval=0.0)
    return await assemble(
        [backend],
        await open_shards([backend]),
        replace(QUICK, commit=commit),
        name="under-test",
        client_urls=(),
        clock=ManualClock(),
        random=Random(1),
        stopped=stopped,
    )


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
