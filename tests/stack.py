"""The engine and its KV service over memory backends, driven by hand: no sockets, no loop, no time.

Commits wait in ``steps`` until the test runs them. Reads of values are answered at once unless
told otherwise, so that requests execute in the order in which they are sent.
"""

from collections.abc import Callable, Coroutine, Sequence
from typing import TypeVar

from backends.memory import MemoryBackend, MemoryDisk, Steps
from kvstore.answers import Answer
from kvstore.backend import IndexRow, RowId
from kvstore.clock import ManualClock
from kvstore.commit import Commits
from kvstore.compaction import Compactor
from kvstore.config import CommitConfig, CompactionConfig, RequestConfig, StoreConfig
from kvstore.errors import BackendError
from kvstore.history import Entry
from kvstore.kv import Header
from kvstore.rpc.kv import KvService
from kvstore.shard import ShardMap
from kvstore.store import Store
from kvstore.transport.api import Call, StatusError

ResultT = TypeVar("ResultT")


def run_now(coroutine: Coroutine[object, None, ResultT]) -> ResultT:
    """The result of a coroutine that never has to wait."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: ResultT = stop.value
        return result
    raise AssertionError("the coroutine waited")


class NoHub:
    """A hub without watchers."""

    def record(
        self,
        shard: int,
        key: bytes,
        entry: Entry,
        framed: bytes,
        previous: Entry | None,
        previous_framed: bytes | None,
    ) -> None:
        """Nobody watches."""

    def advance(self) -> None:
        """Nobody watches."""

    def compacted(self) -> None:
        """Nobody watches."""


class FixedLeases:
    """Leases that simply exist; remembers what is attached."""

    def __init__(self, ids: set[int]) -> None:
        self.ids = ids
        self.attached: dict[bytes, int] = {}

    def exists(self, lease: int) -> bool:
        """Is it one of ours?"""
        return lease in self.ids

    def attach(self, lease: int, key: bytes, revision: int) -> None:
        """Remember it."""
        assert key not in self.attached, "a key has one lease"
        self.attached[key] = lease

    def detach(self, lease: int, key: bytes) -> None:
        """Forget it."""
        assert self.attached.pop(key) == lease, "detached from the lease it had"

    def after_absence(self, lease: int, answer: Answer) -> None:
        """It was never there."""
        answer.reply(b"")


class PromptReads(MemoryBackend):
    """Commits in steps, reads at once."""

    def read_values(
        self, ids: Sequence[RowId], done: Callable[[list[bytes | None] | BackendError], None]
    ) -> None:
        """The values, inside the call."""
        rows = self.disk.rows
        done([rows[id_][6] if id_ in rows else None for id_ in ids])


class Answered:
    """A transport's Call that keeps what it was given."""

    peer = "test"
    deadline = None

    def __init__(self) -> None:
        self.body: bytes | None = None
        self.failed: tuple[int, str] | None = None
        self.cancelled = False
        self.on_cancel: Callable[[], None] | None = None

    def metadata(self, name: bytes, /) -> bytes | None:
        """None is sent."""
        return None

    def reply(self, message: bytes, /) -> None:
        """The answer, once."""
        assert not self.done, "answered once"
        self.body = message

    def reply_parts(self, parts: Sequence[bytes], size: int, /) -> None:
        """Likewise, in parts."""
        body = b"".join(parts)
        assert len(body) == size, "the parts add up"
        self.reply(body)

    def fail(self, code: int, message: str, /) -> None:
        """The refusal, once."""
        assert not self.done, "answered once"
        self.failed = (code, message)

    @property
    def done(self) -> bool:
        """Has it been answered?"""
        return self.body is not None or self.failed is not None


def serve(
    method: Callable[[bytes, Call], bytes | None], payload: bytes, call: Answered | None = None
) -> Answered:
    """Send one unary request; it may be answered later, when commits have been run."""
    call = call or Answered()
    try:
        body = method(payload, call)
    except StatusError as error:
        call.fail(error.code, error.message)
    else:
        if body is not None:
            call.reply(body)
    return call


COMMIT = CommitConfig(batch_rows_max=8)
STORE = StoreConfig(read_chunk_keys=2, fetch_rows_max=3)


class Stack:
    """One process over ``disks``; another one over the same disks is a restart."""

    def __init__(
        self,
        disks: Sequence[MemoryDisk],
        *,
        routes: dict[bytes, int] | None = None,
        leases: set[int] | None = None,
        store: StoreConfig = STORE,
        commit: CommitConfig = COMMIT,
        backend: type[MemoryBackend] = PromptReads,
    ) -> None:
        self.steps = Steps()
        self.turns = Steps()
        self.clock = ManualClock()
        self.backends = [backend(disk, later=self.steps) for disk in disks]
        fences = [run_now(opened.open()) for opened in self.backends]
        self.commits = Commits(
            list(zip(self.backends, fences, strict=True)),
            clock=self.clock,
            config=commit,
            call_soon=self.turns,
            call_later=lambda _, step: self.turns(step),
        )
        self.leases = FixedLeases(leases or set())
        self.store = Store(self.commits, ShardMap(routes), self.leases, NoHub(), store)
        self.compactor = Compactor(
            self.store, CompactionConfig(step_keys=2, drop_rows_max=3), self.turns, lambda: None
        )
        for shard, opened in enumerate(self.backends):
            self._load(shard, opened)
        self.kv = KvService(
            self.store,
            self.compactor,
            Header(cluster_id=1, member_id=2, raft_term=3),
            request=RequestConfig(),
            reads=store,
            call_soon=self.turns,
        )

    def _load(self, shard: int, opened: MemoryBackend) -> None:
        left: list[RowId] = []

        def sink(rows: list[IndexRow]) -> None:
            left.extend(self.store.load_rows(shard, rows))

        run_now(opened.load_index(sink))
        self.compactor.recover(shard, left)

    def turn(self) -> None:
        """Let everything run that waits for a turn of the loop, commits excepted."""
        self.turns.run_all()

    def settle(self) -> None:
        """Run commits and turns until nothing waits."""
        while self.turns.waiting or self.steps.waiting:
            self.turns.run_all()
            self.steps.run_next()

    def crash(self) -> None:
        """Die without a word; the disks stay."""
        for opened in self.backends:
            opened.crash()


def all_versions(store: Store) -> dict[bytes, list[Entry]]:
    """Every version that the index knows, by key, oldest first."""
    found: dict[bytes, list[Entry]] = {}
    for segment in store.index._older:
        for key, entries in segment.items():
            found[key] = list(entries)
    for chunk, low, high in store.index.slices(b"", b"\0"):
        for key, entry in zip(chunk.keys[low:high], chunk.entries[low:high], strict=True):
            found.setdefault(key, []).append(entry)
    return found
