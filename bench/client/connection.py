"""One HTTP/2 connection to a server under test (RFC 9113, gRPC's PROTOCOL-HTTP2.md).

As little Python per call as will do: a request is one write of prepared bytes, an answer one look
at a dictionary; no task, no future. The client must not cost what the server under it costs.

We advertise a header table of size 0, so blocks of answers are stateless and are looked up by their
bytes. Flow control is kept in both directions. A request that its stream's window does not take
waits alone, and those that the connection's window does not take wait in order, as in grpc-go; so
do calls above the number of streams that the server allows.
``received_us`` is read once per piece of input: the time of everything in it.
After a server's goodbye no call is begun, and those that it has accepted are finished, as in
grpc-go. Watches end with the last of them, so that whoever keeps one connection at a time gets the
next; on a connection that *lingers* they go on until the server ends them, as in grpc-go too: its
owner makes another as soon as this one is not ``usable``.

A connection is made, used and lost once; whoever wants another makes another.
"""

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import cast

from bench.client.blocks import RequestBlocks, timeout_field
from bench.client.exchange import Answered, Exchange, Held, Sink, Unsent
from bench.client.status import status_of
from bench.client.writer import Writer
from bench.clock import now_us
from kvstore.transport import frames, grpc

WINDOW_BYTES = 16 << 20
"""Granted to each stream and renewed by half; a stream that reads slowly grants less itself."""
CONNECTION_WINDOW_BYTES = 1 << 30
SMALL_WINDOW_BYTES = 65_535
__all__ = ["SMALL_WINDOW_BYTES", "WINDOW_BYTES", "Answered", "Connection", "Sink"]
_LINGER = struct.pack("ii", 1, 0)


class Connection(asyncio.Protocol):
    """See the module's text. ``on_lost`` is called once, after every exchange has been ended."""

    def __init__(
        self,
        authority: str,
        on_ready: Callable[[], None],
        on_lost: Callable[[], None],
        *,
        window_bytes: int = WINDOW_BYTES,
        lingers: bool = False,
    ) -> None:
        self._authority = authority.encode()
        self._lingers = lingers
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._window_bytes = window_bytes
        self._renews = window_bytes > SMALL_WINDOW_BYTES
        self._transport: asyncio.Transport | None = None
        self._writer: Writer | None = None
        self._rest = b""
        self._exchanges: dict[int, Exchange] = {}
        self._stream_next = 1
        self._blocks: RequestBlocks | None = None
        self._window = frames.DEFAULT_WINDOW
        self._stream_window = frames.DEFAULT_WINDOW
        self._frame_bytes_max = frames.FRAME_BYTES_MIN
        self._streams_max = frames.WINDOW_MAX
        self._windows: dict[int, int] = {}
        """What each stream takes whose sending side is open."""
        self._unsent: dict[int, Unsent] = {}
        self._held: deque[Held] = deque()
        self._consumed = 0
        self._header: tuple[int, int, list[bytes]] | None = None
        self._closing = False
        self._leaving = False
        """The server has said goodbye; what it has accepted is finished."""
        self.received_us = 0
        self.lost = False

    async def connect(self, host: str, port: int, group: asyncio.TaskGroup) -> None:
        """Raises ``OSError``; a client with tasks would have them in the group."""
        await asyncio.get_running_loop().create_connection(lambda: self, host, port)

    # Sending.

    @property
    def usable(self) -> bool:
        """The server's settings have come and nobody has said goodbye."""
        return self._blocks is not None and not self._closing and not self._leaving

    @property
    def calls(self) -> int:
        """Exchanges in progress."""
        return len(self._exchanges) + len(self._held)

    def call(self, path: bytes, message: bytes, answered: Answered, timeout_us: int) -> None:
        """Send a unary call; ``answered`` is called once, whatever happens.

        Needs ``usable``.
        """
        exchange = Exchange(answered, None, now_us() + timeout_us)
        if len(self._exchanges) < self._streams_max:
            self._begin(path, message, exchange, timeout_us, end=True)
        else:
            self._held.append(Held(path, message, exchange))

    def open(
        self, path: bytes, message: bytes, sink: Sink, *, end: bool = False, timeout_us: int = 0
    ) -> int:
        """Begin a stream with its first message; gives its number. Needs ``usable``.

        Without a timeout it lasts until one side ends it.
        """
        deadline_us = now_us() + timeout_us if timeout_us else 0
        return self._begin(path, message, Exchange(None, sink, deadline_us), timeout_us, end=end)

    def _begin(
        self, path: bytes, message: bytes, exchange: Exchange, timeout_us: int, *, end: bool
    ) -> int:
        assert self._blocks is not None
        assert self._writer is not None
        stream = self._stream_next
        self._stream_next = stream + 2
        self._exchanges[stream] = exchange
        block = self._blocks.block(path)
        if timeout_us:
            block += timeout_field(timeout_us)
        size = len(message) + grpc.PREFIX_BYTES
        head = frames.header(frames.HEADERS, frames.END_HEADERS, stream, len(block)) + block
        if size <= self._window and size <= self._stream_window and size <= self._frame_bytes_max:
            self._window -= size
            if not end:
                self._windows[stream] = self._stream_window - size
            flags = frames.END_STREAM if end else 0
            data = frames.header(frames.DATA, flags, stream, size)
            self._writer.write(head + data + grpc.prefix(size - grpc.PREFIX_BYTES) + message)
        else:
            self._writer.write(head)
            self._windows[stream] = self._stream_window
            self._unsent[stream] = Unsent(grpc.prefix(len(message)) + message, end=end)
            self._flush()
        return stream

    def send(self, stream: int, message: bytes) -> None:
        """One more message of a stream that was opened; nothing if it is over."""
        if stream not in self._windows:
            return
        raw = grpc.prefix(len(message)) + message
        unsent = self._unsent.get(stream)
        if unsent is None:
            self._unsent[stream] = Unsent(raw, end=False)
            self._flush()
        elif not unsent.end:
            unsent.raw += raw

    def half_close(self, stream: int) -> None:
        """Say that no message follows on a stream that was opened; nothing if it is over."""
        if stream in self._windows:
            self._unsent.setdefault(stream, Unsent(b"", end=True)).end = True
            self._flush()

    def cancel(self, stream: int) -> None:
        """Give a stream up; its sink is told that it was cancelled."""
        exchange = self._exchanges.get(stream)
        if exchange is not None:
            self._leave(stream, reset=True)
            self._end(exchange, grpc.CANCELLED, "cancelled by the client")

    def grant(self, stream: int, size: int) -> None:
        """Credit for ``size`` bytes of messages that were read, with their prefixes, on a stream
        whose window is renewed by hand.
        """
        exchange = self._exchanges.get(stream)
        if exchange is not None:
            exchange.unread -= size
            self._credit(stream, exchange, size)

    def _credit(self, stream: int, exchange: Exchange, size: int) -> None:
        exchange.credit += size
        if exchange.credit > 0 and self._writer is not None:
            self._writer.write(frames.window_update(stream, exchange.credit))
            exchange.credit = 0

    def _flush(self) -> None:
        """Send of what waits as much as the windows take."""
        assert self._writer is not None
        for stream, unsent in list(self._unsent.items()):
            while True:
                room = min(self._window, self._windows[stream], self._frame_bytes_max)
                if room <= 0 and unsent.position < len(unsent.raw):
                    break
                piece = unsent.raw[unsent.position : unsent.position + room]
                unsent.position += len(piece)
                self._window -= len(piece)
                self._windows[stream] -= len(piece)
                whole = unsent.position == len(unsent.raw)
                flags = frames.END_STREAM if whole and unsent.end else 0
                self._writer.write(frames.frame(frames.DATA, flags, stream, piece))
                if whole:
                    del self._unsent[stream]
                    if unsent.end:
                        del self._windows[stream]
                    break
            if self._window <= 0:
                return

    def _leave(self, stream: int, *, reset: bool = False) -> None:
        """An exchange is over; its stream is reset if this side has not said all."""
        self._exchanges.pop(stream).over = True
        unended = self._windows.pop(stream, None) is not None
        self._unsent.pop(stream, None)
        if (reset or unended) and self._writer is not None:
            self._writer.write(frames.reset(stream, frames.CANCEL))
        if self._held and not self._closing and len(self._exchanges) < self._streams_max:
            held = self._held.popleft()
            left_us = max(1, held.exchange.deadline_us - now_us())
            self._begin(held.path, held.message, held.exchange, left_us, end=True)
        if self._leaving:
            self._close_if_idle()

    def expire(self, now: int) -> None:
        """End the calls whose time is up, which are unanswered by the server."""
        self.received_us = now
        held, self._held = self._held, deque()
        for call in held:
            if call.exchange.deadline_us <= now:
                self._end(call.exchange, grpc.DEADLINE_EXCEEDED, "the benchmark's timeout")
            else:
                self._held.append(call)
        late = [
            (stream, exchange)
            for stream, exchange in self._exchanges.items()
            if exchange.deadline_us and exchange.deadline_us <= now
        ]
        for stream, exchange in late:
            if not exchange.over:
                self._leave(stream, reset=True)
                self._end(exchange, grpc.DEADLINE_EXCEEDED, "the benchmark's timeout")

    def close(self, *, reset: bool = False) -> None:
        """End the connection: by FIN, or by RST as a machine that went away would."""
        transport, writer = self._transport, self._writer
        if transport is None or writer is None or self._closing:
            return
        self._closing = True
        if reset:
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
            transport.abort()
        else:
            writer.write(frames.goaway(0, frames.NO_ERROR))
            writer.close()

    # Receiving.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the preface."""
        transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance
        self._transport = transport
        self._writer = Writer(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        mine = frames.settings(
            [
                (frames.HEADER_TABLE_SIZE, 0),
                (frames.ENABLE_PUSH, 0),
                (frames.INITIAL_WINDOW_SIZE, self._window_bytes),
                (frames.MAX_FRAME_SIZE, 1 << 20),
            ]
        )
        more = CONNECTION_WINDOW_BYTES - frames.DEFAULT_WINDOW
        transport.write(frames.PREFACE + mine + frames.window_update(0, more))

    def connection_lost(self, exc: Exception | None) -> None:
        """End every exchange: what was sent may have been done."""
        self.lost = self._closing = True
        self._transport = self._writer = None
        self.received_us = now_us()
        exchanges = [*self._exchanges.values(), *(held.exchange for held in self._held)]
        self._exchanges.clear()
        self._held.clear()
        for exchange in exchanges:
            exchange.over = True
            self._end(exchange, grpc.UNAVAILABLE, "connection lost")
        self._on_lost()

    def data_received(self, data: bytes) -> None:
        """Take whole frames off the input; what cannot be read ends the connection."""
        self.received_us = now_us()
        try:
            self._receive(self._rest + data if self._rest else data)
        except frames.ConnectionFault:
            self._closing = True
            if self._transport is not None:
                self._transport.abort()

    def _receive(self, data: bytes) -> None:
        position, end = 0, len(data)
        exchanges = self._exchanges
        while end - position >= frames.HEADER_BYTES:
            head, flags, stream = frames.unpack_header(data, position)
            size = head >> 8
            start = position + frames.HEADER_BYTES
            if end - start < size:
                break
            position = start + size
            kind = head & 0xFF
            if kind == frames.DATA:
                self._consumed += size
                exchange = exchanges.get(stream)
                if exchange is not None:
                    self._data(stream, exchange, data[start:position], flags)
            elif kind == frames.HEADERS and flags & frames.END_HEADERS and not flags & 0x28:
                exchange = exchanges.get(stream)
                if exchange is not None:
                    self._headers(stream, exchange, data[start:position], flags)
            else:
                self._control(kind, flags, stream, data[start:position])
        self._rest = data[position:]
        if self._consumed >= CONNECTION_WINDOW_BYTES // 2 and self._writer is not None:
            self._writer.write(frames.window_update(0, self._consumed))
            self._consumed = 0

    def _data(self, stream: int, exchange: Exchange, piece: bytes, flags: int) -> None:
        if self._renews:
            exchange.credit += len(piece)
            if exchange.credit >= self._window_bytes // 2:
                self._credit(stream, exchange, 0)
        if flags & frames.PADDED:
            size = len(piece)
            piece = frames.unpad(flags, piece)
            if not self._renews:
                self._credit(stream, exchange, size - len(piece))
        if exchange.sink is None:
            exchange.parts.append(piece)
        else:
            self._messages(stream, exchange, exchange.sink, piece)
        if flags & frames.END_STREAM and not exchange.over:
            self._leave(stream)
            self._end(exchange, grpc.INTERNAL, "the stream ended without a status")

    def _messages(self, stream: int, exchange: Exchange, sink: Sink, piece: bytes) -> None:
        """Hand the whole messages of a stream to its sink."""
        parts = exchange.parts
        if parts:
            parts.append(piece)
            exchange.have += len(piece)
            if exchange.have < exchange.wanted:
                return
            piece = b"".join(parts)
            parts.clear()
            exchange.wanted = 0
        position = 0
        while len(piece) - position >= grpc.PREFIX_BYTES:
            _, size = grpc.unpack_prefix(piece, position)
            start = position + grpc.PREFIX_BYTES
            if len(piece) - start < size:
                exchange.wanted = size + grpc.PREFIX_BYTES
                self._make_room(stream, exchange)
                break
            if not self._renews:
                exchange.unread += start + size - position
            position = start + size
            sink.message(piece[start:position], self.received_us)
            if exchange.over:
                return
        if position < len(piece):
            parts.append(piece[position:])
            exchange.have = len(piece) - position

    def _make_room(self, stream: int, exchange: Exchange) -> None:
        """A message for which a window that is renewed by hand has no room, beside those that the
        sink has not read, needs credit to become whole.
        """
        room = self._window_bytes - exchange.unread - exchange.credit
        more = exchange.wanted - room
        if more > 0 and not self._renews and self._writer is not None:
            self._writer.write(frames.window_update(stream, more))
            exchange.credit -= more

    def _headers(self, stream: int, exchange: Exchange, block: bytes, flags: int) -> None:
        status = status_of(block)
        if not flags & frames.END_STREAM:
            return
        self._leave(stream)
        code, text = status.code, status.text
        if code < 0:
            code, text = grpc.INTERNAL, "the stream ended without a status"
        elif code == 0 and exchange.answered is not None:
            parts = exchange.parts
            raw = parts[0] if len(parts) == 1 else b"".join(parts)
            size = len(raw) - grpc.PREFIX_BYTES
            if size >= 0 and grpc.unpack_prefix(raw)[1] == size:
                exchange.answered(0, raw[grpc.PREFIX_BYTES :], "")
                return
            code, text = grpc.INTERNAL, "an answer without one whole message"
        self._end(exchange, code, text)

    def _end(self, exchange: Exchange, code: int, text: str) -> None:
        if exchange.answered is not None:
            exchange.answered(code, b"", text)
        elif exchange.sink is not None:
            exchange.sink.ended(code, text)

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        """Everything that is not an answer's headers or data in the usual form."""
        assert self._writer is not None
        if kind in (frames.HEADERS, frames.CONTINUATION):
            self._split_headers(kind, flags, stream, payload)
        elif kind == frames.WINDOW_UPDATE:
            more = int.from_bytes(payload) & frames.STREAM_MASK
            if stream == 0:
                self._window += more
            elif stream in self._windows:
                self._windows[stream] += more
            self._flush()
        elif kind == frames.SETTINGS and not flags & frames.ACK:
            self._settings(dict(frames.iter_settings(payload)))
        elif kind == frames.PING and not flags & frames.ACK:
            self._writer.write(frames.ping(payload, frames.ACK))
        elif kind == frames.RST_STREAM:
            exchange = self._exchanges.get(stream)
            if exchange is not None:
                self._windows.pop(stream, None)
                self._leave(stream)
                self._end(exchange, grpc.UNAVAILABLE, f"reset {int.from_bytes(payload)}")
        elif kind == frames.GOAWAY:
            self._leaving = True
            self._refuse(int.from_bytes(payload[:4]) & frames.STREAM_MASK)
            self._close_if_idle()

    def _refuse(self, last: int) -> None:
        """End what the server has not accepted: calls after its last stream."""
        held, self._held = self._held, deque()
        late = [(stream, one) for stream, one in self._exchanges.items() if stream > last]
        for stream, _ in late:
            self._leave(stream)
        for exchange in [*(one for _, one in late), *(call.exchange for call in held)]:
            self._end(exchange, grpc.UNAVAILABLE, "the server goes away")

    def _close_if_idle(self) -> None:
        """End a connection on which no call is left, or nothing if it lingers."""
        left = any(self._lingers or e.deadline_us for e in self._exchanges.values())
        if self._writer is not None and not left:
            self._writer.close()

    def _settings(self, values: dict[int, int]) -> None:
        assert self._writer is not None
        window = values.get(frames.INITIAL_WINDOW_SIZE, self._stream_window)
        for stream in self._windows:
            self._windows[stream] += window - self._stream_window
        self._stream_window = window
        self._frame_bytes_max = values.get(frames.MAX_FRAME_SIZE, self._frame_bytes_max)
        self._streams_max = values.get(frames.MAX_CONCURRENT_STREAMS, self._streams_max)
        self._writer.write(frames.SETTINGS_ACK)
        is_first = self._blocks is None
        if is_first or frames.HEADER_TABLE_SIZE in values:
            table = values.get(frames.HEADER_TABLE_SIZE, 4096)
            self._blocks = RequestBlocks(authority=self._authority, table_bytes=table)
        if is_first:
            self._on_ready()
        self._flush()

    def _split_headers(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        """Header blocks with padding, priority or continuations."""
        if kind == frames.HEADERS:
            payload = frames.unpad(flags, payload)
            if flags & frames.PRIORITY_FLAG:
                payload = payload[5:]
            self._header = (stream, flags, [payload])
        elif self._header is not None:
            self._header[2].append(payload)
        if flags & frames.END_HEADERS and self._header is not None:
            stream, first_flags, parts = self._header
            self._header = None
            exchange = self._exchanges.get(stream)
            if exchange is not None:
                self._headers(stream, exchange, b"".join(parts), first_flags)
