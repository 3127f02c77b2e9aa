"""The server: its listeners, its connections, its clock, and the way out.

A connection is HTTP/2 if its first bytes are HTTP/2's preface, else HTTP/1.1; with TLS, ALPN offers
both and the first bytes decide as well.

All connections of one turn of the loop are flushed together at its end (``schedule``).
One timer ticks for all of them; each tick looks at a part of the connections, so that every one is
looked at twice a second and none costs a timer of its own.
"""

import asyncio
import socket
from collections import Counter
from collections.abc import Callable, Iterable

from kvstore.transport import frames
from kvstore.transport.api import CallObserver, HttpHandler, Method
from kvstore.transport.connection import Http2Connection
from kvstore.transport.frames import ConnectionFault
from kvstore.transport.headers import Routes
from kvstore.transport.limits import Limits
from kvstore.transport.output import Output, Totals
from kvstore.transport.sniff import Sniffer
from kvstore.transport.streams import Connection

_TICK_SECONDS = 0.05
_TICKS_PER_ROUND = 10


class Server:
    """Serves methods over gRPC and a handler over HTTP/1.1, on any number of listeners."""

    def __init__(
        self,
        *,
        methods: Iterable[Method],
        http_handler: HttpHandler,
        limits: Limits,
        clock: Callable[[], float],
        observer: CallObserver | None = None,
        on_failure: Callable[[str, Exception], None],
    ) -> None:
        self.routes = Routes.of(list(methods))
        self.http_handler = http_handler
        self.limits = limits
        self.clock = clock
        self.observer = observer
        self.totals = Totals()
        self.refusals: Counter[str] = Counter()
        """Limits that were reached, by name."""
        self.faults: Counter[int] = Counter()
        """Connections ended for breaking HTTP/2's rules, by error code."""
        self.greeting = frames.settings(
            [
                (frames.HEADER_TABLE_SIZE, 0),
                (frames.MAX_CONCURRENT_STREAMS, limits.streams_per_connection_max),
                (frames.INITIAL_WINDOW_SIZE, limits.stream_window_bytes),
                (frames.MAX_FRAME_SIZE, limits.frame_bytes_max),
                (frames.MAX_HEADER_LIST_SIZE, limits.header_bytes_max),
            ]
        ) + frames.window_update(0, limits.connection_window_bytes - frames.DEFAULT_WINDOW)
        self.connections: dict[Connection, None] = {}
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._listeners: list[asyncio.Server] = []
        self._dirty: list[Output] = []
        self._round: list[Connection] = []
        self._timer: asyncio.TimerHandle | None = None

    # Listeners.

    async def listen(self, sock: socket.socket) -> None:
        """Accept connections on a bound socket."""
        listener = await self._loop.create_server(self._accept, sock=sock)
        self._listeners.append(listener)
        if self._timer is None:
            self._timer = self._loop.call_later(_TICK_SECONDS, self._tick)

    def _accept(self) -> asyncio.Protocol:
        sniffer = Sniffer(self, http2=self._http2, http1=self._http2)
        self.connections[sniffer] = None
        return sniffer

    def _http2(self) -> asyncio.Protocol:
        connection = Http2Connection(self, "")
        self.connections[connection] = None
        return connection

    # What connections ask for.

    def schedule(self, output: Output, /) -> None:
        """Flush ``output`` at the end of this turn of the loop."""
        if not self._dirty:
            self._loop.call_soon(self._flush)
        self._dirty.append(output)

    def _flush(self) -> None:
        dirty = self._dirty
        self._dirty = []
        for output in dirty:
            output.flush()

    def closed(self, connection: Connection, /) -> None:
        """The connection is gone."""
        self.connections.pop(connection, None)

    def failed(self, what: str, error: Exception, /) -> None:
        """Something of ours raised what it must not."""
        self._on_failure(what, error)

    def refused(self, limit: str, /) -> None:
        """A limit was reached."""
        self.refusals[limit] += 1

    def faulted(self, fault: ConnectionFault, /) -> None:
        """A connection ends with GOAWAY."""
        if fault.code == frames.ENHANCE_YOUR_CALM:
            self.refusals[fault.reason] += 1
        else:
            self.faults[fault.code] += 1

    def _tick(self) -> None:
        self._timer = self._loop.call_later(_TICK_SECONDS, self._tick)
        now = self.clock()
        if not self._round:
            self._round = list(self.connections)
        part = -(-len(self.connections) // _TICKS_PER_ROUND)
        for connection in self._round[-part:]:
            connection.tick(now)
        del self._round[-part:]

    async def drain(self, grace_seconds: float) -> None:
        """Stop."""
        for listener in self._listeners:
            listener.close()
        if self._timer is not None:
            self._timer.cancel()
        for connection in list(self.connections):
            connection.abort()
