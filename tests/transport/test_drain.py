"""The way out: GOAWAY twice, unary calls finish, streams end with a status, then the close."""

import asyncio
import socket
from contextlib import suppress

import pytest
from hyperframe.frame import DataFrame, GoAwayFrame, HeadersFrame, SettingsFrame

from tests.transport.peer import Peer, connected, talking
from tests.transport.running import draining, eventually, serving
from tests.transport.service import PATH

NO_ERROR, REFUSED_STREAM, UNAVAILABLE = 0, 7, 14


def goaways(peer: Peer) -> list[tuple[int, int]]:
    """Last stream and code of the GOAWAY frames so far."""
    return [(f.last_stream_id, f.error_code) for f in peer.seen if isinstance(f, GoAwayFrame)]


async def test_idle_connections_are_sent_away() -> None:
    """A connection without calls is told twice and closed without delay."""
    async with serving() as running, connected(running.port) as peer:
        await peer.call(PATH + "Echo", b"x")
        async with draining(running):
            await peer.read_all()
        assert goaways(peer) == [(2**31 - 1, NO_ERROR), (1, NO_ERROR)]


async def test_unary_calls_finish() -> None:
    """Calls under way, and those that cross the first GOAWAY, are answered."""
    async with serving() as running, connected(running.port) as peer:
        peer.acknowledge = False
        first = peer.start(PATH + "Never", b"")
        await eventually(lambda: len(running.service.parked) == 1)
        async with draining(running):
            await peer.until(lambda f: isinstance(f, GoAwayFrame))
            assert (await peer.call(PATH + "Echo", b"crossed")).messages == [b"crossed"]
            running.service.parked[0].reply(b"done")
            assert (await peer.answer(first)).messages == [b"done"]
            await peer.read_all()  # a second without an answer to the ping
        assert goaways(peer) == [(2**31 - 1, NO_ERROR), (3, NO_ERROR)]


async def test_calls_after_the_second_goaway_are_refused() -> None:
    """Who has been told twice gets REFUSED_STREAM, which clients retry elsewhere."""
    async with serving() as running, connected(running.port) as peer:
        peer.start(PATH + "Never", b"")
        await eventually(lambda: len(running.service.parked) == 1)
        async with draining(running):
            await peer.until(lambda f: isinstance(f, GoAwayFrame) and f.last_stream_id == 1)
            assert (await peer.call(PATH + "Echo", b"x")).reset == REFUSED_STREAM
            running.service.parked[0].reply(b"done")
            await peer.read_all()


async def test_streams_end_with_the_status() -> None:
    """Streams, also those opened meanwhile, end with Unavailable, so that clients resume."""
    async with serving() as running, connected(running.port) as peer:
        peer.acknowledge = False
        sid = peer.start(PATH + "Tap")
        await eventually(lambda: len(running.service.taps) == 1)
        running.service.taps[0].stream.send([b"last"], 4)
        async with draining(running):
            answer = await peer.answer(sid)
            assert (answer.messages, answer.status) == (
                [b"last"],
                (UNAVAILABLE, "etcdserver: server stopped"),
            )
            late = await peer.answer(peer.start(PATH + "Tap"))
            assert late.status == (UNAVAILABLE, "etcdserver: server stopped")
            await peer.read_all()
        assert [tap.events for tap in running.service.taps] == [["closed"], ["closed"]]


async def test_grace_is_bounded() -> None:
    """A call that never ends is cut off when the time is up."""
    async with serving() as running, connected(running.port) as peer:
        peer.start(PATH + "Never", b"")
        await eventually(lambda: len(running.service.parked) == 1)
        await running.server.drain(0.05, message="stopped")
        assert running.service.cancelled == 1
        with pytest.raises(ConnectionError):
            await asyncio.open_connection("127.0.0.1", running.port)


async def test_unread_output_is_cut_off() -> None:
    """A client that does not read cannot hold the server back."""
    settings = {SettingsFrame.INITIAL_WINDOW_SIZE: 2**31 - 1}
    async with serving() as running, connected(running.port, settings=settings) as peer:
        peer.start(PATH + "Size", b"9000000")
        await eventually(lambda: running.server.stats().output_bytes > 0)
        await running.server.drain(0.05, message="stopped")
        assert running.server.stats().output_bytes == 0


async def test_connection_without_a_word_is_closed() -> None:
    """Connections that have said nothing yet are closed at once."""
    async with serving() as running, talking(running.port) as (reader, _):
        await eventually(lambda: running.server.stats().connections == 1)
        await running.server.drain(10.0, message="stopped")
        with suppress(ConnectionError):
            assert await reader.read() == b""


async def test_connection_accepted_just_before() -> None:
    """A socket whose connection has not begun to be made is closed as well."""
    async with serving() as running:
        client, accepted = socket.socketpair()
        with client, accepted:
            running.server._listeners[0]._accepted(accepted)
            await running.server.drain(0.0, message="stopped")
            await eventually(lambda: accepted.fileno() == -1)


async def test_answers_in_the_socket_are_delivered() -> None:
    """What was answered before the close arrives."""
    settings = {SettingsFrame.INITIAL_WINDOW_SIZE: 1 << 20}
    async with serving() as running, connected(running.port, settings=settings) as peer:
        sid = peer.start(PATH + "Size", b"60000")
        await peer.until(lambda f: isinstance(f, HeadersFrame))
        async with draining(running):
            await peer.read_all()
        data = b"".join(f.data for f in peer.seen if isinstance(f, DataFrame))
        assert (len(data), peer.seen[-1].stream_id in {0, sid}) == (60_005, True)
