"""A shard in an SQLite file: threads around ``sqlite_writer`` and ``sqlite_reader``.

One thread writes; a few threads read. Each has its own connection and takes jobs from a queue; what comes out goes
back to the event loop with ``call_soon_threadsafe``. The writer checkpoints after it has reported a commit.

The writer's queue holds at most one commit, one defragmentation and the end, since the interface allows one commit at
a time. The readers' queue holds ``READS_MAX``; a read above is refused at once.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from functools import partial
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
    CommitResult,
    Fence,
    IndexRow,
    LeaseRow,
    Outcome,
    Row,
    RowId,
    Sizes,
)
from kvstore.config import SqliteConfig
from kvstore.errors import BackendError

READS_MAX = 10_000
"""Reads that may wait; more are answered with ``BackendError``."""

Result = TypeVar("Result")
ReadJob = Callable[[Reader], None]

_FIRST: RowId = (-1, -1)


class SqliteBackend:
    """``kvstore.backend.Backend`` over the file ``path``; ``shard`` is its name if it is made now."""

    def __init__(
        self, path: Path, *, shard: str = "default", config: SqliteConfig | None = None
    ) -> None:
        self._path = path
        self._shard = shard
        self._config = config or SqliteConfig()
        self._statements = Statements(sqlite_dialect())
        self._writes: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._reads: SimpleQueue[ReadJob | None] = SimpleQueue()
        self._reads_waiting = 0
        self._readers: list[threading.Thread] = []
        self._committing = False
        self._closing: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop
        self._lock: sqlite_file.Lock
        self._writer: Writer

    # -- opening and closing -------------------------------------------------------------------

    async def open(self) -> Fence:
        """Lock, create or check, raise the epoch. Raises ``BackendError``; then nothing was changed."""
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._write, name=f"{self._path.name} writer", daemon=True).start()
        try:
            return await self._in_writer(self._take)
        except BackendError:
            self._closing = self._loop.create_future()
            self._closing.set_result(None)
            self._writes.put(None)
            raise

    def _take(self) -> Fence:
        """In the writer's thread: everything that ``open`` does."""
        sqlite_file.check_library(apsw.sqlite_lib_version())
        sqlite_file.prepare_directory(self._path)
        lock = sqlite_file.Lock(self._path)
        try:
            if sqlite_file.is_new(self._path):
                sqlite_file.create(self._path, self._shard)
            connection = sqlite_file.open_writer(self._path, self._config, self._statements)
            self._writer = Writer(self._path, connection, self._statements, self._config)
            fence = self._writer.take()
            for number in range(self._config.readers):
                self._start_reader(number)
        except BaseException as error:
            lock.release(undo=True)
            if isinstance(error, (OSError, apsw.Error)):
                raise BackendError(f"cannot open {self._path}: {error}") from error
            raise
        self._lock = lock
        return fence

    def _start_reader(self, number: int) -> None:
        connection = sqlite_file.open_reader(self._path, self._config)
        reader = Reader(connection, self._statements)
        name = f"{self._path.name} reader {number}"
        thread = threading.Thread(target=self._read, args=(reader,), name=name, daemon=True)
        thread.start()
        self._readers.append(thread)

    async def close(self) -> None:
        """Let reads and the commit under way end, checkpoint, release the lock. Idempotent.

        Raises ``BackendError`` when the last checkpoint fails; committed batches are then still in the log.
        """
        if self._closing is None:
            self._closing = self._loop.create_future()
            for _ in self._readers:
                self._reads.put(None)
            try:
                await self._in_writer(self._let_go)
            finally:
                self._writes.put(None)
                self._closing.set_result(None)
        await self._closing

    def _let_go(self) -> None:
        """In the writer's thread, after every job before it."""
        for reader in self._readers:
            reader.join()
        try:
            self._writer.close()
        except apsw.Error as error:
            raise BackendError(f"the last checkpoint of {self._path} failed: {error}") from error
        finally:
            self._lock.release()

    # -- the interface: loading ----------------------------------------------------------------

    async def load_index(self, sink: Callable[[list[IndexRow]], None]) -> None:
        """Every row without its value, in chunks; the next one is read while ``sink`` has one."""
        rows_max = self._config.load_chunk_rows
        chunk = await self._in_reader(lambda reader: reader.index_rows(_FIRST, rows_max))
        while chunk:
            following = self._in_reader(
                partial(Reader.index_rows, after=chunk[-1][:2], rows_max=rows_max)
            )
            sink(chunk)
            chunk = await following

    async def load_leases(self) -> list[LeaseRow]:
        """Every stored lease."""
        return await self._in_reader(Reader.leases)

    # -- the interface: callbacks --------------------------------------------------------------

    def commit(self, batch: Batch, done: Callable[[CommitResult], None]) -> None:
        """Commit ``batch`` in the writer's thread."""
        self._write_batch(self._commit, batch, done)

    def resolve(self, batch: Batch, done: Callable[[CommitResult], None]) -> None:
        """Look whether ``batch`` is stored. Commits here never end as unknown, so no epoch needs raising."""
        self._write_batch(self._resolve, batch, done)

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

    def sizes(self) -> Sizes:
        """Of the database with the pages that are still in its log; at most half a megabyte of commits late."""
        return self._writer.sizes

    def defragment(self, done: Callable[[BackendError | None], None]) -> None:
        """Rebuild the file; commits and other writers wait meanwhile."""
        if self._closing is not None:
            self._loop.call_soon(done, BackendError(f"{self._path} is closed"))
            return
        self._writes.put(lambda: self._tell(done, self._writer.vacuum()))

    # -- threads -------------------------------------------------------------------------------

    def _write(self) -> None:
        while (job := self._writes.get()) is not None:
            job()

    def _read(self, reader: Reader) -> None:
        while (job := self._reads.get()) is not None:
            job(reader)
        reader.close()

    def _tell(self, done: Callable[[Result], None], result: Result) -> None:
        self._loop.call_soon_threadsafe(done, result)

    def _write_batch(
        self,
        write: Callable[[Batch, Callable[[CommitResult], None]], None],
        batch: Batch,
        done: Callable[[CommitResult], None],
    ) -> None:
        assert not self._committing, "one commit at a time"
        if self._closing is not None:
            closed = CommitResult(Outcome.NOT_COMMITTED, f"{self._path} is closed")
            self._loop.call_soon(done, closed)
            return
        self._committing = True

        def committed(result: CommitResult) -> None:
            self._committing = False
            done(result)

        self._writes.put(lambda: write(batch, committed))

    def _commit(self, batch: Batch, done: Callable[[CommitResult], None]) -> None:
        self._tell(done, self._writer.commit(batch))
        self._writer.checkpoint_if_due()

    def _resolve(self, batch: Batch, done: Callable[[CommitResult], None]) -> None:
        self._tell(done, self._writer.stored(batch))

    def _post_read(
        self, read: Callable[[Reader], Result], done: Callable[[Result | BackendError], None]
    ) -> None:
        if self._closing is not None:
            self._loop.call_soon(done, BackendError(f"{self._path} is closed"))
            return
        if self._reads_waiting >= READS_MAX:
            self._loop.call_soon(done, BackendError(f"{self._path}: {READS_MAX} reads are waiting"))
            return
        self._reads_waiting += 1

        def answered(result: Result | BackendError) -> None:
            self._reads_waiting -= 1
            done(result)

        def job(reader: Reader) -> None:
            try:
                self._tell(answered, read(reader))
            except Exception as error:  # noqa: BLE001 - whoever waits must hear of it
                failure = BackendError(f"cannot read {self._path}: {type(error).__name__}: {error}")
                failure.__cause__ = error
                self._tell(answered, failure)

        self._reads.put(job)

    def _in_reader(self, read: Callable[[Reader], Result]) -> "asyncio.Future[Result]":
        future: asyncio.Future[Result] = self._loop.create_future()

        def done(result: Result | BackendError) -> None:
            if future.done():
                return
            if isinstance(result, BackendError):
                future.set_exception(result)
            else:
                future.set_result(result)

        self._post_read(read, done)
        return future

    def _in_writer(self, function: Callable[[], Result]) -> "asyncio.Future[Result]":
        future: asyncio.Future[Result] = self._loop.create_future()

        def done(result: Result | None, error: BaseException | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def job() -> None:
            try:
                result = function()
            except BaseException as error:  # noqa: BLE001 - it is raised where it is awaited
                self._loop.call_soon_threadsafe(done, None, error)
            else:
                self._loop.call_soon_threadsafe(done, result, None)

        self._writes.put(job)
        return future
