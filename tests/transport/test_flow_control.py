"""Flow control both ways (RFC 9113 section 5.2): windows, settings, frames sizes, fairness."""

from dataclasses import replace

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

from tests.transport.limits import TEST_LIMITS
from tests.transport.peer import ClosedError, Peer, connected, message, messages
from tests.transport.running import eventually, serving
from tests.transport.service import PATH

INITIAL_WINDOW_SIZE = SettingsFrame.INITIAL_WINDOW_SIZE
MAX_FRAME_SIZE = SettingsFrame.MAX_FRAME_SIZE


def data_of(peer: Peer, sid: int) -> bytes:
    """What has come on a stream so far."""
    return b"".join(f.data for f in peer.seen if isinstance(f, DataFrame) and f.stream_id == sid)


async def test_answer_stops_at_the_stream_window() -> None:
    """Not a byte more than the window is sent; the rest follows what is granted."""
    async with (
        serving() as running,
        connected(running.port, settings={INITIAL_WINDOW_SIZE: 1000}) as peer,
    ):
        sid = peer.start(PATH + "Size", b"2995")
        await peer.settle()
        assert len(data_of(peer, sid)) == 1000
        peer.send(WindowUpdateFrame(sid, 999))
        await peer.settle()
        assert len(data_of(peer, sid)) == 1999
        assert running.server.stats().output_bytes == 1001
        peer.send(WindowUpdateFrame(sid, 5000))
        await peer.until(lambda f: isinstance(f, HeadersFrame) and "END_STREAM" in f.flags)
        assert messages(data_of(peer, sid)) == [bytes(2995)]


async def test_answer_stops_at_the_connection_window() -> None:
    """All streams together send no more than the connection's window."""
    settings = {INITIAL_WINDOW_SIZE: 1 << 20}
    async with serving() as running, connected(running.port, settings=settings) as peer:
        sids = [peer.start(PATH + "Size", b"40000") for _ in range(3)]
        await peer.settle()
        assert sum(len(data_of(peer, sid)) for sid in sids) == 65_535
        peer.send(WindowUpdateFrame(0, 100_000))
        await peer.settle()
        assert [messages(data_of(peer, sid)) for sid in sids] == [[bytes(40_000)]] * 3


async def test_small_answers_use_the_connection_window() -> None:
    """Answers that are sent at once count too, those of pending calls and of streams as well."""
    settings = {INITIAL_WINDOW_SIZE: 1 << 20}
    async with serving() as running, connected(running.port, settings=settings) as peer:
        for name in ("Echo", "Later", "Chat"):
            for _ in range(100):
                peer.start(PATH + name, bytes(495))
            peer.grant(peer.next_sid - 2, 1)  # a byte, to have the window looked at
            await peer.settle()
        data = [f for f in peer.seen if isinstance(f, DataFrame)]
        assert sum(len(f.data) for f in data) == 65_535 + 3
        assert running.server.stats().output_bytes == 300 * 500 - 65_538


async def test_window_granted_before_the_answer() -> None:
    """Credit that comes while the call is being served counts."""
    async with (
        serving() as running,
        connected(running.port, settings={INITIAL_WINDOW_SIZE: 0}) as peer,
    ):
        sid = peer.start(PATH + "Never", b"")
        peer.send(WindowUpdateFrame(sid, 1005))
        await eventually(lambda: bool(running.service.parked))
        await peer.settle()
        running.service.parked[0].reply(bytes(1000))
        await peer.until(lambda f: isinstance(f, HeadersFrame) and "END_STREAM" in f.flags)
        assert messages(data_of(peer, sid)) == [bytes(1000)]


async def test_setting_changes_open_windows() -> None:
    """INITIAL_WINDOW_SIZE moves the windows of open streams, also below zero."""
    async with (
        serving() as running,
        connected(running.port, settings={INITIAL_WINDOW_SIZE: 1000}) as peer,
    ):
        sid = peer.start(PATH + "Size", b"5000")
        await peer.settle()
        peer.send(SettingsFrame(0, settings={INITIAL_WINDOW_SIZE: 100}))
        peer.send(WindowUpdateFrame(sid, 900))
        await peer.settle()
        assert len(data_of(peer, sid)) == 1000, "the window is 0 now"
        peer.send(SettingsFrame(0, settings={INITIAL_WINDOW_SIZE: 150}))
        await peer.settle()
        assert len(data_of(peer, sid)) == 1050
        peer.send(SettingsFrame(0, settings={INITIAL_WINDOW_SIZE: 10_000}))
        await peer.until(lambda f: isinstance(f, HeadersFrame) and "END_STREAM" in f.flags)
        assert messages(data_of(peer, sid)) == [bytes(5000)]


@pytest.mark.parametrize("frame_size", [16_384, 20_000, 1 << 20])
async def test_frames_are_as_large_as_the_peer_allows(frame_size: int) -> None:
    """DATA frames fill the peer's MAX_FRAME_SIZE and do not exceed it."""
    settings = {INITIAL_WINDOW_SIZE: 1 << 22, MAX_FRAME_SIZE: frame_size}
    async with serving() as running, connected(running.port, settings=settings) as peer:
        peer.send(WindowUpdateFrame(0, 1 << 22))
        peer.start(PATH + "Size", b"3000000")
        await peer.until(lambda f: isinstance(f, HeadersFrame) and "END_STREAM" in f.flags)
        sizes = [f.flow_controlled_length for f in peer.seen if isinstance(f, DataFrame)]
        assert max(sizes) == frame_size
        assert sum(sizes) == 3_000_005


async def test_large_answers_take_turns_and_let_small_ones_pass() -> None:
    """Large answers advance together, and a small answer need not wait for them."""
    settings = {INITIAL_WINDOW_SIZE: 1 << 24}
    async with serving() as running, connected(running.port, settings=settings) as peer:
        large = [peer.start(PATH + "Size", b"7000000") for _ in range(3)]
        await peer.settle()
        small = peer.start(PATH + "Echo", b"small")
        peer.send(WindowUpdateFrame(0, 1 << 20))
        answer = await peer.answer(small)
        assert answer.messages == [b"small"]
        await peer.settle()
        amounts = [len(data_of(peer, sid)) for sid in large]
        assert max(amounts) - min(amounts) <= 2 * 16_384
        assert 900_000 < sum(amounts) < 1_200_000


async def test_uploads_are_granted_again() -> None:
    """A stream and a connection carry more than their windows, in steps."""
    limits = replace(TEST_LIMITS, stream_window_bytes=70_000, connection_window_bytes=100_000)
    async with serving(limits) as running, connected(running.port) as peer:
        sid = peer.start(PATH + "Tap")
        await eventually(lambda: bool(running.service.taps))
        sink = running.service.taps[0]
        room = {0: 100_000, sid: 70_000}
        for i in range(50):
            while min(room.values()) < 10_005:
                frame = await peer.until(lambda f: isinstance(f, WindowUpdateFrame))
                assert isinstance(frame, WindowUpdateFrame)
                room[frame.stream_id] += frame.window_increment
            peer.send(DataFrame(sid, message(bytes([i]) * 10_000)))
            for stream in room:
                room[stream] -= 10_005
        await eventually(lambda: len(sink.events) == 50)


@pytest.mark.parametrize("path", ["Tap", "Echo"])
async def test_stream_window_is_enforced(path: str) -> None:
    """DATA beyond a stream's window resets the stream with FLOW_CONTROL_ERROR."""
    limits = replace(TEST_LIMITS, stream_window_bytes=20_000)
    async with serving(limits) as running, connected(running.port) as peer:
        sid = peer.start(PATH + path)
        data = message(bytes(30_000))
        peer.send(DataFrame(sid, data[:9000]), DataFrame(sid, data[9000:22_000]))
        answer = await peer.answer(sid)
        assert answer.reset == 3
        assert (await peer.call(PATH + "Echo", b"next")).messages == [b"next"]


async def test_connection_window_is_enforced() -> None:
    """DATA beyond the connection's window ends the connection with FLOW_CONTROL_ERROR."""
    limits = replace(TEST_LIMITS, connection_window_bytes=65_535, stream_window_bytes=50_000)
    async with serving(limits) as running, connected(running.port) as peer:
        sids = [peer.start(PATH + "Tap") for _ in range(5)]
        await eventually(lambda: len(running.service.taps) == 5)
        data = [DataFrame(sid, message(bytes(30_000))[:16_384]).serialize() for sid in sids]
        running.connection.data_received(b"".join(data))  # one read: nothing is granted between
        assert (await peer.goaway())[0] == 3


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([WindowUpdateFrame(0, 2**31 - 1)], 3),
        ([SettingsFrame(0, settings={INITIAL_WINDOW_SIZE: 2**31})], 3),
        ([WindowUpdateFrame(1, 1000), SettingsFrame(0, settings={4: 2**31 - 1})], 3),
    ],
)
async def test_overflowing_windows(frames: list[Frame], code: int) -> None:
    """A window above 2^31-1 ends the connection with FLOW_CONTROL_ERROR."""
    async with serving() as running, connected(running.port) as peer:
        peer.start(PATH + "Never", b"")
        peer.send(*frames)
        assert (await peer.goaway())[0] == code


async def test_overflowing_stream_window() -> None:
    """A stream's window above 2^31-1 resets that stream alone."""
    async with serving() as running, connected(running.port) as peer:
        sid = peer.start(PATH + "Never", b"")
        peer.send(WindowUpdateFrame(sid, 2**31 - 1))
        assert (await peer.answer(sid)).reset == 3
        assert (await peer.call(PATH + "Echo", b"next")).messages == [b"next"]
        assert running.service.cancelled == 1


async def test_stream_blocked_and_writable() -> None:
    """A stream that cannot send says so, and its sink is told when there is room again."""
    settings = {INITIAL_WINDOW_SIZE: 1000}
    limits = replace(TEST_LIMITS, outbox_low_bytes=500)
    async with serving(limits) as running, connected(running.port, settings=settings) as peer:
        sid = peer.start(PATH + "Tap")
        await eventually(lambda: bool(running.service.taps))
        sink = running.service.taps[0]
        sink.stream.send([bytes(900)], 900)
        assert (sink.stream.blocked, sink.stream.outbox_bytes) == (False, 0)
        sink.stream.send([bytes(900)], 900)
        sink.stream.send([bytes(900)], 900)
        assert (sink.stream.blocked, sink.stream.outbox_bytes) == (True, 1810)
        await peer.settle()
        assert (sink.events, sink.stream.outbox_bytes) == ([], 1715)
        peer.send(WindowUpdateFrame(sid, 1000))
        await peer.settle()
        assert (sink.events, sink.stream.outbox_bytes) == ([], 715)
        peer.send(WindowUpdateFrame(sid, 300))
        await peer.settle()
        assert (sink.events, sink.stream.outbox_bytes) == (["writable"], 415)
        peer.send(WindowUpdateFrame(sid, 1000))
        await peer.settle()
        assert (sink.events, sink.stream.blocked) == (["writable"], False)


async def test_slow_reader_of_the_socket() -> None:
    """What a client does not read stays in outboxes, beyond what the kernel and a buffer take."""
    settings = {INITIAL_WINDOW_SIZE: 2**31 - 1}
    async with serving() as running, connected(running.port, settings=settings) as peer:
        peer.send(WindowUpdateFrame(0, 2**31 - 1 - 65_535))
        sids = [peer.start(PATH + "Size", b"30000000") for _ in range(2)]
        await eventually(lambda: running.server.stats().output_bytes > 20_000_000)
        amounts = dict.fromkeys(sids, 0)
        while set(amounts.values()) != {30_000_005}:
            frame = await peer.read()
            if isinstance(frame, DataFrame):
                amounts[frame.stream_id] += len(frame.data)
            peer.seen.clear()
        assert running.server.stats().output_bytes == 0


async def test_refused_calls_beside_large_answers() -> None:
    """Calls refused because answers wait are no mistake: however many, the answers are not lost."""
    limits = replace(TEST_LIMITS, output_bytes_max=100_000, faults_per_second_max=10)
    settings = {INITIAL_WINDOW_SIZE: 0}
    async with serving(limits) as running, connected(running.port, settings=settings) as peer:
        large = [peer.start(PATH + "Size", b"200000") for _ in range(2)]
        refused = [peer.start(PATH + "Echo", b"x") for _ in range(500)]
        for sid in refused:
            assert (await peer.answer(sid)).reset == 7
        peer.send(WindowUpdateFrame(0, 1 << 20), *(WindowUpdateFrame(s, 1 << 20) for s in large))
        await eventually(lambda: not running.connection.streams.open)
        await peer.settle()
        assert [messages(data_of(peer, sid)) for sid in large] == [[bytes(200_000)]] * 2


async def test_goaway_on_zero_increment() -> None:
    """WINDOW_UPDATE of 0 ends the connection, or the stream, with PROTOCOL_ERROR."""
    async with serving() as running, connected(running.port) as peer:
        sid = peer.start(PATH + "Never", b"")
        peer.write(b"\0\0\4\x08\0" + sid.to_bytes(4, "big") + bytes(4))
        assert (await peer.answer(sid)).reset == 1
        peer.write(b"\0\0\4\x08\0" + bytes(8))
        assert (await peer.goaway())[0] == 1
        with pytest.raises(ClosedError):
            await peer.read()
        assert isinstance(peer.seen[-1], GoAwayFrame)
        assert not any(isinstance(f, RstStreamFrame) for f in peer.seen[-1:])
