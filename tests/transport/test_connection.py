"""A connection without a socket: however its bytes are cut, and whatever they are."""

import asyncio
import time
from collections import defaultdict
from itertools import pairwise

import hpack
import pytest
from hyperframe.frame import (
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.transport.connection import Http2Connection
from kvstore.transport.server import Server
from tests.transport.limits import TEST_LIMITS
from tests.transport.peer import Fields, message, request_fields
from tests.transport.service import PATH, Service


class Socket(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.protocol: asyncio.BaseProtocol | None = None
        self.closed = False
        self.told: list[str] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Keep it."""
        assert not self.closed, "written to after the close"
        self.written += data

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """There is no buffer."""

    def get_write_buffer_size(self) -> int:
        """Likewise."""
        return 0

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Keep it."""
        self.protocol = protocol

    def pause_reading(self) -> None:
        """Note it."""
        self.told.append("pause")

    def resume_reading(self) -> None:
        """Note it."""
        self.told.append("resume")

    def can_write_eof(self) -> bool:
        """No."""
        return False

    def is_closing(self) -> bool:
        """Was it closed."""
        return self.closed

    def close(self) -> None:
        """Note it."""
        self.closed = True

    def abort(self) -> None:
        """Note it."""
        self.closed = True


class World:
    """A server and one connection of its, fed by hand."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.service = Service()
        self.server = Server(
            methods=self.service.methods(),
            http_handler=self.service.handle_http,
            limits=TEST_LIMITS,
            clock=time.monotonic,
            wall=time.time,
            on_failure=lambda what, error: self.failures.append(f"{what} {error!r}"),
        )
        self.socket = Socket()
        self.connection = Http2Connection(self.server, "test")
        self.connection.connection_made(self.socket)

    def feed(self, data: bytes) -> None:
        """Read one piece."""
        if self.socket.protocol is None and not self.socket.closed:
            self.connection.data_received(data)
            self.server._flush()

    def end(self) -> None:
        """Lose the connection; nothing may be left of it."""
        self.connection.connection_lost(None)
        self.server._flush()
        totals = self.server.totals
        assert (totals.request_bytes, totals.output_bytes) == (0, 0)
        assert not self.connection.streams.open
        assert self.server.stats().connections == 0

    def frames(self) -> list[Frame]:
        """What was written, by hyperframe."""
        found = []
        data = memoryview(bytes(self.socket.written))
        while data:
            frame, size = Frame.parse_frame_header(data[:9])
            frame.parse_body(data[9 : 9 + size])
            found.append(frame)
            data = data[9 + size :]
        return found


def said(frames: list[Frame]) -> dict[int, list[object]]:
    """What each stream was told, however its data was cut."""
    decoder = hpack.Decoder()
    streams: dict[int, list[object]] = defaultdict(list)
    for frame in frames:
        told = streams[frame.stream_id]
        if isinstance(frame, DataFrame):
            if told and isinstance(told[-1], bytes):
                told[-1] += frame.data
            else:
                told.append(frame.data)
        elif isinstance(frame, HeadersFrame):
            told.append((tuple(decoder.decode(frame.data)), "END_STREAM" in frame.flags))
        elif isinstance(frame, RstStreamFrame) and frame.error_code:
            # NO_ERROR follows an answer that was given before the request's end had come.
            told.append(frame.error_code)
        elif isinstance(frame, GoAwayFrame):
            told.append((frame.error_code, frame.additional_data))
    return streams


NAMES = st.sampled_from(["Echo", "Later", "Size", "Fail", "Chat", "Count", "Nothing"])
BODIES = st.sampled_from([b"", b"7", b"5 200", b"40000", b"raise x"])
CALLS = st.lists(
    st.tuples(NAMES, BODIES, st.sampled_from(["", "5S", "4999u", "1x"]), st.booleans()), max_size=12
)


def conversation(calls: list[tuple[str, bytes, str, bool]]) -> bytes:
    """A client's bytes: these calls, one after the other."""
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    parts = [
        SettingsFrame(0, settings={4: 1 << 20}).serialize(),
        SettingsFrame(0, flags=["ACK"]).serialize(),
        WindowUpdateFrame(0, 1 << 20).serialize(),
    ]
    for i, (name, body, timeout, split) in enumerate(calls):
        sid = 2 * i + 1
        fields: Fields = request_fields(PATH + name)
        if timeout:
            fields.append(("grpc-timeout", timeout))
        fields.append(("client-api-version", "3.6"))
        parts.append(HeadersFrame(sid, encoder.encode(fields), flags=["END_HEADERS"]).serialize())
        data = message(body)
        if split:
            parts += [DataFrame(sid, data[:4]).serialize()]
            parts += [
                DataFrame(sid, data[4:]).serialize(),
                DataFrame(sid, b"", flags=["END_STREAM"]).serialize(),
            ]
        else:
            parts.append(DataFrame(sid, data, flags=["END_STREAM"]).serialize())
    return b"".join(parts)


@pytest.fixture
def anyio_backend() -> str:
    """One loop is enough: no socket is touched."""
    return "asyncio"


async def _converse(data: bytes, cuts: list[int]) -> dict[int, list[object]]:
    """What a client is told that sends ``data`` in pieces of these sizes."""
    world = World()
    for cut in cuts:
        world.feed(data[:cut])
        data = data[cut:]
        await asyncio.sleep(0)
    world.feed(data)
    for _ in range(3):  # late answers
        await asyncio.sleep(0)
        world.server._flush()
    told = said(world.frames())
    world.end()
    return told


@given(CALLS, st.lists(st.integers(0, 300), max_size=30))
@settings(max_examples=100)
def test_fast_and_slow_road_agree(
    calls: list[tuple[str, bytes, str, bool]], cuts: list[int]
) -> None:
    """However the bytes of a conversation are cut, each call is told the same."""
    data = conversation(calls)
    whole = asyncio.run(_converse(data, []))
    assert asyncio.run(_converse(data, cuts)) == whole
    assert asyncio.run(_converse(data, [1] * min(len(data), 600))) == whole


async def test_a_turn_is_bounded() -> None:
    """Of a large answer no more than its share is cut in one turn; the rest follows in others."""
    world = World()
    calls = [("Size", b"8000000", "", False)]
    limit = TEST_LIMITS.turn_bytes_max
    world.connection.streams.output.window = 1 << 30
    world.connection.data_received(conversation(calls))
    world.connection.data_received(SettingsFrame(0, settings={4: 1 << 30}).serialize())
    written = [len(world.socket.written)]
    while world.connection.streams.open:
        await asyncio.sleep(0)
        written.append(len(world.socket.written))
    steps = [after - before for before, after in pairwise(written)]
    assert written[0] < limit + 100_000
    assert max(steps) < limit + 100_000
    assert sum(step > 0 for step in steps) >= 5
    assert written[-1] > 8_000_000
    world.end()


async def test_small_answers_of_a_turn_are_bounded() -> None:
    """Many small calls of one read do not fill the socket's buffer with answers either."""
    world = World()
    world.feed(SettingsFrame(0, settings={4: 1 << 20}).serialize())
    world.feed(WindowUpdateFrame(0, 1 << 30).serialize())
    before = len(world.socket.written)
    world.connection.data_received(conversation([("Size", b"16000", "", False)] * 400))
    limit = TEST_LIMITS.turn_bytes_max
    assert len(world.socket.written) - before < 2 * limit + 100_000
    for _ in range(20):  # the rest follows, turn by turn
        await asyncio.sleep(0)
    assert len(world.socket.written) - before > 400 * 16_000
    world.end()


async def test_a_long_read_lets_others_read() -> None:
    """After a read that may have left some, the loop turns to its other connections first."""
    world = World()
    world.feed(conversation([("Echo", bytes(1000), "", False)] * 10))
    assert world.socket.told == []
    world.feed(WindowUpdateFrame(0, 1).serialize() * 11_000)
    assert world.socket.told == ["pause"]
    await asyncio.sleep(0)
    assert world.socket.told == ["pause", "resume"]
    world.end()


def _any_frame() -> st.SearchStrategy[bytes]:
    """A frame of any type, flags, stream and payload, often a sensible one."""

    def build(kind: int, flags: int, sid: int, payload: bytes) -> bytes:
        return (
            len(payload).to_bytes(3, "big")
            + bytes((kind, flags))
            + sid.to_bytes(4, "big")
            + payload
        )

    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    block = encoder.encode(request_fields(PATH + "Chat"))[1:]
    payloads = st.one_of(
        st.binary(max_size=40),
        st.sampled_from(
            [b"", bytes(4), b"\0\0\0\x09", bytes(5), bytes(8), block, message(b"hello")]
        ),
        st.builds(lambda a, b: block[:a] + b, st.integers(0, 40), st.binary(max_size=8)),
    )
    return st.builds(
        build,
        st.integers(0, 10),
        st.sampled_from([0, 1, 4, 5, 8, 0x2C, 0xFF]),
        st.sampled_from([0, 1, 3, 5, 7, 9, 11, 2, 2**31 - 1, 2**31 + 1]),
        payloads,
    )


@given(st.lists(_any_frame(), max_size=40), st.lists(st.integers(1, 60), max_size=40))
@settings(max_examples=400)
def test_any_frames(frames: list[bytes], cuts: list[int]) -> None:
    """Whatever frames come, the answer is proper HTTP/2, and nothing is left at the end."""

    async def run() -> None:
        world = World()
        world.feed(SettingsFrame(0).serialize() + SettingsFrame(0, flags=["ACK"]).serialize())
        data = b"".join(frames)
        for cut in cuts:
            world.feed(data[:cut])
            data = data[cut:]
        world.feed(data)
        world.connection.tick(time.monotonic())
        said(world.frames())
        world.end()
        assert world.failures == []

    asyncio.run(run())


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    """Whatever bytes come after the preface, the connection ends properly."""

    async def run() -> None:
        world = World()
        world.feed(data)
        said(world.frames())
        world.end()
        assert world.failures == []

    asyncio.run(run())
