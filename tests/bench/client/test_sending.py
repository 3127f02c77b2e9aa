"""What the lean client does with the windows and limits of a server."""

import asyncio

import pytest
from h2.settings import SettingCodes

from bench.client.connection import SMALL_WINDOW_BYTES
from kvstore.transport import grpc
from tests.bench.client.far import PATH, Near, Taking, meeting
from tests.transport.peer import message
from tests.transport.running import eventually

LARGE = bytes(range(256)) * 5000


async def settled(near: Near) -> None:
    """Everything sent so far has arrived."""
    before = len(near.far.pongs)
    near.far.h2.ping(b"settled?")
    near.far.flush()
    await eventually(lambda: len(near.far.pongs) > before)


@pytest.mark.slow
async def test_large_request() -> None:
    """A request larger than window and frame arrives whole as windows open."""
    async with meeting() as near:
        near.call("a", LARGE)
        await eventually(lambda: near.far.ended == [1])
        assert [LARGE] == near.far.requests(1)
        near.far.answer(1, b"")
        await near.answered("a")


async def test_window_is_kept() -> None:
    """Not a byte more is sent than was granted; what waits goes as soon as it may."""
    async with meeting({SettingCodes.INITIAL_WINDOW_SIZE: 1000}, renew=False) as near:
        near.call("a", bytes(2000))
        await eventually(lambda: len(near.far.received[1]) == 1000)
        near.far.credit(1, 500)
        await eventually(lambda: len(near.far.received[1]) == 1500)
        near.far.credit(1, 505)
        await eventually(lambda: near.far.ended == [1])
        near.far.answer(1, b"")
        await near.answered("a")


async def test_one_stream_waits_alone() -> None:
    """A request that waits for its stream's window does not keep others back."""
    async with meeting({SettingCodes.INITIAL_WINDOW_SIZE: 1000}, renew=False) as near:
        near.call("large", bytes(2000))
        near.call("small", b"small")
        await eventually(lambda: near.far.ended == [3])
        near.far.answer(3, b"well")
        assert [(0, b"well", "")] == await near.answered("small")
        near.far.credit(1, 2000)
        await eventually(lambda: near.far.ended == [3, 1])
        near.far.answer(1, b"")
        await near.answered("large")


async def test_connection_window_is_shared_in_order() -> None:
    """What waits for the connection's window goes out in the order of the calls."""
    async with meeting({SettingCodes.INITIAL_WINDOW_SIZE: 1 << 20}, renew=False) as near:
        near.call("a", bytes(60_000))
        near.call("b", bytes(10_000))
        near.call("c", b"c")
        await settled(near)
        assert 65_535 == sum(map(len, near.far.received.values()))
        assert near.far.ended == [1]
        near.far.credit(3, 20_000)
        await eventually(lambda: near.far.ended == [1, 3, 5])
        for stream in (1, 3, 5):
            near.far.answer(stream, b"")
        await near.answered("a", "b", "c")


async def test_refused_while_it_waits() -> None:
    """A request refused before all of it was sent frees the way, and is reset."""
    async with meeting(renew=False) as near:
        near.call("large", LARGE)
        near.call("next", b"small")
        await eventually(lambda: len(near.far.received[1]) == 65_535)
        near.far.end(1, [(":status", "200"), ("grpc-status", "8"), ("grpc-message", "too large")])
        assert [(8, b"", "too large")] == await near.answered("large")
        await eventually(lambda: 1 in near.far.resets)
        near.far.h2.increment_flow_control_window(65_535)
        near.far.flush()
        await eventually(lambda: near.far.ended == [3])
        near.far.answer(3, b"")
        await near.answered("next")
        assert 65_535 == len(near.far.received[1])


async def test_an_end_lets_others_go() -> None:
    """Calls behind one that ends do not wait for credit that was there all the time."""
    async with meeting({SettingCodes.MAX_CONCURRENT_STREAMS: 2}) as near:
        for name in "abcd":
            near.call(name, name.encode())
        await settled(near)
        assert [1, 3] == near.far.ended
        near.far.answer(3, b"")
        await eventually(lambda: near.far.ended == [1, 3, 5])
        near.far.h2.reset_stream(1)
        near.far.flush()
        await eventually(lambda: near.far.ended == [1, 3, 5, 7])
        near.far.answer(5, b"")
        near.far.answer(7, b"")
        codes = [code for code, _, _ in await near.answered(*"abcd")]
        assert [grpc.UNAVAILABLE, 0, 0, 0] == codes


async def test_calls_that_never_began_end_too() -> None:
    """A call held back by the server's limit times out, or is lost, as any other."""
    async with meeting({SettingCodes.MAX_CONCURRENT_STREAMS: 1}) as near:
        near.call("a")
        near.call("b", timeout_us=10)
        near.call("c")
        await settled(near)
        near.connection.expire(near.connection.received_us + 1_000_000)
        assert grpc.DEADLINE_EXCEEDED == (await near.answered("b"))[0][0]
        assert [1] == near.far.ended
        near.far.transport.abort()
        codes = [code for code, _, _ in await near.answered("a", "c")]
        assert [grpc.UNAVAILABLE] * 2 == codes


async def test_messages_of_a_stream_keep_their_order() -> None:
    """Messages of an open stream arrive whole and in order through a small window."""
    sizes = [10, 3000, 0, 1, 2500]
    async with meeting({SettingCodes.INITIAL_WINDOW_SIZE: 1000}) as near:
        sink = Taking()
        stream = near.connection.open(PATH, b"", sink)
        for size in sizes:
            near.connection.send(stream, bytes(size))
        await eventually(
            lambda: (
                [0, *sizes] == [len(each) for each in near.far.requests(stream)]
                and len(near.far.received[stream]) == sum(sizes) + 5 * 6
            )
        )
        near.connection.cancel(stream)
        near.connection.send(stream, b"too late")


async def test_slow_stream_takes_a_window_full() -> None:
    """A stream renewed by hand gets what was granted and no more."""
    async with meeting(window_bytes=SMALL_WINDOW_BYTES) as near:
        sink = Taking()
        stream = near.connection.open(PATH, b"", sink)
        await eventually(lambda: stream in near.far.headers)
        near.far.begin(stream)
        near.far.data(stream, message(bytes(50_000)))
        await eventually(lambda: len(sink.messages) == 1)
        await settled(near)
        assert 65_535 - 50_005 == near.far.h2.local_flow_control_window(stream)
        near.connection.grant(stream, 50_005)
        await eventually(lambda: near.far.h2.local_flow_control_window(stream) == 65_535)


@pytest.mark.parametrize("size", [65_535, 200_000])
async def test_slow_stream_takes_a_large_message(size: int) -> None:
    """A message larger than the window comes whole, and the window is not larger afterwards."""
    async with meeting(window_bytes=SMALL_WINDOW_BYTES) as near:
        sink = Taking()
        stream = near.connection.open(PATH, b"", sink)
        await eventually(lambda: stream in near.far.headers)
        near.far.begin(stream)
        raw = message(b"before") + message(bytes(size))
        sink.on_message = lambda: near.connection.grant(stream, len(sink.messages[-1]) + 5)
        async with asyncio.timeout(5):
            while raw:
                room = min(near.far.h2.local_flow_control_window(stream), 16_384)
                piece, raw = raw[:room], raw[room:]
                if piece:
                    near.far.data(stream, piece)
                await asyncio.sleep(0)
        await eventually(lambda: [6, size] == [len(each) for each in sink.messages])
        await settled(near)
        assert 65_535 == near.far.h2.local_flow_control_window(stream)


async def test_half_close_needs_no_window() -> None:
    """That nothing follows can be said behind everything else, and when no window is left."""
    async with meeting({SettingCodes.INITIAL_WINDOW_SIZE: 1000}, renew=False) as near:
        sink = Taking()
        stream = near.connection.open(PATH, bytes(995), sink)
        await eventually(lambda: len(near.far.received[stream]) == 1000)
        near.connection.half_close(stream)
        await eventually(lambda: near.far.ended == [stream])
        later = near.connection.open(PATH, bytes(1000), sink)
        near.connection.half_close(later)
        near.connection.send(later, b"too late")
        await eventually(lambda: len(near.far.received[later]) == 1000)
        assert near.far.ended == [stream]
        near.far.credit(later, 5)
        await eventually(lambda: near.far.ended == [stream, later])
        for each in (stream, later):
            near.far.begin(each)
            near.far.end(each)
        await eventually(lambda: [(0, ""), (0, "")] == sink.ends)
        assert [bytes(1000)] == near.far.requests(later)
