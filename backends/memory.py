"""The reference backend: everything in dictionaries, simple enough to be right by reading.

It has two halves. A ``MemoryDisk`` is what survives: committed rows, leases, the fence row. A
``MemoryBackend`` is a process's hold on it. A crash is to forget the backend (``crash``) and open
another over the same disk.

Every operation that has a callback goes through ``later``, in steps:

- a commit takes two: the batch is stored, all of it or nothing (the commit point); ``done`` is
  called;
- the rest takes one: the answer is found and ``done`` is called;

so that a test that holds the steps (``Steps``) can stop a commit before its commit point, or after
it with nobody told. ``later`` may also be ``loop.call_soon``, or ``at_once`` to have everything
done inside the call.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

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
    ShardRecord,
    Sizes,
)
from kvstore.errors import BackendError, UnreachableError

Later = Callable[[Callable[[], None]], object]
"""Runs a function once, now or later, always on the same thread."""

LOAD_CHUNK_ROWS = 5_000
ROW_OVERHEAD_BYTES = 64
"""What ``sizes`` counts per row besides key and value."""


def at_once(step: Callable[[], None]) -> None:
    """A ``Later`` that does not wait: ``done`` is called inside the call that took it."""
    step()


class Steps:
    """A ``Later`` under a test's control: steps wait until they are run one by one."""

    def __init__(self) -> None:
        self.waiting: deque[Callable[[], None]] = deque()

    def __call__(self, step: Callable[[], None]) -> None:
        """Be a ``Later``: keep ``step`` for the test."""
        self.waiting.append(step)

    def run_next(self) -> bool:
        """Run the oldest waiting step; False when there was none."""
        if not self.waiting:
            return False
        self.waiting.popleft()()
        return True

    def run_all(self) -> None:
        """Run until nothing waits, steps that appear meanwhile included."""
        while self.run_next():
            pass


@dataclass(slots=True)
class MemoryDisk:
    """What has been committed; shared by successive backends, held by at most one at a time."""

    cluster_id: int = 1
    member_id: int = 2
    shard: str = "default"
    epoch: int = 0
    tip: int = 1
    compact_revision: int = -1
    rows: dict[RowId, Row] = field(default_factory=dict)
    """In (revision, sub) order: batches come in order, and a dictionary keeps it."""
    leases: dict[int, LeaseRow] = field(default_factory=dict)
    reserved: int = 0
    shard_map: str = ""
    records: dict[str, ShardRecord] = field(default_factory=dict)
    redo: list[tuple[str, Row]] = field(default_factory=list)
    reachable: bool = True
    """False: ``open`` fails as it does when there is nobody at the other end."""
    origin: str = ""
    used_bytes: int = 0
    """Keys, values and an overhead per row."""
    freed_bytes: int = 0
    """Likewise of dropped rows, until ``defragment`` gives them back."""
    holder: "MemoryBackend | None" = None
    """Who has the lock."""

    def store(self, batch: Batch, epoch: int) -> CommitResult:
        """The commit point: all of ``batch``, or nothing."""
        if (self.epoch, self.tip) != (epoch, batch.tip_before):
            found = f"epoch {self.epoch}, tip {self.tip}"
            wanted = f"epoch {epoch}, tip {batch.tip_before}"
            return CommitResult(Outcome.FENCED, f"the shard is at {found} instead of {wanted}")
        self.tip = batch.tip
        for row in batch.rows:
            assert (row[0], row[1]) not in self.rows, "a revision is issued once"
            self.rows[row[0], row[1]] = row
            self.used_bytes += _row_bytes(row)
        for id_ in batch.drops:
            dropped = self.rows.pop(id_, None)
            if dropped is not None:
                self.used_bytes -= _row_bytes(dropped)
                self.freed_bytes += _row_bytes(dropped)
        for lease in batch.lease_deletes:
            self.leases.pop(lease, None)
        self.leases.update(batch.lease_puts)
        if batch.compact_revision is not None:
            self.compact_revision = batch.compact_revision
        self._store_home(batch)
        return CommitResult(Outcome.COMMITTED)

    def _store_home(self, batch: Batch) -> None:
        """What home keeps for all shards."""
        if batch.reserved is not None:
            self.reserved = batch.reserved
        if batch.shard_map is not None:
            self.shard_map = batch.shard_map
        self.records.update(batch.records)
        gone = set(batch.redo_drops)
        self.redo = [(shard, row) for shard, row in self.redo if row[0] not in gone]
        self.redo += batch.redo

    def holds(self, batch: Batch) -> bool:
        """Has all of ``batch`` been stored? One that does not move the tip does the same when
        stored twice.
        """
        if batch.tip > batch.tip_before:
            return self.tip == batch.tip
        stored = all(id_ not in self.rows for id_ in batch.drops)
        stored &= all(self.leases.get(lease.id) == lease for lease in batch.lease_puts.values())
        gone = (lease for lease in batch.lease_deletes if lease not in batch.lease_puts)
        stored &= all(lease not in self.leases for lease in gone)
        stored &= all(self.records.get(name) == record for name, record in batch.records.items())
        stored &= not any(row[0] in batch.redo_drops for _, row in self.redo)
        stored &= batch.reserved in (None, self.reserved)
        stored &= batch.shard_map in (None, self.shard_map)
        return stored and batch.compact_revision in (None, self.compact_revision)


class MemoryBackend:
    """``kvstore.backend.Backend`` over a ``MemoryDisk``, which must be that of ``shard`` if one is
    named; a new one becomes it.
    """

    def __init__(self, disk: MemoryDisk, *, later: Later, shard: str | None = None) -> None:
        self.on_broken: Callable[[str], None] = _nobody_listens
        self.on_out: Callable[[str], None] = _nobody_listens
        self.on_back: Callable[[], None] = _nobody_hears
        self.disk = disk
        self._later = later
        self._shard = shard
        self._epoch = 0
        self._epoch_opened = 0
        self._crashed = False

    @property
    def origin(self) -> str:
        """The disk's."""
        return self.disk.origin

    async def open(self, cluster: Cluster | None = None, *, known: bool = False) -> Fence:
        """Take the disk and raise its epoch.

        Raises ``UnreachableError`` if the disk is not ``reachable``, or new though the shard is
        ``known``, ``BackendError`` while another backend holds it or if it belongs to another
        cluster or shard.
        """
        disk = self.disk
        if not disk.reachable or (known and disk.epoch == 0):
            raise UnreachableError(f"the memory of shard {disk.shard} cannot be reached")
        if disk.holder is not None:
            raise BackendError(f"the memory of shard {disk.shard} is in use")
        if disk.epoch == 0:
            disk.cluster_id, disk.member_id = cluster or (disk.cluster_id, disk.member_id)
            disk.shard = self._shard or disk.shard
        if cluster is not None and disk.cluster_id != cluster.cluster_id:
            raise BackendError(f"shard {disk.shard} belongs to cluster {disk.cluster_id:x}")
        if self._shard not in (None, disk.shard):
            raise BackendError(f"the memory holds the shard {disk.shard!r}, not {self._shard!r}")
        disk.holder = self
        disk.epoch += 1
        self._epoch = self._epoch_opened = disk.epoch
        return Fence(
            cluster_id=disk.cluster_id,
            member_id=disk.member_id,
            shard=disk.shard,
            epoch=disk.epoch,
            tip=disk.tip,
            compact_revision=disk.compact_revision,
            reserved=disk.reserved,
            origin=disk.origin,
        )

    async def load_index(self, sink: Callable[[list[IndexRow]], None]) -> None:
        """Every row without its value, in chunks."""
        rows = iter(self.disk.rows.values())
        while chunk := [row[:6] for row in islice(rows, LOAD_CHUNK_ROWS)]:
            sink(chunk)

    async def load_leases(self) -> list[LeaseRow]:
        """Every stored lease."""
        return list(self.disk.leases.values())

    async def load_home(self) -> HomeRows:
        """What home keeps for all shards."""
        disk = self.disk
        return HomeRows(disk.shard_map, list(disk.records.values()), list(disk.redo))

    def lease_until(self) -> float:
        """For ever: ``open`` took the disk for this backend alone."""
        return math.inf

    def commit(self, batch: Batch, done: Callable[[CommitResult], None]) -> None:
        """Store ``batch`` in one step, call ``done`` in the next."""
        assert batch.epoch == self._epoch_opened, "a batch carries the epoch that open returned"
        epoch = self._epoch

        def store() -> None:
            result = self.disk.store(batch, epoch)
            self._step(lambda: done(result))

        self._step(store)

    def resolve(self, batch: Batch, done: Callable[[CommitResult], None]) -> None:
        """Raise the epoch, so that a commit still under way stores nothing, then look."""

        def look() -> None:
            disk = self.disk
            if disk.epoch != self._epoch or disk.tip not in (batch.tip_before, batch.tip):
                done(
                    CommitResult(
                        Outcome.FENCED, f"the shard is at epoch {disk.epoch}, tip {disk.tip}"
                    )
                )
                return
            disk.epoch += 1
            self._epoch = disk.epoch
            stored = disk.holds(batch)
            done(CommitResult(Outcome.COMMITTED if stored else Outcome.NOT_COMMITTED))

        self._step(look)

    def read_values(
        self, ids: Sequence[RowId], done: Callable[[list[bytes | None] | BackendError], None]
    ) -> None:
        """The values of rows, None where there is none."""
        wanted = list(ids)

        def read() -> None:
            rows = self.disk.rows
            done([rows[id_][6] if id_ in rows else None for id_ in wanted])

        self._step(read)

    def read_rows(
        self, after: RowId, rows_max: int, done: Callable[[list[Row] | BackendError], None]
    ) -> None:
        """Rows greater than ``after``, at most ``rows_max``."""

        def read() -> None:
            rows = self.disk.rows
            done([rows[id_] for id_ in islice((id_ for id_ in rows if id_ > after), rows_max)])

        self._step(read)

    def sizes(self) -> Sizes:
        """Bytes of the rows; total counts dropped ones until ``defragment``."""
        disk = self.disk
        return Sizes(disk.used_bytes + disk.freed_bytes, disk.used_bytes)

    def defragment(self, done: Callable[[BackendError | None], None]) -> None:
        """Give dropped rows' bytes back."""

        def forget() -> None:
            self.disk.freed_bytes = 0
            done(None)

        self._step(forget)

    async def close(self) -> None:
        """Let go of the disk. Idempotent."""
        if self.disk.holder is self:
            self.disk.holder = None

    def crash(self) -> None:
        """Die: steps that wait will do nothing, and another backend may open the disk."""
        self._crashed = True
        if self.disk.holder is self:
            self.disk.holder = None

    def _step(self, step: Callable[[], None]) -> None:
        self._later(lambda: None if self._crashed else step())


def _nobody_listens(reason: str) -> None:
    """Memory does not break; a test may say that it has."""


def _nobody_hears() -> None:
    """Nor does it come back."""


def _row_bytes(row: Row) -> int:
    return len(row[2]) + len(row[6]) + ROW_OVERHEAD_BYTES
