"""The one road to storage: group commit, and the tickets of those who wait for it.

Each shard has a queue of **pending** batches (``shard_queue``). The first is in flight; the last
one is open and takes what the engine appends. When a commit returns, the next pending batch goes at
once: the batch grows while the disk works.

**Gathering**: after a commit that answered many, the next one is held back for a moment until most
of them are there again; see ``gathering``.

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
refused at once, until a commit returns. One whose backend knows that its database cannot be reached
(``lost``) refuses new requests at once, and who waits already is told after the same time.

A revision over several shards has its commit point on home: see ``redo``.

**Leadership.** Where home's lease may run out (``lease_lapsed``), another process may own the
shards without this one's knowing. Reads at the head and acknowledgements are then refused, the
watchers are told nothing new, until it has been renewed. A home that is lost for good has lost its
lease with it, however fresh that is. It is asked after the state was taken or the commit has
returned: a process that was stopped in between must notice.

Bounds (``CommitConfig``): a full batch is closed and the next one filled; a full queue refuses with
TooManyRequestsError before anything is changed.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from kvstore.answers import Answer, Joined
from kvstore.backend import Backend, Batch, CommitResult, Fence, LeaseRow, Outcome, Row, ShardRecord
from kvstore.clock import Clock
from kvstore.config import CommitConfig
from kvstore.errors import TimedOutError, TooManyRequestsError, UnreadyError
from kvstore.gathering import Gathering
from kvstore.redo import Redo
from kvstore.shard import HOME
from kvstore.shard_queue import NOTHING_PENDING, ShardQueue

__all__ = ["NOTHING_PENDING", "Commits", "ShardQueue"]


class Commits:
    """All shards' queues. ``call_soon`` runs a function later in the same turn of the loop,
    ``call_later`` after some seconds. A shard whose fence has the epoch 0 is missing.

    ``on_durable()`` is called after a frontier moved and before answers are released;
    ``on_broken(shard, reason)`` once when a shard is lost for good;
    ``on_stuck(shard, reason)`` when a commit is refused, stays unknown or hangs, or the database
    cannot be reached, once until a commit succeeds or it can; then ``on_back(shard, seconds)``,
    with the time that it took in all;
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
        self.reserved = NOTHING_PENDING
        """No revision above this is committed anywhere; ``reservation`` moves it."""
        self.leased = shards[HOME][0].lease_until() != math.inf
        """May home's lease run out?"""
        self.on_durable: Callable[[], None] = _ignore
        self.on_broken: Callable[[int, str], None] = _ignore
        self.on_stuck: Callable[[int, str], None] = _ignore
        self.on_back: Callable[[int, float], None] = _ignore
        self.on_commit: Callable[[int, int, float], None] | None = None
        self.clock = clock
        self.config = config
        self._call_soon = call_soon
        self.call_later = call_later
        self._gathering = Gathering(len(shards), config, call_later, self._schedule)
        self.redo = Redo(self.queues, clock, append=self.append, schedule=self._schedule)
        self._untold = False
        """Did a frontier move while the lease had run out?"""

    # -- what may be shown -----------------------------------------

    def frontier(self, shards: Sequence[int]) -> int:
        """The smallest frontier of ``shards``."""
        if len(shards) == 1:
            return self.queues[shards[0]].frontier
        return min(self.queues[shard].frontier for shard in shards)

    def visible(self, shards: Sequence[int]) -> int:
        """The last revision of which everything on ``shards`` is durable and may be shown."""
        return min(self.frontier(shards), self.durable)

    def shows_head(self, shard: int) -> bool:
        """May a read see ``durable`` on ``shard`` at once? If not, it waits or is refused."""
        queue = self.queues[shard]
        if queue.lost is not None or queue.frontier < self.durable:
            return False
        return not (self.leased and self.lease_lapsed())

    def check_readable(self, shards: Sequence[int], *, stale: bool = False) -> None:
        """Raise if a read of ``shards`` must be refused now; after its revision was taken.

        ``stale``: it need not show the newest, and is served while a database is only out of reach.
        """
        for shard in shards:
            queue = self.queues[shard]
            if queue.lost is not None and (not stale or queue.missing or queue.broken):
                raise queue.lost
        if self.leased and not stale and self.lease_lapsed():
            raise TimedOutError

    def lease_lapsed(self) -> bool:
        """May another process own the shards by now?"""
        home = self.queues[HOME]
        if home.broken:
            return self.leased
        return self.clock.monotonic() >= home.backend.lease_until()

    def issued(self, shard: int) -> int:
        """The last revision appended to ``shard``, durable or not."""
        return self.queues[shard].issued()

    def idle(self) -> bool:
        """Is nothing pending anywhere?"""
        return not any(queue.pending for queue in self.queues)

    # -- appending (the engine, after its checks) -----------------------------------------

    def check_room(self, shard: int) -> None:
        """Raise if a write to ``shard`` must be refused now; nothing has been changed yet."""
        queue = self.queues[shard]
        if queue.refusal is not None:
            raise queue.refusal
        if queue.rows >= self.config.queue_rows_max or queue.size >= self.config.queue_bytes_max:
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
            pending.count >= self.config.batch_rows_max
            or pending.size >= self.config.batch_bytes_max
        ):
            queue.open = None
        if not queue.in_flight:
            self._schedule(queue)

    def append_over(self, revision: int, parts: Mapping[int, list[Row]], size: int) -> None:
        """Add the rows of one revision, by shard, which may rest on changes of home that are not
        durable. No other shard with rows has anything uncommitted, nor is it lost, nor home. See
        ``redo``; otherwise as ``append``.
        """
        if len(parts) == 1 and (HOME in parts or not self.queues[HOME].pending):
            ((shard, rows),) = parts.items()
            self.append(shard, rows, size)
        else:
            self.redo.append(revision, parts, size)

    def append_lease(self, *, put: LeaseRow | None = None, delete: int | None = None) -> None:
        """Add a change of a lease to the home shard's open batch; it counts as a row.

        A full batch is closed before, never behind it: rows that follow in the same call, as a
        lease's keys follow its end, come into the same batch.
        """
        queue = self.queues[HOME]
        if queue.open is not None and queue.open.count >= self.config.batch_rows_max:
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

    def append_reserved(self, revision: int | None, records: Iterable[ShardRecord]) -> None:
        """Add what home knows of all shards to its open batch: revisions up to ``revision`` may be
        issued (None: as before), and the shards were last seen as in ``records``.
        """
        home = self.queues[HOME]
        for_all = home.filling_for_all()
        for_all.reserved = for_all.reserved if revision is None else revision
        for_all.records.update((record.shard, record) for record in records)
        self._schedule(home)

    def poke_drops(self, shard: int) -> None:
        """Rows wait to be dropped: commit them when nothing else waits."""
        self._schedule(self.queues[shard])

    # -- requests over several shards -----------------------------------------

    def hold(self, shards: Iterable[int]) -> None:
        """Refuse new writes to ``shards`` with HeldError, until ``unhold``."""
        for shard in shards:
            self.queues[shard].held += 1
            self.queues[shard].judge()

    def unhold(self, shards: Iterable[int]) -> None:
        """The end of one ``hold``."""
        for shard in shards:
            assert self.queues[shard].held, "held before"
            self.queues[shard].held -= 1
            self.queues[shard].judge()

    def bar(self, reason: type[UnreadyError] | None) -> None:
        """Refuse all new writes with ``reason``, so that nothing is issued; None: no longer."""
        for queue in self.queues:
            queue.barred = reason
            queue.judge()

    # -- shards that go and come -----------------------------------------

    def lost(self, shard: int, reason: str) -> None:
        """Its backend knows that the database is out of reach. Idempotent."""
        queue = self.queues[shard]
        if queue.away or queue.broken or not queue.epoch:
            return
        queue.away = True
        queue.judge()
        if not queue.stuck:
            queue.started_at = self.clock.monotonic()
        self._stuck(queue, reason)

    def found(self, shard: int) -> None:
        """It can be reached again. Idempotent."""
        queue = self.queues[shard]
        if not queue.away:
            return
        queue.away = False
        queue.judge()
        if not queue.stuck:
            self._recovered(queue)

    def part(self, shard: int) -> None:
        """A shard that hangs before it has served anyone: it is missing, until it joins."""
        self.queues[shard].missing = True
        self.queues[shard].judge()
        self.queues[shard].move_frontier()

    def prepare(self, shard: int, backend: Backend, fence: Fence) -> None:
        """A missing shard has come: it commits what is appended, and is still refused."""
        queue = self.queues[shard]
        assert queue.missing, "only a missing shard comes"
        assert fence.tip <= self.durable, "it is not ahead of the order"
        queue.meet(backend, fence)

    def join(self, shard: int) -> None:
        """A missing shard has come, its rows are loaded: from now on it serves."""
        queue = self.queues[shard]
        queue.missing = False
        queue.move_frontier()
        queue.judge()
        self.on_durable()

    # -- waiting -----------------------------------------

    def release(self, shards: Sequence[int], answer: Answer, body: bytes) -> None:
        """The ticket: ``answer.reply(body)`` once all that was appended so far on ``shards`` is
        durable.
        """
        if len(shards) == 1:
            queue = self.queues[shards[0]]
            if queue.lost is not None:
                answer.fail(queue.lost.code, queue.lost.text)
            elif queue.pending:
                queue.pending[-1].waiters.append((answer, body))
                self._gathering.came()
            else:
                self._reply(answer, body)
            return
        asked = map(self.queues.__getitem__, shards)
        self._join([q for q in asked if q.pending or q.lost is not None], answer, body)

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
            self._reply(answer, body)
            return
        for queue in queues:
            if queue.lost is not None:
                answer.fail(queue.lost.code, queue.lost.text)
                return
        joined = Joined(answer, body, len(queues))
        for queue in queues:
            queue.last_holding(revision).waiters.append((joined, b""))
        self._gathering.came()

    def _reply(self, answer: Answer, body: bytes) -> None:
        if self.leased and self.lease_lapsed():
            answer.fail(TimedOutError.code, TimedOutError.text)
        else:
            answer.reply(body)

    # -- committing -----------------------------------------

    def _schedule(self, queue: ShardQueue) -> None:
        """Start a commit at the end of this turn, so that everything which arrived with it rides
        along.
        """
        if queue.scheduled or queue.in_flight or queue.held_back:
            return
        queue.scheduled = True
        self._call_soon(lambda: self._start(queue))

    def _start(self, queue: ShardQueue) -> None:
        queue.scheduled = False
        if queue.in_flight or queue.broken or queue.retry_at is not None or not queue.epoch:
            return
        queue.take_drops()
        if not queue.pending or queue.pending[0].blocked:
            return
        batch = queue.next_batch()
        assert batch.tip <= self.reserved, "a revision is reserved before it is issued"
        if not queue.late:
            queue.started_at = self.clock.monotonic()
        self._send(queue, batch)

    def _send(self, queue: ShardQueue, batch: Batch) -> None:
        queue.in_flight = True
        queue.retry_at = None
        queue.backend.commit(batch, lambda result: self._returned(queue, batch, result))

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
            queue.retry_at = self.clock.monotonic() + self.config.retry_interval
            self._stuck(queue, result.reason)
        else:
            self._break(queue, f"{result.outcome.value}: {result.reason}")

    def _resolve(self, queue: ShardQueue, batch: Batch) -> None:
        """Ask the backend what became of ``batch``."""
        queue.in_flight = True
        queue.retry_at = None
        queue.backend.resolve(batch, lambda result: self._returned(queue, batch, result))

    def _committed(self, queue: ShardQueue, batch: Batch) -> None:
        done = queue.committed(batch)
        self.durable = max(self.durable, batch.tip)
        if batch.compact_revision is not None:
            self.compact_revision = batch.compact_revision
        if queue.late:
            queue.late = False
            queue.judge()
        if queue.trouble and not queue.away:
            self._recovered(queue)
        if self.on_commit is not None:
            seconds = self.clock.monotonic() - queue.started_at
            self.on_commit(queue.number, len(done.rows), seconds)
        if done.for_all is not None:
            self.redo.recorded(done.for_all)
            if batch.reserved is not None:
                self.reserved = batch.reserved
        if done.redone:
            self.redo.done(done.redone)
        if not self._gathering.hold(queue, len(done.waiters)):
            self._start(queue)
        if self.leased and self.lease_lapsed():
            self._untold = True
            for answer, _ in done.waiters:
                answer.fail(TimedOutError.code, TimedOutError.text)
            return
        self.on_durable()
        for answer, body in done.waiters:
            answer.reply(body)

    # -- trouble -----------------------------------------

    def give_up(self, shard: int, reason: str) -> None:
        """Stop ``shard`` for good, because its data cannot be trusted, or because it is FENCED, if
        ``reason`` begins with that outcome. Idempotent.
        """
        queue = self.queues[shard]
        told = reason.startswith((Outcome.FENCED.value, Outcome.BROKEN.value))
        if not queue.broken:
            self._break(queue, reason if told else f"{Outcome.BROKEN.value}: {reason}")

    def _break(self, queue: ShardQueue, reason: str) -> None:
        queue.broken = reason
        queue.fenced = reason.startswith(Outcome.FENCED.value)
        queue.trouble = ""
        queue.retry_at = None
        queue.judge()
        self._fail_waiters(queue)
        self.on_broken(queue.number, queue.broken)

    def _stuck(self, queue: ShardQueue, reason: str) -> None:
        if not queue.trouble:
            queue.trouble = reason or "no reason given"
            self.on_stuck(queue.number, queue.trouble)

    def _recovered(self, queue: ShardQueue) -> None:
        queue.trouble = ""
        self.on_back(queue.number, self.clock.monotonic() - queue.started_at)

    def _fail_waiters(self, queue: ShardQueue) -> None:
        error = queue.lost
        assert error is not None, "the shard is lost"
        for answer in queue.take_waiters():
            answer.fail(error.code, error.text)

    def tick(self) -> None:
        """Retry what was not committed and notice what hangs; the server calls it a few times a
        second.
        """
        now = self.clock.monotonic()
        for queue in self.queues:
            hangs = now - queue.started_at >= self.config.shard_timeout
            if hangs and queue.stuck and not queue.late and not queue.broken:
                queue.late = True
                queue.judge()
                self._stuck(queue, "storage does not answer")
                self._fail_waiters(queue)
            if queue.retry_at is not None and now >= queue.retry_at:
                batch = queue.pending[0].batch
                assert batch is not None, "a batch that was tried exists"
                if queue.unresolved:
                    self._resolve(queue, batch)
                else:
                    self._send(queue, batch)
        if self._untold and not self.lease_lapsed():
            self._untold = False
            self.on_durable()


def _ignore(*_: object) -> None:
    """Nobody listens."""
