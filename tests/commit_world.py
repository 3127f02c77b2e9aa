"""``Commits`` over backends that end each commit by hand, in any way it can end."""

import math
from collections.abc import Callable, Collection

from backends.memory import MemoryBackend, MemoryDisk, Steps
from kvstore.backend import Batch, CommitResult, LeaseRow, Outcome, Row
from kvstore.clock import ManualClock
from kvstore.commit import Commits
from kvstore.config import CommitConfig
from kvstore.errors import StoppedError, TimedOutError
from kvstore.opening import ABSENT
from tests.engine import Waiter
from tests.stack import run_now

STOPPED = (StoppedError.code, "etcdserver: server stopped")
TIMED_OUT = (TimedOutError.code, "etcdserver: request timed out")
COMMITTED, NOT_COMMITTED, UNKNOWN, FENCED, BROKEN = Outcome
Asked = tuple[str, Batch, Callable[[CommitResult], None]]


class Held(MemoryBackend):
    """A backend that ends what it was asked only when told, and as told."""

    def __init__(self, number: int) -> None:
        super().__init__(MemoryDisk(shard=str(number)), later=Steps())
        self.leased_until = math.inf
        self.asked: list[Asked] = []
        self.batches: list[Batch] = []

    def commit(self, batch: Batch, done: Callable[[CommitResult], None]) -> None:
        """Keep it."""
        assert not self.asked, "one at a time"
        self.batches.append(batch)
        self.asked.append(("commit", batch, done))

    def resolve(self, batch: Batch, done: Callable[[CommitResult], None]) -> None:
        """Keep it."""
        assert not self.asked, "one at a time"
        self.asked.append(("resolve", batch, done))

    def lease_until(self) -> float:
        """As the test says."""
        return self.leased_until

    def end(self, outcome: Outcome) -> None:
        """End what is under way; COMMITTED stores it."""
        _, batch, done = self.asked.pop()
        if outcome is COMMITTED:
            assert self.disk.store(batch, self._epoch).outcome is COMMITTED
        done(CommitResult(outcome, "as told"))


class World:
    """``Commits`` over held backends, with the revision counter of a store. ``missing`` shards have
    not been opened; with ``leased``, home's lease runs out unless the test renews it.
    """

    def __init__(
        self,
        shards: int = 1,
        *,
        config: CommitConfig | None = None,
        missing: Collection[int] = (),
        leased: bool = False,
    ) -> None:
        self.backends = [Held(number) for number in range(shards)]
        self.turns = Steps()
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.clock = ManualClock()
        fences = [
            ABSENT._replace(shard=str(number)) if number in missing else run_now(backend.open())
            for number, backend in enumerate(self.backends)
        ]
        if leased:
            self.renew()
        self.commits = Commits(
            list(zip(self.backends, fences, strict=True)),
            clock=self.clock,
            config=config or CommitConfig(),
            call_soon=self.turns,
            call_later=lambda seconds, step: self.timers.append((seconds, step)),
        )
        self.broken: list[tuple[int, str]] = []
        self.commits.on_broken = lambda shard, reason: self.broken.append((shard, reason))
        self.told: list[tuple[int, str | float]] = []
        self.commits.on_stuck = lambda shard, reason: self.told.append((shard, reason))
        self.commits.on_back = lambda shard, seconds: self.told.append((shard, seconds))
        self.revision = 1

    def append(self, shard: int = 0, *, rows: int = 1, size: int = 10) -> int:
        """Write one revision; returns it."""
        self.revision += 1
        made: list[Row] = [(self.revision, n, b"k", self.revision, 1, 0, b"") for n in range(rows)]
        self.commits.append(shard, made, size)
        return self.revision

    def append_over(self, *shards: int) -> int:
        """Write one revision with a row on each shard; returns it."""
        self.revision += 1
        parts: dict[int, list[Row]] = {
            shard: [(self.revision, sub, b"k%d" % shard, self.revision, 1, 0, b"v")]
            for sub, shard in enumerate(shards)
        }
        self.commits.append_over(self.revision, parts, 10 * len(parts))
        return self.revision

    def renew(self, seconds: float = 5.0) -> None:
        """Home's lease is good for so long."""
        self.backends[0].leased_until = self.clock.now + seconds

    def join(self, shard: int) -> None:
        """A missing shard comes."""
        backend = self.backends[shard]
        self.commits.prepare(shard, backend, run_now(backend.open()))
        self.commits.join(shard)

    def append_leases(self, *, put: bool) -> None:
        """Grant four leases, or end them."""
        for lease in range(4):
            if put:
                self.commits.append_lease(put=LeaseRow(lease, 9, 0))
            else:
                self.commits.append_lease(delete=lease)

    def write(self, shard: int = 0) -> Waiter:
        """Write one revision and take its ticket."""
        self.append(shard)
        return self.ticket(shard)

    def ticket(self, *shards: int) -> Waiter:
        """A ticket for what was appended so far."""
        waiter = Waiter()
        self.commits.release(shards, waiter, b"durable")
        return waiter

    def settled(self, *shards: int) -> Waiter:
        """Who waits for nothing to be uncommitted there."""
        waiter = Waiter()
        self.commits.release(shards, waiter, b"")
        return waiter

    def end(self, outcome: Outcome = COMMITTED, shard: int = 0) -> None:
        """Let the turn end, then the commit."""
        self.turns.run_all()
        self.backends[shard].end(outcome)

    def pass_time(self, seconds: float) -> None:
        """Time goes by, with a tick at its end."""
        self.clock.advance(seconds)
        self.commits.tick()


def revisions(batch: Batch) -> list[int]:
    """What a batch carries."""
    return [row[0] for row in batch.rows]
