"""The lean client against h2 as a server: calls, streams, ends of all kinds."""

import asyncio

import pytest
from h2.settings import SettingCodes
from hyperframe.frame import ContinuationFrame, DataFrame, GoAwayFrame, HeadersFrame

from bench.clock import now_us
from kvstore.transport import fields, frames, grpc
from tests.bench.client.far import OK, PATH, Taking, meeting
from tests.transport.peer import message
from tests.transport.running import eventually

ECHO_US = 5_000_000


async def test_calls_are_answered() -> None:
    """Each call gets its own answer, in whatever order they come, with the request as sent."""
    async with meeting() as near:
        near.call("a", b"one", ECHO_US)
        near.call("b", b"two", ECHO_US)
        await eventually(lambda: near.far.ended == [1, 3])
        assert ([b"one"], [b"two"]) == (near.far.requests(1), near.far.requests(3))
        assert (PATH, b"5000000u") == (
            near.far.headers[3][b":path"],
            near.far.headers[3][b"grpc-timeout"],
        )
        near.far.answer(3, b"second")
        near.far.answer(1, b"first")
        assert [(0, b"first", ""), (0, b"second", "")] == await near.answered("a", "b")
        assert near.connection.calls == 0


async def test_refusals() -> None:
    """A status ends a call with its code and text, after headers and without any."""
    async with meeting() as near:
        near.call("a")
        near.call("b")
        near.call("c")
        near.call("d")
        await eventually(lambda: near.far.ended == [1, 3, 5, 7])
        near.far.begin(1)
        near.far.end(1, [("grpc-status", "9"), ("grpc-message", "na%C3%AFve")])
        near.far.end(3, [*OK, ("grpc-status", "3")])
        near.far.end(5, [(":status", "503")])
        near.far.begin(7)
        near.far.h2.send_data(7, b"", end_stream=True)
        near.far.flush()
        a, b, c, d = await near.answered("a", "b", "c", "d")
        assert [(9, b"", "naïve"), (3, b"", ""), (14, b"", "HTTP status 503")] == [a, b, c]
        assert (13, "the stream ended without a status") == (d[0], d[2])


async def test_pieces_make_a_message() -> None:
    """An answer may come in any pieces, padded ones too, and be larger than any window."""
    body = bytes(range(256)) * 400
    async with meeting() as near:
        near.call("a")
        await eventually(lambda: near.far.ended == [1])
        near.far.begin(1)
        raw = message(body)
        for at in range(0, len(raw), 997):
            near.far.data(1, raw[at : at + 997], pad_length=at % 200)
        near.far.end(1)
        assert [(0, body, "")] == await near.answered("a")


async def test_bytes_one_by_one() -> None:
    """Frames may be cut anywhere."""
    async with meeting() as near:
        near.call("a")
        await eventually(lambda: near.far.ended == [1])
        near.far.h2.send_headers(1, OK)
        near.far.h2.send_data(1, message(b"small"))
        near.far.h2.send_headers(1, [("grpc-status", "0")], end_stream=True)
        for byte in near.far.h2.data_to_send():
            near.connection.data_received(bytes((byte,)))
        assert [(0, b"small", "")] == await near.answered("a")


@pytest.mark.slow
async def test_receive_windows_are_renewed() -> None:
    """A stream and a connection deliver far more than was granted at first; padding counts."""
    async with meeting() as near:
        sink = Taking()
        stream = near.connection.open(PATH, b"", sink)
        await eventually(lambda: stream in near.far.headers)
        near.far.begin(stream)
        sent = 0
        while sent < 40 << 20:
            room = min(near.far.h2.local_flow_control_window(stream), 1 << 20)
            if room > 300:
                size = room - 300
                near.far.data(stream, message(bytes(size)), pad_length=250)
                sent += room
            await asyncio.sleep(0)
        near.far.end(stream)
        await eventually(lambda: sink.ends == [(0, "")])
        assert sum(map(len, sink.messages)) >= sent - 300 * len(sink.messages)


async def test_header_blocks_in_all_forms() -> None:
    """Headers may be padded, carry a priority and be continued in further frames."""
    block = fields.encode([(b"grpc-status", b"5"), (b"grpc-message", b"gone")])
    async with meeting() as near:
        near.call("padded")
        near.call("continued")
        await eventually(lambda: near.far.ended == [1, 3])
        near.far.frame(
            HeadersFrame(
                1,
                block,
                flags=["END_STREAM", "END_HEADERS", "PADDED", "PRIORITY"],
                pad_length=7,
                depends_on=0,
                stream_weight=15,
            ),
            HeadersFrame(3, block[:3], flags=["END_STREAM"]),
            ContinuationFrame(3, block[3:9]),
            ContinuationFrame(3, block[9:], flags=["END_HEADERS"]),
        )
        padded, continued = await near.answered("padded", "continued")
        assert (5, b"", "gone") == padded == continued


@pytest.mark.parametrize("code", [frames.REFUSED_STREAM, frames.CANCEL, frames.INTERNAL_ERROR])
async def test_reset(code: int) -> None:
    """A reset ends its call, once, as one of unknown outcome, and no other."""
    async with meeting() as near:
        near.call("a")
        near.call("b")
        await eventually(lambda: near.far.ended == [1, 3])
        near.far.h2.reset_stream(1, code)
        near.far.flush()
        assert [(grpc.UNAVAILABLE, b"", f"reset {code}")] == await near.answered("a")
        near.far.answer(3, b"well")
        assert [(0, b"well", "")] == await near.answered("b")


async def test_goaway() -> None:
    """After a goodbye nothing is sent; accepted calls are finished, then streams end, once."""
    async with meeting() as near:
        near.call("a")
        sink = Taking()
        near.connection.open(PATH, b"", sink)
        near.call("b")
        await eventually(lambda: near.far.ended == [1, 5] and 3 in near.far.headers)
        near.far.frame(GoAwayFrame(0, last_stream_id=3))
        assert [(grpc.UNAVAILABLE, b"", "the server goes away")] == await near.answered("b")
        assert not near.connection.usable
        assert not sink.ends
        near.far.answer(1, b"done")
        assert [(0, b"done", "")] == await near.answered("a")
        await eventually(lambda: [grpc.UNAVAILABLE] == [code for code, _ in sink.ends])
        assert near.connection.lost


async def test_goaway_of_an_idle_connection() -> None:
    """Without calls a goodbye is the end, whatever streams there are."""
    async with meeting() as near:
        sink = Taking()
        near.connection.open(PATH, b"", sink)
        await eventually(lambda: 1 in near.far.headers)
        near.far.h2.close_connection()
        near.far.flush()
        await eventually(lambda: [grpc.UNAVAILABLE] == [code for code, _ in sink.ends])


async def test_own_goodbye() -> None:
    """A connection that is being closed is usable no more, though it is not lost yet."""
    async with meeting() as near:
        near.call("a")
        await eventually(lambda: near.far.ended == [1])
        near.connection.close()
        assert not near.connection.usable
        assert grpc.UNAVAILABLE == (await near.answered("a"))[0][0]


@pytest.mark.parametrize("reset", [False, True])
async def test_close(reset: bool) -> None:  # noqa: FBT001 - a parameter
    """Closed by FIN the far end is told, by RST it is not; calls end once either way."""
    async with meeting() as near:
        near.call("a")
        await eventually(lambda: near.far.ended == [1])
        near.connection.close(reset=reset)
        assert [(grpc.UNAVAILABLE, b"", "connection lost")] == await near.answered("a")
        await eventually(lambda: near.far.lost)
        assert near.far.goodbye != reset


async def test_lost() -> None:
    """A connection that breaks ends every call and stream once."""
    async with meeting() as near:
        sink = Taking()
        near.connection.open(PATH, b"", sink)
        for name in "abc":
            near.call(name)
        await eventually(lambda: near.far.ended == [3, 5, 7])
        near.far.transport.abort()
        answers = await near.answered(*"abc")
        assert {grpc.UNAVAILABLE} == {code for code, _, _ in answers}
        assert [(grpc.UNAVAILABLE, "connection lost")] == sink.ends
        assert near.connection.calls == 0


async def test_settings_change() -> None:
    """Changed settings are acknowledged and hold from then on, for open streams too."""
    async with meeting(renew=False) as near:
        sink = Taking()
        stream = near.connection.open(PATH, b"first", sink)
        await eventually(lambda: near.far.requests(stream) == [b"first"])
        near.far.h2.update_settings(
            {
                SettingCodes.INITIAL_WINDOW_SIZE: 16,
                SettingCodes.MAX_FRAME_SIZE: 20_000,
                SettingCodes.HEADER_TABLE_SIZE: 100,
            }
        )
        near.far.flush()
        await eventually(lambda: near.far.acknowledged == 2)
        near.connection.send(stream, b"second")  # six bytes of it fit
        near.call("a", b"twelve bytes")
        await eventually(lambda: len(near.far.received[3]) == 16)
        assert 16 == len(near.far.received[stream])
        near.far.credit(3, 100)
        near.far.credit(stream, 100)
        await eventually(lambda: [b"first", b"second"] == near.far.requests(stream))
        await eventually(lambda: near.far.ended == [3])
        near.far.answer(3, b"")
        await near.answered("a")


async def test_ping() -> None:
    """A ping is answered with its own bytes."""
    async with meeting() as near:
        near.far.h2.ping(b"01234567")
        near.far.flush()
        await eventually(lambda: near.far.pongs == [b"01234567"])


async def test_timeout() -> None:
    """A call whose time is up ends by itself, is reset, and an answer after that is nobody's."""
    async with meeting() as near:
        near.call("a", timeout_us=1000)
        near.call("b")
        await eventually(lambda: near.far.ended == [1, 3])
        near.connection.expire(now_us() + 2000)
        assert [grpc.DEADLINE_EXCEEDED] == [code for code, _, _ in near.answers["a"]]
        assert not near.answers["b"]
        await eventually(lambda: near.far.resets == {1: frames.CANCEL})
        block = fields.encode([(b"grpc-status", b"0")])
        near.far.frame(
            DataFrame(1, message(b"late")),
            HeadersFrame(1, block, flags=["END_STREAM", "END_HEADERS"]),
        )
        near.far.answer(3, b"well")
        assert [(0, b"well", "")] == await near.answered("b")


async def test_cancel() -> None:
    """A stream that is given up is reset and its sink told once, even from its own message."""
    async with meeting() as near:
        sink = Taking()
        stream = near.connection.open(PATH, b"", sink)
        sink.on_message = lambda: near.connection.cancel(stream)
        await eventually(lambda: stream in near.far.headers)
        near.far.begin(stream)
        near.far.h2.send_data(stream, message(b"one") + message(b"two"), end_stream=True)
        near.far.flush()
        await eventually(lambda: bool(sink.ends))
        assert ([b"one"], [(grpc.CANCELLED, "cancelled by the client")]) == (
            sink.messages,
            sink.ends,
        )


async def test_not_an_answer() -> None:
    """Who speaks something else than HTTP/2 loses the connection before it is ready."""
    async with meeting() as near:
        near.call("a")
        await eventually(lambda: near.far.ended == [1])
        near.far.frame(HeadersFrame(1, b"\xff\xff\xff", flags=["END_STREAM", "END_HEADERS"]))
        code, _, _ = (await near.answered("a"))[0]
        assert code in (grpc.INTERNAL, grpc.UNAVAILABLE)
