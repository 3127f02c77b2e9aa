"""One shard's queue: what waits to be committed, how far it may be shown, and what it refuses.

    pending   [ in flight: 7 8 9 ] [ open: 10 11 ]      tip = 6, frontier = 6
    after COMMITTED:               [ in flight: 10 11 ] tip = 9, frontier = 9

The first pending batch is in flight or about to be, the last one is open and takes what the engine
appends. A **blocked** batch has rows that home has not committed yet (see ``commit``): it stays the
first until it has.

What a shard refuses follows from what is known of it:

- **missing**: its database has not been reached since the start. Its frontier is 0, so that nothing
  of it is shown;
- **away**: the backend knows that its database is out of reach; what waits goes on waiting;
- **late**: a commit hangs for too long, and those who waited for it have been told so;
- **broken**: it is lost for good;
- **barred**: nothing may be issued, on whatever shard (``Commits.bar``);
- **held**: a request over several shards waits for it to have nothing uncommitted.

Whoever asks looks at the outcome of all that: ``lost`` for reads and tickets, ``refusal`` for
writes.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from kvstore.answers import Answer
from kvstore.backend import Backend, Batch, Fence, LeaseRow, Row, RowId, ShardRecord
from kvstore.errors import HeldError, StoppedError, StoreError, TimedOutError, UnreadyError

NOTHING_PENDING = 1 << 63


@dataclass(slots=True)
class ForAll:
    """What a batch of home carries for all shards; see ``backend.Batch``."""

    tip: int = 0
    """The last revision in ``redo``."""
    reserved: int | None = None
    records: dict[str, ShardRecord] = field(default_factory=dict)
    redo: list[tuple[str, Row]] = field(default_factory=list)
    redo_drops: list[int] = field(default_factory=list)
    frees: "list[tuple[ShardQueue, Pending]]" = field(default_factory=list)
    """Blocked batches of other shards that may go once this one is committed."""


@dataclass(slots=True)
class Pending:
    """A batch that is being filled or committed, and those who wait for it."""

    rows: list[Row] = field(default_factory=list)
    drops: list[RowId] = field(default_factory=list)
    lease_puts: dict[int, LeaseRow] = field(default_factory=dict)
    lease_deletes: list[int] = field(default_factory=list)
    compact_revision: int | None = None
    waiters: list[tuple[Answer, bytes]] = field(default_factory=list)
    count: int = 0
    """Changes for the limits: rows, and as much for each change of a lease."""
    size: int = 0
    batch: Batch | None = None
    for_all: ForAll | None = None
    blocked: int = 0
    """Batches of home that it waits for."""
    redone: tuple[int, ...] = ()
    """Revisions whose rows here are in a redo record of home."""
    recorded: int = 0
    """Rows of those revisions; others may follow in the same batch."""


class DropSource(Protocol):
    """Where rows that compaction left behind come from."""

    def take(self, rows: int) -> list[RowId]:
        """Rows that may be deleted now, as many as suit a batch of ``rows`` rows (0: nothing else
        waits).
        """


class ShardQueue:
    """One shard's pending batches and its state; only ``Commits`` changes it. Counters are read by
    the metrics. A fence of epoch 0 is that of a shard which is missing.
    """

    def __init__(self, number: int, backend: Backend, fence: Fence) -> None:
        self.number = number
        self.name = fence.shard
        self.pending: deque[Pending] = deque()
        self.open: Pending | None = None
        self.in_flight = False
        self.started_at = 0.0
        """When the commit under way was tried first, or the trouble began."""
        self.retry_at: float | None = None
        self.unresolved = False
        self.missing = fence.epoch == 0
        self.frontier = 0 if self.missing else NOTHING_PENDING
        self.away = False
        self.late = False
        self.barred: type[UnreadyError] | None = None
        """Why."""
        self.held = 0
        """By how many."""
        self.broken = ""
        self.fenced = False
        """Is it broken because another process has taken it?"""
        self.trouble = ""
        """Why nothing is committed, as it was told; empty while commits succeed."""
        self.lost: type[UnreadyError] | None = None
        """What reads and tickets are refused with."""
        self.refusal: type[StoreError] | None = None
        """What writes are refused with."""
        self.scheduled = False
        self.held_back = False
        """Does its next commit wait for more to come (``gathering``)?"""
        self.drops: DropSource | None = None
        self.rows = 0
        self.size = 0
        self.commits_total = 0
        self.rows_total = 0
        self.stored = 0
        """Rows in storage: loaded or committed, and not dropped since."""
        self.meet(backend, fence)

    def meet(self, backend: Backend, fence: Fence) -> None:
        """From now on, this is its database."""
        self.backend = backend
        self.epoch = fence.epoch
        self.tip = fence.tip
        self.away = False
        self.trouble = ""
        self.judge()

    def judge(self) -> None:
        """What is refused now; after every change of what is known."""
        if self.broken:
            self.lost = StoppedError
        elif self.missing or self.away or self.late:
            self.lost = TimedOutError
        else:
            self.lost = None
        self.refusal = self.lost or self.barred or (HeldError if self.held else None)

    @property
    def out(self) -> bool:
        """Is it refused until its database answers again?"""
        return self.missing or self.away or self.late

    @property
    def state(self) -> str:
        """``broken``, ``missing``, ``out``, ``stuck`` (commits fail, and nobody is refused yet) or
        ``serving``.
        """
        if self.broken:
            return "broken"
        if self.missing:
            return "missing"
        if self.out:
            return "out"
        return "stuck" if self.trouble else "serving"

    @property
    def stuck(self) -> bool:
        """Does anything wait for storage, this shard's or, being blocked, home's?"""
        if self.in_flight or self.retry_at is not None:
            return True
        return bool(self.pending) and self.pending[0].blocked > 0

    @property
    def settled(self) -> bool:
        """Is nothing uncommitted but what home's redo records have?"""
        return all(each.recorded == len(each.rows) for each in self.pending)

    # -- pending batches ---------------------------------------------------------------------------

    def filling(self) -> Pending:
        """The open batch, made if there is none."""
        if self.open is None:
            self.open = Pending()
            self.pending.append(self.open)
        return self.open

    def filling_for_all(self) -> ForAll:
        """Home's: what the open batch carries for all shards."""
        pending = self.filling()
        if pending.for_all is None:
            pending.for_all = ForAll()
        return pending.for_all

    def waiting(self) -> int:
        """Those who wait for pending batches."""
        return sum(len(pending.waiters) for pending in self.pending)

    def last_holding(self, revision: int) -> Pending:
        """The last pending batch with a revision at or below ``revision``; the very last for
        NOTHING_PENDING. Only when something is pending.
        """
        if revision == NOTHING_PENDING:
            return self.pending[-1]
        found = self.pending[0]
        for pending in self.pending:
            if pending.rows and pending.rows[0][0] <= revision:
                found = pending
        return found

    def issued(self) -> int:
        """The last revision appended, durable or not."""
        for pending in reversed(self.pending):
            if pending.rows:
                return pending.rows[-1][0]
        return self.tip

    def next_batch(self) -> Batch:
        """The first pending batch, as it is committed from now on."""
        pending = self.pending[0]
        if pending is self.open:
            self.open = None
        rows = pending.rows
        batch = Batch(
            epoch=self.epoch,
            tip_before=self.tip,
            tip=rows[-1][0] if rows else self.tip,
            rows=rows,
            drops=pending.drops,
            lease_puts=pending.lease_puts,
            lease_deletes=pending.lease_deletes,
            compact_revision=pending.compact_revision,
        )
        for_all = pending.for_all
        if for_all is not None:
            batch.tip = max(batch.tip, for_all.tip)
            batch.reserved = for_all.reserved
            batch.records = for_all.records
            batch.redo = for_all.redo
            batch.redo_drops = for_all.redo_drops
        pending.batch = batch
        return batch

    def take_drops(self) -> None:
        """Rows left by compaction: a batch of their own when nothing else waits, else along with
        the first batch.
        """
        if self.drops is None:
            return
        if not self.pending:
            drops = self.drops.take(0)
            if drops:
                self.pending.append(Pending(drops=drops))
        elif not self.pending[0].drops:
            self.pending[0].drops = self.drops.take(max(1, self.pending[0].count))

    def committed(self, batch: Batch) -> Pending:
        """The first pending batch is durable: it, with the frontier moved."""
        done = self.pending.popleft()
        self.tip = batch.tip
        self.rows -= done.count
        self.size -= done.size
        self.commits_total += 1
        self.rows_total += len(done.rows)
        self.stored += len(done.rows) - len(done.drops)
        self.move_frontier()
        return done

    def move_frontier(self) -> None:
        """To where it is now."""
        self.frontier = 0 if self.missing else NOTHING_PENDING
        for pending in self.pending:
            if pending.rows and not self.missing:
                self.frontier = pending.rows[0][0] - 1
                break

    def take_waiters(self) -> list[Answer]:
        """All who wait; nobody does any more."""
        taken: list[Answer] = []
        for pending in self.pending:
            taken += [answer for answer, _ in pending.waiters]
            pending.waiters = []
        return taken
