"""A store whose PostgreSQL is reached through a proxy, clients that never rest, and what they saw.

The store is the real one, from the handlers to the sessions; only the transport is left out. It is
one shard in PostgreSQL, or that beside a home shard in SQLite.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from backends.postgres import PostgresBackend
from backends.sqlite import SqliteBackend
from kvstore.assembly import Assembly, assemble
from kvstore.backend import Backend, Row
from kvstore.clock import SystemClock
from kvstore.config import Config
from kvstore.errors import TimedOutError
from kvstore.opening import close_shards, open_shards
from kvstore.pb import rpc_pb2 as pb
from kvstore.server import _tick_commits, _tick_watches
from kvstore.shard_config import RouteSpec, ShardConfig, ShardSpec
from kvstore.watch import Watch
from tests.backends.cut_history import Asked, End, History, Read
from tests.backends.postgres_proxy import Fault, Proxy, Round, proxying
from tests.backends.postgres_storage import QUICK, PostgresStorage, eventually
from tests.backends.raw import raw
from tests.stack import Answered, serve

if TYPE_CHECKING:
    import asyncpg

    from kvstore.transport.api import UnaryHandler

IMPATIENT: Final = replace(
    QUICK,
    connect_timeout=2.0,
    answer_timeout=0.5,
    reconnect_interval_min=0.005,
    reconnect_interval_max=0.05,
)
CONFIG: Final = replace(
    Config(),
    commit=replace(
        Config().commit,
        queue_rows_max=12,
        retry_interval=0.02,
        shard_timeout=0.1,
        barrier_timeout=0.2,
    ),
    watch=replace(Config().watch, tick_interval=0.01),
)
"""A queue that is sometimes full, and a shard that is soon out."""
TICK_SECONDS: Final = 0.02
CLIENTS: Final = 8
KEYS: Final = [prefix + b"%d" % n for prefix in (b"/a/", b"/b/") for n in range(6)]
BESIDE: Final = ShardConfig(
    [ShardSpec("core", "sqlite:"), ShardSpec("other", "postgresql:")], [RouteSpec(b"/b/", "other")]
)
ALONE: Final = ShardConfig([ShardSpec("core", "postgresql:")])
NO_LEASE: Final = 77
PATIENCE: Final = 30.0
"""Seconds within which a shard must be back, on a machine that is busy."""

_ROWS: Final = (
    "SELECT revision, sub, key, create_revision, version, lease, value FROM revisions"
    " WHERE revision > {after} AND revision <= {until} ORDER BY revision, sub"
)


class Call(Answered):
    """A unary call that can be awaited."""

    def __init__(self) -> None:
        super().__init__()
        self._told = asyncio.Event()

    def reply(self, message: bytes, /) -> None:
        """The answer, once."""
        super().reply(message)
        self._told.set()

    def fail(self, code: int, message: str, /) -> None:
        """The refusal, once."""
        super().fail(code, message)
        self._told.set()

    async def wait(self) -> None:
        """Until there is either."""
        async with asyncio.timeout(PATIENCE):
            await self._told.wait()


class Watching:
    """The stream of a client that watches everything, and always reads."""

    outbox_bytes = 0
    blocked = False

    def __init__(self, history: History) -> None:
        self._history = history

    def send(self, parts: Sequence[bytes], size: int, /) -> None:
        """Write down what is shown."""
        response = pb.WatchResponse.FromString(b"".join(parts))
        assert not response.canceled
        history = self._history
        history.events += response.events
        if not response.created:
            history.reached.append((response.header.revision, len(history.events)))


class Injury(NamedTuple):
    """What is to be done to the writing sessions."""

    fault: Fault
    wanted: Callable[[Round], bool]
    """To which rounds."""
    skip: int
    """After how many of them."""


class Injuries:
    """A plan for the proxy: one injury after the other. What is late may arrive at any moment, best
    of all when something else is just being committed, or has been and nobody was told yet.
    """

    def __init__(self, proxy: Proxy, random: Random) -> None:
        self.left: deque[Injury] = deque()
        self._proxy = proxy
        self._random = random

    def __call__(self, asked: Round) -> Fault | None:
        """What is to become of this round."""
        if not asked.session.startswith("kvstore writer"):
            return None
        if asked.commits and self._random.random() < 0.2:
            self._proxy.thaw()
        if not self.left:
            return None
        next_ = self.left[0]
        if not next_.wanted(asked):
            return None
        if next_.skip:
            self.left[0] = next_._replace(skip=next_.skip - 1)
            return None
        self.left.popleft()
        if next_.fault is Fault.DELAYED:
            loop = asyncio.get_running_loop()
            loop.call_later(self._proxy.delay_seconds / 2, self._proxy.thaw)
        return next_.fault


class Source(Protocol):
    """Where the rows of a shard are, past all of our own code."""

    async def rows(self, after: int, until: int) -> list[Row]:
        """Those of revisions in (after, until], in order."""


class PostgresSource:
    """Over a connection that nobody cuts."""

    def __init__(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        self._connection = connection

    async def rows(self, after: int, until: int) -> list[Row]:
        """From the table."""
        found = await self._connection.fetch(_ROWS.format(after=after, until=until))
        return [record[:] for record in found]


class SqliteSource:
    """In a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def rows(self, after: int, until: int) -> list[Row]:
        """From the file."""
        with raw(self._path) as connection:
            return list(connection.execute(_ROWS.format(after=after, until=until)))


@dataclass
class World:
    """A store that serves, its clients, the proxy, and what is known of it all."""

    store: Assembly
    proxy: Proxy
    backend: PostgresBackend
    sources: Sequence[Source]
    random: Random
    history: History
    broken: list[str] = field(default_factory=list)
    stopping: bool = False
    in_postgres: int = 0
    """Requests acknowledged that PostgreSQL had to commit."""
    elsewhere: int = 0
    """Those that it had not."""

    def __post_init__(self) -> None:
        """Hear of everything."""
        self.injuries = Injuries(self.proxy, Random(self.random.random()))
        self.proxy.plan = self.injuries
        self.store.commits.on_broken = lambda _, reason: self.broken.append(reason)
        self.handlers: dict[bytes, UnaryHandler] = {
            method.path.rpartition(b"/")[2]: method.handler  # type: ignore[misc]
            for method in self.store.methods
        }
        self.routed = len(self.store.commits.queues) > 1
        self.watchers = self.store.hub.open(Watching(self.history))
        self.watchers.create(Watch(b"\0", b"\0", self.history.verified + 1))

    # -- clients -----------------------------------------------------------------------------------

    async def call(self, name: bytes, request: bytes) -> Call:
        """One request, to its end."""
        call = Call()
        serve(self.handlers[name], request, call)
        await call.wait()
        return call

    async def work(self, random: Random) -> None:
        """One client, until the end."""
        while not self.stopping:
            await random.choice((self._put, self._put, self._delete, self._txn, self._read))(random)
            await asyncio.sleep(random.choice((0, 0, 0.001, 0.004)))

    async def _put(self, random: Random) -> None:
        key = random.choice(KEYS)
        asked = self.history.ask([key])
        lease = NO_LEASE if random.random() < 0.05 else 0
        request = pb.PutRequest(key=key, value=asked.changes[0][1] or b"", lease=lease)
        call = await self.call(b"Put", request.SerializeToString())
        answer = pb.PutResponse.FromString(call.body or b"")
        self._end(asked, call, answer.header.revision)

    async def _delete(self, random: Random) -> None:
        key = random.choice(KEYS)
        asked = self.history.ask_delete(key)
        request = pb.DeleteRangeRequest(key=key)
        call = await self.call(b"DeleteRange", request.SerializeToString())
        answer = pb.DeleteRangeResponse.FromString(call.body or b"")
        self._end(asked, call, answer.header.revision if answer.deleted else 0)

    async def _txn(self, random: Random) -> None:
        """Some puts, on condition of what one of the keys was a while ago, or not."""
        prefix = random.choice((b"/a/", b"/b/", b"/"))
        keys = random.sample([key for key in KEYS if key.startswith(prefix)], random.randint(1, 4))
        guard = None
        if random.random() < 0.5:
            guard = (keys[0], self.history.current(keys[0]))
        asked = self.history.ask(keys, guard)
        request = pb.TxnRequest()
        for key, value in asked.changes:
            request.success.add(request_put=pb.PutRequest(key=key, value=value or b""))
        if guard is not None:
            request.compare.add(
                target=pb.Compare.MOD,
                result=pb.Compare.EQUAL,
                key=guard[0],
                mod_revision=guard[1],
            )
        call = await self.call(b"Txn", request.SerializeToString())
        answer = pb.TxnResponse.FromString(call.body or b"")
        self._end(asked, call, answer.header.revision if answer.succeeded else 0)

    async def _read(self, random: Random) -> None:
        key = random.choice(KEYS)
        before = self.history.acknowledged
        call = await self.call(b"Range", pb.RangeRequest(key=key).SerializeToString())
        if call.body is not None:
            answer = pb.RangeResponse.FromString(call.body)
            assert answer.header.revision >= before, "a read is not older than what it follows"
            pairs = [(p.mod_revision, p.create_revision, p.version, p.value) for p in answer.kvs]
            pair = pairs[0] if pairs else None
            self.history.reads.append(Read(key, answer.header.revision, pair))

    def _end(self, asked: Asked, call: Call, revision: int) -> None:
        if call.failed is not None:
            timed_out = call.failed == (TimedOutError.code, TimedOutError.text)
            asked.end = End.UNKNOWN if timed_out else End.NOTHING
        elif revision:
            self.history.acknowledge(asked, revision)
            if self.routed and not any(key.startswith(b"/b/") for key, _ in asked.changes):
                self.elsewhere += 1
            else:
                self.in_postgres += 1
        else:
            asked.end = End.NOTHING

    # -- looking -----------------------------------------------------------------------------------

    async def until_back(self) -> None:
        """Wait until all that was to be injured is, and PostgreSQL commits again."""
        await eventually(lambda: bool(self.broken) or not self.injuries.left, PATIENCE)
        goal = self.in_postgres + CLIENTS + 1
        await eventually(lambda: bool(self.broken) or self.in_postgres >= goal, PATIENCE)
        assert not self.broken, self.broken

    async def verify(self) -> None:
        """Everything that may be shown by now is exact."""
        history = self.history
        until = self.store.commits.visible(range(len(self.sources)))
        shown, reached = len(history.events), len(history.reached)
        found = [
            row for source in self.sources for row in await source.rows(history.verified, until)
        ]
        history.verify(sorted(found), until, shown=shown, reached=reached)
        self.watchers.request_progress()

    async def verify_end(self) -> None:
        """Everything has settled: all of it is exact, and what was so before still is."""
        await eventually(lambda: self.store.commits.idle(), PATIENCE)  # noqa: PLW0108 - typed
        await eventually(
            lambda: self.history.events[-1].kv.mod_revision == self.store.store.revision
        )
        await self.verify()
        self.history.verify_end()
        first = self.history.rows[0][0] - 1
        again = [
            row
            for source in self.sources
            for row in await source.rows(first, self.history.verified)
        ]
        assert self.history.rows == sorted(again)


@asynccontextmanager
async def cut_world(
    storage: PostgresStorage, path: Path | None, random: Random
) -> AsyncIterator[World]:
    """A store that serves; ``path`` is where its SQLite home is, None to have it in PostgreSQL."""
    async with proxying(storage.cluster.port, Random(random.random())) as proxy:
        shards = ALONE if path is None else BESIDE
        postgres = PostgresBackend(
            storage.cluster.url(storage.schema, port=proxy.port),
            shard=shards.names[-1],
            config=IMPATIENT,
            random=Random(random.random()),
        )
        backends: list[Backend] = [postgres]
        if path is not None:
            backends = [SqliteBackend(path, shard="core", config=Config().sqlite), postgres]
        opened = await open_shards(backends, shards)
        direct = await storage.connect()
        sources: list[Source] = [PostgresSource(direct)]
        if path is not None:
            sources.insert(0, SqliteSource(path))
        try:
            store = await assemble(
                backends,
                opened,
                shards.shard_map(),
                CONFIG,
                name="under-test",
                client_urls=(),
                clock=SystemClock(),
                random=Random(random.random()),
                stopped=lambda: False,
            )
            yield World(store, proxy, postgres, sources, random, History(store.store.revision))
        finally:
            proxy.thaw()
            await close_shards(backends)
            await direct.close()


@asynccontextmanager
async def living(world: World) -> AsyncIterator[None]:
    """Clients work inside; behind, all of them have got their answers. Ticks go on until then."""
    async with asyncio.TaskGroup() as ticks:
        ticking = ticks.create_task(_tick(world.store))
        try:
            async with asyncio.TaskGroup() as clients:
                for _ in range(CLIENTS):
                    clients.create_task(world.work(Random(world.random.random())))
                try:
                    yield
                finally:
                    world.stopping = True
            await world.verify_end()
        finally:
            ticking.cancel()


async def _tick(store: Assembly) -> None:
    while True:
        _tick_commits(store)
        _tick_watches(store)
        await asyncio.sleep(TICK_SECONDS)
