"""Backends under the contract tests: made, reopened, crashed, and spoken to with ``await``."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from backends.memory import MemoryBackend, MemoryDisk
from backends.sqlite import SqliteBackend
from kvstore.backend import (
    Backend,
    Batch,
    Cluster,
    CommitResult,
    Fence,
    HomeRows,
    IndexRow,
    LeaseRow,
    Outcome,
    Row,
    RowId,
    ShardRecord,
)
from kvstore.config import SqliteConfig
from kvstore.errors import BackendError
from tests.backends.raw import raw

Result = TypeVar("Result")


class Storage(Protocol):
    """Something that keeps what is committed, and makes backends that hold it."""

    def backend(self, shard: str = "first") -> Backend:
        """A backend of that shard that has not been opened yet."""

    async def steal(self, epoch: int, tip: int) -> None:
        """Write the fence row as another process would."""


class MemoryStorage:
    """A ``MemoryDisk``."""

    def __init__(self) -> None:
        self.disk = MemoryDisk(cluster_id=2**64 - 1, member_id=2**63)

    def backend(self, shard: str = "first") -> Backend:
        """Over the disk, with callbacks in later turns of the running loop."""
        return MemoryBackend(
            self.disk,
            later=lambda step: asyncio.get_running_loop().call_soon(step),
            shard=shard,
        )

    async def steal(self, epoch: int, tip: int) -> None:
        """The disk's fence."""
        self.disk.epoch, self.disk.tip = epoch, tip


class SqliteStorage:
    """A file."""

    def __init__(self, path: Path, config: SqliteConfig | None = None) -> None:
        self.path = path
        self.config = config or SqliteConfig()

    def backend(self, shard: str = "first") -> Backend:
        """Over the file."""
        return SqliteBackend(self.path, shard=shard, config=self.config)

    async def steal(self, epoch: int, tip: int) -> None:
        """By a connection that respects no lock file."""
        with raw(self.path) as connection:
            connection.execute("UPDATE fence SET epoch = ?, tip = ?", (epoch, tip))


class Session:
    """An open backend, spoken to with ``await``; commits what it is told on top of its own tip."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.fence: Fence
        self.tip = 0

    async def open(self, cluster: Cluster | None = None) -> "Session":
        """Open the backend."""
        self.fence = await self.backend.open(cluster)
        self.tip = self.fence.tip
        return self

    async def close(self) -> None:
        """Close the backend."""
        await self.backend.close()

    def batch(
        self,
        rows: Sequence[Row] = (),
        *,
        drops: Sequence[RowId] = (),
        lease_puts: Sequence[LeaseRow] = (),
        lease_deletes: Sequence[int] = (),
        compact_revision: int | None = None,
        tip: int | None = None,
        reserved: int | None = None,
        records: Sequence[ShardRecord] = (),
        redo: Sequence[tuple[str, Row]] = (),
        redo_drops: Sequence[int] = (),
        shard_map: str | None = None,
    ) -> Batch:
        """A batch on top of the tip, up to its own last row unless it is told."""
        last = rows[-1][0] if rows else self.tip
        return Batch(
            epoch=self.fence.epoch,
            tip_before=self.tip,
            tip=last if tip is None else tip,
            rows=list(rows),
            drops=list(drops),
            lease_puts={lease.id: lease for lease in lease_puts},
            lease_deletes=list(lease_deletes),
            compact_revision=compact_revision,
            reserved=reserved,
            records={record.shard: record for record in records},
            redo=list(redo),
            redo_drops=list(redo_drops),
            shard_map=shard_map,
        )

    async def commit(self, batch: Batch) -> CommitResult:
        """How the commit ends; the tip follows."""
        result: CommitResult = await _answer(lambda done: self.backend.commit(batch, done))
        if result.outcome is Outcome.COMMITTED:
            self.tip = batch.tip
        return result

    async def put(self, *keys: bytes, value: bytes = b"v") -> None:
        """Commit one revision with a change of each key."""
        revision = self.tip + 1
        rows = [put(revision, sub, key, value=value) for sub, key in enumerate(keys)]
        assert CommitResult(Outcome.COMMITTED) == await self.commit(self.batch(rows))

    async def resolve(self, batch: Batch) -> CommitResult:
        """What the backend finds of a batch."""
        result: CommitResult = await _answer(lambda done: self.backend.resolve(batch, done))
        return result

    async def values(self, *ids: RowId) -> list[bytes | None]:
        """Values by id; raises what the backend reports."""
        return _checked(await _answer(lambda done: self.backend.read_values(ids, done)))

    async def rows(self, after: RowId = (0, 0), rows_max: int = 1 << 30) -> list[Row]:
        """Rows after an id; raises what the backend reports."""
        return _checked(await _answer(lambda done: self.backend.read_rows(after, rows_max, done)))

    async def index(self) -> list[list[IndexRow]]:
        """The chunks of the index."""
        chunks: list[list[IndexRow]] = []
        await self.backend.load_index(chunks.append)
        return chunks

    async def leases(self) -> list[LeaseRow]:
        """Leases by id."""
        return sorted(await self.backend.load_leases())

    async def home(self) -> HomeRows:
        """What home keeps for all shards, records by name."""
        found = await self.backend.load_home()
        return found._replace(records=sorted(found.records))

    async def defragment(self) -> None:
        """Defragment; raises what the backend reports."""
        error = await _answer(self.backend.defragment)
        if error is not None:
            raise error


async def filled(path: Path) -> None:
    """Make a store with one row in a file."""
    session = await Session(SqliteBackend(path)).open()
    await session.put(b"a")
    await session.close()


def put(revision: int, sub: int, key: bytes, *, value: bytes = b"v", lease: int = 0) -> Row:
    """The first version of a key."""
    return (revision, sub, key, revision, 1, lease, value)


async def _answer(ask: Callable[[Callable[[Result], None]], None]) -> Result:
    """What ``ask`` hands to its callback, which is called once, later, on the loop's thread."""
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[Result] = loop.create_future()
    asking = True

    def done(result: Result) -> None:
        assert not asking, "called from inside the call that took it"
        assert asyncio.get_running_loop() is loop, "called on another thread"
        answered.set_result(result)

    ask(done)
    asking = False
    async with asyncio.timeout(30):
        return await answered


def _checked(result: Result | BackendError) -> Result:
    if isinstance(result, BackendError):
        raise result
    return result
