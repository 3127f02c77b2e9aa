"""The one road to storage: group commit, the frontier of each shard, and the tickets of those who
wait for them.

Each shard has a queue of **pending** batches. The first is in flight; the last one is open and
takes what the engine appends. When a commit returns, the next pending batch goes at once: the batch
grows while the disk works.

    queue   [ in flight: 7 8 9 ] [ open: 10 11 ]      tip = 6, frontier = 6
            after COMMITTED:     [ in flight: 10 11 ] tip = 9, frontier = 9, durable = 9

**Gathering**: a commit costs much the same for one row as for fifty, and many who are answered are
about to write again. So after a commit that answered ``gather_waiters_min`` or more, the next one
is held back until most of them are there again, ``gather_interval`` at most: they form one batch
instead of several that chase each other. Few clients never wait.

**Frontier**: the last revision below the shard's first uncommitted one; NOTHING_PENDING when there
is none. **durable**: the highest revision committed on any shard. What may be shown of some shards
is min(frontiers, durable).

**Tickets**: an answer that executed at the head of some shards is released when everything that had
been appended there by then is durable; it hangs on the last pending batch of each. A read pinned at
P hangs on the last batch that holds a revision <= P.

Outcomes (see ``backend.Outcome``): COMMITTED releases; NOT_COMMITTED is retried with the same
revisions; UNKNOWN is resolved, however often that must be asked, before anything else is tried;
FENCED and BROKEN stop the shard for good, with its waiters told that the server stopped (their
outcome is unknown); so does ``give_up``, for what reads find. A shard whose commit hangs for
``shard_timeout`` is **out**: its waiters are told that the request timed out, new requests are
refused at once, until a commit returns.

Bounds (``CommitConfig``): a full batch is closed and the next one filled; a full queue refuses with
TooManyRequestsError before anything is changed.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvstore.answers import Answer, Joined
from kvstore.backend import Backend, Batch, CommitResult, Fence, LeaseRow, Outcome, Row, RowId
from kvstore.clock import Clock
from kvstore.config import CommitConfig
from kvstore.errors import StoppedError, StoreError, TimedOutError, TooManyRequestsError
from kvstore.shard import HOME

NOTHING_PENDING = 1 << 63


@dataclass(slots=True)
class _Pending:
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


class DropSource(Protocol):
    """Where rows that compaction left behind come from."""

    def take(self, rows: int) -> list[RowId]:
        """Rows that may be deleted now, as many as suit a batch of ``rows`` rows (0: nothing else
        waits).
        """


class ShardQueue:
    """One shard's pending batches; only ``Commits`` touches it. Counters are read by the
    metrics.
    """

    def __init__(self, number: int, backend: Backend, fence: Fence) -> None:
        self.number = number
        self.backend = backend
        self.epoch = fence.epoch
        self.tip = fence.tip
        self.frontier = NOTHING_PENDING
        self.pending: deque[_Pending] = deque()
        self.open: _Pending | None = None
        self.in_flight = False
        self.started_at = 0.0
        self.retry_at: float | None = None
        self.unresolved = False
        self.out = False
        self.broken = ""
        self.trouble = ""
        """Why nothing is committed, as it was told; empty while commits succeed."""
        self.scheduled = False
        self.gathering = 0
        """Waiters that the next commit is held back for; 0 when it is not."""
        self.drops: DropSource | None = None
        self.rows = 0
        self.size = 0
        self.commits_total = 0
        self.rows_total = 0

    def filling(self) -> _Pending:
        """The open batch, made if there is none."""
        if self.open is None:
            self.open = _Pending()
            self.pending.append(self.open)
        return self.open


class Commits:
    """All shards' queues. ``call_soon`` runs a function later in the same turn of the loop,
    ``call_later`` after some seconds.

    ``on_durable()`` is called after a frontier moved and before answers are released;
    ``on_broken(shard, reason)`` once when a shard is lost for good;
    ``on_stuck(shard, reason)`` when a commit is refused, stays unknown or hangs, once until one
    succeeds; then ``on_back(shard, seconds)``, with the time that this one took in all;
    ``on_commit(shard, rows, seconds)``, if set, after each commit, for the metrics.
    """

    def __init__(
        self,
        shards: Sequence[tuple[Backend, Fence]],
        *,
        clock: Clock,
        config: CommitConfig,
        call_soon: Callable[[Callable[[], None]], object],
        call_later: Callable[[float, Callable[[], None]], object],
    ) -> None:
        self.queues = [ShardQueue(n, backend, fence) for n, (backend, fence) in enumerate(shards)]
        self.durable = max(fence.tip for _, fence in shards)
        self.compact_revision = shards[HOME][1].compact_revision
        """The last compaction committed."""
        self.on_durable: Callable[[], None] = _nothing
        self.on_broken: Callable[[int, str], None] = _ignore_trouble
        self.on_stuck: Callable[[int, str], None] = _ignore_trouble
        self.on_back: Callable[[int, float], None] = _ignore_return
        self.on_commit: Callable[[int, int, float], None] | None = None
        self._clock = clock
        self._config = config
        self._call_soon = call_soon
        self.call_later = call_later

    # -- what may be shown -----------------------------------------

    def frontier(self, shards: Sequence[int]) -> int:
        """The smallest frontier of ``shards``."""
        if len(shards) == 1:
            return self.queues[shards[0]].frontier
        return min(self.queues[shard].frontier for shard in shards)

    def visible(self, shards: Sequence[int]) -> int:
        """The last revision of which everything on ``shards`` is durable and may be shown."""
        return min(self.frontier(shards), self.durable)

    def issued(self, shard: int) -> int:
        """The last revision appended to ``shard``, durable or not."""
        queue = self.queues[shard]
        for pending in reversed(queue.pending):
            if pending.rows:
                return pending.rows[-1][0]
        return queue.tip

    def idle(self) -> bool:
        """Is nothing pending anywhere?"""
        return not any(queue.pending for queue in self.queues)

    # -- appending (the engine, after its checks) -----------------------------------------

    def check_room(self, shard: int) -> None:
        """Raise if a write to ``shard`` must be refused now; nothing has been changed yet."""
        queue = self.queues[shard]
        if queue.broken:
            raise StoppedError
        if queue.out:
            raise TimedOutError
        if queue.rows >= self._config.queue_rows_max or queue.size >= self._config.queue_bytes_max:
            raise TooManyRequestsError

    def append(self, shard: int, rows: list[Row], size: int) -> None:
        """Add the rows of one revision, which is greater than every one before; never split over
        batches.

        ``size`` is the bytes they hold, for the limits.
        """
        queue = self.queues[shard]
        pending = queue.filling()
        pending.rows += rows
        pending.count += len(rows)
        pending.size += size
        queue.rows += len(rows)
        queue.size += size
        if queue.frontier == NOTHING_PENDING:
            queue.frontier = rows[0][0] - 1
        if (
            pending.count >= self._config.batch_rows_max
            or pending.size >= self._config.batch_bytes_max
        ):
            queue.open = None
        if not queue.in_flight:
            self._schedule(queue)

    def append_lease(self, *, put: LeaseRow | None = None, delete: int | None = None) -> None:
        """Add a change of a lease to the home shard's open batch; it counts as a row.

        A full batch is closed before, never behind it: rows that follow in the same call, as a
        lease's keys follow its end, come into the same batch.
        """
        queue = self.queues[HOME]
        if queue.open is not None and queue.open.count >= self._config.batch_rows_max:
            queue.open = None
        pending = queue.filling()
        pending.count += 1
        queue.rows += 1
        if delete is not None:
            pending.lease_puts.pop(delete, None)
            pending.lease_deletes.append(delete)
        if put is not None:
            pending.lease_puts[put.id] = put
        self._schedule(queue)

    def append_compaction(self, revision: int) -> None:
        """Add a new compact revision to the home shard's open batch."""
        queue = self.queues[HOME]
        queue.filling().compact_revision = revision
        self._schedule(queue)

    def poke_drops(self, shard: int) -> None:
        """Rows wait to be dropped: commit them when nothing else waits."""
        self._schedule(self.queues[shard])

    # -- waiting -----------------------------------------

    def release(self, shards: Sequence[int], answer: Answer, body: bytes) -> None:
        """The ticket: ``answer.reply(body)`` once all that was appended so far on ``shards`` is
        durable.
        """
        if len(shards) == 1:
            queue = self.queues[shards[0]]
            if queue.pending:
                if queue.out or queue.broken:
                    self._refuse(queue, answer)
                else:
                    queue.pending[-1].waiters.append((answer, body))
            else:
                answer.reply(body)
            return
        self._join([q for q in map(self.queues.__getitem__, shards) if q.pending], answer, body)

    def when_visible(self, shards: Sequence[int], revision: int, answer: Answer) -> None:
        """``answer.reply(b"")`` once the frontiers of ``shards`` have reached ``revision``; at once
        if they have.
        """
        late = [q for q in map(self.queues.__getitem__, shards) if q.frontier < revision]
        self._join(late, answer, b"", revision)

    def _join(
        self, queues: list[ShardQueue], answer: Answer, body: bytes, revision: int = NOTHING_PENDING
    ) -> None:
        if not queues:
            answer.reply(body)
            return
        lost = next((q for q in queues if q.out or q.broken), None)
        if lost is not None:
            self._refuse(lost, answer)
            return
        joined = Joined(answer, body, len(queues))
        for queue in queues:
            _last_holding(queue, revision).waiters.append((joined, b""))

    def _refuse(self, queue: ShardQueue, answer: Answer) -> None:
        error = StoppedError if queue.broken else TimedOutError
        answer.fail(error.code, error.text)

    # -- committing -----------------------------------------

    def _schedule(self, queue: ShardQueue) -> None:
        """Start a commit at the end of this turn, so that everything which arrived with it rides
        along.
        """
        if queue.scheduled or queue.in_flight:
            return
        if queue.gathering and _waiting(queue) + 1 < queue.gathering:  # its own ticket comes next
            return
        queue.scheduled = True
        self._call_soon(lambda: self._start(queue))

    def _gather(self, queue: ShardQueue, answered: int) -> bool:
        """Hold the next commit back for those who are being ``answered`` now, if they are many."""
        if answered < self._config.gather_waiters_min:
            return False
        waiting = _waiting(queue)
        goal = (answered + waiting) * 7 // 8
        if waiting >= goal:
            return False
        queue.gathering = goal
        turn = queue.commits_total

        def over() -> None:
            if queue.gathering and queue.commits_total == turn:
                self._start(queue)

        self.call_later(self._config.gather_interval, over)
        return True

    def _start(self, queue: ShardQueue) -> None:
        queue.scheduled = False
        queue.gathering = 0
        if queue.in_flight or queue.broken or queue.retry_at is not None:
            return
        self._take_drops(queue)
        if not queue.pending:
            return
        pending = queue.pending[0]
        if pending is queue.open:
            queue.open = None
        rows = pending.rows
        pending.batch = Batch(
            epoch=queue.epoch,
            tip_before=queue.tip,
            tip=rows[-1][0] if rows else queue.tip,
            rows=rows,
            drops=pending.drops,
            lease_puts=pending.lease_puts,
            lease_deletes=pending.lease_deletes,
            compact_revision=pending.compact_revision,
        )
        self._send(queue, pending.batch)

    def _send(self, queue: ShardQueue, batch: Batch) -> None:
        queue.in_flight = True
        queue.retry_at = None
        if not queue.out:
            queue.started_at = self._clock.monotonic()
        queue.backend.commit(batch, lambda result: self._returned(queue, batch, result))

    def _take_drops(self, queue: ShardQueue) -> None:
        """Rows left by compaction: a batch of their own when nothing else waits, else along with
        the batch.
        """
        if queue.drops is None:
            return
        if not queue.pending:
            drops = queue.drops.take(0)
            if drops:
                queue.pending.append(_Pending(drops=drops))
        elif not queue.pending[0].drops:
            queue.pending[0].drops = queue.drops.take(max(1, queue.pending[0].count))

    def _returned(self, queue: ShardQueue, batch: Batch, result: CommitResult) -> None:
        """A commit ended, one way or the other."""
        queue.in_flight = False
        asked, queue.unresolved = queue.unresolved, result.outcome is Outcome.UNKNOWN
        if result.outcome is Outcome.COMMITTED:
            self._committed(queue, batch)
            return
        if queue.broken:
            return  # given up meanwhile
        if queue.unresolved and not asked:
            self._resolve(queue, batch)
        elif queue.unresolved or result.outcome is Outcome.NOT_COMMITTED:
            queue.retry_at = self._clock.monotonic() + self._config.retry_interval
            self._stuck(queue, result.reason)
        else:
            self._break(queue, f"{result.outcome.value}: {result.reason}")

    def _stuck(self, queue: ShardQueue, reason: str) -> None:
        if not queue.trouble:
            queue.trouble = reason or "no reason given"
            self.on_stuck(queue.number, queue.trouble)

    def _resolve(self, queue: ShardQueue, batch: Batch) -> None:
        """Ask the backend what became of ``batch``."""
        queue.in_flight = True
        queue.retry_at = None
        queue.backend.resolve(batch, lambda result: self._returned(queue, batch, result))

    def _committed(self, queue: ShardQueue, batch: Batch) -> None:
        done = queue.pending.popleft()
        queue.tip = batch.tip
        queue.rows -= done.count
        queue.size -= done.size
        queue.commits_total += 1
        queue.rows_total += len(done.rows)
        queue.frontier = NOTHING_PENDING
        for pending in queue.pending:
            if pending.rows:
                queue.frontier = pending.rows[0][0] - 1
                break
        self.durable = max(self.durable, batch.tip)
        if batch.compact_revision is not None:
            self.compact_revision = batch.compact_revision
        if queue.trouble:
            queue.trouble = ""
            self.on_back(queue.number, self._clock.monotonic() - queue.started_at)
        if self.on_commit is not None:
            seconds = self._clock.monotonic() - queue.started_at
            self.on_commit(queue.number, len(done.rows), seconds)
        queue.out = False
        if not self._gather(queue, len(done.waiters)):
            self._start(queue)
        self.on_durable()
        for answer, body in done.waiters:
            answer.reply(body)

    def give_up(self, shard: int, reason: str) -> None:
        """Stop ``shard`` for good, because its data cannot be trusted. Idempotent."""
        queue = self.queues[shard]
        if not queue.broken:
            self._break(queue, f"{Outcome.BROKEN.value}: {reason}")

    def _break(self, queue: ShardQueue, reason: str) -> None:
        queue.broken = reason
        queue.trouble = ""
        queue.retry_at = None
        self._fail_waiters(queue, StoppedError)
        self.on_broken(queue.number, queue.broken)

    def _fail_waiters(self, queue: ShardQueue, error: type[StoreError]) -> None:
        for pending in queue.pending:
            waiters, pending.waiters = pending.waiters, []
            for answer, _ in waiters:
                answer.fail(error.code, error.text)

    def tick(self) -> None:
        """Retry what was not committed and notice what hangs; the server calls it a few times a
        second.
        """
        now = self._clock.monotonic()
        for queue in self.queues:
            stuck = queue.in_flight or queue.retry_at is not None
            if stuck and not queue.out and now - queue.started_at >= self._config.shard_timeout:
                queue.out = True
                self._stuck(queue, "storage does not answer")
                self._fail_waiters(queue, TimedOutError)
            if queue.retry_at is not None and now >= queue.retry_at:
                batch = queue.pending[0].batch
                assert batch is not None, "a batch that was tried exists"
                if queue.unresolved:
                    self._resolve(queue, batch)
                else:
                    self._resend(queue, batch)

    def _resend(self, queue: ShardQueue, batch: Batch) -> None:
        started_at = queue.started_at
        self._send(queue, batch)
        queue.started_at = started_at


def _waiting(queue: ShardQueue) -> int:
    """Those who wait for pending batches."""
    return sum(len(pending.waiters) for pending in queue.pending)


def _last_holding(queue: ShardQueue, revision: int) -> _Pending:
    """The last pending batch with a revision at or below ``revision``; the very last for
    NOTHING_PENDING.
    """
    if revision == NOTHING_PENDING:
        return queue.pending[-1]
    found = queue.pending[0]
    for pending in queue.pending:
        if pending.rows and pending.rows[0][0] <= revision:
            found = pending
    return found


def _nothing() -> None:
    """Nobody listens."""


def _ignore_trouble(shard: int, reason: str) -> None:
    """Nobody listens."""


def _ignore_return(shard: int, seconds: float) -> None:
    """Nobody listens."""
