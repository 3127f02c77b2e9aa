"""One server's life: start, serve, stop.

Start, in this order, so that whatever a user can get wrong is found before anything is changed:
bind the sockets, read the certificates, take the shards, load the store, accept connections.

Stop, on the first SIGTERM or SIGINT: accept no more, let calls that are under way finish with their
commits, end streams with ``etcdserver: server stopped``, wait for everything appended to be
durable, let the shards go; ``stop_timeout`` and ``close_timeout`` bound that. A second signal ends
the process at once; nothing acknowledged is lost by that either.

When storage fails for good, or an exception shows that the state in memory cannot be trusted, the
server stops likewise, with exit code 1: what is on disk is right, and a new process reads it.
"""

import asyncio
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from random import SystemRandom

import uvloop

from kvstore.answers import Then
from kvstore.assembly import Assembly, LoadStoppedError, assemble, close_shards, open_shards
from kvstore.backend import Backend
from kvstore.clock import Clock
from kvstore.commit import Commits
from kvstore.config import Config
from kvstore.errors import BackendError, StoppedError, StoreError
from kvstore.front import Front, Sockets, bind_all, make_tls
from kvstore.housekeeping import GarbageCollector, StallMonitor
from kvstore.http.health import HealthRoutes, Verdict
from kvstore.http.pages import make_routes
from kvstore.listen import ListenError
from kvstore.logs import Logger
from kvstore.metrics import (
    CallMetrics,
    CommitMetrics,
    ServerMetrics,
    StoreMetrics,
    WatchMetrics,
    make_exposition,
)
from kvstore.options import ServeOptions
from kvstore.shard import HOME
from kvstore.transport.tls import Tls

EXIT_OK = 0
EXIT_FAILED = 1
"""Storage failed, or the state in memory cannot be trusted."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StartError(Exception):
    """The server cannot start, and has changed nothing; the message is one line for the user."""


def run(
    backends: Sequence[Backend], config: Config, options: ServeOptions, *, clock: Clock, log: Logger
) -> int:
    """Serve until told to stop; returns the exit code. Raises ``StartError``."""
    _allow_descriptors()
    sys.setswitchinterval(config.server.thread_switch_interval)
    failures = Failures(log, clock)
    try:
        sockets = bind_all(options)
        try:
            tls = make_tls(options.tls, log)
        except ListenError:
            sockets.close()
            raise
        server = Server(backends, config, options, sockets, tls, failures, clock=clock, log=log)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve_until_signal(server, log))
    except (BackendError, ListenError) as error:
        raise StartError(str(error)) from error


async def _serve_until_signal(server: "Server", log: Logger) -> int:
    """The first signal begins the stop; the second has the system's own effect."""
    loop = asyncio.get_running_loop()

    def begin_stop(number: signal.Signals) -> None:
        for each in _SIGNALS:
            loop.remove_signal_handler(each)
            signal.signal(each, signal.SIG_DFL)
        log.info("received signal; shutting down", signal=number.name)
        server.stop()

    for number in _SIGNALS:
        loop.add_signal_handler(number, begin_stop, number)
    return await server.serve()


def _allow_descriptors() -> None:
    """Every connection is one: take as many as the system gives, as Go's runtime does."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Failures:
    """Reports what should not have happened: the first of a kind whole, then counts now and then.

    Kinds are few: a constant message and a type of exception.
    """

    _PAUSE_SECONDS = 10.0

    def __init__(self, log: Logger, clock: Clock) -> None:
        self._log = log
        self._clock = clock
        self._since: dict[tuple[str, type[BaseException]], tuple[float, int]] = {}
        self.count = 0

    def report(self, message: str, error: BaseException) -> None:
        """Log ``error`` with its traceback, unless one of its kind was logged a moment ago."""
        self.count += 1
        kind = message, type(error)
        now = self._clock.monotonic()
        logged_at, unsaid = self._since.get(kind, (-self._PAUSE_SECONDS, 0))
        if now - logged_at < self._PAUSE_SECONDS:
            self._since[kind] = logged_at, unsaid + 1
            return
        self._since[kind] = now, 0
        more = {"unsaid_before": unsaid} if unsaid else {}
        self._log.error(message, exc_info=error, **more)


class Server:
    """See the module's text. ``serve`` is its whole life."""

    def __init__(
        self,
        backends: Sequence[Backend],
        config: Config,
        options: ServeOptions,
        sockets: Sockets,
        tls: Tls | None,
        failures: Failures,
        *,
        clock: Clock,
        log: Logger,
    ) -> None:
        self._backends = backends
        self._config = config
        self._options = options
        self._sockets = sockets
        self._tls = tls
        self._failures = failures
        self._clock = clock
        self._log = log
        self._exit_code = EXIT_OK
        self._stop = asyncio.Event()
        self._stalls = StallMonitor(clock, time.process_time, config.housekeeping)
        self._garbage = GarbageCollector(clock, config.housekeeping)

    async def serve(self) -> int:
        """Start, serve until told to stop, stop; returns the exit code.

        Raises ``BackendError`` or ``ListenError`` when it cannot start.
        """
        asyncio.get_running_loop().set_exception_handler(self._unexpected)
        try:
            fences = await open_shards(self._backends)
        except BackendError:
            self._sockets.close()
            raise
        try:
            store = await assemble(
                self._backends,
                fences,
                self._config,
                name=self._options.name,
                client_urls=self._client_urls(),
                clock=self._clock,
                random=SystemRandom(),
                stopped=self._stop.is_set,
            )
            store.commits.on_broken = self._shard_lost
            store.commits.on_stuck = self._shard_stuck
            store.commits.on_back = self._shard_back
            for shard, backend in enumerate(self._backends):
                backend.on_broken = partial(store.commits.give_up, shard)
            self._garbage.take_over()
            front = self._make_front(store)
            await self._serve(store, front)
        except LoadStoppedError:
            self._log.info("stopped before everything was loaded")
        finally:
            self._sockets.close()
            await self._close()
        self._log.info("stopped", exit_code=self._exit_code)
        return self._exit_code

    def stop(self) -> None:
        """Begin to stop; ``serve`` returns when everything has ended. Idempotent."""
        self._stop.set()

    async def _serve(self, store: Assembly, front: Front) -> None:
        """From the first connection to the last durable change."""
        config = self._config
        try:
            await front.listen()
        except ListenError:
            await front.drain(0.0)
            raise
        async with asyncio.TaskGroup() as group:
            ticking = [
                group.create_task(
                    self._tick(store.commits.tick, config.server.commit_tick_interval)
                ),
                group.create_task(self._tick(store.hub.tick, config.watch.tick_interval)),
                group.create_task(
                    self._tick(store.compactor.tick, config.compaction.tick_interval)
                ),
                group.create_task(self._tick_leases(store)),
                group.create_task(self._keep_house()),
            ]
            self._say_ready(store)
            await self._stop.wait()
            await self._drain(store, front)
            for task in ticking:
                task.cancel()

    def _say_ready(self, store: Assembly) -> None:
        self._log.info(
            "ready to serve client requests",
            name=self._options.name,
            client_urls=[bound.url for bound in self._sockets.clients],
            metrics_urls=[bound.url for bound in self._sockets.metrics],
            cluster_id=f"{store.header.cluster_id:x}",
            member_id=f"{store.header.member_id:x}",
            epoch=store.header.raft_term,
            revision=store.store.revision,
            compact_revision=store.store.compact_revision,
            keys=store.store.index.live,
            leases=len(store.lessor),
        )

    def _client_urls(self) -> list[str]:
        told = list(self._options.advertise_client_urls)
        return told or [bound.url for bound in self._sockets.clients]

    def _make_front(self, store: Assembly) -> Front:
        """Listeners with all their pages and metrics."""
        calls = CallMetrics(store.methods)
        health = HealthRoutes(StoreHealth(store.commits))
        commits = CommitMetrics(store.commits)
        numbers = StoreMetrics(
            store.store, store.lessor, quota_bytes=self._config.server.quota_bytes
        )
        watches = WatchMetrics(store.hub)
        process = ServerMetrics(
            store.header, health, self._stalls, self._garbage, lambda: self._failures.count
        )
        exposed = make_exposition(
            [
                calls.collect,
                commits.collect,
                numbers.collect,
                watches.collect,
                process.collect,
                lambda: front.collect(),  # noqa: PLW0108 - it is made below
            ]
        )
        clients, metrics = make_routes(health, exposed)
        front = Front(
            sockets=self._sockets,
            tls=self._tls,
            kind=self._options.transport,
            methods=store.methods,
            client_pages=clients.handle,
            metrics_pages=metrics.handle,
            limits=self._config.transport,
            clock=self._clock,
            on_failure=self._handler_failed,
            observer=calls.observe,
            log=self._log,
        )
        return front

    # -- ticks -------------------------------------------------------------------------------------

    async def _tick(self, work: Callable[[], None], seconds: float) -> None:
        """Call ``work`` every ``seconds`` for as long as the task lives."""
        while True:
            await asyncio.sleep(seconds)  # noqa: TID251 - ticks are real time
            self._guarded(work)

    async def _tick_leases(self, store: Assembly) -> None:
        """Expire leases until the stop begins; the lessor says when it wants to be called again."""
        seconds = self._config.lease.tick_interval

        def work() -> None:
            nonlocal seconds
            seconds = store.lessor.tick()

        while not self._stop.is_set():
            await asyncio.sleep(seconds)  # noqa: TID251 - ticks are real time
            self._guarded(work)

    async def _keep_house(self) -> None:
        """Measure stalls, and collect garbage when nothing happens."""

        def work() -> None:
            self._stalls.tick()
            self._garbage.tick(self._stalls.load)

        self._stalls.begin()
        await self._tick(work, self._config.housekeeping.stall_tick_interval)

    def _guarded(self, work: Callable[[], None]) -> None:
        """An exception in a tick leaves work half done: stop."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 - whatever it is
            self._fatal("a periodic task failed", error)

    # -- what can go wrong -------------------------------------------------------------------------

    def _shard_lost(self, shard: int, reason: str) -> None:
        self._log.error("storage failed; shutting down", shard=shard, reason=reason)
        self._exit_code = EXIT_FAILED
        self._stop.set()

    def _shard_stuck(self, shard: int, reason: str) -> None:
        self._log.error("shard does not commit", shard=shard, reason=reason)

    def _shard_back(self, shard: int, seconds: float) -> None:
        self._log.info("shard commits again", shard=shard, seconds=round(seconds, 3))

    def _handler_failed(self, message: str, error: Exception) -> None:
        """A broken assertion means that the state may be wrong; anything else was one request's."""
        if isinstance(error, AssertionError):
            self._fatal(message, error)
        else:
            self._failures.report(message, error)

    def _unexpected(self, _: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        """An exception that reached the event loop: from a callback, whose work is half done."""
        error = context.get("exception")
        message = str(context.get("message", "unexpected"))
        if isinstance(error, OSError):
            self._failures.report("a connection failed", error)
        elif isinstance(error, BaseException):
            self._fatal(message, error)
        else:
            self._log.warning("the event loop complains", complaint=message)

    def _fatal(self, message: str, error: BaseException) -> None:
        self._failures.report(message, error)
        self._exit_code = EXIT_FAILED
        self._stop.set()

    # -- stop --------------------------------------------------------------------------------------

    async def _drain(self, store: Assembly, front: Front) -> None:
        """Everything that was begun ends; no new beginning. In order."""
        loop = asyncio.get_running_loop()
        seconds = self._config.server.stop_timeout
        end = loop.time() + seconds
        store.health.drain()
        await front.drain(seconds)
        durable = loop.create_future()

        def settled(error: StoreError | None) -> None:
            if not durable.done():
                durable.set_result(error)

        store.commits.release(store.store.shards.all, Then(settled), b"")
        with suppress(TimeoutError):
            async with asyncio.timeout_at(end):
                await durable

    async def _close(self) -> None:
        """Let the shards go. A failure here loses nothing that was acknowledged, but is told."""
        seconds = self._config.server.close_timeout
        try:
            async with asyncio.timeout(seconds):
                await close_shards(self._backends)
        except (BackendError, TimeoutError) as error:
            reason = str(error) or f"not within {seconds} s"
            self._log.error("storage could not be closed", reason=reason)
            self._exit_code = EXIT_FAILED


class StoreHealth:
    """Answers the health checks from the store; see ``http.health.Health``."""

    def __init__(self, commits: Commits) -> None:
        self._commits = commits

    def alarms(self) -> Sequence[str]:
        """None: there is no quota."""
        return ()

    def check_read(self, verdict: Verdict, *, serializable: bool) -> None:
        """A read of home: refused when it is lost, and if linearizable, when it does not commit.

        etcd's own linearizable read needs its raft loop, which a stuck disk stops; here a read
        waits for nothing that is durable, so the check asks for the shard's commits instead. What
        keeps it from committing follows etcd's text.
        """
        home = self._commits.queues[HOME]

        def told(error: StoreError | None) -> None:
            if error is None:
                verdict(None)
            else:
                why = f" (shard {HOME}: {home.trouble})" if home.trouble else ""
                verdict(error.text + why)

        if serializable:
            verdict(StoppedError.text if home.broken else None)
        else:
            self._commits.release((HOME,), Then(told), b"")
