"""One life of the server in the simulation: everything but its sockets, on a loop of its own.

It starts as the server does, ticks as the server does, and stops for the reasons for which the
server stops. What it is asked while it is paused arrives when it goes on.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from random import Random
from typing import cast

from kvstore import server
from kvstore.answers import Answer, Then
from kvstore.assembly import Assembly, assemble
from kvstore.config import (
    CommitConfig,
    CompactionConfig,
    Config,
    LeaseConfig,
    StoreConfig,
    WatchConfig,
)
from kvstore.errors import BackendError, StoreError
from kvstore.opening import Returning, close_shards, open_shards
from kvstore.shard import HOME
from kvstore.shard_config import RouteSpec, ShardConfig, ShardSpec
from kvstore.store import Store
from kvstore.transport.api import Kind, StreamHandler, StreamSink, UnaryHandler
from kvstore.transport.api import Stream as StreamApi
from tests.sim_backend import SimBackend
from tests.sim_loop import Loop
from tests.sim_world import NAMES, World
from tests.stack import Answered, serve

CONFIG = Config(
    commit=CommitConfig(
        batch_rows_max=3,
        queue_rows_max=5,
        shard_timeout=2.0,
        barrier_requests_max=3,
        held_requests_max=3,
        record_interval=1.0,
        return_interval=0.5,
    ),
    store=StoreConfig(
        cache_bytes_max=100, recent_bytes_max=500, read_chunk_keys=2, fetch_rows_max=3
    ),
    compaction=CompactionConfig(step_keys=2, drop_rows_max=3),
    lease=LeaseConfig(checkpoint_interval=3.0),
    watch=WatchConfig(
        progress_interval=2.0,
        fresh_changes_max=6,
        response_bytes=60,
        outbox_bytes_max=150,
        control_bytes_max=100_000,
        catch_up_changes=3,
        catch_up_fetches_max=1,
        catch_up_fetch_rows=2,
    ),
)
SERVICE = b"/etcdserverpb."
STOP_SECONDS = 2.0
"""That a stop waits for calls, and then for commits."""


class OneAnswer:
    """A stream that asks once and is over with the first answer; ``call`` gets it."""

    peer = "test"
    deadline = None
    cancelled = False
    blocked = False
    outbox_bytes = 0

    def __init__(self, call: Answered) -> None:
        self.call = call

    def metadata(self, name: bytes, /) -> bytes | None:
        """None is sent."""
        return None

    def send(self, parts: Sequence[bytes], size: int, /) -> None:
        """The answer."""
        self.call.reply(b"".join(parts))

    def finish(self, code: int = 0, message: str = "", /) -> None:
        """The end, with or without it."""
        if not self.call.done:
            self.call.fail(code, message)


class Process:
    """See the module's text. ``over``: why it has ended; empty while it lives."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.loop = Loop(world.clock)
        self.backends = [SimBackend(disk, self.loop) for disk in world.disks]
        self.paused = False
        self.over = ""
        self.assembly: Assembly | None = None
        self._calls: list[Answered] = []
        self._stopping = False
        self._handlers: dict[bytes, tuple[Kind, UnaryHandler | StreamHandler]] = {}
        self._tasks = [self.loop.create_task(self._start())]

    # -- what is known of it -----------------------------------------------------------------------

    @property
    def serving(self) -> bool:
        """Does it take requests?"""
        return self.assembly is not None and not self._stopping and not self.over

    @property
    def store(self) -> Store:
        """Once it serves."""
        assert self.assembly is not None, "it serves"
        return self.assembly.store

    @property
    def absent(self) -> set[int]:
        """Shards that it has not loaded."""
        if self.assembly is None:
            return set(self.world.shards.all)
        return {queue.number for queue in self.assembly.commits.queues if queue.missing}

    @property
    def out(self) -> set[int]:
        """Shards whose databases it knows to be away."""
        if self.assembly is None or self.paused:
            return set()
        queues = self.assembly.commits.queues
        return {queue.number for queue in queues if queue.out and not queue.broken}

    @property
    def broken(self) -> set[int]:
        """Shards that it has lost for good."""
        queues = self.assembly.commits.queues if self.assembly is not None else ()
        return {queue.number for queue in queues if queue.broken}

    @property
    def calm(self) -> bool:
        """Is everything there, and nothing under way?"""
        if not self.serving or self.absent or self.out or self.broken or self.loop.ready:
            return False
        commits = self.store.commits
        return commits.idle() and not commits.lease_lapsed()

    @property
    def dropping(self) -> bool:
        """Does compaction go on?"""
        assert self.assembly is not None, "it serves"
        return any(drops.count for drops in self.assembly.compactor.drops)

    # -- what happens to it ------------------------------------------------------------------------

    def serve(self, path: str, payload: bytes, call: Answered) -> None:
        """One request; ``call`` gets the answer, now or later."""
        kind, handler = self._handlers[SERVICE + path.encode()]
        self._calls = [each for each in self._calls if not each.done]
        self._calls.append(call)
        if self.paused:
            self.loop.call_soon(partial(_ask, kind, handler, payload, call))
        else:
            _ask(kind, handler, payload, call)

    def stream(self, path: str, stream: StreamApi) -> StreamSink:
        """A streaming call's receiving end; not while it is paused."""
        _, handler = self._handlers[SERVICE + path.encode()]
        return cast("StreamHandler", handler)(stream)

    def run_next(self) -> bool:
        """One step of its loop; False when there was none."""
        if self.paused or self.over:
            return False
        ran = self.loop.run_next()
        self._look_at_tasks()
        return ran

    def tick(self) -> None:
        """Time has gone by."""
        if self.paused or self.over:
            return
        self.loop.wake()
        store = self.assembly
        if store is not None:
            for tick in self._ticks(store):
                if not self.over:
                    tick()

    def evict(self) -> None:
        """Values leave memory."""
        if self.serving:
            index = self.store.index
            for chunk in index._chunks:
                chunk.hot = False
            index.evict(0, self.store._safe())

    def stop(self) -> None:
        """Begin to stop in good order."""
        self._stopping = True
        self._tasks.append(self.loop.create_task(self._stop()))

    def crash(self) -> None:
        """Die without a word."""
        self.over = self.over or "crashed"
        for backend in self.backends:
            backend.crash()
        self.loop.end(self._tasks)

    # -- its life ----------------------------------------------------------------------------------

    async def _start(self) -> None:
        config = _shard_config(self.world)
        opened = await open_shards(self.backends, config)
        random = Random(self.world.random.getrandbits(32))
        store = await assemble(
            self.backends,
            opened,
            config.shard_map(),
            CONFIG,
            name="simulated",
            client_urls=(),
            clock=self.world.clock,
            random=random,
            stopped=lambda: False,
        )
        store.commits.on_broken = self._shard_lost
        self.assembly = store
        for queue in store.commits.queues:
            if queue.broken:
                self._shard_lost(queue.number, queue.broken)
        self._handlers = {each.path: (each.kind, each.handler) for each in store.methods}
        self._tasks += [self.loop.create_task(self._take_back(each)) for each in store.returning]

    async def _take_back(self, returning: Returning) -> None:
        """Ask for a missing shard until it has come."""
        while not returning.over:
            await asyncio.sleep(CONFIG.commit.return_interval)
            with suppress(BackendError):
                await returning.attempt()
                self.world.returned += 1

    def _ticks(self, store: Assembly) -> Sequence[Callable[[], object]]:
        commits, watches = server._tick_commits, server._tick_watches
        ticks: list[Callable[[], object]] = [partial(commits, store), partial(watches, store)]
        ticks.append(store.compactor.tick)
        return ticks if self._stopping else [*ticks, store.lessor.tick]

    def _shard_lost(self, shard: int, reason: str) -> None:
        """Home's loss ends the server, and so does another server's taking any of them."""
        assert self.assembly is not None, "it is called once it is set"
        fenced = self.assembly.commits.queues[shard].fenced or "fenced" in reason
        if shard == HOME or fenced:
            self.over = "fenced" if fenced else reason

    async def _stop(self) -> None:
        """Everything that was begun ends, for as long as that takes a while."""
        assert self.assembly is not None, "it serves"
        *others, _ = self._tasks
        for task in others:
            task.cancel()
        store = self.assembly
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                while not all(call.done for call in self._calls):  # noqa: ASYNC110 - they tell nobody
                    await asyncio.sleep(0.05)
        for call in self._calls:
            call.cancelled = True
        store.store.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                for shard in store.store.shards.all:
                    await self._until(partial(server._ask_durable, store, shard))
                if store.reservation is not None:
                    await self._until(store.reservation.end)
        await close_shards(self.backends)
        self.over = "stopped"

    async def _until(self, ask: Callable[[Answer], None]) -> None:
        """Wait for an answer, whatever it is."""
        told = self.loop.create_future()

        def settled(error: StoreError | None) -> None:
            if not told.done():
                told.set_result(error)

        ask(Then(settled))
        await told

    def _look_at_tasks(self) -> None:
        """What ends badly is the end of it, if storage says so, or else a fault."""
        done = [task for task in self._tasks if task.done()]
        for task in done:
            self._tasks.remove(task)
            error = None if task.cancelled() else task.exception()
            if isinstance(error, BackendError):
                self.over = self.over or f"refused: {error}"
            elif error is not None:
                raise error


def _ask(kind: Kind, handler: UnaryHandler | StreamHandler, payload: bytes, call: Answered) -> None:
    """Hand a request to its handler, and what that says at once to ``call``."""
    if kind is Kind.UNARY:
        serve(cast("UnaryHandler", handler), payload, call)
        return
    sink = cast("StreamHandler", handler)(OneAnswer(call))
    sink.message(payload)
    sink.half_closed()


def _shard_config(world: World) -> ShardConfig:
    names = NAMES[: len(world.disks)]
    routes = [RouteSpec(prefix, names[number]) for prefix, number in world.routes.items()]
    return ShardConfig([ShardSpec(name, f"memory:{name}") for name in names], routes)
