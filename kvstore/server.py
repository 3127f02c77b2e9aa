"""One server's life: start, serve, stop.

Start, in this order, so that whatever a user can get wrong is found before anything is changed:
bind the sockets, read the certificates, take the shards, load the store, accept connections.

Stop, on the first SIGTERM or SIGINT: accept no more, let calls that are under way finish with their
commits, end streams with ``etcdserver: server stopped``, wait for everything appended to be
durable, store how far the order got, let the shards go; ``stop_timeout`` and ``close_timeout``
bound that. A second signal ends the process at once; nothing acknowledged is lost by that either.

When home fails for good, when another server has taken a shard, or when an exception shows that the
state in memory cannot be trusted, the server stops likewise, with exit code 1: what is on disk is
right, and a new process reads it. Another shard that fails for good is refused from then on, and
the others are served; the exit code tells of it in the end.
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

from kvstore.answers import Answer, Then
from kvstore.assembly import Assembly, LoadStoppedError, assemble
from kvstore.backend import Backend
from kvstore.clock import Clock
from kvstore.config import Config
from kvstore.errors import BackendError, StoreError, UnreachableError
from kvstore.front import Front, Sockets, bind_all, make_tls
from kvstore.housekeeping import GarbageCollector, StallMonitor
from kvstore.http.health import HealthRoutes
from kvstore.http.pages import make_routes
from kvstore.listen import ListenError
from kvstore.logs import Logger
from kvstore.metrics import (
    CallMetrics,
    ServerMetrics,
    StoreMetrics,
    WatchMetrics,
    make_exposition,
)
from kvstore.opening import Returning, close_shards, open_shards
from kvstore.options import ServeOptions
from kvstore.shard import HOME
from kvstore.shard_config import ShardConfig
from kvstore.shard_metrics import ShardMetrics
from kvstore.shard_status import shard_status
from kvstore.store_health import StoreHealth
from kvstore.transport.tls import Tls

EXIT_OK = 0
EXIT_FAILED = 1
"""Storage failed, or the state in memory cannot be trusted."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StartError(Exception):
    """The server cannot start, and has changed nothing; the message is one line for the user."""


def run(
    backends: Sequence[Backend],
    shards: ShardConfig,
    config: Config,
    options: ServeOptions,
    *,
    clock: Clock,
    log: Logger,
) -> int:
    """Serve until told to stop; returns the exit code. Raises ``StartError``.

    ``backends`` are those of ``shards``, in the same order.
    """
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
        server = Server(
            backends, shards, config, options, sockets, tls, failures, clock=clock, log=log
        )
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
        shards: ShardConfig,
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
        self._shards = shards
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
            opened = await open_shards(
                self._backends, self._shards, accept_loss=self._options.accept_data_loss
            )
        except BaseException:
            self._sockets.close()
            raise
        for loss in opened.losses:
            self._log.warning("a loss of data is accepted", reason=loss)
        try:
            store = await assemble(
                self._backends,
                opened,
                self._shards.shard_map(),
                self._config,
                name=self._options.name,
                client_urls=self._client_urls(),
                clock=self._clock,
                random=SystemRandom(),
                stopped=self._stop.is_set,
            )
            self._say_missing(store)
            shards = ShardMetrics(store.store, store.hub, self._clock)
            self._listen(store, shards)
            self._garbage.take_over()
            front = self._make_front(store, shards)
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
                    self._tick(partial(_tick_commits, store), config.server.commit_tick_interval)
                ),
                group.create_task(
                    self._tick(partial(_tick_watches, store), config.watch.tick_interval)
                ),
                group.create_task(
                    self._tick(store.compactor.tick, config.compaction.tick_interval)
                ),
                group.create_task(self._tick_leases(store)),
                group.create_task(self._keep_house()),
                *(group.create_task(self._bring_back(each)) for each in store.returning),
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

    def _make_front(self, store: Assembly, shards: ShardMetrics) -> Front:
        """Listeners with all their pages and metrics."""
        calls = CallMetrics(store.methods)
        health = HealthRoutes(StoreHealth(store.commits))
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
                shards.collect,
                numbers.collect,
                watches.collect,
                process.collect,
                lambda: front.collect(),  # noqa: PLW0108 - it is made below
            ]
        )
        tell_shards = partial(shard_status, store.store)
        clients, metrics = make_routes(health, exposed, tell_shards)
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

    def _listen(self, store: Assembly, metrics: ShardMetrics) -> None:
        """Hear of shards that are lost, stuck and back, of what happened until now first."""
        commits = store.commits

        def name(shard: int) -> str:
            return commits.queues[shard].name

        def lost(shard: int, reason: str) -> None:
            metrics.failed(shard)
            self._exit_code = EXIT_FAILED
            if shard == HOME or commits.queues[shard].fenced:
                self._log.error("storage failed; shutting down", shard=name(shard), reason=reason)
                self._stop.set()
            else:
                self._log.error("shard lost until a restart", shard=name(shard), reason=reason)

        def stuck(shard: int, reason: str) -> None:
            metrics.failed(shard)
            self._log.error("shard does not commit", shard=name(shard), reason=reason)

        def back(shard: int, seconds: float) -> None:
            self._log.info("shard commits again", shard=name(shard), seconds=round(seconds, 3))

        commits.on_broken, commits.on_stuck, commits.on_back = lost, stuck, back
        for queue in commits.queues:
            if queue.broken:
                lost(queue.number, queue.broken)

    def _say_missing(self, store: Assembly) -> None:
        for shard in store.returning:
            self._log.error(
                "shard is missing; its keys are refused", shard=shard.name, reason=shard.trouble
            )

    async def _bring_back(self, shard: Returning) -> None:
        """Try until a missing shard has joined; a refusal is told when it is a new one."""
        while not shard.over:
            await asyncio.sleep(self._config.commit.return_interval)  # noqa: TID251 - real time
            told = shard.trouble
            try:
                await shard.attempt()
            except UnreachableError as error:
                if str(error) != told:
                    self._log.warning("shard is still missing", shard=shard.name, reason=str(error))
            except BackendError as error:
                if str(error) != told:
                    self._log.error("shard is refused", shard=shard.name, reason=str(error))
            except Exception as error:  # noqa: BLE001 - whatever it is, the load is half done
                self._fatal("a shard's return failed", error)
                return
            else:
                self._log.info("shard is back", shard=shard.name)

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
        store.store.close()
        for queue in store.commits.queues:
            await self._told(partial(_ask_durable, store, queue.number), end)
        if store.reservation is not None:
            await self._told(store.reservation.end, end)

    async def _told(self, ask: Callable[[Answer], None], end: float) -> None:
        """Wait until what is asked is answered, in whatever way, or it is time to ``end``."""
        done = asyncio.get_running_loop().create_future()

        def told(error: StoreError | None) -> None:
            if not done.done():
                done.set_result(error)

        ask(Then(told))
        with suppress(TimeoutError):
            async with asyncio.timeout_at(end):
                await done

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


def _tick_commits(store: Assembly) -> None:
    """Everything that has to do with the order."""
    store.commits.tick()
    store.store.barrier.tick()
    if store.reservation is not None:
        store.reservation.tick()


def _tick_watches(store: Assembly) -> None:
    """Watchers are told nothing while another process may own the shards."""
    if not (store.commits.leased and store.commits.lease_lapsed()):
        store.hub.tick()


def _ask_durable(store: Assembly, shard: int, answer: Answer) -> None:
    """``answer`` is told when nothing is pending on ``shard``."""
    store.commits.release((shard,), answer, b"")
