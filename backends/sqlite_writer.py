"""Writing to an SQLite file: the one connection that commits and checkpoints, without threads.

**Commit.** A batch of rows is one statement and so one transaction: it inserts all rows if the
fence row is still as we left it, and none otherwise; the number of inserted rows tells. The driver
gives up the interpreter's lock for each step of a statement, and with a busy event loop each time
waits for it: one step is the least there can be. A batch with other parts, or with more rows than a
statement takes, or whose tip is above its last row, is a transaction of several statements; the
first updates the fence row, or not.

**Tip.** It is the greater of the last row's revision and the fence row's ``tip``, which only
transactions of several statements write (they may delete the last row): one page less to sync.
Only the holder of the epoch moves the tip, so that the tip we know is the tip as long as the epoch
is ours: a batch that expects another one is refused without asking.

**The log.** SQLite appends pages to the write-ahead log and syncs it at every commit
(synchronous=FULL). Checkpoints copy them into the database. They run here, between two batches,
once ``checkpoint_bytes`` have been appended; then the next commit starts over at the beginning of
the log, whose file keeps its length: overwriting is cheaper to sync than growing. A reader in the
middle of a statement keeps the log from being started over, so that it may grow beyond; from half
of ``wal_bytes_max`` a checkpoint waits for readers, and above ``wal_bytes_max`` commits are refused
until one succeeds.

**Failures.** Full and busy are definite once the transaction is seen to be gone and the tip
unmoved: nothing was stored. Any other error, the sync above all, breaks the writer for good: after
a failed ``fsync`` the kernel may call pages clean that never reached the disk, so that neither a
retry nor a look at the file proves anything. So does what is not SQLite's error (the log's file is
gone, a fault of ours); what has been committed is then still brought into the database at the end.
No method but ``take`` and ``close`` raises: whoever waits for the writer's thread gets an answer.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import apsw

from backends.schema import SIZE_MAX, Sized, Statements, unsigned
from backends.sqlite_file import describe
from kvstore.backend import Batch, CommitResult, Fence, Outcome, Sizes
from kvstore.config import SqliteConfig
from kvstore.errors import BackendError

_SIZES_REFRESH_PAGES = 64
"""``sizes`` is taken anew after a commit was reported once this many pages have been written."""

_UNSIZED_PAGES_MAX = 128
"""And before it is reported once there are so many."""

_COUNT_PAGES = "SELECT page_count, freelist_count FROM pragma_page_count, pragma_freelist_count"

_DEFINITE = (apsw.FullError, apsw.BusyError)
_VACUUM_REFUSED = (*_DEFINITE, apsw.CantOpenError, apsw.SQLError)
"""Before VACUUM has changed anything, or with all of it undone; temporary files are on the
database's own disk, so that an I/O error there counts like any other."""
_COMMITTED = CommitResult(Outcome.COMMITTED)


class Writer:
    """Owns the writing connection; used by one thread only, except for ``sizes`` and ``broken``."""

    def __init__(
        self, path: Path, connection: apsw.Connection, statements: Statements, config: SqliteConfig
    ) -> None:
        self.broken = ""
        """Why nothing is committed any more; empty while all is well."""
        self._sqlite_failed = False
        self._connection = connection
        self._statements = statements
        self._log_path = path.with_name(path.name + "-wal")
        self._page_bytes: int = connection.pragma("page_size")
        self._checkpoint_pages = config.checkpoint_bytes // self._page_bytes
        self._log_bytes_max = config.wal_bytes_max
        self._tip = 0
        self._last: tuple[Batch, CommitResult] | None = None
        self._pages_written = self._count_pages()
        self._pages_logged = 0
        self._pages_unsized = 0
        self.sizes = self._take_sizes()

    def take(self) -> Fence:
        """Raise the epoch durably and read the fence row.

        Raises ``BackendError`` or ``apsw.Error``.
        """
        execute = self._connection.execute
        execute("BEGIN IMMEDIATE")
        execute(self._statements.raise_epoch)
        row = execute(self._statements.select_fence).fetchone()
        if row is None:
            raise BackendError(f"{self._connection.filename} has no fence row")
        execute("COMMIT")
        cluster_id, member_id, *others = row
        fence = Fence(unsigned(cluster_id), unsigned(member_id), *others)
        self._tip = fence.tip
        return fence

    def commit(self, batch: Batch) -> CommitResult:
        """Store all of ``batch``, or nothing."""
        if self.broken:
            return CommitResult(Outcome.BROKEN, self.broken)
        try:
            result = self._try(batch)
        except Exception as error:  # noqa: BLE001 - whatever it was, nothing is certain any more
            result = self._break(error)
        self._last = (batch, result)
        return result

    def resolve(self, batch: Batch) -> CommitResult:
        """How ``batch`` ended, for whoever missed it: commits here always have a definite end."""
        if self.broken:
            return CommitResult(Outcome.BROKEN, self.broken)
        if self._last is not None and self._last[0] == batch:
            return self._last[1]
        if batch.tip_before != self._tip:
            return self._fenced(batch)
        return CommitResult(Outcome.NOT_COMMITTED, "the batch has not been tried")

    def tidy(self) -> None:
        """After a commit was reported: take the sizes, checkpoint, when enough has been written; a
        failure shows in ``broken``.
        """
        if self.broken:
            return
        try:
            if self._pages_unsized >= _SIZES_REFRESH_PAGES:
                self.sizes = self._take_sizes()
            if self._pages_logged < self._checkpoint_pages:
                return
            wait = self._log_bytes() > self._log_bytes_max // 2
            self._checkpoint(
                apsw.SQLITE_CHECKPOINT_RESTART if wait else apsw.SQLITE_CHECKPOINT_PASSIVE
            )
            self.sizes = self._take_sizes()
        except Exception as error:  # noqa: BLE001 - likewise
            self._break(error)

    def vacuum(self) -> BackendError | None:
        """Rebuild the file without free pages; meanwhile needs room for two copies, both beside it:
        a temporary one and one in the log.

        When it is refused (no room, no temporary file), the store is as it was.
        """
        if self.broken:
            return BackendError(self.broken)
        try:
            before = self._position()
            try:
                directory = str(self._log_path.parent.absolute())
                self._connection.pragma("temp_store_directory", directory)
                self._connection.execute("VACUUM")
            except _VACUUM_REFUSED as error:
                if not self._is_undone(before):
                    raise
                return BackendError(f"defragmentation failed: {describe(error)}")
            self._pages_written = self._count_pages()
            self._checkpoint(apsw.SQLITE_CHECKPOINT_TRUNCATE)
            self.sizes = self._take_sizes()
        except Exception as error:  # noqa: BLE001 - likewise
            return BackendError(self._break(error).reason)
        return None

    def close(self) -> None:
        """Checkpoint, unless SQLite has failed, and close. Raises ``apsw.Error`` if that fails."""
        try:
            if not self._sqlite_failed:
                self._roll_back()
                self._connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)
                self._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        finally:
            self._connection.close()

    # -- a batch -------------------------------------------------------------------------------

    def _try(self, batch: Batch) -> CommitResult:
        """Raises what leaves the end of ``batch`` uncertain."""
        if self._log_is_full():
            return CommitResult(
                Outcome.NOT_COMMITTED, "the write-ahead log is full: a reader holds it"
            )
        try:
            return self._store(batch)
        except _DEFINITE as error:
            return self._undone(batch, error)

    def _store(self, batch: Batch) -> CommitResult:
        if batch.tip_before != self._tip:
            return self._fenced(batch)
        if _is_plain(batch):
            text, given = self._statements.insert_rows.fitting(
                batch.rows, batch.epoch, batch.tip_before
            )
            self._connection.execute(text, given)
            stored = self._connection.changes() == len(batch.rows)
        else:
            stored = self._store_parts(batch)
        if not stored:
            return self._fenced(batch)
        self._tip = batch.tip
        written = self._count_pages()
        self._pages_logged += written - self._pages_written
        self._pages_unsized += written - self._pages_written
        self._pages_written = written
        if self._pages_unsized >= _UNSIZED_PAGES_MAX or batch.drops:
            self.sizes = self._take_sizes()
        return _COMMITTED

    def _store_parts(self, batch: Batch) -> bool:
        """In a transaction of several statements; False when another process owns the shard."""
        s, execute = self._statements, self._connection.execute
        execute("BEGIN IMMEDIATE")
        execute(s.advance, (batch.tip, batch.epoch, batch.tip_before))
        if self._connection.changes() != 1:
            execute("ROLLBACK")
            return False
        self._each(s.insert_rows, batch.rows, batch.epoch, batch.tip)
        self._each(s.delete_rows, batch.drops)
        self._each(s.delete_leases, [(i,) for i in (*batch.lease_deletes, *batch.lease_puts)])
        self._each(s.insert_leases, list(batch.lease_puts.values()))
        if batch.compact_revision is not None:
            execute(s.set_compact_revision, (batch.compact_revision,))
        self._store_home(batch)
        execute("COMMIT")
        return True

    def _store_home(self, batch: Batch) -> None:
        """What home keeps for all shards, within the transaction."""
        s, execute = self._statements, self._connection.execute
        if batch.reserved is not None:
            execute(s.set_reserved, (batch.reserved,))
        if batch.shard_map is not None:
            execute(s.delete_shard_map)
            execute(s.insert_shard_map, (1, batch.shard_map))
        self._each(s.delete_shards, [(name,) for name in batch.records])
        self._each(s.insert_shards, list(batch.records.values()))
        self._each(s.delete_redo, [(revision,) for revision in batch.redo_drops])
        self._each(s.insert_redo, [(*row[:2], shard, *row[2:]) for shard, row in batch.redo])

    def _each(self, sized: Sized, rows: Sequence[Sequence[object]], *more: object) -> None:
        """Run a sized statement over all ``rows``."""
        for start in range(0, len(rows), SIZE_MAX):
            text, given = sized.fitting(rows[start : start + SIZE_MAX], *more)
            self._connection.execute(text, given)

    # -- what went wrong -----------------------------------------------------------------------

    def _fenced(self, batch: Batch) -> CommitResult:
        wanted = f"epoch {batch.epoch}, tip {batch.tip_before}"
        reason = f"another process owns the shard: it is not at {wanted}"
        return CommitResult(Outcome.FENCED, reason)

    def _undone(self, batch: Batch, error: apsw.Error) -> CommitResult:
        """Make sure that nothing of the failed ``batch`` is left; raises ``apsw.Error``."""
        if not self._is_undone((batch.epoch, batch.tip_before)):
            return self._break(error)
        return CommitResult(Outcome.NOT_COMMITTED, describe(error))

    def _is_undone(self, before: tuple[object, ...]) -> bool:
        """Roll back; is the shard at the (epoch, tip) from before? A checkpoint is due then."""
        self._roll_back()
        self._pages_written = self._count_pages()
        self._pages_logged = max(self._pages_logged, self._checkpoint_pages)
        return self._position() == before

    def _position(self) -> tuple[object, ...]:
        """(epoch, tip) as stored."""
        return self._connection.execute(self._statements.select_fence).fetchall()[0][3:5]

    def _roll_back(self) -> None:
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")

    def _break(self, error: Exception) -> CommitResult:
        """Commit nothing from now on, and if it was SQLite that failed, leave its files alone."""
        self.broken = describe(error)
        self._sqlite_failed |= isinstance(error, apsw.Error)
        return CommitResult(Outcome.BROKEN, self.broken)

    # -- the log -------------------------------------------------------------------------------

    def _checkpoint(self, mode: int) -> None:
        """Copy the log into the database. When that is held up (full, busy), the log goes on to
        grow and it is tried again half a log later. Raises ``apsw.Error``.
        """
        try:
            logged, copied = self._connection.wal_checkpoint(mode=mode)
            self._pages_logged = min(logged - copied, self._checkpoint_pages // 2)
        except _DEFINITE:
            self._pages_logged = self._checkpoint_pages // 2

    def _log_is_full(self) -> bool:
        """Is the log beyond its limit, and cannot be emptied? Raises if it cannot be told."""
        if self._log_bytes() < self._log_bytes_max:
            return False
        self._checkpoint(apsw.SQLITE_CHECKPOINT_TRUNCATE)
        return self._log_bytes() >= self._log_bytes_max

    def _log_bytes(self) -> int:
        return self._log_path.stat().st_size

    def _count_pages(self) -> int:
        """Pages that this connection has appended to the log since it was opened."""
        return self._connection.status(apsw.SQLITE_DBSTATUS_CACHE_WRITE)[0]

    def _take_sizes(self) -> Sizes:
        counts: list[Any] = self._connection.execute(_COUNT_PAGES).fetchall()
        ((pages, free),) = counts
        self._pages_unsized = 0
        return Sizes(pages * self._page_bytes, (pages - free) * self._page_bytes)


def _is_plain(batch: Batch) -> bool:
    """Has the batch rows only, no more than one statement takes, and no tip but the last one's?"""
    rows = batch.rows
    return (
        0 < len(rows) <= SIZE_MAX
        and batch.tip == rows[-1][0]
        and batch.compact_revision is None
        and batch.reserved is None
        and batch.shard_map is None
        and not (batch.drops or batch.lease_puts or batch.lease_deletes)
        and not (batch.records or batch.redo or batch.redo_drops)
    )
