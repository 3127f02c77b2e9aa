"""Writing to PostgreSQL: the one session that commits, and what is known of the fence row.

Without tasks: whoever runs the writer calls one method at a time and awaits it.

**Unknown outcomes.** A commit whose answer did not come, was not ``COMMIT``, or came with a WARNING
(the wait for a standby was cut short) may have happened. The session is then gone, or is cut.
``reconnect`` takes the shard anew on another one: it raises the epoch, so that a statement which is
still on its way changes nothing, and waits for one that is at it. Only then the row tells: the
number of the commit is there, or it will never be. A lost session that the server still has, and
that waits for us with the row in its hands, is ended first.

**Patience.** A batch may take longer than an answer usually does: many rows, a slow link or disk.
Each time that its commit is cut off for being late it is given twice as long the next time, up to
``commit_timeout_max``, until it is stored: with the same time again it would be cut off for ever.
Taking the shard anew has a patience of its own, for it must outlast a commit that is still at work.

**Lost data.** Taking anew requires that the row has at least the tip and the commit that were
acknowledged. A standby that took over without them shows less: the shard is broken, for what is in
memory is not what is stored. The row's origin is marked with what it lacks, so that the next start
refuses, too: an older copy of the files has the origin of before, and nothing else tells it from
what it was. A standby that lacks nothing is served like the database before.
"""

import secrets
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import asyncpg
from asyncpg import exceptions

from backends import postgres_statements as sql
from backends.postgres_leadership import Taken, take_home, take_other
from backends.postgres_reader import read_size
from backends.postgres_schema import update_schema
from backends.postgres_session import (
    LostError,
    Session,
    Target,
    connect,
    describe,
    end_abandoned,
    find_origin,
)
from backends.schema import signed, unsigned
from kvstore.backend import Batch, Cluster, CommitResult, Fence, Outcome
from kvstore.clock import Clock
from kvstore.config import PostgresConfig
from kvstore.errors import BackendError, UnreachableError

_COMMITTED: Final = CommitResult(Outcome.COMMITTED)
_BREAKING: Final = ("23", "XX001", "XX002")
"""Beginnings of SQLSTATEs after which nothing is to be trusted: a revision that exists already,
corrupt data or index."""
_ABANDONED_MAX: Final = 16
"""Lost sessions that are remembered, to be ended if they are in the way; the oldest are forgotten.
"""
_READ_ONLY: Final = "25006"
_LACKS: Final = " lacks "
"""Between an origin and the revision that was acknowledged and is not there."""


@dataclass(slots=True)
class _Tried:
    """The last batch that was tried."""

    batch: Batch
    number: int
    result: CommitResult


class Writer:
    """Holds one shard; see the module's text."""

    def __init__(
        self,
        target: Target,
        shard: str,
        config: PostgresConfig,
        clock: Clock,
        holder: int,
        on_lost: Callable[[], None],
    ) -> None:
        """``holder`` is what the fence row calls us; ``on_lost`` hears of each session's end."""
        self.ended: CommitResult | None = None
        """How everything ends from now on: FENCED or BROKEN."""
        self.session: Session | None = None
        self.origin = ""
        self.renewed_at = 0.0
        """Monotonic time before the last renewal, commit or taking that succeeded."""
        self.size_total = 0
        """Bytes of the tables, estimated since ``measured``."""
        self.size_in_use = 0
        """Bytes that rows take."""
        self._target = target
        self._shard = shard
        self._config = config
        self._clock = clock
        self._holder = holder
        self._on_lost = on_lost
        self._commit_timeout = config.answer_timeout
        """For each statement of the next commit; see the module's text on patience."""
        self._take_timeout = config.answer_timeout
        """Likewise for taking the shard anew."""
        self._home = True
        self._epoch = 0
        self._tip = 0
        self._writes = 0
        """The last number that was given to a commit or renewal."""
        self._writes_committed = 0
        self._found: tuple[int, int] = (0, 0)
        """(tip, writes) when the shard was last taken."""
        self._tried: _Tried | None = None
        self._taking: Session | None = None
        self._abandoned: deque[int] = deque(maxlen=_ABANDONED_MAX)
        """The server's processes of sessions that were lost since the shard was last taken."""

    @property
    def connected(self) -> bool:
        """Is there a session to write with?"""
        return self.session is not None and not self.session.lost

    @property
    def overdue(self) -> bool:
        """Was the last session cut because an answer did not come in time?"""
        return self.session is not None and self.session.overdue

    @property
    def unresolved(self) -> bool:
        """Is the end of the last batch unknown?"""
        return self._tried is not None and self._tried.result.outcome is Outcome.UNKNOWN

    # -- taking --------------------------------------------------------------------------------

    async def open(self, cluster: Cluster | None, *, known: bool) -> Fence:
        """Connect, check, make what is missing, take the shard; one that is ``known`` is not made.

        Raises ``BackendError``, ``UnreachableError`` among them; may then be called again.
        """
        session = await connect(self._target, self._config, writes=True)
        try:
            session.answer_timeout = self._config.answer_timeout_max
            origin = await find_origin(session)
            await update_schema(session, self._target.schema)
            await self._identify(session, cluster, origin, known=known)
            self._home = cluster is None
            if not self._home:  # whoever has the row locked is not waited for by the whole start
                session.answer_timeout = self._config.answer_timeout
            self._accept(await self._take(session, origin), origin)
            self.measured(await read_size(session))
            session.answer_timeout = self._config.answer_timeout
        except exceptions.PostgresError as error:
            session.terminate()
            raise BackendError(f"{self._target.shown}: {describe(error)}") from error
        except BackendError as error:
            session.terminate()
            raise type(error)(f"{self._target.shown}: {error}") from error
        except BaseException:
            session.terminate()
            raise
        self._use(session)
        return self._fence

    async def _identify(
        self, session: Session, cluster: Cluster | None, origin: str, *, known: bool
    ) -> None:
        """Raise ``BackendError`` unless this is the shard we want; a new store becomes it."""
        rows = (await session.run(sql.SELECT_FENCE)).rows
        if not rows:
            (has_rows,) = await session.one(sql.HAS_ROWS)
            if has_rows:
                raise BackendError("there are rows, but no fence row: the store is damaged")
            if known:
                raise BackendError(f"shard {self._shard} has been there, and this is empty")
            ids = cluster or [secrets.randbelow((1 << 64) - 1) + 1 for _ in range(2)]
            await session.run(sql.INSERT_FENCE, *map(signed, ids), self._shard)
            rows = (await session.run(sql.SELECT_FENCE)).rows
        row = rows[0]
        if row["shard"] != self._shard:
            raise BackendError(f"this is the shard {row['shard']!r}, not {self._shard!r}")
        found = unsigned(row["cluster_id"])
        if cluster is not None and found != cluster.cluster_id:
            raise BackendError(
                f"this shard belongs to the cluster {found:x}, not {cluster.cluster_id:x}"
            )
        if self._config.accept_data_loss:
            return
        before, _, lacks = row["origin"].partition(_LACKS)
        if lacks and row["tip"] <= int(lacks):  # beyond it, the loss was accepted meanwhile
            raise BackendError(
                f"acknowledged writes are lost: revision {lacks} was stored, and this database ends"
                f" at {row['tip']}. --accept-data-loss goes on without them"
            )
        if before not in ("", origin):
            raise BackendError(
                f"this is not the database of before, but a copy of it or another one: its system"
                f" identifier and timeline were {before} and are {origin}; what was"
                " acknowledged may be missing. --accept-data-loss goes on without it"
            )

    async def _take(self, session: Session, origin: str) -> Taken:
        session.warnings.clear()
        if self._home:
            taken = await take_home(
                session,
                holder=self._holder,
                origin=origin,
                config=self._config,
                clock=self._clock,
            )
        else:
            taken = await take_other(session, holder=self._holder, origin=origin, clock=self._clock)
        _require_no_warning(session)
        return taken

    def _accept(self, taken: Taken, origin: str) -> None:
        """Start from the fence row as it was taken."""
        row = taken.row
        self.origin, self.renewed_at = origin, taken.began
        self._epoch, self._tip = row["epoch"], row["tip"]
        self._writes = self._writes_committed = row["writes"]
        self._found = (row["tip"], row["writes"])
        self._fence = Fence(
            cluster_id=unsigned(row["cluster_id"]),
            member_id=unsigned(row["member_id"]),
            shard=row["shard"],
            epoch=row["epoch"],
            tip=row["tip"],
            compact_revision=row["compact_revision"],
            reserved=row["reserved"],
            origin=origin,
        )

    def _use(self, session: Session) -> None:
        session.on_lost = self._on_lost
        self.session = session

    async def reconnect(self) -> None:
        """Take the shard anew on a new session, or find out that it must end (``ended``).

        Raises ``UnreachableError`` when it could not be done now, ``BackendError`` when the server
        must not be used as it is now.
        """
        if self.session is not None:
            self._abandoned.append(self.session.server_process)
            self.session = None
        session = self._taking = await connect(self._target, self._config, writes=True)
        try:
            session.answer_timeout = self._take_timeout
            origin = await find_origin(session)
            began = self._clock.monotonic()
            row = await self._take_anew(session, origin)
        except LostError:
            session.terminate()
            self._abandoned.append(session.server_process)
            if session.overdue:
                self._take_timeout = min(2 * self._take_timeout, self._config.answer_timeout_max)
            raise
        except exceptions.PostgresError as error:
            session.terminate()
            raise BackendError(f"{self._target.shown}: {describe(error)}") from error
        except BaseException:
            session.terminate()
            raise
        finally:
            self._taking = None
        if row is not None:
            self._epoch, self._found = row["epoch"], (row["tip"], row["writes"])
            self.origin, self.renewed_at = origin, began
        self._abandoned.clear()
        self._take_timeout = self._config.answer_timeout
        session.answer_timeout = self._config.answer_timeout
        self._use(session)

    def abandon(self) -> None:
        """Let a ``reconnect`` under way fail."""
        if self._taking is not None:
            self._taking.terminate()

    async def _take_anew(self, session: Session, origin: str) -> asyncpg.Record | None:
        """The row as taken; None when ``ended`` tells why not."""
        if origin.partition("/")[0] != self.origin.partition("/")[0]:
            self._end(
                Outcome.BROKEN, f"another database answers: {origin} instead of {self.origin}"
            )
            return None
        await end_abandoned(session, self._abandoned)
        seen = (await session.run(sql.SELECT_FENCE)).rows
        if seen:
            session.warnings.clear()
            known = (self._holder, origin, self._tip, self._writes_committed, seen[0]["epoch"])
            taken = (await session.run(sql.TAKE_MINE, *known)).rows
            _require_no_warning(session)
            if taken:
                return taken[0]
        found = (await session.run(sql.SELECT_FENCE)).rows
        if not found or found[0]["tip"] < self._tip or found[0]["writes"] < self._writes_committed:
            await self._lost(session, found, origin)
        elif found[0]["holder"] != self._holder:
            self._end(Outcome.FENCED, "another server has taken the shard")
        else:
            raise UnreachableError("an earlier attempt of ours came in between")
        return None

    async def _lost(
        self, session: Session, found: Sequence[asyncpg.Record], origin: str
    ) -> CommitResult:
        """The row as ``found``, if there is one, lacks what was acknowledged: mark it, and end."""
        ends_at = "nothing"
        if found:
            ends_at, *seen = found[0]["tip"], found[0]["epoch"], found[0]["writes"]
            await session.run(sql.MARK_LOST, f"{origin}{_LACKS}{self._tip}", *seen)
        return self._end(
            Outcome.BROKEN,
            f"acknowledged writes are lost: revision {self._tip} was stored, and the database"
            f" ({origin}, before {self.origin}) ends at {ends_at}. To go on without them, restart"
            " with --accept-data-loss",
        )

    # -- committing ----------------------------------------------------------------------------

    async def commit(self, batch: Batch) -> CommitResult:
        """Store all of ``batch``, or nothing."""
        if self.ended is not None:
            return self.ended
        if batch.tip_before != self._tip:
            return _fenced(f"it is at revision {self._tip}, not at {batch.tip_before}")
        session = self.session
        if session is None or session.lost:
            return CommitResult(Outcome.NOT_COMMITTED, "the connection is lost")
        self._writes += 1
        number = self._writes
        began = self._clock.monotonic()
        session.answer_timeout = self._commit_timeout
        try:
            result, freed = await self._store(session, batch, number)
        except LostError as error:
            result, freed = CommitResult(Outcome.UNKNOWN, str(error)), 0
            if session.overdue:
                most = self._config.commit_timeout_max
                self._commit_timeout = min(2 * self._commit_timeout, most)
        except exceptions.PostgresError as error:
            result, freed = await self._undone(session, error), 0
        session.answer_timeout = self._config.answer_timeout
        self._tried = _Tried(batch, number, result)
        if result.outcome is Outcome.COMMITTED:
            self._stored(batch, number, freed)
            self.renewed_at = began
        return result

    async def _store(self, session: Session, batch: Batch, number: int) -> tuple[CommitResult, int]:
        """How it ended, and the bytes that dropped rows gave back. Raises ``PostgresError`` when
        nothing was stored, ``LostError`` when nobody knows.
        """
        first, *others = sql.steps(batch, epoch=self._epoch, writes=number)
        session.warnings.clear()
        if others:
            await session.command("BEGIN")
        tag = (await session.run(first[0], *first[1])).tag
        if tag.endswith(" 0"):
            if others:
                await session.command("ROLLBACK")
            found = (await session.run(sql.SELECT_FENCE)).rows
            if not found or found[0]["tip"] < self._tip:
                return await self._lost(session, found, self.origin), 0
            return self._end(Outcome.FENCED, "another server has taken the shard"), 0
        moved = len(batch.rows) if first[0] == sql.INSERT_ROWS else 1
        assert tag.endswith(f" {moved}"), "all rows are stored, or none"
        freed = 0
        for text, given in others:
            if text == sql.COPY_ROWS:
                await session.copy("revisions", sql.ROW_COLUMNS, batch.rows)
                continue
            answer = await session.run(text, *given)
            if text == sql.DELETE_ROWS:
                count, size = answer.rows[0]
                freed = int(size) + sql.ROW_OVERHEAD_BYTES * count
        ended = await session.command("COMMIT") if others else "COMMIT"
        doubt = _doubt(session, ended)
        if doubt:
            session.terminate()
            return CommitResult(Outcome.UNKNOWN, doubt), 0
        return _COMMITTED, freed

    def _stored(self, batch: Batch, number: int, freed: int) -> None:
        self._tip, self._writes_committed = batch.tip, number
        self._commit_timeout = self._config.answer_timeout
        added = sql.row_bytes(batch)
        self.size_total += added
        self.size_in_use = max(0, self.size_in_use + added - freed)

    async def _undone(self, session: Session, error: exceptions.PostgresError) -> CommitResult:
        """PostgreSQL refused the batch, so that nothing of it is stored."""
        code = error.sqlstate or ""
        if code.startswith(_BREAKING):
            session.terminate()
            return self._end(Outcome.BROKEN, describe(error))
        if code == _READ_ONLY:
            session.terminate()
        elif session.in_transaction:
            try:
                await session.command("ROLLBACK")
            except (LostError, exceptions.PostgresError):
                session.terminate()
        return CommitResult(Outcome.NOT_COMMITTED, describe(error))

    def resolve(self, batch: Batch) -> CommitResult:
        """What became of ``batch``: to be asked after ``reconnect`` if that was unknown."""
        if self.ended is not None:
            return self.ended
        tip, writes = self._found
        tried = self._tried
        if tried is None or tried.batch is not batch:
            if batch.tip_before != self._tip:
                return _fenced(f"it is at revision {self._tip}, not at {batch.tip_before}")
            return CommitResult(Outcome.NOT_COMMITTED, "the batch has not been tried")
        if tried.result.outcome is Outcome.UNKNOWN:
            if writes == tried.number and tip == batch.tip:
                tried.result = _COMMITTED
                self._stored(batch, tried.number, 0)
            elif writes < tried.number and tip == batch.tip_before:
                tried.result = CommitResult(Outcome.NOT_COMMITTED, tried.result.reason)
            else:
                tried.result = self._end(
                    Outcome.FENCED, f"somebody else has written: the shard is at revision {tip}"
                )
        return tried.result

    # -- holding -------------------------------------------------------------------------------

    async def renew(self) -> None:
        """Show that the shard is held, if it is home, or else see whether it is; sets ``ended`` if
        it is not. Does nothing without a connection.
        """
        session = self.session
        if self.ended is not None or session is None or session.lost:
            return
        began = self._clock.monotonic()
        try:
            if await (self._renew(session) if self._home else self._look(session)):
                self.renewed_at = began
            else:
                self._end(Outcome.FENCED, "another server has taken the shard")
        except exceptions.PostgresError:
            return  # not renewed; a commit will tell why
        except UnreachableError:
            session.terminate()

    async def _renew(self, session: Session) -> bool:
        self._writes += 1
        session.warnings.clear()
        answer = await session.run(sql.RENEW, self._writes, self._epoch, self._holder)
        _require_no_warning(session)
        return answer.tag == "UPDATE 1"

    async def _look(self, session: Session) -> bool:
        row = await session.one(sql.SELECT_FENCE)
        return (row["epoch"], row["holder"]) == (self._epoch, self._holder)

    def measured(self, total: int) -> None:
        """Take over the tables' size in bytes."""
        self.size_total = total

    async def close(self) -> None:
        """Let go of the shard if it is ours and the server answers, and part."""
        session, self.session = self.session, None
        if session is None or session.lost:
            return
        try:
            await session.run(sql.RELEASE, self._holder, self._epoch)
            await session.close()
        except (LostError, exceptions.PostgresError):
            session.terminate()

    def _end(self, outcome: Outcome, reason: str) -> CommitResult:
        """Nothing is written from now on."""
        self.ended = CommitResult(outcome, f"{self._target.shown}: {reason}")
        return self.ended


def _doubt(session: Session, tag: str) -> str:
    """Why an answered COMMIT is not a success; empty if it is one."""
    if tag != "COMMIT":
        return f"COMMIT was answered {tag}"
    if session.in_transaction:
        return "a transaction is open after the commit"
    if session.warnings:
        return f"the commit came with a warning: {session.warnings[0]}"
    return ""


def _require_no_warning(session: Session) -> None:
    """Raise ``UnreachableError`` if a write that was answered may not be durable."""
    if session.warnings:
        raise UnreachableError(f"a write came with a warning: {session.warnings[0]}")


def _fenced(reason: str) -> CommitResult:
    return CommitResult(Outcome.FENCED, f"another server owns the shard: {reason}")
