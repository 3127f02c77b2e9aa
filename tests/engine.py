"""The whole engine over memory backends, its loop and its clock moved by hand.

``engine.steps`` holds what the loop would run: nothing is committed until a test runs it.
A crash forgets the engine and starts another over what the disks hold.
"""

from collections.abc import Mapping
from functools import partial
from random import Random

from backends.memory import MemoryBackend, MemoryDisk, Steps
from kvstore.backend import IndexRow
from kvstore.clock import ManualClock
from kvstore.commit import Commits
from kvstore.config import Config
from kvstore.history import Entry
from kvstore.kv import Header
from kvstore.lease import Lessor
from kvstore.shard import ShardMap
from kvstore.store import Store
from kvstore.txn import DeleteRange, Put
from tests.stack import run_now


class Waiter:
    """An Answer that remembers what it was told."""

    def __init__(self) -> None:
        self.body: bytes | None = None
        self.failure: tuple[int, str] | None = None

    @property
    def waits(self) -> bool:
        """Has nothing been answered yet?"""
        return self.body is None and self.failure is None

    def reply(self, message: bytes) -> None:
        """Answered; an answer comes once."""
        assert self.waits, "answered twice"
        self.body = message

    def fail(self, code: int, message: str) -> None:
        """Refused; likewise once."""
        assert self.waits, "answered twice"
        self.failure = (code, message)


class Events:
    """A watch hub that only writes down what changed: (key, revision, is it a deletion)."""

    def __init__(self) -> None:
        self.seen: list[tuple[bytes, int, bool]] = []

    def record(
        self,
        shard: int,
        key: bytes,
        entry: Entry,
        framed: bytes,
        previous: Entry | None,
        previous_framed: bytes | None,
    ) -> None:
        """A change was applied."""
        self.seen.append((key, entry[0], entry[3] == 0))

    def advance(self) -> None:
        """A frontier moved."""

    def compacted(self) -> None:
        """The compact revision moved."""


class Engine:
    """See the module's text. ``routes`` send prefixes to the shards of ``disks``, 0 being home."""

    def __init__(
        self,
        *,
        disks: list[MemoryDisk] | None = None,
        routes: Mapping[bytes, int] | None = None,
        clock: ManualClock | None = None,
        config: Config | None = None,
        seed: int = 0,
    ) -> None:
        self.routes = dict(routes or {})
        self.config = config or Config()
        self.clock = clock or ManualClock()
        self.disks = disks or [MemoryDisk(shard=str(n)) for n in range(1 + len(self.routes))]
        self.seed = seed
        self.steps = Steps()
        self.events = Events()
        self.backends = [MemoryBackend(disk, later=self.steps) for disk in self.disks]
        fences = [run_now(backend.open()) for backend in self.backends]
        self.commits = Commits(
            list(zip(self.backends, fences, strict=True)),
            clock=self.clock,
            config=self.config.commit,
            call_soon=self.steps,
            call_later=lambda _, step: self.steps(step),
        )
        self.lessor = Lessor(self.clock, Random(seed), self.config.lease)
        self.store = Store(
            self.commits, ShardMap(self.routes), self.lessor, self.events, self.config.store
        )
        self.lessor.bind(self.store)
        self.header = Header(cluster_id=1, member_id=2, raft_term=fences[0].epoch)
        for shard, backend in enumerate(self.backends):
            run_now(backend.load_index(partial(self._load, shard)))
        self.lessor.load(run_now(self.backends[0].load_leases()))

    def _load(self, shard: int, rows: list[IndexRow]) -> None:
        self.store.load_rows(shard, rows)

    def crash(self, *, seconds: float = 0.0) -> "Engine":
        """Another engine over what the disks hold, ``seconds`` later."""
        for backend in self.backends:
            backend.crash()
        return Engine(
            disks=self.disks,
            routes=self.routes,
            clock=ManualClock(self.clock.now + seconds),
            config=self.config,
            seed=self.seed + 1,
        )

    def settle(self) -> None:
        """Run the loop until it has nothing to do."""
        self.steps.run_all()

    def pass_time(self, seconds: float) -> None:
        """Let time go by with the lessor's ticks in between, and the loop running."""
        end = self.clock.now + seconds
        while self.clock.now < end:
            pause = self.lessor.tick()
            self.settle()
            self.clock.advance(min(pause, end - self.clock.now))
        self.lessor.tick()
        self.settle()

    def put(self, key: bytes, lease: int = 0) -> int:
        """Put ``key``; the revision."""
        return self.store.put(Put(key, b"v", lease)).revision

    def delete(self, key: bytes) -> int:
        """Delete ``key``; how many there were."""
        return self.store.delete_range(DeleteRange(key, None, False)).deleted

    def live(self) -> list[bytes]:
        """Live keys at the head."""
        slices = self.store.index.slices(b"", b"\0")
        return [key for chunk, low, high in slices for key in chunk.keys[low:high]]

    def granted(self, lease_id: int, ttl: int) -> int:
        """Grant a lease and wait until keys may attach; its id."""
        lease_id, _ = self.lessor.grant(lease_id, ttl)
        self.settle()
        assert self.lessor.exists(lease_id)
        return lease_id

    def left(self, lease_id: int) -> int | None:
        """Whole seconds that a lease has left, None if it is unknown."""
        found = self.lessor.time_to_live(lease_id, keys=False)
        return None if found is None else found.left

    def keys_of(self, lease_id: int) -> list[bytes]:
        """Keys attached to a lease, which exists."""
        found = self.lessor.time_to_live(lease_id, keys=True)
        assert found is not None
        return found.keys

    def deaths(self) -> list[tuple[bytes, int]]:
        """Deletions since the start: (key, revision)."""
        return [(key, revision) for key, revision, dead in self.events.seen if dead]
