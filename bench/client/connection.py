"""One HTTP/2 connection to a server under test (RFC 9113, gRPC's PROTOCOL-HTTP2.md).

As little Python per call as will do: a request is one write of prepared bytes, an answer one look
at a dictionary; no task, no future. The client must not cost what the server under it costs.

We advertise a header table of size 0, so blocks of answers are stateless and are looked up by their
bytes. Flow control is kept in both directions; what does not fit a window waits in order.
``received_us`` is read once per piece of input: the time of everything in it.

A connection is made, used and lost once; whoever wants another makes another.
"""

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Protocol, cast

from bench.client.blocks import RequestBlocks, timeout_field
from bench.clock import now_us
from kvstore.transport import fields, frames, grpc

Answered = Callable[[int, bytes, str], None]
"""gRPC code, message (empty unless the code is OK) and text of the error."""

WINDOW_BYTES = 16 << 20
"""Granted to each stream and renewed by half; a stream that reads slowly grants less itself."""
CONNECTION_WINDOW_BYTES = 1 << 30
SMALL_WINDOW_BYTES = 65_535
_BLOCKS_MAX = 4096
_ANSWER_FIELDS_MAX, _ANSWER_HEADER_BYTES_MAX = 100, 65_536
_LINGER = struct.pack("ii", 1, 0)


class Sink(Protocol):
    """The receiving end of a stream."""

    def message(self, message: bytes, received_us: int, /) -> None:
        """One whole message."""

    def ended(self, code: int, text: str, /) -> None:
        """The stream is over; called once."""


class _Exchange:
    """One call or stream that is not over."""

    __slots__ = ("answered", "credit", "deadline_us", "parts", "sink", "unsent")

    def __init__(self, answered: Answered | None, sink: Sink | None, deadline_us: int) -> None:
        self.answered = answered
        self.sink = sink
        self.deadline_us = deadline_us
        self.parts: list[bytes] = []
        self.credit = 0
        self.unsent = 0


class Status:
    """What a header block of an answer says: gRPC code (-1: none yet) and text."""

    __slots__ = ("code", "text")

    def __init__(self, block: bytes) -> None:
        found, _ = fields.decode(
            block, count_max=_ANSWER_FIELDS_MAX, bytes_max=_ANSWER_HEADER_BYTES_MAX
        )
        said = dict(found)
        self.code, self.text = -1, ""
        if b"grpc-status" in said:
            self.code = int(said[b"grpc-status"])
            self.text = grpc.decode_message(said.get(b"grpc-message", b""))
        elif said.get(b":status", b"200") != b"200":
            self.code = grpc.UNAVAILABLE
            self.text = f"HTTP status {said[b':status'].decode()}"


_statuses: dict[bytes, Status] = {}


def _status(block: bytes) -> Status:
    found = _statuses.get(block)
    if found is None:
        if len(_statuses) >= _BLOCKS_MAX:
            _statuses.clear()
        found = _statuses[block] = Status(block)
    return found


class Connection(asyncio.Protocol):
    """See the module's text. ``on_lost`` is called once, after every exchange has been ended."""

    def __init__(
        self,
        authority: str,
        on_ready: Callable[[], None],
        on_lost: Callable[[], None],
        *,
        window_bytes: int = WINDOW_BYTES,
    ) -> None:
        self._authority = authority.encode()
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._window_bytes = window_bytes
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._exchanges: dict[int, _Exchange] = {}
        self._stream_next = 1
        self._blocks: RequestBlocks | None = None
        self._window = frames.DEFAULT_WINDOW
        self._stream_window = frames.DEFAULT_WINDOW
        self._frame_bytes_max = frames.FRAME_BYTES_MIN
        self._windows: dict[int, int] = {}
        """Windows of streams that differ from a new stream's."""
        self._waiting: deque[tuple[int, bytes, bool]] = deque()
        """(stream, bytes, is the end) that no window takes yet."""
        self._consumed = 0
        self._header: tuple[int, int, list[bytes]] | None = None
        self.received_us = 0
        self.lost = False

    # Sending.

    @property
    def usable(self) -> bool:
        """The server's settings have come and nobody has said goodbye."""
        return self._blocks is not None and not self.lost

    @property
    def calls(self) -> int:
        """Exchanges in progress."""
        return len(self._exchanges)

    def call(self, path: bytes, message: bytes, answered: Answered, timeout_us: int) -> None:
        """Send a unary call; ``answered`` is called once, whatever happens.

        Needs ``usable``.
        """
        deadline_us = now_us() + timeout_us
        self._begin(path, message, _Exchange(answered, None, deadline_us), timeout_us, end=True)

    def open(self, path: bytes, message: bytes, sink: Sink, *, end: bool = False) -> int:
        """Begin a stream with its first message; gives its number."""
        return self._begin(path, message, _Exchange(None, sink, 0), 0, end=end)

    def _begin(
        self, path: bytes, message: bytes, exchange: _Exchange, timeout_us: int, *, end: bool
    ) -> int:
        assert self._blocks is not None
        assert self._transport is not None
        stream = self._stream_next
        self._stream_next = stream + 2
        self._exchanges[stream] = exchange
        block = self._blocks.block(path)
        if timeout_us:
            block += timeout_field(timeout_us)
        size = len(message) + grpc.PREFIX_BYTES
        head = frames.header(frames.HEADERS, frames.END_HEADERS, stream, len(block)) + block
        if (
            size <= self._window
            and size <= self._stream_window
            and size <= self._frame_bytes_max
            and not self._waiting
        ):
            self._window -= size
            if not end:
                self._windows[stream] = self._stream_window - size
            flags = frames.END_STREAM if end else 0
            data = frames.header(frames.DATA, flags, stream, size)
            self._transport.write(head + data + grpc.prefix(size - grpc.PREFIX_BYTES) + message)
        else:
            self._transport.write(head)
            self._windows[stream] = self._stream_window
            self._queue(stream, grpc.prefix(len(message)) + message, end=end)
        return stream

    def send(self, stream: int, message: bytes) -> None:
        """One more message of a stream that is open."""
        if stream in self._exchanges:
            self._queue(stream, grpc.prefix(len(message)) + message, end=False)

    def half_close(self, stream: int) -> None:
        """Say that no message follows on a stream that is open."""
        if stream in self._exchanges:
            self._queue(stream, b"", end=True)

    def cancel(self, stream: int) -> None:
        """Give a stream up; its sink is told that it was cancelled."""
        exchange = self._exchanges.pop(stream, None)
        if exchange is not None and self._transport is not None:
            self._transport.write(frames.reset(stream, frames.CANCEL))
            self._end(exchange, grpc.CANCELLED, "cancelled by the client")

    def grant(self, stream: int, size: int) -> None:
        """Credit for a stream whose window this side renews by hand."""
        if self._transport is not None and stream in self._exchanges:
            self._transport.write(frames.window_update(stream, size))

    def _queue(self, stream: int, raw: bytes, *, end: bool) -> None:
        self._waiting.append((stream, raw, end))
        self._flush()

    def _flush(self) -> None:
        """Send of what waits as much as the windows take, in order."""
        assert self._transport is not None
        while self._waiting:
            stream, raw, end = self._waiting[0]
            if stream not in self._exchanges:
                self._waiting.popleft()
                continue
            room = min(
                self._window,
                self._windows.get(stream, self._stream_window),
                self._frame_bytes_max,
            )
            if room <= 0:
                return
            piece, rest = raw[:room], raw[room:]
            self._window -= len(piece)
            self._windows[stream] = self._windows.get(stream, self._stream_window) - len(piece)
            last = end and not rest
            flags = frames.END_STREAM if last else 0
            self._transport.write(frames.frame(frames.DATA, flags, stream, piece))
            self._waiting.popleft()
            if rest:
                self._waiting.appendleft((stream, rest, end))

    def expire(self, now: int) -> None:
        """End the calls whose time is up, which are unanswered by the server."""
        late = [
            (stream, exchange)
            for stream, exchange in self._exchanges.items()
            if exchange.deadline_us and exchange.deadline_us <= now
        ]
        for stream, exchange in late:
            del self._exchanges[stream]
            if self._transport is not None:
                self._transport.write(frames.reset(stream, frames.CANCEL))
            self.received_us = now
            self._end(exchange, grpc.DEADLINE_EXCEEDED, "the benchmark's timeout")

    def close(self, *, reset: bool = False) -> None:
        """End the connection: by FIN, or by RST as a machine that went away would."""
        transport = self._transport
        if transport is None:
            return
        if reset:
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
            transport.abort()
        else:
            transport.write(frames.goaway(0, frames.NO_ERROR))
            transport.close()

    # Receiving.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the preface."""
        transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance
        self._transport = transport
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
        self.lost = True
        self._transport = None
        self.received_us = now_us()
        exchanges = list(self._exchanges.values())
        self._exchanges.clear()
        for exchange in exchanges:
            self._end(exchange, grpc.UNAVAILABLE, "connection lost")
        self._on_lost()

    def data_received(self, data: bytes) -> None:
        """Take whole frames off the input."""
        self.received_us = now_us()
        if self._rest:
            data = self._rest + data
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
        if self._consumed >= CONNECTION_WINDOW_BYTES // 2 and self._transport is not None:
            self._transport.write(frames.window_update(0, self._consumed))
            self._consumed = 0

    def _data(self, stream: int, exchange: _Exchange, piece: bytes, flags: int) -> None:
        if flags & frames.PADDED:
            piece = frames.unpad(flags, piece)
        exchange.credit += len(piece)
        if exchange.credit >= self._window_bytes // 2 > SMALL_WINDOW_BYTES:
            self.grant(stream, exchange.credit)
            exchange.credit = 0
        if exchange.sink is None:
            exchange.parts.append(piece)
        else:
            self._messages(exchange, piece)
        if flags & frames.END_STREAM:
            del self._exchanges[stream]
            self._end(exchange, grpc.INTERNAL, "the stream ended without a status")

    def _messages(self, exchange: _Exchange, piece: bytes) -> None:
        """Hand the whole messages of a stream to its sink."""
        assert exchange.sink is not None
        parts = exchange.parts
        if parts:
            parts.append(piece)
            if exchange.unsent > sum(map(len, parts)):
                return
            piece = b"".join(parts)
            parts.clear()
        position = 0
        while len(piece) - position >= grpc.PREFIX_BYTES:
            _, size = grpc.unpack_prefix(piece, position)
            start = position + grpc.PREFIX_BYTES
            if len(piece) - start < size:
                exchange.unsent = size + grpc.PREFIX_BYTES
                break
            position = start + size
            exchange.sink.message(piece[start:position], self.received_us)
        else:
            exchange.unsent = 0
        if position < len(piece):
            parts.append(piece[position:])

    def _headers(self, stream: int, exchange: _Exchange, block: bytes, flags: int) -> None:
        status = _status(block)
        if not flags & frames.END_STREAM:
            return
        del self._exchanges[stream]
        self._windows.pop(stream, None)
        code = status.code
        if code == 0 and exchange.answered is not None:
            parts = exchange.parts
            message = parts[0] if len(parts) == 1 else b"".join(parts)
            exchange.answered(0, message[grpc.PREFIX_BYTES :], "")
            return
        self._end(exchange, code if code >= 0 else grpc.INTERNAL, status.text)

    def _end(self, exchange: _Exchange, code: int, text: str) -> None:
        if exchange.answered is not None:
            exchange.answered(code, b"", text)
        elif exchange.sink is not None:
            exchange.sink.ended(code, text)

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        """Everything that is not an answer's headers or data in the usual form."""
        assert self._transport is not None
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
            self._transport.write(frames.ping(payload, frames.ACK))
        elif kind == frames.RST_STREAM:
            exchange = self._exchanges.pop(stream, None)
            if exchange is not None:
                self._end(exchange, grpc.UNAVAILABLE, f"reset {int.from_bytes(payload)}")
        elif kind == frames.GOAWAY:
            self._transport.close()

    def _settings(self, values: dict[int, int]) -> None:
        assert self._transport is not None
        window = values.get(frames.INITIAL_WINDOW_SIZE, self._stream_window)
        for stream in self._windows:
            self._windows[stream] += window - self._stream_window
        self._stream_window = window
        self._frame_bytes_max = values.get(frames.MAX_FRAME_SIZE, self._frame_bytes_max)
        self._transport.write(frames.SETTINGS_ACK)
        if self._blocks is None:
            table = values.get(frames.HEADER_TABLE_SIZE, 4096)
            self._blocks = RequestBlocks(authority=self._authority, table_bytes=table)
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
