"""A proxy that hands every RPC on unchanged and tells a book what it saw.

Each connection of a client has one of its own to the upstream, made at its first call, so that
what the upstream does per connection (order, flow control, the end of one) is as without the proxy.
A call that the client gives up is cancelled upstream, as is one whose deadline passes: the deadline
is kept here, the upstream is not told of it. Of a request's metadata only ``hasleader`` is noted,
and none is handed on.

The upstream is read as fast as it sends: what a slow client has not read yet waits here, up to
``LIMITS.output_bytes_max``, and then costs the client its connection.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from bench.client.asking import reason
from bench.client.connection import Connection
from bench.clock import now_us, wall_seconds
from bench.replay.methods import RPCS, Rpc
from bench.replay.scrub import Scrubber
from bench.replay.trace import Kind, Row, TraceError, TraceWriter
from kvstore.transport import api, grpc, host
from kvstore.transport.limits import Limits
from kvstore.transport.server import Server

KIB, MIB = 1 << 10, 1 << 20
WAITING_MAX = 10_000
"""Messages of one client that wait for its connection to the upstream; above: Unavailable."""
LIMITS = Limits(
    connections_max=10_000,
    connections_per_address_max=10_000,
    handshake_timeout=10.0,
    preface_timeout=10.0,
    first_request_timeout=3_600.0,
    streams_per_connection_max=1_000,
    message_bytes_max=16 * MIB,
    request_bytes_total_max=256 * MIB,
    request_timeout=60.0,
    stream_window_bytes=1 * MIB,
    connection_window_bytes=8 * MIB,
    frame_bytes_max=16 * KIB,
    header_bytes_max=16 * KIB,
    header_count_max=64,
    continuations_max=8,
    templates_max=32,
    template_bytes_max=1 * KIB,
    resets_per_second_max=10_000,
    faults_per_second_max=100,
    settings_per_second_max=10,
    settings_entries_max=32,
    control_per_second_max=50_000,
    small_data_per_second_max=10_000,
    refusals_per_second_max=1_000,
    unserved_per_second_max=10_000,
    ping_interval_min=5.0,
    ping_strikes_max=2,
    keepalive_interval=7_200.0,
    keepalive_timeout=20.0,
    outbox_low_bytes=64 * KIB,
    socket_bytes_max=256 * KIB,
    unread_bytes_max=2 * MIB,
    turn_bytes_max=1 * MIB,
    output_bytes_max=256 * MIB,
    output_bytes_total_max=512 * MIB,
    output_stall_timeout=60.0,
    http1_header_bytes_max=16 * KIB,
    http1_body_bytes_max=64 * KIB,
    http1_timeout=30.0,
)
"""Those of a server for Kubernetes; a recorder must not be what refuses."""


class Address(NamedTuple):
    """Where somebody listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class Book:
    """Numbers calls and writes rows; ``failed`` is told once when it cannot write any more."""

    def __init__(
        self,
        writer: TraceWriter,
        scrubber: Scrubber | None,
        zero_us: int,
        failed: Callable[[str], None],
    ) -> None:
        self._writer = writer
        self._scrubber = scrubber
        self._zero_us = zero_us
        self._failed = failed
        self._broken = False
        self.calls = 0
        self.connections = 0
        self.stopping = False
        """Clients are being sent away: that they leave is none of their doing."""

    def connection(self) -> int:
        """A number for one more connection."""
        self.connections += 1
        return self.connections - 1

    def begin(self, connection: int, rpc: Rpc, context: api.Context, message: bytes) -> int:
        """A call has come; gives its number."""
        call = self.calls
        self.calls += 1
        left = 0 if context.deadline is None else round(context.deadline * 1e6) - now_us()
        row = Row(
            self._now(),
            Kind.BEGIN,
            connection,
            call,
            rpc.path,
            max(left, 1) if context.deadline is not None else 0,
            context.metadata(b"hasleader") is not None,
            message=message,
        )
        self._add(row, rpc.request)
        return call

    def up(self, connection: int, call: int, rpc: Rpc, message: bytes) -> None:
        """One message of a client's stream."""
        self._add(Row(self._now(), Kind.UP, connection, call, message=message), rpc.request)

    def down(self, connection: int, call: int, rpc: Rpc, message: bytes) -> None:
        """One message to a client's stream."""
        self._add(Row(self._now(), Kind.DOWN, connection, call, message=message), rpc.answer)

    def half_close(self, connection: int, call: int, rpc: Rpc) -> None:
        """The client's stream has no more messages."""
        self._add(Row(self._now(), Kind.HALF_CLOSE, connection, call), rpc.request)

    def end(
        self, connection: int, call: int, rpc: Rpc, code: int, text: str, message: bytes
    ) -> None:
        """A call was answered or refused, or a stream is over."""
        row = Row(self._now(), Kind.END, connection, call, code=code, text=text, message=message)
        self._add(row, rpc.answer)

    def cancel(self, connection: int, call: int, rpc: Rpc) -> None:
        """A client gave a call up."""
        if not self.stopping:
            self._add(Row(self._now(), Kind.CANCEL, connection, call), rpc.request)

    def _now(self) -> int:
        return now_us() - self._zero_us

    def _add(self, row: Row, kind: type) -> None:
        if self._broken:
            return
        try:
            if self._scrubber is not None and row.message:
                row = row._replace(message=self._scrubber.message(kind, row.message))
            self._writer.add(row)
        except TraceError as error:
            self._broken = True
            self._failed(str(error))


Use = Callable[[Connection | None], None]
"""What to do with the connection to the upstream; None: there is none."""


class Upstream:
    """What one client's connection has behind the proxy."""

    def __init__(
        self, number: int, address: Address, group: asyncio.TaskGroup, failed: Callable[[str], None]
    ) -> None:
        self.number = number
        self._address = address
        self._group = group
        self._failed = failed
        self._connection: Connection | None = None
        """The one for calls that begin now, or on its way to be."""
        self._leaving: list[Connection] = []
        """Those to which the upstream has said goodbye; it ends what it has accepted."""
        self._making: asyncio.Task[None] | None = None
        self._waiting: deque[Use] = deque()
        self._greeted = False
        self._over = False

    def use(self, do: Use) -> None:
        """Call ``do`` with the connection, now or when it is there; in the order of calls."""
        connection = self._connection
        if connection is not None and self._greeted and not connection.usable:
            self._leaving.append(connection)
            self._connection = connection = None
        if connection is not None and connection.usable and not self._waiting:
            do(connection)
        elif self._over or len(self._waiting) >= WAITING_MAX:
            do(None)
        else:
            self._waiting.append(do)
            if connection is None:
                self._connect()

    def close(self) -> None:
        """The client has gone."""
        self._over = True
        for connection in (*self._leaving, *filter(None, (self._connection,))):
            connection.close()

    def _connect(self) -> None:
        connection = Connection(
            str(self._address),
            self._usable,
            lambda: self._lost(connection),
            lingers=True,
        )
        self._connection = connection
        self._greeted = False
        self._making = self._group.create_task(self._make(connection))

    async def _make(self, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: connection, *self._address)
        except OSError as error:
            self._connection = None
            self._serve(None)
            self._failed(f"the upstream {self._address} went away: {reason(error)}")
        else:
            if self._over:
                connection.close()

    def _usable(self) -> None:
        self._greeted = True
        self._serve(self._connection)

    def _serve(self, connection: Connection | None) -> None:
        while self._waiting:
            self._waiting.popleft()(connection)

    def _lost(self, connection: Connection) -> None:
        """The upstream ended a connection: if it is there still, another is made."""
        if connection in self._leaving:
            self._leaving.remove(connection)
            return
        self._connection = None
        self._serve(None)
        if self._over:
            return
        if self._greeted:
            self._connect()
        else:
            self._failed(f"the upstream {self._address} went away: it ends connections at once")


class _Unary:
    """One unary call on its way; the sink of its answer."""

    def __init__(
        self, book: Book, upstream: Upstream, rpc: Rpc, raw: bytes, call: api.Call
    ) -> None:
        self._book, self._upstream, self._rpc, self._call = book, upstream, rpc, call
        self._number = book.begin(upstream.number, rpc, call, raw)
        self._sent: tuple[Connection, int] | None = None
        self._answer = b""
        self._over = False
        call.on_cancel = self._cancel
        upstream.use(lambda connection: self._begin(connection, raw))

    def _begin(self, connection: Connection | None, raw: bytes) -> None:
        if connection is None:
            self.ended(grpc.UNAVAILABLE, "the upstream is not there")
        elif not self._over:
            self._sent = connection, connection.open(self._rpc.path, raw, self, end=True)

    def message(self, message: bytes, received_us: int, /) -> None:
        """The answer; its status follows."""
        self._answer = message

    def ended(self, code: int, text: str, /) -> None:
        """The status: all of the answer is there."""
        if self._over:
            return
        self._over = True
        answer = b"" if code else self._answer
        self._book.end(self._upstream.number, self._number, self._rpc, code, text, answer)
        if code:
            self._call.fail(code, text)
        else:
            self._call.reply(answer)

    def _cancel(self) -> None:
        self._over = True
        self._book.cancel(self._upstream.number, self._number, self._rpc)
        if self._sent is not None:
            connection, stream = self._sent
            connection.cancel(stream)


class _Streamed:
    """One streaming call on its way; the sink of what the client sends."""

    def __init__(self, book: Book, upstream: Upstream, rpc: Rpc, stream: api.Stream) -> None:
        self._book, self._upstream, self._rpc, self._stream = book, upstream, rpc, stream
        self._number = book.begin(upstream.number, rpc, stream, b"")
        self._sent: tuple[Connection, int] | None = None
        self._begun = False
        self._over = False

    def message(self, message: bytes, /) -> None:
        """One more to the upstream; the first begins the call there."""
        self._book.up(self._upstream.number, self._number, self._rpc, message)
        first, self._begun = not self._begun, True
        self._upstream.use(lambda connection: self._hand_on(connection, message, first=first))

    def _hand_on(self, connection: Connection | None, message: bytes, *, first: bool) -> None:
        if connection is None:
            self.end(grpc.UNAVAILABLE, "the upstream is not there")
        elif self._over:
            pass
        elif first:
            end = self._rpc.kind is api.Kind.SERVER_STREAM
            stream = connection.open(self._rpc.path, message, _Answers(self), end=end)
            self._sent = connection, stream
        elif self._sent is not None:
            self._sent[0].send(self._sent[1], message)

    def half_closed(self) -> None:
        """No message follows; a call of one message had its end with that."""
        if self._rpc.kind is api.Kind.SERVER_STREAM:
            return
        self._book.half_close(self._upstream.number, self._number, self._rpc)
        if self._begun:
            self._upstream.use(lambda _: self._half_close())
        else:
            self.end(grpc.OK, "")

    def _half_close(self) -> None:
        if self._sent is not None:
            self._sent[0].half_close(self._sent[1])

    def writable(self) -> None:
        """Nothing here waits for that."""

    def closed(self) -> None:
        """Over: by ``end``, or because the client has given it up."""
        if self._over:
            return
        self._over = True
        self._book.cancel(self._upstream.number, self._number, self._rpc)
        if self._sent is not None:
            self._sent[0].cancel(self._sent[1])

    def answer(self, message: bytes) -> None:
        """One more to the client."""
        if not self._over:
            self._book.down(self._upstream.number, self._number, self._rpc, message)
            self._stream.send((message,), len(message))

    def end(self, code: int, text: str) -> None:
        """The upstream has ended the call."""
        if not self._over:
            self._over = True
            self._book.end(self._upstream.number, self._number, self._rpc, code, text, b"")
            self._stream.finish(code, text)


class _Answers:
    """The sink of what the upstream sends on a stream."""

    def __init__(self, streamed: _Streamed) -> None:
        self._streamed = streamed

    def message(self, message: bytes, received_us: int, /) -> None:
        """One message."""
        self._streamed.answer(message)

    def ended(self, code: int, text: str, /) -> None:
        """The status."""
        self._streamed.end(code, text)


class Proxy(Server):
    """The server that clients connect to. ``failed`` is told when the upstream is not there."""

    def __init__(
        self, book: Book, address: Address, group: asyncio.TaskGroup, failed: Callable[[str], None]
    ) -> None:
        super().__init__(
            methods=list(self._methods()),
            http_handler=lambda _: api.HttpResponse(404, (), b"a recording proxy has no pages\n"),
            limits=LIMITS,
            clock=lambda: now_us() / 1e6,
            wall=wall_seconds,
            on_failure=lambda what, error: failed(f"{what}: {error!r}"),
        )
        self._book = book
        self._address = address
        self._group = group
        self._upstream_failed = failed
        self._upstreams: dict[str, Upstream] = {}
        self._states: Counter[str] = Counter()

    def _methods(self) -> Iterator[api.Method]:
        for rpc in RPCS.values():
            yield api.Method(rpc.path, rpc.kind, self._handler(rpc))

    def _handler(self, rpc: Rpc) -> api.UnaryHandler | api.StreamHandler:
        def unary(message: bytes, call: api.Call) -> None:
            _Unary(self._book, self._upstream(call.peer), rpc, message, call)

        def stream(stream: api.Stream) -> api.StreamSink:
            return _Streamed(self._book, self._upstream(stream.peer), rpc, stream)

        return unary if rpc.kind is api.Kind.UNARY else stream

    def _upstream(self, peer: str) -> Upstream:
        found = self._upstreams.get(peer)
        if found is None:
            number = self._book.connection()
            found = Upstream(number, self._address, self._group, self._upstream_failed)
            self._upstreams[peer] = found
        return found

    def opened(self, connection: host.Connection, /) -> None:
        """One more connection of a client, or the next state of one."""
        super().opened(connection)
        self._states[connection.peer] += 1

    def closed(self, connection: host.Connection, /) -> None:
        """The connection is gone, or has become another; what was its peer's goes with the last."""
        super().closed(connection)
        peer = connection.peer
        self._states[peer] -= 1
        if self._states[peer] <= 0:
            del self._states[peer]
            upstream = self._upstreams.pop(peer, None)
            if upstream is not None:
                upstream.close()

    async def end(self, grace_seconds: float) -> None:
        """Let unary calls finish, send clients away, let go of the upstream."""
        self._book.stopping = True
        await self.drain(grace_seconds, message="the recording has ended")
        for upstream in list(self._upstreams.values()):
            upstream.close()
