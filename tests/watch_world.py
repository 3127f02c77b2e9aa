"""A store with a watch hub over memory backends, clients, and a model of what they must see.

Nothing runs by itself: a shard's commits and reads wait in ``world.disks[shard]``, turns of the
loop in ``world.turns``, reads that are to be tried again in ``world.timers``. Every message is
judged when it is sent (``Client.send``): what it shows must be visible by then and be exactly what
the model says. ``World.check_complete`` judges what has been sent in the end.
"""

from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple, TypeVar

from backends.memory import MemoryBackend, MemoryDisk, Steps
from kvstore.answers import Answer
from kvstore.backend import IndexRow, RowId
from kvstore.clock import ManualClock
from kvstore.commit import Commits
from kvstore.compaction import Compactor
from kvstore.config import CommitConfig, CompactionConfig, StoreConfig, WatchConfig
from kvstore.history import in_range
from kvstore.kv import Header
from kvstore.opening import ABSENT
from kvstore.pb import kv_pb2
from kvstore.pb import rpc_pb2 as pb
from kvstore.recent import RecentValues
from kvstore.shard import ShardMap
from kvstore.store import Store
from kvstore.txn import DeleteRange, Op, Put, Txn
from kvstore.watch import Watch, WatchHub
from kvstore.watch_message import FRAGMENTS, NO_DELETE, NO_PUT, PREVIOUS

ResultT = TypeVar("ResultT")

HEADER = Header(cluster_id=1 << 63, member_id=7, raft_term=3)


class Happened(NamedTuple):
    """A change in the model: ``pair`` is the event's KeyValue, ``before`` what it replaced."""

    revision: int
    key: bytes
    pair: kv_pb2.KeyValue
    before: kv_pb2.KeyValue | None

    @property
    def is_put(self) -> bool:
        """Is it a put?"""
        return self.pair.version > 0


class NoLeases:
    """No lease exists."""

    def exists(self, lease: int) -> bool:
        """None does."""
        return False

    def attach(self, lease: int, key: bytes, revision: int) -> None:
        """Never called."""
        raise AssertionError

    def detach(self, lease: int, key: bytes) -> None:
        """Never called."""
        raise AssertionError

    def after_absence(self, lease: int, answer: Answer) -> None:
        """Never called."""
        raise AssertionError


class Ignore:
    """An Answer that nobody reads."""

    def reply(self, message: bytes) -> None:
        """Done."""

    def fail(self, code: int, message: str) -> None:
        """Refused."""


@dataclass
class Seen:
    """What a client has seen of one watcher."""

    watch: Watch
    watch_id: int
    start: int
    """The first revision that it is owed."""
    events: list[kv_pb2.Event] = field(default_factory=list)
    progress: int = 0
    fragment: list[kv_pb2.Event] = field(default_factory=list)
    """Of a response that is not complete yet."""
    cancelled: bool = False
    compact_revision: int = 0

    @property
    def last(self) -> int:
        """Everything it was told to have seen."""
        last = self.events[-1].kv.mod_revision if self.events else 0
        return max(last, self.progress)


class Client:
    """A client's stream. While it does not read, what it is sent piles up in ``outbox_bytes``."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.outbox_bytes = 0
        self.reading = True
        self.messages: list[pb.WatchResponse] = []
        self.seen: list[Seen] = []
        self.open: dict[int, Seen] = {}
        self._asked: list[Watch] = []
        self.stream = world.hub.open(self)

    def send(self, parts: Sequence[bytes], size: int, /) -> None:
        """The hub's response; see ``_judge``."""
        message = b"".join(parts)
        assert len(message) == size
        if not self.reading:
            self.outbox_bytes += size
        response = pb.WatchResponse.FromString(message)
        assert len(response.SerializeToString()) == size, "no field is written in vain"
        self.messages.append(response)
        self._judge(response)

    def create(
        self,
        key: bytes,
        end: bytes | None = None,
        start: int = 0,
        *,
        watch_id: int = 0,
        wants: int = 0,
        notify: bool = False,
    ) -> Seen | None:
        """Ask for a watch; what will be seen of it, or None if it was refused."""
        self._asked.append(Watch(key, end, start, watch_id, wants, notify))
        before = len(self.seen)
        self.stream.create(self._asked[-1])
        assert not self._asked, "a create request is answered at once"
        return self.seen[before] if len(self.seen) > before else None

    def cancel(self, watch_id: int) -> None:
        """Cancel a watch."""
        self.stream.cancel(watch_id)
        assert watch_id not in self.open

    def read(self) -> None:
        """Read all, and from now on."""
        self.reading = True
        self.outbox_bytes = 0
        self.stream.writable()

    @property
    def last(self) -> pb.WatchResponse:
        """The newest response."""
        return self.messages[-1]

    def _judge(self, response: pb.WatchResponse) -> None:
        durable = self.world.store.commits.durable
        assert response.header.revision <= durable, "nothing is shown before it is durable"
        if response.created:
            self._created(response, durable)
        elif response.canceled:
            self._canceled(response)
        elif response.events:
            self._events(self.open[response.watch_id], response)
        else:
            self._progress(response)

    def _created(self, response: pb.WatchResponse, durable: int) -> None:
        watch = self._asked.pop(0)
        assert response.header.revision == durable
        if response.canceled:
            assert response.watch_id == -1
            assert response.cancel_reason
            return
        assert response.watch_id not in self.open
        seen = Seen(watch, response.watch_id, watch.start_revision or durable + 1)
        self.open[response.watch_id] = seen
        self.seen.append(seen)

    def _canceled(self, response: pb.WatchResponse) -> None:
        seen = self.open.get(response.watch_id)
        assert seen is not None
        assert not seen.fragment, "a response's fragments come together"
        if response.compact_revision:
            assert not seen.cancelled
            assert response.header.revision == 0
            assert not response.cancel_reason
            assert response.compact_revision == self.world.store.compact_revision
            assert max(seen.start, seen.last + 1) <= response.compact_revision
            missed = self.world.expected(seen, response.compact_revision - 1)
            assert missed or seen.last < response.compact_revision
            seen.compact_revision = response.compact_revision
        else:
            assert response.header.revision == self.world.store.commits.durable
            del self.open[response.watch_id]
        seen.cancelled = True

    def _events(self, seen: Seen, response: pb.WatchResponse) -> None:
        assert not seen.cancelled, "nothing follows a cancellation"
        assert seen.start <= response.events[0].kv.mod_revision
        if not seen.fragment:
            assert seen.last < response.events[0].kv.mod_revision, "no revision continues"
        assert response.events[-1].kv.mod_revision <= response.header.revision
        shards = self.world.store.shards_of(seen.watch.key, seen.watch.end)
        assert response.header.revision <= self.world.store.commits.visible(shards)
        seen.fragment += response.events
        assert not response.fragment or seen.watch.wants & FRAGMENTS
        if response.fragment:
            return
        first, last = seen.fragment[0], seen.fragment[-1]
        events, seen.fragment = seen.fragment, []
        wanted = self.world.expected(seen, last.kv.mod_revision)[len(seen.events) :]
        assert wanted, "an event that is not expected"
        assert wanted[0].revision == first.kv.mod_revision, "the first is the next one expected"
        assert len(events) == len(wanted), "complete revisions"
        for event, happened in zip(events, wanted, strict=True):
            self._event(seen, event, happened)
        seen.events += events

    def _event(self, seen: Seen, event: kv_pb2.Event, happened: Happened) -> None:
        assert event.kv == happened.pair
        assert (event.type == kv_pb2.Event.PUT) == happened.is_put
        if not seen.watch.wants & PREVIOUS or happened.before is None:
            assert not event.HasField("prev_kv")
        elif event.HasField("prev_kv"):
            assert event.prev_kv == happened.before
        else:
            assert happened.revision <= self.world.store.compact_revision, "prev_kv is there"

    def _progress(self, response: pb.WatchResponse) -> None:
        revision = response.header.revision
        told = (
            list(self.open.values()) if response.watch_id == -1 else [self.open[response.watch_id]]
        )
        for seen in told:
            assert not seen.cancelled
            assert not seen.fragment
            assert seen.last <= revision, "progress does not go back"
            assert seen.start <= revision + 1
            assert len(self.world.expected(seen, revision)) == len(seen.events)
            shards = self.world.store.shards_of(seen.watch.key, seen.watch.end)
            assert revision <= self.world.store.commits.visible(shards)
            seen.progress = revision


class World:
    """See the module's text. ``routes`` send prefixes to further shards; ``stored`` is what an
    earlier process left, shards ``missing`` cannot be reached yet.
    """

    def __init__(
        self,
        *,
        routes: Mapping[bytes, int] | None = None,
        config: WatchConfig | None = None,
        cache_bytes_max: int = 1 << 20,
        seed: int = 1,
        stored: Sequence[MemoryDisk] = (),
        missing: Collection[int] = (),
    ) -> None:
        self.routes = dict(routes or {})
        self.config = config or WatchConfig()
        self.cache_bytes_max = cache_bytes_max
        self.clock = ManualClock()
        self.turns = Steps()
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.lost: list[tuple[int, str]] = []
        self.disks = [Steps() for _ in range(1 + max(self.routes.values(), default=0))]
        self.backends = [
            MemoryBackend(stored[n] if stored else MemoryDisk(shard=str(n)), later=steps)
            for n, steps in enumerate(self.disks)
        ]
        self.commits = Commits(
            [
                (backend, ABSENT if n in missing else finish(backend.open()))
                for n, backend in enumerate(self.backends)
            ],
            clock=self.clock,
            config=CommitConfig(gather_waiters_min=1 << 30),  # nobody is held back for others
            call_soon=self.turns,
            call_later=lambda seconds, step: self.timers.append((seconds, step)),
        )
        self.commits.durable = max(backend.disk.tip for backend in self.backends)
        self.commits.on_broken = lambda shard, reason: self.lost.append((shard, reason))
        self.hub = WatchHub(
            HEADER,
            clock=self.clock,
            random=Random(seed),
            config=self.config,
            call_soon=self.turns,
        )
        memory = StoreConfig(cache_bytes_max=cache_bytes_max, recent_bytes_max=cache_bytes_max)
        self.store = Store(self.commits, ShardMap(self.routes), NoLeases(), self.hub, memory)
        self.hub.bind(self.store)
        self.compactor = Compactor(self.store, CompactionConfig(), self.turns, self.hub.compacted)
        self.happened: list[Happened] = []
        self.live: dict[bytes, kv_pb2.KeyValue] = {}
        self.clients: list[Client] = []
        for shard in range(len(self.disks)):
            if shard not in missing:
                left = self.store.load_rows(shard, self.rows(shard))
                self.compactor.recover(shard, left)

    # -- writing -----------------------------------------------------------------------------------

    def write(self, ops: Sequence[Op]) -> int:
        """Execute operations in one Txn and in the model."""
        _, revision = self.store.txn(Txn((), ops, ()))
        for op in ops:
            match op:
                case Put(key, value):
                    self._happen(revision, key, value)
                case DeleteRange(key, end):
                    for found in sorted(k for k in self.live if in_range(k, key, end)):
                        self._happen(revision, found, None)
                case _:
                    raise AssertionError(op)
        return revision

    def put(self, key: bytes, value: bytes = b"v") -> int:
        """Put one key; not committed yet."""
        return self.write([Put(key, value)])

    def delete(self, key: bytes, end: bytes | None = None) -> int:
        """Delete; not committed yet."""
        return self.write([DeleteRange(key, end)])

    def compact(self, revision: int) -> None:
        """Ask for a compaction; it takes effect once the home shard has committed it."""
        self.compactor.compact(revision, physical=False, answer=Ignore(), body=b"")

    def _happen(self, revision: int, key: bytes, value: bytes | None) -> None:
        replaced = before = self.live.pop(key, None)
        if before is not None and before.mod_revision == revision:  # put by the same Txn
            earlier = [h for h in self.happened if (h.revision, h.key) == (revision, key)]
            replaced = earlier[0].before
        pair = kv_pb2.KeyValue(key=key, mod_revision=revision)
        if value is not None:
            pair.create_revision = before.create_revision if before else revision
            pair.version = before.version + 1 if before else 1
            pair.value = value
            self.live[key] = pair
        self.happened.append(Happened(revision, key, pair, replaced))

    # -- restarting --------------------------------------------------------------------------------

    def restart(self, *missing: int) -> "World":
        """Another process over what is stored."""
        for backend in self.backends:
            backend.crash()
        disks = [backend.disk for backend in self.backends]
        again = World(
            routes=self.routes,
            config=self.config,
            cache_bytes_max=self.cache_bytes_max,
            stored=disks,
            missing=missing,
        )
        for happened in self.happened:
            if happened.revision <= disks[self.store.shards.of(happened.key)].tip:
                again.happened.append(happened)
                again.live.pop(happened.key, None)
                if happened.is_put:
                    again.live[happened.key] = happened.pair
        return again

    def rows(self, shard: int) -> list[IndexRow]:
        """What a shard has to load."""
        return [row[:6] for row in self.backends[shard].disk.rows.values()]

    def join(self, shard: int, left: list[RowId]) -> None:
        """A missing shard is there and loaded, which has ``left`` rows to drop."""
        backend = self.backends[shard]
        self.commits.prepare(shard, backend, finish(backend.open()))
        self.commits.join(shard)
        self.compactor.recover(shard, left)

    # -- running -----------------------------------------------------------------------------------

    def client(self) -> Client:
        """A new client's stream."""
        self.clients.append(Client(self))
        return self.clients[-1]

    def forget_values(self) -> None:
        """Once all is durable: values are in storage only."""
        assert self.commits.idle()
        store = self.store
        store.index.evict(0, store.revision)
        store._recent = [RecentValues(r._bytes_max, r._stored) for r in store._recent]

    def settle(self) -> None:
        """Let commits, reads and turns run until nothing waits."""
        while self.turns.waiting or any(disk.waiting for disk in self.disks):
            self.turns.run_all()
            for disk in self.disks:
                disk.run_all()

    def wait(self) -> None:
        """A moment passes: what was put off is done, the hub ticks, and all settles."""
        timers, self.timers = self.timers, []
        for _, step in timers:
            step()
        self.hub.tick()
        self.settle()

    # -- judging -----------------------------------------------------------------------------------

    def expected(self, seen: Seen, up_to: int) -> list[Happened]:
        """What a watcher must have seen up to a revision."""
        watch = seen.watch
        return [
            change
            for change in self.happened
            if seen.start <= change.revision <= up_to
            and in_range(change.key, watch.key, watch.end)
            and not watch.wants & (NO_PUT if change.is_put else NO_DELETE)
        ]

    def check_complete(self) -> None:
        """Once all is calm and read: each watcher has everything, or was told why not."""
        for client in self.clients:
            for seen in client.open.values():
                if not seen.cancelled:
                    assert len(seen.events) == len(self.expected(seen, self.store.revision))


def finish(coroutine: Coroutine[object, None, ResultT]) -> ResultT:
    """The result of a coroutine that never has to wait."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: ResultT = stop.value
        return result
    raise AssertionError("the coroutine waited")


def world_of(*keys: bytes, config: WatchConfig | None = None) -> World:
    """A world with revisions 2, 3, ... that put ``keys``."""
    world = World(config=config)
    for key in keys:
        world.put(key)
    world.settle()
    return world
