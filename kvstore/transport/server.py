"""The server: its listeners, its connections, its clock, and the way out.

A connection is HTTP/2 if its first bytes are HTTP/2's preface, else HTTP/1.1; with TLS, ALPN offers
both (a listener that speaks HTTP/1.1 alone: only that) and the first bytes decide as well.

All connections of one turn of the loop are flushed together at its end (``schedule``).
One timer ticks for all of them; each tick looks at a part of the connections, so that every one is
looked at twice a second and none costs a timer of its own.
"""

import asyncio
import socket
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple

from kvstore.transport import frames, grpc
from kvstore.transport.api import CallObserver, HttpHandler, Method
from kvstore.transport.frames import ConnectionFault
from kvstore.transport.headers import Route, Routes
from kvstore.transport.host import Connection, address_of, peer_name
from kvstore.transport.limits import Limits
from kvstore.transport.listener import Listener
from kvstore.transport.output import Output, Totals
from kvstore.transport.sniff import Sniffer
from kvstore.transport.tls import Tls

_LIMIT_CODES = {frames.NO_ERROR, frames.SETTINGS_TIMEOUT, frames.ENHANCE_YOUR_CALM}
"""Ends of connections that are a limit's doing, not a rule's."""
_TICK_SECONDS = 0.05
_TICKS_PER_ROUND = 10


class Stats(NamedTuple):
    """The transport at one moment; counters are since the start."""

    connections: int
    connections_accepted: int
    calls: int
    """In progress, streams included."""
    bytes_received: int
    bytes_sent: int
    request_bytes: int
    """Held of requests that are not whole."""
    output_bytes: int
    """Of answers that wait for their clients."""
    handshakes_failed: int
    refusals: dict[str, int]
    """How often each limit was reached, by its name or by the reason that GOAWAY gave."""
    faults: dict[int, int]
    """Connections ended for breaking HTTP/2's rules, by error code."""


def _greeting(limits: Limits) -> bytes:
    """The first frames of every HTTP/2 connection."""
    settings = frames.settings(
        [
            (frames.HEADER_TABLE_SIZE, 0),
            (frames.MAX_CONCURRENT_STREAMS, limits.streams_per_connection_max),
            (frames.INITIAL_WINDOW_SIZE, limits.stream_window_bytes),
            (frames.MAX_FRAME_SIZE, limits.frame_bytes_max),
            (frames.MAX_HEADER_LIST_SIZE, limits.header_bytes_max),
        ]
    )
    more = limits.connection_window_bytes - frames.DEFAULT_WINDOW
    return settings + frames.window_update(0, more) if more else settings


def _peer_of(sock: socket.socket) -> str:
    """The client's address and port; of one that has gone already, those of nobody."""
    try:
        return peer_name(sock.getpeername())
    except OSError:
        return peer_name(None)


class Server:
    """Serves methods over gRPC and a handler of pages over HTTP, on any number of listeners.

    Made and used on the thread of a running event loop.
    """

    def __init__(
        self,
        *,
        methods: Iterable[Method],
        http_handler: HttpHandler,
        limits: Limits,
        clock: Callable[[], float],
        wall: Callable[[], float],
        on_failure: Callable[[str, Exception], None],
        observer: CallObserver | None = None,
        on_handshake_failed: Callable[[str, Exception], None] | None = None,
    ) -> None:
        """``clock`` gives monotonic seconds, ``wall`` those since the Unix epoch.

        ``on_failure`` is told what raised an exception that it must not, for the log.
        ``observer`` is told of every call that ended, ``on_handshake_failed`` of every TLS
        handshake that failed: whose, as address and port, and why.
        """
        self.routes = Routes.of(list(methods))
        self.http_handler = http_handler
        self.limits = limits
        self.clock = clock
        self.wall = wall
        self.observer = observer
        self.failed = on_failure
        self._on_handshake_failed = on_handshake_failed
        self.totals = Totals(output_max=limits.output_bytes_total_max, on_full=self._shed_soon)
        self.greeting = _greeting(limits)
        self._refusals: Counter[str] = Counter()
        self._faults: Counter[int] = Counter()
        self._accepted = 0
        self._handshakes_failed = 0
        self._connections: dict[Connection, None] = {}
        self._by_address: Counter[str] = Counter()
        """Connections that each address has, those that are being made included."""
        self._entering: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._listeners: list[Listener] = []
        self._dirty: list[Output] = []
        self._round: list[Connection] = []
        self._timer: asyncio.TimerHandle | None = None
        self._part = 0
        self._draining = False
        self._emptied: asyncio.Future[None] | None = None

    # Listeners.

    def listen(
        self, sock: socket.socket, *, tls: Tls | None = None, http1_only: bool = False
    ) -> None:
        """Accept connections on a bound socket, TCP or UNIX; it is the server's from now on.

        ``http1_only``: for listeners of metrics; HTTP/2 is not offered, and answered 505 there.
        """

        def accepted(connected: socket.socket) -> None:
            self._accepted += 1
            if len(self._connections) + len(self._entering) >= self.limits.connections_max:
                self.refused("connections_max")
                connected.close()
                return
            peer = _peer_of(connected)
            if self._by_address[address_of(peer)] >= self.limits.connections_per_address_max:
                self.refused("connections_per_address_max")
                connected.close()
                return
            self._count(peer, 1)
            entering = self._enter(connected, peer, tls, http1_only=http1_only)
            task = self._loop.create_task(entering)
            self._entering.add(task)
            task.add_done_callback(lambda ended: self._entered(ended, connected, peer))

        self._listeners.append(Listener(sock, accepted, self._exhausted))
        if self._timer is None:
            self._timer = self._loop.call_later(_TICK_SECONDS, self._tick)

    async def _enter(
        self, sock: socket.socket, peer: str, tls: Tls | None, *, http1_only: bool
    ) -> None:
        """Make a connection of an accepted socket, after its TLS handshake if it has one.

        The server owns the task that runs this; ``drain`` cancels and awaits it.
        """
        if sock.family is not socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sniffer = Sniffer(self, http1_only=http1_only)
        try:
            if tls is None:
                await self._loop.connect_accepted_socket(lambda: sniffer, sock)
            else:
                await self._loop.connect_accepted_socket(
                    lambda: sniffer,
                    sock,
                    ssl=tls.context(http1_only=http1_only),
                    ssl_handshake_timeout=self.limits.handshake_timeout,
                )
        except (OSError, TimeoutError) as error:  # ssl.SSLError is an OSError
            self._handshakes_failed += 1
            sock.close()
            if tls is not None and self._on_handshake_failed is not None:
                self._on_handshake_failed(peer, error)

    def _entered(self, entering: "asyncio.Task[None]", sock: socket.socket, peer: str) -> None:
        """A connection has been made, or not: also when its task was cancelled unbegun."""
        self._entering.discard(entering)
        self._count(peer, -1)
        if entering.cancelled():
            sock.close()

    def _exhausted(self, error: OSError) -> None:
        """No descriptor for another connection."""
        self.refused("descriptors")
        self.failed("connections cannot be accepted", error)

    # What connections ask for.

    def opened(self, connection: Connection, /) -> None:
        """One more connection, or the next state of one."""
        self._connections[connection] = None
        self._count(connection.peer, 1)

    def closed(self, connection: Connection, /) -> None:
        """The connection is gone, or has become another."""
        if connection in self._connections:
            del self._connections[connection]
            self._count(connection.peer, -1)
        if not self._connections and self._emptied is not None and not self._emptied.done():
            self._emptied.set_result(None)

    def _count(self, peer: str, change: int) -> None:
        """One more or one less of the peer's address; UNIX sockets have none."""
        address = address_of(peer)
        if address:
            self._by_address[address] += change
            if not self._by_address[address]:
                del self._by_address[address]

    def schedule(self, output: Output, /) -> None:
        """Flush ``output`` at the end of this turn of the loop."""
        if not self._dirty:
            self._loop.call_soon(self._flush)
        self._dirty.append(output)

    def _flush(self) -> None:
        dirty = self._dirty
        self._dirty = []
        for output in dirty:
            try:
                output.flush()
            except Exception as error:  # noqa: BLE001 - a bug costs one connection, not all
                self.failed("output failed", error)
                output.abort()

    def refused(self, limit: str, /) -> None:
        """A limit was reached."""
        self._refusals[limit] += 1

    def faulted(self, fault: ConnectionFault, /) -> None:
        """A connection ends with GOAWAY."""
        if fault.code in _LIMIT_CODES:
            self._refusals[fault.reason] += 1
        else:
            self._faults[fault.code] += 1

    def _shed_soon(self) -> None:
        """All unread answers together are too many."""
        self._loop.call_soon(self._shed)

    def _shed(self) -> None:
        """Close the connections with the most unread answers until the rest fits."""
        self.totals.full = False
        excess = self.totals.output_bytes - self.limits.output_bytes_total_max
        if excess <= 0:
            return
        for connection in sorted(self._connections, key=lambda c: c.waiting, reverse=True):
            if excess <= 0:
                break
            excess -= connection.waiting
            self.refused("output_bytes_total_max")
            connection.abort()

    def _tick(self) -> None:
        self._timer = self._loop.call_later(_TICK_SECONDS, self._tick)
        now = self.clock()
        if not self._round:
            self._round = list(self._connections)
            self._part = -(-len(self._round) // (1 if self._draining else _TICKS_PER_ROUND))
        for connection in self._round[-self._part :]:
            try:
                connection.tick(now)
            except Exception as error:  # noqa: BLE001 - likewise
                self.failed("tick failed", error)
                connection.abort()
        del self._round[-self._part :]

    # For metrics, and the way out.

    def stats(self) -> Stats:
        """What the transport holds and has done."""
        totals = self.totals
        return Stats(
            connections=len(self._connections) + len(self._entering),
            connections_accepted=self._accepted,
            calls=sum(connection.calls for connection in self._connections),
            bytes_received=totals.bytes_received,
            bytes_sent=totals.bytes_sent,
            request_bytes=totals.request_bytes,
            output_bytes=totals.output_bytes,
            handshakes_failed=self._handshakes_failed,
            refusals=dict(self._refusals),
            faults=dict(self._faults),
        )

    def method_stats(self) -> list[Route]:
        """The methods served, with calls started and messages of streams received and sent."""
        return list(self.routes.by_path.values())

    async def drain(
        self, grace_seconds: float, *, message: str, code: int = grpc.UNAVAILABLE
    ) -> None:
        """Stop: accept no more, let unary calls finish, end streams with a status, close.

        Whatever is not over after ``grace_seconds`` is cut off.
        """
        self._draining = True
        while self._listeners:
            self._listeners.pop().close()
        for task in self._entering:
            task.cancel()
        await asyncio.gather(*self._entering, return_exceptions=True)
        for connection in list(self._connections):
            connection.drain(code, message)
        if self._connections:
            self._emptied = self._loop.create_future()
            with suppress(TimeoutError):
                async with asyncio.timeout(grace_seconds):
                    await self._emptied
        await self._cut_off()

    async def _cut_off(self) -> None:
        """Abort what is left, and wait until it is gone."""
        for connection in list(self._connections):
            connection.abort()
        if self._connections:
            self._emptied = self._loop.create_future()
            await self._emptied
        if self._timer is not None:
            self._timer.cancel()
