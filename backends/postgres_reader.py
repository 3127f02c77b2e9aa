"""Reading from PostgreSQL: the queries, and the few connections that they share.

Each connection serves one read at a time, in the order asked. A read whose connection is lost is
tried on a new one; after some attempts, and at once while the database is known to be out, it fails
with ``UnreachableError``: nothing is wrong with the data.

A reading connection must show the same copy of the database as the writer's, or rows would seem to
be missing: it is asked for its origin, and all are replaced when the writer's has changed.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from asyncpg import exceptions

from backends import postgres_statements as sql
from backends.postgres_session import Session, describe
from kvstore.backend import HomeRows, IndexRow, LeaseRow, Row, RowId, ShardRecord
from kvstore.config import PostgresConfig
from kvstore.errors import BackendError, ReadsFullError, UnreachableError

READS_MAX: Final = 10_000
"""Reads that may wait; more are answered with ``ReadsFullError``."""

Result = TypeVar("Result")
Read = Callable[[Session], Awaitable[Result]]
Done = Callable[[Result | BackendError], None]

_DEFINITE: Final = ("XX001", "XX002", "42", "28", "3D", "3F")
"""Beginnings of SQLSTATEs that another attempt does not help: corruption, no such thing, no
permission."""


async def read_index(session: Session, after: RowId, rows_max: int) -> tuple[list[IndexRow], int]:
    """Up to ``rows_max`` rows after ``after`` without their values, and what they take in bytes."""
    records = (await session.run(sql.SELECT_INDEX, *after, rows_max)).rows
    size = sum(len(record[2]) + record[6] for record in records)
    rows: list[IndexRow] = [record[:6] for record in records]
    return rows, size + sql.ROW_OVERHEAD_BYTES * len(rows)


async def read_rows(session: Session, after: RowId, rows_max: int) -> list[Row]:
    """Up to ``rows_max`` rows after ``after``."""
    records = (await session.run(sql.SELECT_ROWS, *after, rows_max)).rows
    return [record[:] for record in records]


async def read_values(session: Session, ids: Sequence[RowId]) -> list[bytes | None]:
    """The value of each row, None where there is none."""
    if not ids:
        return []
    revisions, subs = zip(*ids, strict=True)
    records = (await session.run(sql.SELECT_VALUES, revisions, subs)).rows
    found = {(revision, sub): value for revision, sub, value in records}
    return [found[id_] for id_ in ids]


async def read_leases(session: Session) -> list[LeaseRow]:
    """Every lease."""
    return [LeaseRow(*record) for record in (await session.run(sql.SELECT_LEASES)).rows]


async def read_home(session: Session) -> HomeRows:
    """What home keeps for all shards; nobody commits while it is asked."""
    records = (await session.run(sql.SELECT_RECORDS)).rows
    redo = (await session.run(sql.SELECT_REDO)).rows
    shard_map = (await session.run(sql.SELECT_SHARD_MAP)).rows
    return HomeRows(
        shard_map[0]["document"] if shard_map else "",
        [ShardRecord(*record) for record in records],
        [(record[0], record[1:]) for record in redo],
    )


async def read_size(session: Session) -> int:
    """Bytes of all tables."""
    (size,) = await session.one(sql.SELECT_SIZE)
    return int(size)


@dataclass(slots=True)
class _Job(Generic[Result]):
    read: Read[Result]
    done: Done[Result]


class Readers:
    """Reads that wait, and those who serve them: each ``serve`` is a task with a connection."""

    def __init__(self, connect: Callable[[], Awaitable[Session]], config: PostgresConfig) -> None:
        self.out = ""
        """Why the database is out; reads fail at once while it is set."""
        self._connect = connect
        self._attempts_max = config.read_attempts_max
        self._count = config.readers
        self._loop = asyncio.get_running_loop()
        self._jobs: asyncio.Queue[_Job[object] | None] = asyncio.Queue()
        self._waiting = 0
        self._generation = 0

    def ask(self, read: Read[Result], done: Done[Result]) -> None:
        """Call ``done`` with what ``read`` gives, later."""
        if self.out:
            self._loop.call_soon(done, UnreachableError(self.out))
        elif self._waiting >= READS_MAX:
            self._loop.call_soon(done, ReadsFullError(f"{READS_MAX} reads are waiting"))
        else:
            self._waiting += 1
            self._jobs.put_nowait(_Job(read, done))  # type: ignore[arg-type]

    def replace_connections(self) -> None:
        """Read through new ones from now on."""
        self._generation += 1

    def stop(self) -> None:
        """End each ``serve`` once the reads before have been answered."""
        for _ in range(self._count):
            self._jobs.put_nowait(None)

    async def serve(self) -> None:
        """Answer reads until the end."""
        place = _Place()
        try:
            while (job := await self._jobs.get()) is not None:
                result = await self._answer(place, job.read)
                self._waiting -= 1
                self._loop.call_soon(job.done, result)
        except BaseException:
            place.leave()
            raise
        if place.session is not None:
            await place.session.close()

    async def _answer(self, place: "_Place", read: Read[object]) -> object:
        """What ``read`` gives, or why it gives nothing."""
        failure: BackendError = UnreachableError(self.out or "no attempt was made")
        for _ in range(self._attempts_max):
            if self.out:
                return UnreachableError(self.out)
            if place.generation != self._generation:
                place.leave()
            try:
                if place.session is None or place.session.lost:
                    place.generation = self._generation
                    place.session = await self._connect()
                return await read(place.session)
            except UnreachableError as error:
                failure = error
            except Exception as error:  # noqa: BLE001 - whoever waits must hear of it
                failure = _failure(error)
                if not isinstance(failure, UnreachableError):
                    break
        return failure


@dataclass(slots=True)
class _Place:
    """Where one of the tasks reads."""

    session: Session | None = None
    generation: int = 0

    def leave(self) -> None:
        """Cut the connection."""
        if self.session is not None:
            self.session.terminate()
            self.session = None


def _failure(error: Exception) -> BackendError:
    """What a read that failed for certain is answered with."""
    definite = not isinstance(error, exceptions.PostgresError) or (error.sqlstate or "").startswith(
        _DEFINITE
    )
    kind = BackendError if definite else UnreachableError
    failure = kind(f"cannot read: {describe(error)}")
    failure.__cause__ = error
    return failure
