"""What breaks HTTP/2's rules, and the exact error that it earns (RFC 9113)."""

import struct
from dataclasses import replace

import pytest
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
)

from tests.transport.limits import TEST_LIMITS
from tests.transport.peer import PREFACE, Fields, Peer, connected, message, request_fields
from tests.transport.running import eventually, serving
from tests.transport.service import PATH

PROTOCOL_ERROR, FLOW_CONTROL_ERROR, SETTINGS_TIMEOUT = 1, 3, 4
STREAM_CLOSED, FRAME_SIZE_ERROR, REFUSED_STREAM, COMPRESSION_ERROR = 5, 6, 7, 9


def raw(kind: int, flags: int, sid: int, payload: bytes = b"", size: int | None = None) -> bytes:
    """Any frame, right or wrong."""
    length = len(payload) if size is None else size
    return struct.pack(">IBI", length << 8 | kind, flags, sid) + payload


DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    range(10)
)


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (raw(DATA, 1, 0, b"x"), PROTOCOL_ERROR),
        (raw(DATA, 1, 7, b"x"), PROTOCOL_ERROR),
        (raw(DATA, 0, 2, b"x"), PROTOCOL_ERROR),
        (raw(DATA, 8, 1, b"\x05abc"), PROTOCOL_ERROR),
        (raw(HEADERS, 4, 0, b"\x82"), PROTOCOL_ERROR),
        (raw(HEADERS, 4, 2, b"\x82"), PROTOCOL_ERROR),
        (raw(HEADERS, 4 | 8, 7, b"\x05abc"), PROTOCOL_ERROR),
        (raw(HEADERS, 4 | 8, 7), PROTOCOL_ERROR),
        (raw(HEADERS, 4 | 0x20, 7, b"abc"), FRAME_SIZE_ERROR),
        (raw(HEADERS, 4, 7, b"\xbe"), COMPRESSION_ERROR),  # a dynamic index
        (raw(HEADERS, 4, 7, b"\x80"), COMPRESSION_ERROR),  # index 0
        (raw(HEADERS, 4, 7, b"\x3f\xe1\x1f"), COMPRESSION_ERROR),  # a table of 4,096
        (raw(HEADERS, 4, 7, b"\x82\x20"), COMPRESSION_ERROR),  # a size update too late
        (raw(HEADERS, 4, 7, b"\x00\x05ab"), COMPRESSION_ERROR),  # a string beyond the block
        (raw(HEADERS, 4, 7, b"\x00\x81\xff\x01a"), COMPRESSION_ERROR),  # Huffman padding of 8 ones
        (raw(HEADERS, 4, 7, b"\x7f\xff\xff\xff\xff\xff\x0f"), COMPRESSION_ERROR),  # endless integer
        (raw(PRIORITY, 0, 0, bytes(5)), PROTOCOL_ERROR),
        (raw(RST_STREAM, 0, 0, bytes(4)), PROTOCOL_ERROR),
        (raw(RST_STREAM, 0, 7, bytes(4)), PROTOCOL_ERROR),
        (raw(RST_STREAM, 0, 1, bytes(3)), FRAME_SIZE_ERROR),
        (raw(SETTINGS, 0, 1), PROTOCOL_ERROR),
        (raw(SETTINGS, 0, 0, bytes(5)), FRAME_SIZE_ERROR),
        (raw(SETTINGS, 1, 0, bytes(6)), FRAME_SIZE_ERROR),
        (raw(SETTINGS, 0, 0, struct.pack(">HI", 2, 2)), PROTOCOL_ERROR),
        (raw(SETTINGS, 0, 0, struct.pack(">HI", 4, 2**31)), FLOW_CONTROL_ERROR),
        (raw(SETTINGS, 0, 0, struct.pack(">HI", 5, 16_383)), PROTOCOL_ERROR),
        (raw(SETTINGS, 0, 0, struct.pack(">HI", 5, 2**24)), PROTOCOL_ERROR),
        (raw(PUSH, 4, 1, bytes(8)), PROTOCOL_ERROR),
        (raw(PING, 0, 1, bytes(8)), PROTOCOL_ERROR),
        (raw(PING, 0, 0, bytes(7)), FRAME_SIZE_ERROR),
        (raw(GOAWAY, 0, 1, bytes(8)), PROTOCOL_ERROR),
        (raw(WINDOW_UPDATE, 0, 0, bytes(3)), FRAME_SIZE_ERROR),
        (raw(WINDOW_UPDATE, 0, 0, bytes(4)), PROTOCOL_ERROR),
        (raw(WINDOW_UPDATE, 0, 7, b"\0\0\0\1"), PROTOCOL_ERROR),
        (raw(CONTINUATION, 4, 1, b"\x82"), PROTOCOL_ERROR),
        (raw(DATA, 0, 1, bytes(16_385)), FRAME_SIZE_ERROR),
        (raw(DATA, 0, 1, b"", 2**24 - 1), FRAME_SIZE_ERROR),
        (raw(99, 0, 0, b"", 16_385), FRAME_SIZE_ERROR),
    ],
)
async def test_connection_errors(frame: bytes, code: int) -> None:
    """Each of these ends the connection with GOAWAY, this code, and the last call's stream."""
    async with serving() as running, connected(running.port) as peer:
        await peer.call(PATH + "Echo", b"x")
        peer.write(frame)
        assert (await peer.goaway())[0] == code
        last = [f for f in peer.seen if isinstance(f, GoAwayFrame)][-1]
        assert last.last_stream_id in {1, 7}
        assert running.server.stats().faults == {code: 1}


def changed(**change: str | None) -> Fields:
    """Header fields of a call with some replaced, added, or left out."""
    names = {name.replace("_", "-").replace("pseudo-", ":"): v for name, v in change.items()}
    fields = {**dict(request_fields(PATH + "Echo")), **names}
    return [(name, value) for name, value in fields.items() if value is not None]


GOOD = request_fields(PATH + "Echo")


@pytest.mark.parametrize(
    "fields",
    [
        changed(Upper="x"),
        changed(**{"a b": "x"}),
        changed(**{"": "x"}),
        changed(a="x\r\nb: y"),
        changed(a="x\0"),
        changed(a=" x"),
        changed(connection="close"),
        changed(transfer_encoding="chunked"),
        changed(te="gzip"),
        changed(pseudo_path=""),
        changed(pseudo_path=None),
        changed(pseudo_method=None),
        changed(pseudo_scheme=None),
        changed(pseudo_status="200"),
        [*GOOD, (":path", "/x")],
        [*GOOD, (":authority", "x")],
        [(":path", "/x"), *GOOD],
    ],
)
async def test_malformed_requests(fields: Fields) -> None:
    """A malformed request resets its stream with PROTOCOL_ERROR and harms no other."""
    async with serving() as running, connected(running.port) as peer:
        peer.next_sid += 2
        peer.send(peer.headers(1, fields, "END_STREAM"))
        assert (await peer.answer(1)).reset == PROTOCOL_ERROR
        assert (await peer.call(PATH + "Echo", b"next")).messages == [b"next"]


@pytest.mark.parametrize(
    ("length", "served"),
    [("6", True), ("5", False), ("7", False), ("0", False), ("-6", False), ("6" * 5000, False)],
)
async def test_content_length(length: str, served: bool) -> None:  # noqa: FBT001
    """A content-length must be that of all DATA together."""
    fields = request_fields(PATH + "Echo", content_length=length)
    async with serving() as running, connected(running.port) as peer:
        for sid in (1, 3):
            peer.send(
                peer.headers(sid, fields),
                DataFrame(sid, message(b"x")[:3]),
                DataFrame(sid, message(b"x")[3:], flags=["END_STREAM", "PADDED"], pad_length=5),
            )
            answer = await peer.answer(sid)
            assert answer.messages == ([b"x"] if served else [])
            assert answer.reset == (None if served else PROTOCOL_ERROR)


async def open_call(peer: Peer) -> int:
    """A call that is open on both sides."""
    return peer.start(PATH + "Tap")


async def test_data_after_the_end() -> None:
    """DATA on a half-closed stream resets it with STREAM_CLOSED."""
    async with serving() as running, connected(running.port) as peer:
        sid = peer.start(PATH + "Never", b"")
        peer.send(DataFrame(sid, b"x"))
        assert (await peer.answer(sid)).reset == STREAM_CLOSED
        assert running.service.cancelled == 1


async def test_headers_after_the_end() -> None:
    """HEADERS on a half-closed stream reset it with STREAM_CLOSED."""
    async with serving() as running, connected(running.port) as peer:
        sid = peer.start(PATH + "Never", b"")
        peer.send(peer.headers(sid, [("a", "b")], "END_STREAM"))
        assert (await peer.answer(sid)).reset == STREAM_CLOSED


async def test_trailers_that_do_not_end() -> None:
    """Trailers without END_STREAM reset the stream with PROTOCOL_ERROR."""
    async with serving() as running, connected(running.port) as peer:
        sid = await open_call(peer)
        peer.send(peer.headers(sid, [("a", "b")]))
        assert (await peer.answer(sid)).reset == PROTOCOL_ERROR


@pytest.mark.parametrize("name", [":path", "Upper"])
async def test_malformed_trailers(name: str) -> None:
    """Trailers with pseudo-headers or bad names reset the stream with PROTOCOL_ERROR."""
    async with serving() as running, connected(running.port) as peer:
        sid = await open_call(peer)
        peer.send(peer.headers(sid, [(name, "b")], "END_STREAM"))
        assert (await peer.answer(sid)).reset == PROTOCOL_ERROR


async def test_frames_on_a_closed_stream() -> None:
    """DATA after the end of both sides is a stream error, HEADERS a connection error."""
    async with serving() as running, connected(running.port) as peer:
        await peer.call(PATH + "Echo", b"x")
        peer.send(DataFrame(1, b"x"))
        assert (await peer.answer(1)).reset == STREAM_CLOSED
        await peer.call(PATH + "Echo", b"x")
        peer.send(peer.headers(3, GOOD, "END_STREAM"))
        assert (await peer.goaway())[0] == STREAM_CLOSED


async def test_harmless_frames() -> None:
    """Frames that a client may send at any time change nothing."""
    async with serving() as running, connected(running.port) as peer:
        await peer.call(PATH + "Echo", b"x")
        peer.write(raw(WINDOW_UPDATE, 0, 1, b"\0\0\0\1"))  # on a closed stream
        peer.write(raw(RST_STREAM, 0, 1, bytes(4)))
        peer.write(raw(PRIORITY, 0, 1, bytes(5)))
        peer.write(raw(PRIORITY, 0, 99, bytes(5)))
        peer.write(raw(0xFA, 0xFF, 12, b"unknown"))
        peer.write(raw(SETTINGS, 0, 0, struct.pack(">HI", 0xFADE, 5)))
        peer.write(raw(GOAWAY, 0, 0, bytes(8)))
        peer.write(raw(PING, 1, 0, bytes(8)))
        assert (await peer.call(PATH + "Echo", b"next")).messages == [b"next"]


async def test_reserved_bit_is_ignored() -> None:
    """The bit before a stream's number means nothing, also in a call that is served at once."""
    async with serving() as running, connected(running.port) as peer:
        for _ in range(3):
            await peer.call(PATH + "Echo", b"x")
        call = peer.headers(7, GOOD).serialize()
        call += DataFrame(7, message(b"y"), flags=["END_STREAM"]).serialize()
        peer.write(call.replace(b"\0\0\0\x07", b"\x80\0\0\x07"))
        peer.next_sid = 9
        assert (await peer.answer(7)).messages == [b"y"]
        assert (await peer.call(PATH + "Echo", b"next")).messages == [b"next"]


async def test_priority_of_a_wrong_length() -> None:
    """PRIORITY that is not five bytes long resets its stream with FRAME_SIZE_ERROR."""
    async with serving() as running, connected(running.port) as peer:
        sid = await open_call(peer)
        peer.write(raw(PRIORITY, 0, sid, bytes(4)))
        assert (await peer.answer(sid)).reset == FRAME_SIZE_ERROR


@pytest.mark.parametrize("first", [raw(PING, 0, 0, bytes(8)), raw(SETTINGS, 1, 0), raw(99, 0, 0)])
async def test_settings_come_first(first: bytes) -> None:
    """Anything but SETTINGS after the preface is a PROTOCOL_ERROR."""
    async with serving() as running, connected(running.port, greet=False) as peer:
        peer.acknowledge = False
        peer.write(PREFACE + first)
        assert (await peer.goaway())[0] == PROTOCOL_ERROR


async def test_header_block_in_pieces() -> None:
    """A block may be continued, padded and prioritised; nothing may come between."""
    async with serving() as running, connected(running.port) as peer:
        block = peer.encoder.encode(request_fields(PATH + "Echo", a="x" * 300))
        first = HeadersFrame(1, block[:20], flags=["PADDED", "PRIORITY"], pad_length=3)
        rest = [
            ContinuationFrame(1, block[20:50]),
            ContinuationFrame(1, b""),
            ContinuationFrame(1, block[50:], flags=["END_HEADERS"]),
        ]
        peer.send(first, *rest, DataFrame(1, message(b"x"), flags=["END_STREAM"]))
        assert (await peer.answer(1)).messages == [b"x"]
        peer.send(HeadersFrame(3, block[:20]), PingFrame(0, bytes(8)))
        assert (await peer.goaway())[0] == PROTOCOL_ERROR


async def test_call_inside_a_header_block() -> None:
    """Not even a whole call that would be served at once may interrupt a block."""
    async with serving() as running, connected(running.port) as peer:
        for _ in range(2):
            await peer.call(PATH + "Echo", b"x")
        block = peer.encoder.encode(GOOD)
        sid = peer.next_sid
        peer.next_sid += 2
        peer.send(HeadersFrame(sid, block[:5]))
        peer.start(PATH + "Echo", b"x")
        assert (await peer.goaway())[0] == PROTOCOL_ERROR


async def test_too_many_streams() -> None:
    """Above the advertised limit calls are refused, and served again below it."""
    limits = replace(TEST_LIMITS, streams_per_connection_max=3)
    async with serving(limits) as running, connected(running.port) as peer:
        assert isinstance(peer.seen[0], SettingsFrame)
        assert peer.seen[0].settings[SettingsFrame.MAX_CONCURRENT_STREAMS] == 3
        sids = [peer.start(PATH + "Never", b"") for _ in range(3)]
        await eventually(lambda: len(running.service.parked) == 3)
        assert (await peer.call(PATH + "Echo", b"x")).reset == REFUSED_STREAM
        peer.send(RstStreamFrame(sids[0], 8))
        assert (await peer.call(PATH + "Echo", b"x")).messages == [b"x"]
        assert running.server.stats().refusals == {"streams_per_connection_max": 1}


async def test_dynamic_table_before_the_settings_are_taken() -> None:
    """A client that has not acknowledged our SETTINGS may use its dynamic table, then no more."""
    async with serving() as running, connected(running.port, greet=False) as peer:
        peer.acknowledge = False
        peer.write(PREFACE)
        peer.send(SettingsFrame(0))
        for _ in range(3):
            assert (await peer.call(PATH + "Echo", b"x", a="b")).messages == [b"x"]
        assert len(peer.encoder.header_table.dynamic_entries) > 3
        peer.send(SettingsFrame(0, flags=["ACK"]))
        peer.encoder.header_table_size = 0
        for _ in range(3):
            assert (await peer.call(PATH + "Echo", b"x", a="b")).messages == [b"x"]
        peer.write(raw(HEADERS, 4, peer.next_sid, b"\xbe"))
        assert (await peer.goaway())[0] == COMPRESSION_ERROR


async def test_bad_block_before_the_settings_are_taken() -> None:
    """An unreadable block is a COMPRESSION_ERROR then, too."""
    async with serving() as running, connected(running.port, greet=False) as peer:
        peer.acknowledge = False
        peer.write(PREFACE)
        peer.send(SettingsFrame(0))
        peer.write(raw(HEADERS, 4, 1, b"\xff\xff\xff"))
        assert (await peer.goaway())[0] == COMPRESSION_ERROR


async def test_settings_must_be_acknowledged() -> None:
    """A client that never acknowledges our SETTINGS is sent away with SETTINGS_TIMEOUT."""
    limits = replace(TEST_LIMITS, preface_timeout=0.01)
    async with serving(limits) as running, connected(running.port, greet=False) as peer:
        peer.acknowledge = False
        peer.write(PREFACE)
        peer.send(SettingsFrame(0))
        assert await peer.goaway() == (SETTINGS_TIMEOUT, "preface_timeout")
