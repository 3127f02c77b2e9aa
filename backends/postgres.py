"""A shard in PostgreSQL: tasks around ``postgres_writer`` and ``postgres_reader``.

One task writes: it takes jobs one after the other, and when the connection is lost takes the shard
anew, as often as it must, before the next job. Jobs wait meanwhile. Between two jobs it renews the
lease once that is due: a commit that succeeds is a renewal, so that only idle shards have one to
send, and those whose commits are refused. A few tasks read. All of it runs on the loop of ``open``;
``done`` is called in a turn of its own.

The database is **out** once it did not answer in time, or an attempt to connect again has failed;
``on_out`` tells, reads fail at once, until ``on_back``.

The tasks belong to a group, and that to one root task, which ``close`` ends and awaits: a backend
is opened and closed by calls, not by a block that a group could span.
"""

import asyncio
import math
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from random import Random
from typing import Final, TypeVar

from asyncpg import exceptions

from backends import postgres_reader as reader
from backends import postgres_statements as sql
from backends.postgres_reader import Readers
from backends.postgres_session import Session, connect, describe, find_origin, read_url
from backends.postgres_writer import Writer
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
from kvstore.clock import Clock, SystemClock
from kvstore.config import PostgresConfig
from kvstore.errors import BackendError, UnreachableError

Result = TypeVar("Result")
Done = Callable[[Result], None]

_FIRST: Final[RowId] = (-1, -1)
_VACUUM: Final = f"VACUUM (ANALYZE) {', '.join(table.name for table in sql.tables())}"


_Job = tuple[Callable[[Batch], CommitResult] | None, Batch, Done[CommitResult]]
"""What looks for the batch after an unknown outcome, or None to commit it; the batch; whom to tell.
"""


class PostgresBackend:
    """``kvstore.backend.Backend`` over the database at ``url``, which must hold ``shard``; a new
    one becomes it. ``open`` may be called again after it has failed, and after ``close``.
    """

    def __init__(
        self,
        url: str,
        *,
        shard: str = "default",
        config: PostgresConfig | None = None,
        clock: Clock | None = None,
        random: Random | None = None,
    ) -> None:
        """Raises ``BackendError`` for a URL that is none."""
        self.on_broken: Callable[[str], None] = _nobody_listens
        self.on_out: Callable[[str], None] = _nobody_listens
        self.on_back: Callable[[], None] = _nobody_hears
        self._config = config or PostgresConfig()
        self._clock = clock or SystemClock()
        self._random = random or Random()
        self._target = read_url(url)
        self._shard = shard
        self._holder = secrets.randbelow((1 << 63) - 1) + 1
        self._writer: Writer
        self._home = True
        self._jobs: deque[_Job] = deque()
        self._wake = asyncio.Event()
        self._closing = asyncio.Event()
        self._out = ""
        self._ended_told = False
        self._vacuuming = False
        self._vacuum_session: Session | None = None
        self._renewal_tried_at = 0.0
        self._measure_at = 0.0
        self._life: asyncio.Task[None] | None = None
        self._tasks: asyncio.TaskGroup
        self._loop: asyncio.AbstractEventLoop
        self._readers: Readers

    @property
    def origin(self) -> str:
        """Which database this is; it changes when a standby has taken over that lacks nothing."""
        return self._writer.origin

    # -- opening and closing -------------------------------------------------------------------

    async def open(self, cluster: Cluster | None = None, *, known: bool = False) -> Fence:
        """Connect, check and take the shard; look on first if somebody may hold home.

        Raises ``UnreachableError`` or ``BackendError``.
        """
        assert self._life is None, "a backend is opened once at a time"
        self._loop = asyncio.get_running_loop()
        self._home = cluster is None
        self._wake, self._closing = asyncio.Event(), asyncio.Event()
        self._out, self._ended_told = "", False
        self._writer = Writer(
            self._target, self._shard, self._config, self._clock, self._holder, self._wake.set
        )
        fence = await self._writer.open(cluster, known=known)
        self._measure_at = self._clock.monotonic() + self._config.sizes_interval
        self._readers = Readers(self._connect_reader, self._config)
        self._life = self._loop.create_task(self._live())
        return fence

    async def _live(self) -> None:
        """The root task."""
        async with asyncio.TaskGroup() as self._tasks:
            self._tasks.create_task(self._write())
            for _ in range(self._config.readers):
                self._tasks.create_task(self._readers.serve())

    async def close(self) -> None:
        """Let reads and the commit under way end, let go of the shard. Idempotent."""
        if self._life is None:
            return
        if not self._closing.is_set():
            self._closing.set()
            self._wake.set()
            self._readers.stop()
            self._writer.abandon()
            if self._vacuum_session is not None:
                self._vacuum_session.terminate()
        life = self._life
        await asyncio.wait([life])
        self._life = None
        life.result()

    # -- writing -------------------------------------------------------------------------------

    def commit(self, batch: Batch, done: Done[CommitResult]) -> None:
        """Commit ``batch`` when the shard is in hand."""
        self._post(None, batch, done)

    def resolve(self, batch: Batch, done: Done[CommitResult]) -> None:
        """How ``batch`` ended, once the shard is in hand again."""
        self._post(self._writer.resolve, batch, done)

    def _post(
        self,
        look: Callable[[Batch], CommitResult] | None,
        batch: Batch,
        done: Done[CommitResult],
    ) -> None:
        assert not self._jobs, "one commit at a time"
        if self._closing.is_set():
            self._loop.call_soon(done, self._closed(look))
            return
        self._jobs.append((look, batch, done))
        self._wake.set()

    def _closed(self, look: Callable[[Batch], CommitResult] | None) -> CommitResult:
        outcome = Outcome.NOT_COMMITTED if look is None else Outcome.UNKNOWN
        return CommitResult(outcome, f"{self._target.shown} is closed")

    async def _write(self) -> None:
        """The writing task."""
        while not self._closing.is_set():
            try:
                await self._turn()
            except Exception as error:  # noqa: BLE001 - a fault of ours must not go unheard
                self._break(error)
            self._tell_if_ended()
        while self._jobs:
            look, _, done = self._jobs.popleft()
            self._loop.call_soon(done, self._closed(look))
        await self._writer.close()

    async def _turn(self) -> None:
        """What is due next."""
        writer = self._writer
        if writer.ended is None and not writer.connected:
            await self._reconnect()
            return
        self._measure_if_due()
        seconds = self._renewal_due_in()
        if seconds <= 0:
            await self._renew()
        elif self._jobs:
            await self._do(*self._jobs[0])
        else:
            await self._rest(seconds)

    def _renewal_due_in(self) -> float:
        last = max(self._writer.renewed_at, self._renewal_tried_at)
        return last + self._config.renew_interval - self._clock.monotonic()

    async def _renew(self) -> None:
        """Unless a commit is in doubt: a renewal would write over its number."""
        self._renewal_tried_at = self._clock.monotonic()
        if not self._writer.unresolved:
            await self._writer.renew()

    async def _do(
        self,
        look: Callable[[Batch], CommitResult] | None,
        batch: Batch,
        done: Done[CommitResult],
    ) -> None:
        """One job."""
        try:
            result = await self._writer.commit(batch) if look is None else look(batch)
        except Exception as error:  # noqa: BLE001 - whoever waits must hear of it
            result = self._break(error)
        self._jobs.popleft()
        self._loop.call_soon(done, result)

    def _break(self, error: Exception) -> CommitResult:
        """Something happened that never should: nothing is certain any more."""
        self._writer.ended = CommitResult(Outcome.BROKEN, describe(error))
        return self._writer.ended

    async def _rest(self, seconds: float) -> None:
        """Until a job, the loss of the connection or the end comes, but no longer."""
        self._wake.clear()
        idle = self._writer.connected or self._writer.ended is not None
        if self._jobs or self._closing.is_set() or not idle:
            return
        due = self._loop.call_later(seconds, self._wake.set)
        await self._wake.wait()
        due.cancel()

    async def _reconnect(self) -> None:
        """Take the shard anew, however often it must be tried."""
        writer = self._writer
        wait = self._config.reconnect_interval_min
        origin = writer.origin
        if writer.overdue:
            self._say_out(f"{self._target.shown} does not answer")
        while not self._closing.is_set():
            try:
                await writer.reconnect()
            except BackendError as error:
                self._say_out(str(error))
            else:
                if writer.origin != origin:
                    self._readers.replace_connections()
                self._say_back()
                return
            try:
                async with asyncio.timeout(self._random.uniform(wait / 2, wait)):
                    await self._closing.wait()
            except TimeoutError:
                wait = min(2 * wait, self._config.reconnect_interval_max)

    # -- telling -------------------------------------------------------------------------------

    def _say_out(self, reason: str) -> None:
        self._readers.out = reason
        if not self._out:
            self._out = reason
            self._loop.call_soon(lambda: self.on_out(reason))

    def _say_back(self) -> None:
        """Unless it turned out to be lost for good: then ``on_broken`` follows."""
        self._readers.out = ""
        if self._out and self._writer.ended is None:
            self._out = ""
            self._loop.call_soon(lambda: self.on_back())  # noqa: PLW0108 - it may be set later

    def _tell_if_ended(self) -> None:
        """Once, so that no commit is needed to notice."""
        ended = self._writer.ended
        if ended is not None and not self._ended_told:
            self._ended_told = True
            reason = f"{ended.outcome.value}: {ended.reason}"
            self._loop.call_soon(lambda: self.on_broken(reason))

    def lease_until(self) -> float:
        """While the last renewal's time runs; for ever if this is not home, which needs none."""
        if not self._home:
            return math.inf
        return self._writer.renewed_at + self._config.lease_duration

    # -- reading -------------------------------------------------------------------------------

    async def _connect_reader(self) -> Session:
        """A session that reads from the copy that the writer writes to."""
        session = await connect(self._target, self._config, writes=False)
        try:
            found = await find_origin(session)
        except BaseException:
            session.terminate()
            raise
        if found != self._writer.origin:
            session.terminate()
            raise UnreachableError(f"{self._target.shown}: {found} answers, another copy")
        return session

    def read_values(
        self, ids: Sequence[RowId], done: Done[list[bytes | None] | BackendError]
    ) -> None:
        """The values of rows, None where there is none."""
        self._ask(lambda session: reader.read_values(session, ids), done)

    def read_rows(self, after: RowId, rows_max: int, done: Done[list[Row] | BackendError]) -> None:
        """Rows greater than ``after``, at most ``rows_max``."""
        self._ask(lambda session: reader.read_rows(session, after, rows_max), done)

    def _ask(self, read: reader.Read[Result], done: Done[Result | BackendError]) -> None:
        if self._closing.is_set():
            self._loop.call_soon(done, BackendError(f"{self._target.shown} is closed"))
            return
        self._readers.ask(read, done)

    async def load_index(self, sink: Callable[[list[IndexRow]], None]) -> None:
        """Every row without its value, in pages; the next is read while ``sink`` has one."""
        rows, size = await self._index_page(_FIRST)
        while rows:
            following = self._index_page(rows[-1][:2])
            self._writer.size_in_use += size
            sink(rows)
            rows, size = await following

    def _index_page(self, after: RowId) -> "asyncio.Future[tuple[list[IndexRow], int]]":
        rows_max = self._config.load_chunk_rows
        return self._awaited(lambda session: reader.read_index(session, after, rows_max))

    async def load_leases(self) -> list[LeaseRow]:
        """Every stored lease."""
        return await self._awaited(reader.read_leases)

    async def load_home(self) -> HomeRows:
        """What home keeps for all shards."""
        return await self._awaited(reader.read_home)

    def _awaited(self, read: reader.Read[Result]) -> "asyncio.Future[Result]":
        future: asyncio.Future[Result] = self._loop.create_future()

        def done(result: Result | BackendError) -> None:
            if future.done():
                return
            if isinstance(result, BackendError):
                future.set_exception(result)
            else:
                future.set_result(result)

        self._ask(read, done)
        return future

    # -- sizes ---------------------------------------------------------------------------------

    def sizes(self) -> Sizes:
        """Of the tables with their indexes, measured now and then, and since then with what was
        added; in use is what the rows take.
        """
        in_use = self._writer.size_in_use
        return Sizes(max(self._writer.size_total, in_use), in_use)

    def _measure_if_due(self) -> None:
        now = self._clock.monotonic()
        if now < self._measure_at or self._out:
            return
        self._measure_at = now + self._config.sizes_interval

        def done(size: int | BackendError) -> None:
            if not isinstance(size, BackendError):
                self._writer.measured(size)

        self._ask(reader.read_size, done)

    def defragment(self, done: Done[BackendError | None]) -> None:
        """VACUUM, on a connection of its own: dead rows' room is used again, and what is free at a
        table's end goes back to the file system. Commits and reads go on.

        VACUUM FULL would give all of it back and lock the tables for as long as that takes.
        """
        if self._closing.is_set() or self._vacuuming:
            why = "is closed" if self._closing.is_set() else "is being defragmented"
            self._loop.call_soon(done, BackendError(f"{self._target.shown} {why}"))
            return
        self._vacuuming = True
        self._tasks.create_task(self._vacuum(done))

    async def _vacuum(self, done: Done[BackendError | None]) -> None:
        error: BackendError | None = None
        try:
            session = self._vacuum_session = await connect(self._target, self._config, writes=True)
            session.answer_timeout = math.inf
            if self._closing.is_set():
                session.terminate()
            await session.command(_VACUUM)
            self._writer.measured(await reader.read_size(session))
            await session.close()
        except BackendError as failure:
            error = failure
        except (exceptions.PostgresError, exceptions.InterfaceError) as failure:
            error = BackendError(f"{self._target.shown}: {describe(failure)}")
        finally:
            self._vacuuming, self._vacuum_session = False, None
        self._loop.call_soon(done, error)


def _nobody_listens(reason: str) -> None:
    """Until somebody sets the callback."""


def _nobody_hears() -> None:
    """Likewise."""
