"""A shard in an SQLite file: threads around ``sqlite_writer`` and ``sqlite_reader``.

One thread writes; a few threads read. Each has its own connection and takes jobs from a queue; what
comes out goes back to the event loop with ``call_soon_threadsafe``. The writer checkpoints after it
has reported a commit.

The writer's queue holds at most one commit (the interface promises it), one defragmentation and the
end. The readers' queue holds ``READS_MAX``; a read above is refused at once (``ReadsFullError``).
"""

import asyncio
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

import apsw

from backends import sqlite_file
from backends.schema import Statements, sqlite_dialect
from backends.sqlite_reader import Reader
from backends.sqlite_writer import Writer
from kvstore.backend import (
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
    Sizes,
)
from kvstore.config import SqliteConfig
from kvstore.errors import BackendError, ReadsFullError, UnreachableError

READS_MAX = 10_000
"""Reads that may wait; more are answered with ``ReadsFullError``."""

Result = TypeVar("Result")
WriterJob = Callable[[], None]
ReaderJob = Callable[[Reader], None]

_FIRST: RowId = (-1, -1)
_DISK_FAILS = (
    OSError,
    apsw.IOError,
    apsw.CantOpenError,
    apsw.FullError,
    apsw.ReadOnlyError,
    apsw.BusyError,
)
"""What says nothing against a file: it may be opened another time."""


class SqliteBackend:
    """``kvstore.backend.Backend`` over the file ``path``, which must be that of ``shard``; a new
    one becomes it. Once opened, a file is never out of reach: it is there or broken.
    """

    def __init__(
        self, path: Path, *, shard: str = "default", config: SqliteConfig | None = None
    ) -> None:
        self.on_broken: Callable[[str], None] = _nobody_listens
        self.on_out: Callable[[str], None] = _nobody_listens
        self.on_back: Callable[[], None] = _nobody_hears
        self.origin = ""  # nothing tells a file from its copy
        self._path = path
        self._shard = shard
        self._config = config or SqliteConfig()
        self._statements = Statements(sqlite_dialect())
        self._broken = ""
        self._opened = False
        self._closed: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop
        self._writer: Writer
        self._start_over()

    def _start_over(self) -> None:
        """As if it had never been opened; but what broke stays so in this process."""
        self._writes: SimpleQueue[WriterJob | None] = SimpleQueue()
        self._reads: SimpleQueue[ReaderJob | None] = SimpleQueue()
        self._reads_waiting = 0
        self._committing = False
        self._broken_told = False
        self._readers: list[threading.Thread] = []
        self._lock: sqlite_file.Lock | None = None

    # -- opening and closing -------------------------------------------------------------------

    async def open(self, cluster: Cluster | None = None, *, known: bool = False) -> Fence:
        """Lock, create or check, raise the epoch.

        Raises ``UnreachableError`` if the file of one that is ``known`` is not there, or its disk
        does not let it be used, else ``BackendError``; then nothing was changed.
        """
        if self._closed is not None:
            await self._closed.wait()
            self._start_over()
        self._opened, self._closed = True, None
        self._loop = asyncio.get_running_loop()
        self._start_thread("writer", _write, self._writes)
        try:
            return await self._in_writer(lambda: self._take(cluster, known=known))
        except BackendError:
            self._closed = asyncio.Event()
            self._closed.set()
            self._writes.put(None)
            raise

    def _take(self, cluster: Cluster | None, *, known: bool) -> Fence:
        """In the writer's thread: everything that ``open`` does."""
        if self._broken:
            raise BackendError(f"{self._path} cannot be trusted any more: {self._broken}")
        sqlite_file.check_library(apsw.sqlite_lib_version())
        if known:
            sqlite_file.require_file(self._path)
        sqlite_file.make_directory(self._path.parent)
        lock = sqlite_file.Lock(self._path)
        connections: list[apsw.Connection] = []
        try:
            if sqlite_file.is_new(self._path):
                if cluster is None:
                    sqlite_file.refuse_beside(self._path)
                sqlite_file.create(self._path, self._shard, cluster)
            else:
                sqlite_file.require_identity(
                    self._path, self._statements, shard=self._shard, cluster=cluster
                )
            connection = sqlite_file.open_writer(self._path, self._statements, self._config)
            connections.append(connection)
            writer = Writer(self._path, connection, self._statements, self._config)
            connections.extend(
                sqlite_file.open_reader(self._path, self._config)
                for _ in range(self._config.readers)
            )
            fence = writer.take()
        except BaseException as error:
            for connection in connections:
                connection.close()
            lock.release(undo=True)
            if isinstance(error, OSError | apsw.Error):
                reason = sqlite_file.describe(error)
                kind = UnreachableError if isinstance(error, _DISK_FAILS) else BackendError
                raise kind(f"cannot open {self._path}: {reason}") from error
            raise
        self._lock, self._writer = lock, writer
        for connection in connections[1:]:
            reader = Reader(connection, self._statements)
            self._readers.append(self._start_thread("reader", _read, self._reads, reader))
        return fence

    def _start_thread(
        self, name: str, target: Callable[..., None], *arguments: object
    ) -> threading.Thread:
        """A daemon: a process that ends without ``close`` ends like one that is killed."""
        thread = threading.Thread(
            target=target, args=arguments, name=f"{self._path.name} {name}", daemon=True
        )
        thread.start()
        return thread

    async def close(self) -> None:
        """Let reads and the commit under way end, checkpoint, release the lock. Idempotent.

        Raises ``BackendError`` when the last checkpoint fails; what was committed is then still in
        the log.
        """
        if not self._opened:
            return
        if self._closed is not None:
            await self._closed.wait()
            return
        self._closed = asyncio.Event()
        try:
            await self._in_writer(self._let_go)
        finally:
            self._writes.put(None)
            self._closed.set()

    def _let_go(self) -> None:
        """In the writer's thread, after every job before it."""
        if self._lock is None:
            return
        for _ in self._readers:
            self._reads.put(None)
        for reader in self._readers:
            reader.join()
        self._broken = self._writer.broken
        try:
            self._writer.close()
        except Exception as error:
            reason = sqlite_file.describe(error)
            raise BackendError(f"the last checkpoint of {self._path} failed: {reason}") from error
        finally:
            self._lock.release()

    # -- loading -------------------------------------------------------------------------------

    async def load_index(self, sink: Callable[[list[IndexRow]], None]) -> None:
        """Every row without its value, in chunks; the next is read while ``sink`` has one."""
        chunk = await self._index_rows(_FIRST)
        while chunk:
            following = self._index_rows(chunk[-1][:2])
            sink(chunk)
            chunk = await following

    def _index_rows(self, after: RowId) -> "asyncio.Future[list[IndexRow]]":
        return self._in_reader(
            lambda reader: reader.index_rows(after, self._config.load_chunk_rows)
        )

    async def load_leases(self) -> list[LeaseRow]:
        """Every stored lease."""
        return await self._in_reader(Reader.leases)

    async def load_home(self) -> HomeRows:
        """What home keeps for all shards."""
        return await self._in_reader(Reader.home)

    def lease_until(self) -> float:
        """For ever: the lock goes with the process."""
        return math.inf

    # -- writing -------------------------------------------------------------------------------

    def commit(self, batch: Batch, done: Callable[[CommitResult], None]) -> None:
        """Commit ``batch`` in the writer's thread."""
        self._post_write(lambda: self._writer.commit(batch), done)

    def resolve(self, batch: Batch, done: Callable[[CommitResult], None]) -> None:
        """How ``batch`` ended. Commits here never end unknown, so that no epoch is raised."""
        self._post_write(lambda: self._writer.resolve(batch), done)

    def _post_write(
        self, work: Callable[[], CommitResult], done: Callable[[CommitResult], None]
    ) -> None:
        assert not self._committing, "one commit at a time"
        if self._closed is not None:
            closed = CommitResult(Outcome.NOT_COMMITTED, f"{self._path} is closed")
            self._loop.call_soon(done, closed)
            return
        self._committing = True

        def ended(result: CommitResult) -> None:
            self._committing = False
            done(result)

        def job() -> None:
            self._tell(ended, work())
            self._writer.tidy()
            self._tell_if_broken()

        self._writes.put(job)

    def sizes(self) -> Sizes:
        """Of the database, pages that are still in its log included; some commits late, by at most
        half a MiB.
        """
        return self._writer.sizes

    def defragment(self, done: Callable[[BackendError | None], None]) -> None:
        """Rebuild the file in the writer's thread."""
        if self._closed is not None:
            self._loop.call_soon(done, BackendError(f"{self._path} is closed"))
            return

        def job() -> None:
            self._tell(done, self._writer.vacuum())
            self._tell_if_broken()

        self._writes.put(job)

    # -- reading -------------------------------------------------------------------------------

    def read_values(
        self, ids: Sequence[RowId], done: Callable[[list[bytes | None] | BackendError], None]
    ) -> None:
        """The values of rows, None where there is none."""
        self._post_read(lambda reader: reader.values(ids), done)

    def read_rows(
        self, after: RowId, rows_max: int, done: Callable[[list[Row] | BackendError], None]
    ) -> None:
        """Rows greater than ``after``, at most ``rows_max``."""
        self._post_read(lambda reader: reader.rows(after, rows_max), done)

    def _post_read(
        self, read: Callable[[Reader], Result], done: Callable[[Result | BackendError], None]
    ) -> None:
        refused = self._refuses_reads()
        if refused is not None:
            self._loop.call_soon(done, refused)
            return
        self._reads_waiting += 1

        def ended(result: Result | BackendError) -> None:
            self._reads_waiting -= 1
            done(result)

        def job(reader: Reader) -> None:
            try:
                self._tell(ended, read(reader))
            except Exception as error:  # noqa: BLE001 - whoever waits must hear of it
                reason = sqlite_file.describe(error)
                failure = BackendError(f"cannot read {self._path}: {reason}")
                failure.__cause__ = error
                self._tell(ended, failure)

        self._reads.put(job)

    def _refuses_reads(self) -> BackendError | None:
        if self._closed is not None:
            return BackendError(f"{self._path} is closed")
        if self._reads_waiting >= READS_MAX:
            return ReadsFullError(f"{self._path} has {READS_MAX} reads waiting")
        return None

    # -- threads -------------------------------------------------------------------------------

    def _tell(self, done: Callable[[Result], None], result: Result) -> None:
        self._loop.call_soon_threadsafe(done, result)

    def _tell_if_broken(self) -> None:
        """In the writer's thread, after each job: no later one is needed to notice."""
        if self._writer.broken and not self._broken_told:
            self._broken_told = True
            self._loop.call_soon_threadsafe(lambda: self.on_broken(self._writer.broken))

    def _in_reader(self, read: Callable[[Reader], Result]) -> "asyncio.Future[Result]":
        future: asyncio.Future[Result] = self._loop.create_future()
        self._post_read(read, lambda result: _settle(future, result))
        return future

    def _in_writer(self, function: Callable[[], Result]) -> "asyncio.Future[Result]":
        future: asyncio.Future[Result] = self._loop.create_future()

        def job() -> None:
            try:
                result: Result | BaseException = function()
            except BaseException as error:  # noqa: BLE001 - raised where the future is awaited
                result = error
            self._loop.call_soon_threadsafe(_settle, future, result)

        self._writes.put(job)
        return future


def _write(jobs: SimpleQueue[WriterJob | None]) -> None:
    """The writer's thread, until it gets None."""
    while (job := jobs.get()) is not None:
        job()


def _read(jobs: SimpleQueue[ReaderJob | None], reader: Reader) -> None:
    """A reader's thread, likewise."""
    while (job := jobs.get()) is not None:
        job(reader)
    reader.close()


def _nobody_listens(reason: str) -> None:
    """Until somebody sets ``on_broken``; nobody needs to set ``on_out``."""


def _nobody_hears() -> None:
    """Nor ``on_back``."""


def _settle(future: "asyncio.Future[Result]", result: Result | BaseException) -> None:
    """Give ``future`` its end, unless its waiter was cancelled."""
    if future.done():
        return
    if isinstance(result, BaseException):
        future.set_exception(result)
    else:
        future.set_result(result)
