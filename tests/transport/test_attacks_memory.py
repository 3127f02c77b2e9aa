"""Attacks on memory: what HTTP/2 clients can make the server hold of requests and answers."""

import asyncio
import struct

import pytest
from hyperframe.frame import DataFrame, HeadersFrame, RstStreamFrame, WindowUpdateFrame

from tests.transport.attack import MANY, new_sids, target
from tests.transport.peer import Peer, message, request_fields
from tests.transport.service import PATH

pytestmark = pytest.mark.slow
ECHO = request_fields(PATH + "Echo")


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """The server is another process, under uvloop; the attacker's loop does not matter."""
    return ("asyncio", {"use_uvloop": True})


def calls_with(peer: Peer, changes: dict[bytes, bytes], count: int, *, flags: int) -> bytes:
    """HEADERS of many calls, whose fields are changed or more than those of ``ECHO``."""
    fields = {name.encode(): value.encode() for name, value in ECHO} | changes
    peer.encoder.encode(ECHO)  # the update of the table's size is said once
    block = peer.encoder.encode(fields.items(), huffman=False)
    size = len(block) << 8 | 1
    return b"".join(struct.pack(">IBI", size, flags, sid) + block for sid in new_sids(peer, count))


def refused_with_long_texts(peer: Peer, count: int) -> bytes:
    """Calls whose refusals repeat a path that takes nine times its bytes there."""
    return calls_with(peer, {b":path": b"/" + b"\xff" * 350 + b"/y"}, count, flags=5)


async def test_different_headers_for_every_call() -> None:
    """Few header blocks are remembered of one connection, and no large ones."""
    # The calm client has two: its first block says that the table is gone.
    async with target(templates_max=5) as server, server.peer() as peer:
        for length, count, known in ((5_000, 10, 2), (500, 300, 5)):
            for i in range(count):
                answer = await peer.call(PATH + "Echo", b"x", token=f"{i:0{length}d}")
                assert answer.messages == [b"x"]
            assert (await server.stats())["templates"] <= known


async def test_requests_that_never_end() -> None:
    """All unfinished requests together hold a bounded number of bytes; who holds most gives way."""
    limit = 4 << 20
    async with (
        target(request_bytes_total_max=limit, calm_bytes=100_000) as server,
        server.peer() as one,
        server.peer() as other,
    ):
        for peer in (one, other):
            sids = [peer.start(PATH + "Echo") for _ in range(200)]
            start = message(bytes(1_000_000))[:14_000]
            for sid in sids:
                peer.send(DataFrame(sid, start))
        for peer in (one, other, one):  # what the other sends makes some of the first give way
            await peer.settle()
        refused = sum(isinstance(f, HeadersFrame) for peer in (one, other) for f in peer.seen)
        stats = await server.stats()
        assert limit * 3 // 4 < stats["request_bytes"] <= limit
        assert refused >= 100
        assert stats["refusals"]["request_bytes_total_max"] >= refused
        answer = await one.call(PATH + "Echo", b"whole")
        assert answer.messages == [b"whole"], "a request that is not held is served"


@pytest.mark.parametrize("name", ["Echo", "Chat"])
async def test_large_headers_of_calls_that_never_end(name: str) -> None:
    """Headers that no template shares are counted with the requests they belong to."""
    limit = 4 << 20
    async with (
        target(request_bytes_total_max=limit, calm_bytes=100_000) as server,
        server.peer() as peer,
    ):
        changes = {b":path": (PATH + name).encode(), b"token": b"t" * 15_000}
        for _ in range(100):
            peer.write(calls_with(peer, changes, 10, flags=4))
            await peer.writer.drain()
        await peer.settle()
        stats = await server.stats()
        assert limit * 3 // 4 < stats["request_bytes"] <= limit
        assert stats["calls"] < limit // 15_000
        assert stats["refusals"]["request_bytes_total_max"] > 700


async def test_requests_that_take_too_long() -> None:
    """Requests that stop before their end are ended, and a connection that stops in a frame."""
    async with target(request_timeout=0.5) as server, server.peer() as peer:
        sids = [peer.start(PATH + name) for name in ("Echo", "Echo", "Count", "Chat", "Chat")]
        idle = sids.pop()
        for sid in sids[1:]:
            peer.send(DataFrame(sid, message(b"hello")[:7]))
        for sid in sids:
            assert (await peer.answer(sid)).status == (8, "grpc: request takes too long")
        assert (await server.stats())["refusals"] == {"request_timeout": len(sids)}
        peer.send(DataFrame(idle, message(b"x"), flags=["END_STREAM"]))
        assert (await peer.answer(idle)).messages == [b"x"], "a stream may be silent"
        peer.write(DataFrame(peer.start(PATH + "Echo"), message(bytes(500))).serialize()[:100])
        assert await peer.goaway() == (0, "request_timeout")


async def test_messages_too_large() -> None:
    """Large messages are refused by their prefix: their bytes are never held."""
    async with (
        target(message_bytes_max=1000, faults_per_second_max=1000) as server,
        server.peer() as peer,
    ):
        for _ in range(200):
            sid = peer.start(PATH + "Echo")
            peer.send(*[DataFrame(sid, message(bytes(1 << 20))[:16_000])] * 2)
            answer = await peer.answer(sid)
            assert answer.status[0] == 8
        assert (await server.stats())["request_bytes"] == 0


async def test_slow_reader_with_a_tiny_window() -> None:
    """A client that reads a byte at a time holds one answer, and the calm client does not wait."""
    async with target() as server, server.peer(settings={4: 1}) as peer:
        sid = peer.start(PATH + "Size", b"1000000")
        for _ in range(500):
            peer.send(WindowUpdateFrame(sid, 1))
            await peer.until(lambda f: isinstance(f, DataFrame))
        assert 999_000 < (await server.stats())["output_bytes"] < 1_000_005


async def test_refusals_that_are_not_read() -> None:
    """A peer that does not read what it provokes is not read from either, until it reads."""
    limit = 1 << 20
    async with (
        target(
            unread_bytes_max=limit, turn_bytes_max=limit // 2, refusals_per_second_max=MANY
        ) as server,
        server.peer() as peer,
    ):
        await peer.call(PATH + "Echo")
        peer.write(refused_with_long_texts(peer, 40_000))
        await server.until(lambda now: now["output_bytes"] > limit)
        for _ in range(20):
            assert (await server.stats())["output_bytes"] < 2 * limit
        assert peer.writer.transport.get_write_buffer_size() > 0
        for _ in range(40_000):
            await peer.until(lambda f: isinstance(f, HeadersFrame))
            peer.seen.clear()
            await asyncio.sleep(0)
        assert (await peer.call(PATH + "Echo", b"next")).messages == [b"next"]


async def test_refusals_count_as_unread_answers() -> None:
    """Whose refusals fill what all connections share is closed as if they were answers."""
    async with (
        target(output_bytes_total_max=1 << 20, refusals_per_second_max=MANY) as server,
        server.peer() as peer,
    ):
        peer.write(refused_with_long_texts(peer, 40_000))
        await server.until(lambda now: now["refusals"] == {"output_bytes_total_max": 1})


async def test_unread_answers_of_one_connection() -> None:
    """Beyond its limit (the largest not counted) a connection gets no more calls served."""
    async with (
        target(output_bytes_max=2_000_000) as server,
        server.peer(settings={4: 0}) as peer,
    ):
        for _ in range(100):
            peer.start(PATH + "Size", b"500000")
        await peer.settle()
        refused = [f for f in peer.seen if isinstance(f, RstStreamFrame)]
        assert {f.error_code for f in refused} == {7}
        stats = await server.stats()
        assert stats["output_bytes"] <= 2_000_000 + 2 * 500_005
        assert stats["refusals"]["output_bytes_max"] == len(refused) >= 90


async def test_unread_answers_of_all_connections() -> None:
    """Beyond the limit of all, the connection that holds the most is closed."""
    async with (
        target(output_bytes_total_max=10_000_000) as server,
        server.peer(settings={4: 0}) as greedy,
        server.peer(settings={4: 0}) as modest,
    ):
        modest.start(PATH + "Size", b"100000")
        await modest.settle()
        for _ in range(11):
            greedy.start(PATH + "Size", b"1000000")
        await greedy.read_all()
        stats = await server.stats()
        assert stats["output_bytes"] == 100_005
        assert stats["refusals"] == {"output_bytes_total_max": 1}


async def test_unread_answers_of_http1() -> None:
    """Answers over HTTP/1.1 count as well, and their connections are closed before smaller ones."""
    limit = 3 << 20
    async with (
        target(output_bytes_total_max=limit) as server,
        server.peer(settings={4: 0}) as modest,
        server.pairs(8) as pairs,
    ):
        modest.start(PATH + "Size", b"200000")
        await modest.settle()
        for _, writer in pairs:
            writer.write(b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n" * 20)
        stats = await server.until(lambda now: "output_bytes_total_max" in now["refusals"])
        assert 200_005 < stats["output_bytes"] <= limit
        await modest.settle()
        for _, writer in pairs:
            writer.transport.abort()


@pytest.mark.parametrize("settings", [{4: 0}, {4: 2**31 - 1}], ids=["window", "socket"])
async def test_reader_that_stopped(settings: dict[int, int]) -> None:
    """Who reads nothing for too long while answers wait is disconnected."""
    async with (
        target(output_stall_timeout=0.5) as server,
        server.peer(settings=settings) as peer,
    ):
        peer.send(WindowUpdateFrame(0, 2**31 - 1 - 65_535))
        for _ in range(3):
            peer.start(PATH + "Size", b"10000000")
        await server.until(lambda stats: stats["refusals"] == {"output_stall_timeout": 1})


async def test_watchers_that_do_not_read() -> None:
    """Streams that nobody reads say so to those who send, and hold what they were given."""
    async with target() as server, server.peer(settings={4: 100}) as peer:
        sids = [peer.start(PATH + "Chat") for _ in range(500)]
        for _ in range(5):
            for sid in sids:
                peer.send(DataFrame(sid, message(bytes(200))))
        await peer.settle()
        assert (await server.stats())["output_bytes"] == 500 * (5 * 205 - 100)
