"""Writing to an SQLite file: the one connection that commits and checkpoints, without threads or a loop.

**Commit.** A batch is one transaction. Its first statement moves the fence row's tip on condition that epoch and tip
are the expected ones; when that changes no row, nothing else is tried.

**The log.** SQLite appends pages to the write-ahead log and syncs it at every commit (synchronous=FULL). Checkpoints
copy them into the database. They run here, between two batches, once ``checkpoint_bytes`` have been appended; then
the next commit starts over at the beginning of the log, whose file keeps its length: overwriting is cheaper to sync
than growing. A reader in the middle of a statement keeps the log from being started over, so that it may grow beyond;
from half of ``wal_bytes_max`` a checkpoint waits for readers, and above ``wal_bytes_max`` commits are refused until
one succeeds.

**Failures.** Full and busy are definite once the transaction is seen to be gone and the tip unmoved: nothing was
stored. Any other error, the sync above all, breaks the writer for good: after a failed ``fsync`` the kernel may call
pages clean that never reached the disk, so that neither a retry nor a look at the file proves anything.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import apsw

from backends.schema import SIZE_MAX, Sized, Statements, unsigned
from kvstore.backend import Batch, CommitResult, Fence, Outcome, Sizes
from kvstore.config import SqliteConfig
from kvstore.errors import BackendError

SIZES_REFRESH_PAGES = 64
"""``sizes`` is taken anew once this many pages have been written."""

_DEFINITE = (apsw.FullError, apsw.BusyError, apsw.NoMemError)


class Writer:
    """Owns the writing connection; used by one thread only, except for ``sizes``."""

    def __init__(
        self, path: Path, connection: apsw.Connection, statements: Statements, config: SqliteConfig
    ) -> None:
        self.broken = ""
        """Why nothing is committed any more; empty while all is well."""
        self._connection = connection
        self._statements = statements
        self._log_path = path.with_name(path.name + "-wal")
        self._page_bytes: int = connection.pragma("page_size")
        self._checkpoint_pages = config.checkpoint_bytes // self._page_bytes
        self._log_bytes_max = config.wal_bytes_max
        self._written = self._pages_written()
        self._pages_logged = 0
        self._pages_unsized = 0
        self.sizes = self._take_sizes()

    def take(self) -> Fence:
        """Raise the epoch durably and read the fence row. Raises ``BackendError`` or ``apsw.Error``."""
        execute = self._connection.execute
        execute("BEGIN IMMEDIATE")
        execute(self._statements.raise_epoch)
        row = execute(self._statements.select_fence).fetchone()
        if row is None:
            raise BackendError(f"{self._connection.filename} has no fence row")
        execute("COMMIT")
        cluster_id, member_id, *others = row
        return Fence(unsigned(cluster_id), unsigned(member_id), *others)

    def commit(self, batch: Batch) -> CommitResult:
        """Store all of ``batch``, or nothing."""
        if self.broken:
            return CommitResult(Outcome.BROKEN, self.broken)
        if self._log_is_full():
            return CommitResult(
                Outcome.NOT_COMMITTED, "the write-ahead log is full: a reader holds it"
            )
        try:
            return self._transact(batch)
        except _DEFINITE as error:
            self._pages_logged = max(self._pages_logged, self._checkpoint_pages)
            return self._undone(batch, error)
        except Exception as error:  # noqa: BLE001 - whatever it was, the writer is not to be trusted
            return self._break(error)

    def stored(self, batch: Batch) -> CommitResult:
        """Is ``batch`` stored? It has been tried and its outcome was not noticed."""
        if self.broken:
            return CommitResult(Outcome.BROKEN, self.broken)
        try:
            epoch, tip = self._connection.execute(self._statements.select_fence).fetchall()[0][3:5]
        except apsw.Error as error:
            return self._break(error)
        if epoch != batch.epoch or tip not in (batch.tip_before, batch.tip):
            return _fenced(batch)
        return CommitResult(Outcome.COMMITTED if tip == batch.tip else Outcome.NOT_COMMITTED)

    def checkpoint_if_due(self) -> None:
        """Checkpoint when the log has grown enough; a failure shows at the next commit."""
        if self._pages_logged < self._checkpoint_pages or self.broken:
            return
        waits = self._log_bytes() > self._log_bytes_max // 2
        try:
            self._checkpoint(
                apsw.SQLITE_CHECKPOINT_RESTART if waits else apsw.SQLITE_CHECKPOINT_PASSIVE
            )
            self.sizes = self._take_sizes()
        except apsw.Error as error:
            self._break(error)

    def vacuum(self) -> BackendError | None:
        """Rebuild the file without free pages."""
        if self.broken:
            return BackendError(self.broken)
        try:
            self._connection.execute("VACUUM")
            self._checkpoint(apsw.SQLITE_CHECKPOINT_TRUNCATE)
            self.sizes = self._take_sizes()
        except _DEFINITE as error:
            return BackendError(f"defragmentation failed: {error}")
        except apsw.Error as error:
            return BackendError(self._break(error).reason)
        return None

    def close(self) -> None:
        """Checkpoint, unless broken, and close the connection. Raises ``apsw.Error`` if that fails."""
        try:
            if not self.broken:
                self._connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)
                self._checkpoint(apsw.SQLITE_CHECKPOINT_TRUNCATE)
        finally:
            self._connection.close()

    # -- a batch -------------------------------------------------------------------------------

    def _transact(self, batch: Batch) -> CommitResult:
        execute = self._connection.execute
        s = self._statements
        execute("BEGIN IMMEDIATE")
        execute(s.advance, (batch.tip, batch.epoch, batch.tip_before))
        if self._connection.changes() != 1:
            execute("ROLLBACK")
            return _fenced(batch)
        self._each(s.insert_rows, batch.rows)
        if batch.drops:
            self._each(s.delete_rows, batch.drops)
        if batch.lease_deletes or batch.lease_puts:
            self._each(s.delete_leases, [(i,) for i in (*batch.lease_deletes, *batch.lease_puts)])
            self._each(s.insert_leases, list(batch.lease_puts.values()))
        if batch.compact_revision is not None:
            execute(s.set_compact_revision, (batch.compact_revision,))
        execute("COMMIT")
        written = self._pages_written()
        self._pages_logged += written - self._written
        self._pages_unsized += written - self._written
        self._written = written
        if self._pages_unsized >= SIZES_REFRESH_PAGES:
            self.sizes = self._take_sizes()
        return CommitResult(Outcome.COMMITTED)

    def _each(self, sized: Sized, rows: Sequence[tuple[object, ...]]) -> None:
        """Run a sized statement over all ``rows``."""
        for start in range(0, len(rows), SIZE_MAX):
            part = rows[start : start + SIZE_MAX] if len(rows) > SIZE_MAX else rows
            size = sized.fit(len(part))
            padding = (None,) * (sized.width * (size - len(part)))
            self._connection.execute(sized.texts[size], (*_flat(part), *padding))  # type: ignore[arg-type]

    # -- what went wrong -----------------------------------------------------------------------

    def _undone(self, batch: Batch, error: apsw.Error) -> CommitResult:
        """Make sure that nothing of the failed ``batch`` is left."""
        try:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            epoch, tip = self._connection.execute(self._statements.select_fence).fetchall()[0][3:5]
        except Exception as second:  # noqa: BLE001 - see commit
            return self._break(second)
        if (epoch, tip) != (batch.epoch, batch.tip_before):
            return self._break(error)
        return CommitResult(Outcome.NOT_COMMITTED, str(error))

    def _break(self, error: Exception) -> CommitResult:
        self.broken = f"{type(error).__name__}: {error}"
        return CommitResult(Outcome.BROKEN, self.broken)

    # -- the log -------------------------------------------------------------------------------

    def _checkpoint(self, mode: int) -> None:
        """Copy the log into the database. Full and busy leave the rest in the log, for another time."""
        try:
            logged, copied = self._connection.wal_checkpoint(mode=mode)
        except _DEFINITE:
            self._pages_logged = self._checkpoint_pages // 2
            return
        self._pages_logged = max(0, logged - copied)

    def _log_is_full(self) -> bool:
        if (
            self._pages_logged < self._checkpoint_pages // 2
            or self._log_bytes() < self._log_bytes_max
        ):
            return False
        self._checkpoint(apsw.SQLITE_CHECKPOINT_TRUNCATE)
        return self._log_bytes() >= self._log_bytes_max

    def _log_bytes(self) -> int:
        return self._log_path.stat().st_size

    def _pages_written(self) -> int:
        """Pages that this connection has appended to the log since it was opened."""
        return self._connection.status(apsw.SQLITE_DBSTATUS_CACHE_WRITE)[0]

    def _take_sizes(self) -> Sizes:
        pages: int = self._connection.pragma("page_count")
        free: int = self._connection.pragma("freelist_count")
        self._pages_unsized = 0
        return Sizes(pages * self._page_bytes, (pages - free) * self._page_bytes)


def _fenced(batch: Batch) -> CommitResult:
    wanted = f"epoch {batch.epoch}, tip {batch.tip_before}"
    return CommitResult(Outcome.FENCED, f"another process owns the shard: it is not at {wanted}")


def _flat(rows: Iterable[tuple[object, ...]]) -> Iterable[object]:
    return chain.from_iterable(rows)
