"""Streaming calls: what sinks are told, in which order, and how streams end."""

import pytest
from hyperframe.frame import (
    DataFrame,
    HeadersFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from tests.transport.peer import Peer, connected, message, messages
from tests.transport.running import Running, eventually, serving
from tests.transport.service import PATH, Tap


async def tap(running: Running, peer: Peer, grpc_timeout: str = "1H") -> tuple[int, Tap]:
    """Open a stream that the test drives."""
    count = len(running.service.taps)
    sid = peer.start(PATH + "Tap", hasleader="true", grpc_timeout=grpc_timeout)
    await eventually(lambda: len(running.service.taps) > count)
    return sid, running.service.taps[-1]


async def test_server_stream() -> None:
    """All messages come in order, then the trailers."""
    async with serving() as running, connected(running.port) as peer:
        answer = await peer.call(PATH + "Count", b"300 1000")
        assert answer.messages == [b"%d" % i + bytes(1000) for i in range(300)]
        assert (answer.headers[":status"], answer.status) == ("200", (0, ""))


async def test_bidi_stream() -> None:
    """Messages are answered as they come; the end of the client's side ends the call."""
    async with serving() as running, connected(running.port) as peer:
        sid = peer.start(PATH + "Chat")
        for body in (b"a", b"b" * 40_000, b""):
            data = message(body)
            for i in range(0, len(data), 16_384):
                peer.send(DataFrame(sid, data[i : i + 16_384]))
            echoed = b""
            while len(echoed) < len(data):
                frame = await peer.until(lambda f: isinstance(f, DataFrame))
                assert isinstance(frame, DataFrame)
                echoed += frame.data
            assert messages(echoed) == [body]
        peer.send(DataFrame(sid, b"", flags=["END_STREAM"]))
        assert (await peer.answer(sid)).headers["grpc-status"] == "0"


async def test_several_messages_in_a_frame() -> None:
    """A frame may hold many messages and a part of the next."""
    async with serving() as running, connected(running.port) as peer:
        sid, sink = await tap(running, peer)
        bodies = [b"%d" % i * i for i in range(20)]
        data = b"".join(map(message, bodies))
        peer.send(DataFrame(sid, data[:33]), DataFrame(sid, data[33:-2]), DataFrame(sid, data[-2:]))
        await eventually(lambda: len(sink.events) == 20)
        assert sink.events == bodies


async def test_half_close() -> None:
    """A sink is told of the client's end after its messages, and may still send."""
    async with serving() as running, connected(running.port) as peer:
        sid, sink = await tap(running, peer)
        peer.send(DataFrame(sid, message(b"last"), flags=["END_STREAM"]))
        await eventually(lambda: len(sink.events) == 2)
        sink.stream.send([b"to", b"day"], 5)
        sink.stream.finish(5, "bye")
        answer = await peer.answer(sid)
        assert (answer.messages, answer.status) == ([b"today"], (5, "bye"))
        assert sink.events == [b"last", "half_closed", "closed"]


async def test_finish_before_the_client() -> None:
    """A stream that we end first is reset with NO_ERROR, and what still comes is no mistake."""
    async with serving() as running, connected(running.port) as peer:
        sid, sink = await tap(running, peer)
        sink.stream.finish()
        sink.stream.finish(5, "again")
        sink.stream.send([b"late"], 4)
        answer = await peer.answer(sid)
        assert (answer.headers["grpc-status"], answer.messages) == ("0", [])
        reset = await peer.until(lambda f: isinstance(f, RstStreamFrame))
        assert isinstance(reset, RstStreamFrame)
        assert (reset.stream_id, reset.error_code) == (sid, 0)
        peer.send(DataFrame(sid, message(b"on its way")))
        assert (await peer.call(PATH + "Echo", b"next")).messages == [b"next"]
        assert sink.events == ["closed"]


async def test_reset_closes_a_stream() -> None:
    """After RST_STREAM the sink is told once, and sending does nothing."""
    async with serving() as running, connected(running.port) as peer:
        sid, sink = await tap(running, peer)
        sink.stream.send([bytes(1_000_000)], 1_000_000)
        assert sink.stream.blocked
        peer.send(RstStreamFrame(sid, 8))
        await eventually(lambda: bool(sink.events))
        sink.stream.send([b"late"], 4)
        sink.stream.finish()
        assert (sink.events, sink.stream.outbox_bytes, sink.stream.cancelled) == (
            ["closed"],
            0,
            True,
        )
        assert running.server.stats().output_bytes == 0


async def test_lost_connection_closes_streams() -> None:
    """Sinks of a lost connection are told once, also one that has finished into a full outbox."""
    async with serving() as running:
        async with connected(running.port) as peer:
            _, one = await tap(running, peer)
            _, two = await tap(running, peer)
            two.stream.send([bytes(1_000_000)], 1_000_000)
            two.stream.finish()
        await eventually(lambda: one.events == two.events == ["closed"])


async def test_stream_deadline() -> None:
    """A stream past its deadline ends with DeadlineExceeded."""
    async with serving() as running, connected(running.port) as peer:
        sid, sink = await tap(running, peer, grpc_timeout="10m")
        assert (await peer.answer(sid)).status == (4, "context deadline exceeded")
        assert sink.events == ["closed"]


async def test_stream_deadline_with_unread_output() -> None:
    """Past the deadline, unread output is dropped and the status is sent past it."""
    async with serving() as running, connected(running.port) as peer:
        _, sink = await tap(running, peer, grpc_timeout="10m")
        sink.stream.send([bytes(1_000_000)], 1_000_000)
        await peer.until(lambda f: isinstance(f, HeadersFrame) and "END_STREAM" in f.flags)
        await eventually(lambda: sink.events == ["closed"])
        assert running.server.stats().output_bytes == 0


@pytest.mark.parametrize(
    ("body", "status"), [(b"refuse", (9, "refused")), (b"crash", (13, "internal error"))]
)
async def test_sink_that_refuses(body: bytes, status: tuple[int, str]) -> None:
    """A sink may end its stream by what it raises; anything but a status is reported."""
    async with (
        serving(expect_failures=body == b"crash") as running,
        connected(running.port) as peer,
    ):
        sid, sink = await tap(running, peer)
        peer.send(DataFrame(sid, message(b"fine") + message(body) + message(b"never seen")))
        assert (await peer.answer(sid)).status == status
        await eventually(lambda: sink.events == [b"fine", "closed"])


async def test_handler_that_refuses() -> None:
    """A handler may refuse a stream when it opens."""
    async with serving() as running, connected(running.port) as peer:
        answer = await peer.answer(peer.start(PATH + "Closed"))
        assert answer.status == (7, "no entry")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (message(b"abc")[:7], (13, "unexpected EOF")),
        (message(b"abc", compressed=1), (13, "grpc: compressed flag set with identity or empty")),
        (b"\0\x10\0\0\0", (8, "grpc: received message larger than max (268435456 vs. 2097152)")),
    ],
)
async def test_bad_message(data: bytes, status: tuple[int, str]) -> None:
    """A stream with an improper message ends as by grpc-go."""
    async with serving() as running, connected(running.port) as peer:
        sid, _ = await tap(running, peer)
        peer.send(DataFrame(sid, data, flags=["END_STREAM"]))
        answer = await peer.answer(sid)
        assert answer.status[0] == status[0]
        assert answer.status[1].startswith(status[1])


async def test_request_trailers_end_the_request() -> None:
    """Trailers by the client count as its end."""
    async with serving() as running, connected(running.port) as peer:
        sid, sink = await tap(running, peer)
        peer.send(DataFrame(sid, message(b"x")), peer.headers(sid, [("a", "b")], "END_STREAM"))
        await eventually(lambda: sink.events == [b"x", "half_closed"])


@pytest.mark.parametrize(
    ("data", "messages", "status"),
    [
        (b"", [], (2, "EOF")),
        (message(b"2 0")[:3], [], (2, "EOF")),
        (message(b"2 0") + message(b"9 0"), [b"0", b"1"], (0, "")),
    ],
)
async def test_server_stream_takes_one_message(
    data: bytes, messages: list[bytes], status: tuple[int, str]
) -> None:
    """A server stream without a request ends as by grpc-go; what follows the first is ignored."""
    async with serving() as running, connected(running.port) as peer:
        sid = peer.start(PATH + "Count")
        peer.send(DataFrame(sid, data, flags=["END_STREAM"]))
        answer = await peer.answer(sid)
        assert (answer.messages, answer.status) == (messages, status)


async def test_finished_stream_hears_nothing() -> None:
    """After ``finish`` a sink is told of no message, though its last answer is still unread."""
    settings = {SettingsFrame.INITIAL_WINDOW_SIZE: 0}
    async with serving() as running, connected(running.port, settings=settings) as peer:
        sid, sink = await tap(running, peer)
        sink.stream.send([b"unread"], 6)
        sink.stream.finish()
        peer.send(DataFrame(sid, message(b"late")), DataFrame(sid, b"", flags=["END_STREAM"]))
        await peer.settle()
        assert sink.events == []
        peer.send(WindowUpdateFrame(sid, 100))
        assert (await peer.answer(sid)).messages == [b"unread"]
        assert sink.events == ["closed"]


async def test_metadata_of_streams() -> None:
    """Streams know their headers and their client."""
    async with serving() as running, connected(running.port) as peer:
        _, sink = await tap(running, peer)
        assert sink.stream.metadata(b"hasleader") == b"true"
        assert sink.stream.peer.startswith("127.0.0.1:")
        assert sink.stream.deadline is not None


async def test_order_across_outbox_and_direct_road() -> None:
    """Messages keep their order when some wait for flow control and later ones would fit."""
    async with serving() as running, connected(running.port) as peer:
        sid, sink = await tap(running, peer)
        bodies = [bytes([i]) * size for i, size in enumerate([10, 70_000, 10, 0, 30_000, 10])]
        for body in bodies:
            sink.stream.send([body[:5], body[5:]], len(body))
        sink.stream.finish()
        assert (await peer.answer(sid)).messages == bodies
