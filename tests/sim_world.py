"""The world of the simulation: disks that log what is committed, storage that fails in every way
that ``backend.Outcome`` knows, and a process that recovers from what the disks hold.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import merge
from random import Random

from backends.memory import MemoryBackend, MemoryDisk, Steps
from kvstore.backend import Batch, CommitResult, IndexRow, Outcome, Row, RowId
from kvstore.clock import ManualClock
from kvstore.commit import Commits
from kvstore.compaction import Compactor
from kvstore.config import CommitConfig, CompactionConfig, RequestConfig, StoreConfig
from kvstore.errors import BackendError
from kvstore.kv import Header
from kvstore.rpc.kv import KvService
from kvstore.shard import ShardMap
from kvstore.store import Store
from tests.stack import FixedLeases, NoHub, run_now

LEASE = 7
COMMIT = CommitConfig(batch_rows_max=3, queue_rows_max=5)
STORE = StoreConfig(cache_bytes_max=100, recent_bytes_max=500, read_chunk_keys=2, fetch_rows_max=3)
COMPACTION = CompactionConfig(step_keys=2, drop_rows_max=3)
ROUTES = {b"x/": 1, b"y/": 2}


class Log:
    """What has been committed, as it was committed."""

    def __init__(self) -> None:
        self.revisions: dict[int, list[Row]] = {}
        self.versions: dict[bytes, list[Row]] = {}
        self.values: set[bytes] = set()
        self.refused: set[bytes] = set()
        self.tip = 1

    def add(self, rows: Sequence[Row], tip_before: int) -> None:
        """A batch passed its commit point."""
        for revision in {row[0] for row in rows}:
            assert revision not in self.revisions, f"revision {revision} was issued twice"
        for row in rows:
            revision, _, key, create, version, lease, value = row
            assert revision > tip_before, "revisions of a shard increase"
            chain = self.versions.setdefault(key, [])
            before = chain[-1] if chain else None
            alive = before is not None and before[4] > 0
            if version == 0:
                assert alive, "only a live key is deleted"
                assert (create, lease, value) == (0, 0, b"")
            else:
                expected = (before[3], before[4] + 1) if before and alive else (revision, 1)
                assert (create, version) == expected, f"{key!r} at {revision} continues its chain"
                assert value not in self.values, f"{value!r} was written twice"
                assert value not in self.refused, f"{value!r} was refused"
                self.values.add(value)
            chain.append(row)
            self.revisions.setdefault(revision, []).append(row)
            self.tip = max(self.tip, revision)

    def at(self, key: bytes, revision: int) -> Row | None:
        """The version of ``key`` that ``revision`` sees, None if it is not alive then."""
        seen = next((row for row in reversed(self.versions.get(key, ())) if row[0] <= revision), ())
        return seen if seen and seen[4] else None

    def range(self, key: bytes, end: bytes, revision: int) -> list[Row]:
        """Live versions of a range at ``revision``, in key order."""
        inside = sorted(k for k in self.versions if k == key or key < k < end)
        return [row for row in (self.at(k, revision) for k in inside) if row is not None]

    def kept(self, compacted: int) -> set[RowId]:
        """Rows that a compaction leaves: later ones, its own, and what its revision sees."""
        rows = [row for chain in self.versions.values() for row in chain]
        return {(r[0], r[1]) for r in rows if r[0] >= compacted or self.at(r[2], compacted) is r}


class LoggedDisk(MemoryDisk):
    """A disk whose commit point writes the log."""

    def __init__(self, number: int, log: Log) -> None:
        super().__init__(shard=str(number))
        self.log = log

    def store(self, batch: Batch, epoch: int) -> CommitResult:
        """The commit point."""
        tip_before = self.tip
        result = super().store(batch, epoch)
        if result.outcome is Outcome.COMMITTED:
            self.log.add(batch.rows, tip_before)
        return result


@dataclass
class Faults:
    """How often things go wrong; 0 is never, and what was held back then goes on."""

    random: Random
    rate: float
    hung: deque[Callable[[], None]] = field(default_factory=deque)

    def fate(self, *fates: str) -> str:
        """What happens now: "well", or one of ``fates``."""
        return self.random.choice(fates) if self.random.random() < self.rate else "well"


class FaultyBackend(MemoryBackend):
    """Storage that may be slow, say no, lose its answer, hang, or break."""

    def __init__(self, disk: MemoryDisk, *, later: Steps, faults: Faults) -> None:
        super().__init__(disk, later=later)
        self._faults = faults

    def commit(self, batch: Batch, done: Callable[[CommitResult], None]) -> None:
        """Commit ``batch``, or not."""
        fates = ("refused", "refused", "lost", "lost", "late", "late", "hang", "hang", "broken")
        epoch = self._epoch
        match self._faults.fate(*fates):
            case "refused":
                self._end(Outcome.NOT_COMMITTED, done)
            case "lost":
                self._end(Outcome.UNKNOWN, done)
            case "late":
                # On its way although nobody listens any more, perhaps beyond the process's end.
                self._later(lambda: self._store(batch, epoch))
                self._end(Outcome.UNKNOWN, done)
            case "hang":
                self._faults.hung.append(lambda: MemoryBackend.commit(self, batch, done))
            case "broken":
                if self._faults.random.random() < 0.5:
                    self._step(lambda: self._store(batch, epoch))
                self._end(Outcome.BROKEN, done)
            case _:
                super().commit(batch, done)

    def resolve(self, batch: Batch, done: Callable[[CommitResult], None]) -> None:
        """Say what became of ``batch``, or not yet."""
        match self._faults.fate("lost", "hang"):
            case "lost":
                self._end(Outcome.UNKNOWN, done)
            case "hang":
                self._faults.hung.append(lambda: MemoryBackend.resolve(self, batch, done))
            case _:
                super().resolve(batch, done)

    def read_values(
        self, ids: Sequence[RowId], done: Callable[[list[bytes | None] | BackendError], None]
    ) -> None:
        """The values, perhaps much later, or an error."""
        match self._faults.fate("broken", "hang", "hang", "hang"):
            case "broken":
                self._step(lambda: done(BackendError("cannot read")))
            case "hang":
                self._faults.hung.append(lambda: MemoryBackend.read_values(self, ids, done))
            case _:
                super().read_values(ids, done)

    def _store(self, batch: Batch, epoch: int) -> None:
        self.disk.store(batch, epoch)

    def _end(self, outcome: Outcome, done: Callable[[CommitResult], None]) -> None:
        self._step(lambda: done(CommitResult(outcome, "simulated")))


class Process:
    """One life of the server over ``disks``."""

    def __init__(self, disks: Sequence[MemoryDisk], steps: Steps, faults: Faults) -> None:
        self.turns = Steps()
        self.clock = ManualClock()
        self.lost = False
        self.backends = [FaultyBackend(disk, later=steps, faults=faults) for disk in disks]
        fences = [run_now(backend.open()) for backend in self.backends]
        self.commits = Commits(
            list(zip(self.backends, fences, strict=True)),
            clock=self.clock,
            config=COMMIT,
            call_soon=self.turns,
            call_later=lambda _, step: self.turns(step),
        )
        self.commits.on_broken = self._broken
        routes = {prefix: shard for prefix, shard in ROUTES.items() if shard < len(disks)}
        shards = ShardMap(routes)
        self.store = Store(self.commits, shards, FixedLeases({LEASE}), NoHub(), STORE)
        self.store.compact_revision = fences[0].compact_revision
        self.compactor = Compactor(self.store, COMPACTION, self.turns, lambda: None)
        self.kv = KvService(
            self.store,
            self.compactor,
            Header(cluster_id=1, member_id=2, raft_term=3),
            request=RequestConfig(),
            reads=STORE,
            call_soon=self.turns,
        )

    def load(self, rows_max: int = 1 << 30) -> None:
        """Recover; an interrupted recovery gets as far as ``rows_max``."""
        shards: list[list[IndexRow]] = []
        for backend in self.backends:
            shards.append([])
            run_now(backend.load_index(shards[-1].extend))
        of = self.store.shards.of
        left = self.store.load_rows(list(merge(*shards))[:rows_max])
        owner = {row[:2]: of(row[2]) for rows in shards for row in rows}
        self.compactor.recover([row for row in left if owner[row] == 0])
        for number, drops in enumerate(self.compactor.drops[1:], start=1):
            drops.add([row for row in left if owner[row] == number])

    def tick(self, seconds: float) -> None:
        """Time goes by."""
        self.clock.advance(seconds)
        self.commits.tick()
        self.compactor.tick()

    def evict(self) -> None:
        """Values leave memory."""
        index = self.store.index
        for chunk in index._chunks:
            chunk.hot = False
        index.evict(0, self.commits.visible(self.store.shards.all))

    def crash(self) -> None:
        """Die without a word."""
        for backend in self.backends:
            backend.crash()

    def _broken(self, shard: int, reason: str) -> None:
        self.lost = True
