"""A generator process in miniature, against the fake etcd in the same loop."""

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial

from bench import plan, records
from bench.client import requests
from bench.clock import now_us
from bench.drive.actor import Acting
from bench.drive.apiserver import Apiserver
from bench.drive.site import Line, Site
from bench.drive.ticker import Ticker
from bench.drive.watching import Watching
from kvstore.pb import kv_pb2
from kvstore.pb import rpc_pb2 as pb
from kvstore.transport.api import Call, Method, StatusError, Stream
from kvstore.transport.server import Server
from tests.bench.fake_etcd import FakeEtcd, Watch
from tests.stack import Answered
from tests.transport.limits import TEST_LIMITS
from tests.transport.running import bound, eventually

PODS, EVENTS = b"/registry/pods/", b"/registry/events/"
Row = dict[str, int | bytes]


class Store(FakeEtcd):
    """The fake etcd; calls can be refused, kept unanswered, or preceded by something."""

    def __init__(self) -> None:
        super().__init__()
        self.refusals: dict[bytes, deque[tuple[int, str]]] = defaultdict(deque)
        """What the next calls of a path get instead of their answer."""
        self.silent: set[bytes] = set()
        self.before: deque[Callable[[], object]] = deque()
        """Done right before the next Txns, one each: somebody is faster."""
        self.after_range: Callable[[], object] = lambda: None
        self.asked: list[tuple[bytes, bytes]] = []

    def methods(self) -> list[Method]:
        """As the fake's."""
        unary = {
            requests.RANGE: self.range,
            requests.TXN: self.txn,
            requests.COMPACT: self.compact,
            requests.GRANT: self.grant,
            requests.STATUS: self.status,
        }
        found = [
            Method.unary(path, partial(self._serve, path, handler))
            for path, handler in unary.items()
        ]
        return [
            *found,
            Method.bidi_stream(requests.WATCH, lambda stream: Watch(self, stream)),
            Method.server_stream(requests.RANGE_STREAM, lambda stream: Chunks(self, stream)),
        ]

    def _serve(
        self, path: bytes, handler: Callable[[bytes, Call], bytes], message: bytes, call: Call
    ) -> bytes | None:
        self.asked.append((path, message))
        if path in self.silent:
            return None
        if self.refusals[path]:
            raise StatusError(*self.refusals[path].popleft())
        if path == requests.TXN and self.before:
            self.before.popleft()()
        answer = handler(message, call)
        if path in {requests.RANGE, requests.RANGE_STREAM}:
            self.after_range()
        return answer

    def put(self, key: bytes, value: bytes) -> int:
        """Somebody else writes."""
        self._put(key, value, 0)
        return self.revision

    def delete(self, key: bytes) -> None:
        """Somebody else deletes."""
        self._delete(key)

    def get(self, key: bytes) -> kv_pb2.KeyValue | None:
        """As it is now."""
        return self.at(key, self.revision)


class Chunks:
    """The sink of a RangeStream: one object in each chunk, count and header in the last."""

    def __init__(self, store: Store, stream: Stream) -> None:
        self._store, self._stream = store, stream

    def message(self, message: bytes, /) -> None:
        """Send all of it."""
        call: Call = Answered()  # of no use to the fake
        raw = self._store._serve(requests.RANGE_STREAM, self._store.range, message, call)
        if raw is None:
            return
        whole = pb.RangeResponse.FromString(raw)
        parts = [pb.RangeResponse(kvs=[kv]) for kv in whole.kvs]
        parts.append(pb.RangeResponse(header=whole.header, count=whole.count))
        for part in parts:
            raw = pb.RangeStreamResponse(range_response=part).SerializeToString()
            self._stream.send([raw], len(raw))
        self._stream.finish()

    def half_closed(self) -> None:
        """It asks once."""

    def writable(self) -> None:
        """Lists are small."""

    def closed(self) -> None:
        """Nothing to give back."""


class World:
    """A site with one apiserver; a test adds actors and watchers."""

    def __init__(self, store: Store, site: Site, made: plan.Plan) -> None:
        self.store, self.site, self.plan = store, site, made
        self.apiserver = Apiserver(site, 0, made)
        self.group: asyncio.TaskGroup | None = None
        self.watchers: list[Watching] = []

    def rows(self, table: records.Table, **columns: int | bytes) -> list[Row]:
        """What was recorded of a table, where it has these values."""
        recorder = self.site.recorders[table.name]
        rows = [dict(zip(table.columns, row, strict=True)) for row in recorder._rows]
        return [row for row in rows if all(row[name] == v for name, v in columns.items())]

    def column(self, table: records.Table, name: str, **columns: int | bytes) -> list[int | bytes]:
        """One column of ``rows``."""
        return [row[name] for row in self.rows(table, **columns)]

    def act(self, *steps: plan.Step, number: int = 0) -> Acting:
        """An actor that begins now."""
        acting = Acting(plan.Actor(f"actor {number}", 0, steps), number, self.apiserver)
        acting.begin()
        return acting

    async def done(self, *steps: plan.Step, number: int = 0) -> Acting:
        """An actor, at its end."""
        acting = self.act(*steps, number=number)
        await eventually(lambda: acting.done)
        return acting

    def watch(self, watcher: plan.Watcher, **line: int) -> Watching:
        """A watcher of its own."""
        watching = Watching(self.site, Line(self.site, **line), watcher, -1, lambda *_: None)
        self.watchers.append(watching)
        assert self.group is not None
        watching.line.up(self.group)
        return watching

    def lines(self) -> Iterator[Line]:
        """All there are."""
        yield from self.apiserver.lines()
        for watching in self.watchers:
            yield watching.line


@asynccontextmanager
async def living(
    *resources: bytes, prefix: bytes = b"", timeout_us: int = 5_000_000
) -> AsyncIterator[World]:
    """A world whose caches are filled, and whose load begins now."""
    store = Store()
    failures: list[str] = []
    server = Server(
        methods=store.methods(),
        http_handler=lambda _: None,
        limits=TEST_LIMITS,
        clock=time.monotonic,
        wall=time.time,
        on_failure=lambda what, error: failures.append(f"{what}: {error!r}"),
    )
    sock = bound()
    server.listen(sock)
    loop = asyncio.get_running_loop()
    site = Site(
        loop=loop,
        host="127.0.0.1",
        port=sock.getsockname()[1],
        part=0,
        run="test",
        prefix=prefix,
        timeout_us=timeout_us,
        ticker=Ticker(loop),
        recorders={table.name: records.Recorder(table) for table in records.TABLES},
    )
    world = World(store, site, plan.Plan(duration_us=1, apiservers=1, resources=resources))
    try:
        async with asyncio.TaskGroup() as group:
            world.group = group
            world.apiserver.up(group)
            await eventually(lambda: world.apiserver.ready)
            site.zero_us = now_us()
            yield world
            site.stopping = True
            for line in world.lines():
                line.close()
            await eventually(lambda: all(line.connection is None for line in world.lines()))
    finally:
        site.ticker.stop()
        await server.drain(0.0, message="server stopped")
    assert not failures
