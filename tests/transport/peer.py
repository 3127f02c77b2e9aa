"""An HTTP/2 client for tests that says exactly what it is told to, right or wrong.

It shares no code with what it tests: frames are hyperframe's, header blocks are hpack's.
"""

import asyncio
import ssl
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

import hpack
from hyperframe.frame import (
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
PATIENCE = 10.0
"""Seconds that a test waits for something that must come."""
FRAME_BYTES = 16_384

Fields = list[tuple[str, str]]
Pair = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class ClosedError(Exception):
    """The server closed the connection."""


class Answer(NamedTuple):
    """What came on one stream."""

    headers: dict[str, str]
    messages: list[bytes]
    trailers: dict[str, str]
    reset: int | None

    @property
    def status(self) -> tuple[int, str]:
        """Code and message of gRPC."""
        fields = self.trailers or self.headers
        return int(fields["grpc-status"]), fields.get("grpc-message", "")


def message(body: bytes, *, compressed: int = 0) -> bytes:
    """A gRPC message on the wire."""
    return struct.pack(">BI", compressed, len(body)) + body


def messages(data: bytes) -> list[bytes]:
    """The messages in the data of a stream."""
    found = []
    while data:
        size = int.from_bytes(data[1:5], "big")
        found.append(data[5 : 5 + size])
        data = data[5 + size :]
    return found


def request_fields(path: str, **extra: str) -> Fields:
    """The header of a gRPC request; names in ``extra`` have ``_`` for ``-``."""
    return [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        *((name.replace("_", "-"), value) for name, value in extra.items()),
    ]


class Peer:
    """One connection to the server under test."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer
        self.encoder = hpack.Encoder()
        self._decoder = hpack.Decoder()
        self.next_sid = 1
        self.seen: list[Frame] = []
        """Every frame read so far."""
        self._unacknowledged = 0
        """SETTINGS frames sent that the server has not acknowledged."""
        self.acknowledge = True
        """Answer SETTINGS and PING while reading."""

    async def greet(self, settings: dict[int, int] | None = None) -> None:
        """Preface and SETTINGS both ways."""
        self.write(PREFACE)
        self.send(SettingsFrame(0, settings=settings or {}))
        await self.until(lambda f: isinstance(f, SettingsFrame) and "ACK" not in f.flags)
        self.encoder.header_table_size = 0
        await self.until(lambda f: isinstance(f, SettingsFrame) and "ACK" in f.flags)

    def write(self, data: bytes) -> None:
        """Send bytes."""
        self.writer.write(data)

    def send(self, *frames: Frame) -> None:
        """Send frames in one write."""
        self.write(b"".join(frame.serialize() for frame in frames))
        self._unacknowledged += sum(
            isinstance(frame, SettingsFrame) and "ACK" not in frame.flags for frame in frames
        )

    def headers(self, sid: int, fields: Fields, *flags: str) -> HeadersFrame:
        """A HEADERS frame with a whole block."""
        return HeadersFrame(sid, self.encoder.encode(fields), flags=["END_HEADERS", *flags])

    def start(self, path: str, body: bytes | None = None, **extra: str) -> int:
        """Send a request with one message, or only its headers; gives its stream."""
        sid = self.next_sid
        self.next_sid += 2
        frames: list[Frame] = [self.headers(sid, request_fields(path, **extra))]
        if body is not None:
            data = message(body)
            parts = [data[i : i + FRAME_BYTES] for i in range(0, len(data), FRAME_BYTES)]
            frames += [DataFrame(sid, part) for part in parts]
            frames[-1].flags.add("END_STREAM")
        self.send(*frames)
        return sid

    async def read(self) -> Frame:
        """The next frame; raises ``ClosedError`` when there is none."""
        try:
            async with asyncio.timeout(PATIENCE):
                head = await self._reader.readexactly(9)
                frame, size = Frame.parse_frame_header(memoryview(head))
                frame.parse_body(memoryview(await self._reader.readexactly(size)))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise ClosedError from error
        self.seen.append(frame)
        if isinstance(frame, SettingsFrame) and "ACK" in frame.flags:
            self._unacknowledged -= 1
        if self.acknowledge and "ACK" not in frame.flags:
            if isinstance(frame, SettingsFrame):
                self.send(SettingsFrame(0, flags=["ACK"]))
            elif isinstance(frame, PingFrame):
                self.send(PingFrame(0, frame.opaque_data, flags=["ACK"]))
        return frame

    async def read_all(self) -> None:
        """Read to the end of the connection."""
        with suppress(ClosedError):
            while True:
                await self.read()

    async def until(self, wanted: Callable[[Frame], bool]) -> Frame:
        """Read until a frame is as wanted."""
        while True:
            frame = await self.read()
            if wanted(frame):
                return frame

    async def answer(self, sid: int) -> Answer:
        """Read until stream ``sid`` has ended."""
        blocks: list[dict[str, str]] = []
        data = b""
        while True:
            frame = await self.read()
            if isinstance(frame, GoAwayFrame) and frame.error_code:
                raise AssertionError(f"GOAWAY {frame.error_code} {frame.additional_data!r}")
            if isinstance(frame, HeadersFrame):
                fields = {str(n): str(v) for n, v in self._decoder.decode(frame.data)}
                if frame.stream_id == sid:
                    blocks.append(fields)
            if frame.stream_id != sid:
                continue
            if isinstance(frame, DataFrame):
                data += frame.data
                if frame.flow_controlled_length:
                    self.grant(sid, frame.flow_controlled_length)
            if isinstance(frame, RstStreamFrame):
                return _answer(blocks, data, frame.error_code)
            if "END_STREAM" in frame.flags:
                return _answer(blocks, data, None)

    async def settle(self) -> None:
        """Return when all that the server sends because of what it got has come."""
        for _ in range(2):  # data follows the first acknowledgement in its turn of the loop
            self.send(SettingsFrame(0))
            while self._unacknowledged:
                await self.read()

    def grant(self, sid: int, increment: int) -> None:
        """Credit for a stream and the connection."""
        self.send(WindowUpdateFrame(0, increment), WindowUpdateFrame(sid, increment))

    async def call(self, path: str, body: bytes = b"", **extra: str) -> Answer:
        """One unary call."""
        return await self.answer(self.start(path, body, **extra))

    async def goaway(self) -> tuple[int, str]:
        """Read to the end of the connection; code and reason of the last GOAWAY."""
        last: GoAwayFrame | None = None
        try:
            while True:
                frame = await self.read()
                if isinstance(frame, GoAwayFrame):
                    last = frame
        except ClosedError:
            pass
        assert last is not None, "closed without GOAWAY"
        return last.error_code, last.additional_data.decode()

    async def close(self) -> None:
        """Close the connection."""
        self.writer.close()
        with suppress(ConnectionError, ssl.SSLError):
            await self.writer.wait_closed()


def _answer(blocks: list[dict[str, str]], data: bytes, reset: int | None) -> Answer:
    headers = blocks[0] if blocks else {}
    trailers = blocks[1] if len(blocks) > 1 else {}
    return Answer(headers, messages(data), trailers, reset)


@asynccontextmanager
async def talking(port: int, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[Pair]:
    """A connection that says nothing of its own, closed at the end whatever happened."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(ConnectionError, ssl.SSLError):
            await writer.wait_closed()


@asynccontextmanager
async def connected(
    port: int,
    *,
    settings: dict[int, int] | None = None,
    greet: bool = True,
    tls: ssl.SSLContext | None = None,
    address: str = "127.0.0.1",
) -> AsyncIterator[Peer]:
    """A peer at ``address`` that has exchanged SETTINGS with the server on ``port``."""
    pair = await asyncio.open_connection("127.0.0.1", port, ssl=tls, local_addr=(address, 0))
    peer = Peer(*pair)
    try:
        if greet:
            await peer.greet(settings)
        yield peer
    finally:
        await peer.close()
